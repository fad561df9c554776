"""Seam `inject`: the committed tokens' hidden states into the drafter's KV pool, in one op instead of nine launches.

Replaces ``dflash_worker_v2.py`` DFlashWorkerV2._append_target_hidden_to_draft_kv_by_loc: fc, hidden norm, the KV
projection of all layers, K norm, rotation, and the write of every layer's rows below ``commit_lens``
(``fused_kv_materialize.py`` FusedKVMaterializeHelper.materialize and ``memory_pool.py``
MHATokenToKVPool.set_kv_buffer_prefix_valid), with the same roundings. Up to 64 rows read a packed copy of the weights.
"""

from __future__ import annotations

from typing import Any

import torch

from dflash_kernels.integrations.sglang.seam import (
    WORKER_MODULE,
    DraftPool,
    RotaryTable,
    Seam,
    Target,
    follow_loading,
    max_positions,
    may_pack,
    require,
    require_norms,
    require_plain_drafter,
    require_weights,
)


class InjectSeam(Seam):
    name = "inject"
    targets = (
        Target(
            WORKER_MODULE,
            "DFlashWorkerV2._append_target_hidden_to_draft_kv_by_loc",
            ("target_hidden", "cache_loc", "positions", "cache_loc_2d", "commit_lens"),
            # Of the LiLiCorr head, which is declined.
            ("extend_lens",),
        ),
    )

    def prepare(self, worker: Any) -> None:
        require_plain_drafter(worker)
        model = worker.draft_model
        attentions = [layer.self_attn for layer in model.layers]
        self.eps = require_norms([model.hidden_norm, *(a.k_norm for a in attentions)])
        rows = [slice(a.q_size, a.q_size + 2 * a.kv_size) for a in attentions]
        weights = [a.qkv_proj.weight for a in attentions]
        norms = [a.k_norm.weight for a in attentions]
        self.dtype = require_weights([model.fc.weight, model.hidden_norm.weight, *weights, *norms])
        hidden = model.fc.weight.shape[0]
        require(model.fc.weight.shape[1] % hidden == 0, "taps of a width other than the drafter's")
        self.num_taps = model.fc.weight.shape[1] // hidden
        require(self.num_taps <= 8, f"{self.num_taps} target layers, at most 8")
        require(len(attentions) <= 16, f"{len(attentions)} drafter layers, at most 16")
        require(hidden % 8 == 0, f"hidden size {hidden}, not a multiple of 8")
        # A copy, as SGLang's helper makes one: the rows of K and V of all layers, one after the other.
        self._kv_rows, self._k_norms = list(zip(weights, rows, strict=True)), norms
        self.kv_weight = torch.stack([w.detach()[r] for w, r in self._kv_rows]).contiguous()
        self.k_norm = torch.stack([w.detach() for w in norms]).contiguous()
        self.fc_weight, self.hidden_norm = model.fc.weight.detach(), model.hidden_norm.weight.detach()
        self.cos_sin = RotaryTable(attentions[0].rotary_emb, max_positions(worker))

    def bind(self, worker: Any) -> None:
        from dflash_kernels.ops import inject_kv_plan, inject_kv_workspace

        self.pool, self.max_rows = DraftPool(worker, self.dtype), self.settings.limit("inject")
        first = worker.draft_model.layers[0].self_attn
        allowed, note = may_pack(self.settings, (self.fc_weight, self.kv_weight))
        # One plan for the worker: its injections follow each other on one stream, captured or not.
        self.plan = inject_kv_plan(self.fc_weight, self.kv_weight, first.head_dim) if allowed else None
        self.note = "weights not packed: not bfloat16, or heads over 128" if allowed and self.plan is None else note
        follow_loading(worker.draft_model, self._reload)
        self.workspace = inject_kv_workspace(
            self.max_rows,
            self.fc_weight.shape[0],
            len(self.pool.k),
            first.num_kv_heads,
            first.head_dim,
            self.dtype,
            self.fc_weight.device,
            num_taps=self.num_taps,
        )

    def _reload(self) -> None:
        """Take the drafter's weights anew, at the addresses where they were."""
        self.kv_weight.copy_(torch.stack([w.detach()[r] for w, r in self._kv_rows]))
        self.k_norm.copy_(torch.stack([w.detach() for w in self._k_norms]))
        if self.plan is not None:
            from dflash_kernels.ops import inject_kv_plan

            head_dim, blocks = self.k_norm.shape[1], self.plan.units.shape[0]
            fresh = inject_kv_plan(self.fc_weight, self.kv_weight, head_dim, blocks)
            assert fresh is not None
            self.plan.tiles.copy_(fresh.tiles)

    def run(
        self,
        *,
        target_hidden: torch.Tensor | None,
        cache_loc: torch.Tensor,
        positions: torch.Tensor,
        cache_loc_2d: torch.Tensor | None = None,
        commit_lens: torch.Tensor | None = None,
        extend_lens: torch.Tensor | None = None,
    ) -> bool:
        """The method's work; False where the call is one for stock (long prompts, odd shapes, its errors)."""
        from dflash_kernels.ops import inject_kv

        if target_hidden is None or target_hidden.dim() != 2 or not 0 < target_hidden.shape[0] <= self.max_rows:
            return False
        rows = target_hidden.shape[0]
        if (
            target_hidden.dtype is not self.dtype
            or target_hidden.shape[1] != self.fc_weight.shape[1]
            or not target_hidden.is_contiguous()
            or cache_loc.shape != (rows,)
            or positions.shape != (rows,)
            or not target_hidden.device == cache_loc.device == positions.device == self.fc_weight.device
            or (commit_lens is None) != (cache_loc_2d is None)
        ):
            return False
        if commit_lens is not None and (
            cache_loc_2d is None
            or commit_lens.dim() != 1
            or cache_loc_2d.dim() != 2
            or cache_loc_2d.numel() != rows
            or cache_loc_2d.shape[0] != commit_lens.shape[0]
            or commit_lens.device != target_hidden.device
        ):
            return False
        self.pool.refresh()
        with torch.inference_mode():
            inject_kv(
                target_hidden.unflatten(1, (self.num_taps, -1)).unbind(1),
                self.fc_weight,
                self.hidden_norm,
                self.kv_weight,
                None,
                self.k_norm,
                self.cos_sin.table,
                positions,
                cache_loc,
                commit_lens,
                self.pool.k,
                self.pool.v,
                self.workspace,
                self.eps,
                self.plan,
            )
        return True

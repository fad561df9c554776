"""Seam `forward`: the drafter's pass over a block, from token ids to the final norm, inside the captured draft graph.

Replaces ``models/dflash.py`` DFlashDraftModel.forward on the worker's model, which the draft graph calls at capture
(``model_executor/runner/decode_cuda_graph_runner.py``) and which nothing else calls with a block of T tokens a request.
The block is embedded from its ids with the target's table, as the worker does before (``input_embeds`` stays unused).
The block's own K and V are not written to the pool: the worker writes the committed ones again when it injects, and
nobody reads the others.

Rounding is SGLang's: K and Q round after their norm and after the rotation, sums are in float32. The order of the sums
is not, so a draft token may differ where two logits all but tie; the output does not, as the target decides.
"""

from __future__ import annotations

from typing import Any

import torch

from dflash_kernels import tuning
from dflash_kernels.draft_stream import (
    PackedDraft,
    default_blocks,
    has_fp8_chain,
    pack_draft,
    streamed_tokens,
    why_not_packed,
)
from dflash_kernels.formats import QuantizedWeight
from dflash_kernels.integrations.sglang.seam import (
    DraftPool,
    Refused,
    RotaryTable,
    Seam,
    Target,
    follow_loading,
    for_packing,
    max_positions,
    may_pack,
    require,
    require_norms,
    require_plain_drafter,
    require_weights,
)

MATRICES = ("qkv", "o", "gate_up", "down")


class ForwardSeam(Seam):
    name = "forward"
    switchable = False
    targets = (
        Target(
            "sglang.srt.models.dflash",
            "DFlashDraftModel.forward",
            ("input_ids", "positions", "forward_batch", "input_embeds"),
            ("get_embedding", "pp_proxy_tensors"),
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.captured_sizes: set[int] = set()  # batch sizes whose graphs hold this pass

    def prepare(self, worker: Any) -> None:
        require_plain_drafter(worker)
        model = worker.draft_model
        for target in self.targets:
            target.check_function(type(model).forward)
        layers = list(model.layers)
        attentions = [layer.self_attn for layer in layers]
        self.block_size = int(worker.block_size)
        require(self.block_size <= 32, f"block size {self.block_size}, at most 32")
        require(not getattr(worker, "use_compact_draft_cache", False), "compact draft window")
        for layer in layers:
            attention = layer.self_attn
            require(attention.num_heads == attention.total_num_heads, "tensor parallelism")
            require(type(layer.mlp.act_fn).__name__ == "SiluAndMul", f"activation {type(layer.mlp.act_fn).__name__}")
            require(not getattr(attention.attn, "logit_cap", 0), "a logit cap in the attention")
        self.windows, self.causal = _masks(attentions)
        self.eps = require_norms(
            [
                model.norm,
                *(norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)),
                *(norm for a in attentions for norm in (a.q_norm, a.k_norm)),
            ]
        )
        scales = {float(a.scaling) for a in attentions}
        require(len(scales) == 1, f"layers with different softmax scales {sorted(scales)}")
        self.scale = scales.pop()
        self.embed = self._embedding(worker)
        groups = {
            "input_norm": [layer.input_layernorm for layer in layers],
            "qkv": [a.qkv_proj for a in attentions],
            "q_norm": [a.q_norm for a in attentions],
            "k_norm": [a.k_norm for a in attentions],
            "o": [a.o_proj for a in attentions],
            "post_norm": [layer.post_attention_layernorm for layer in layers],
            "gate_up": [layer.mlp.gate_up_proj for layer in layers],
            "down": [layer.mlp.down_proj for layer in layers],
        }
        every = [module.weight for modules in groups.values() for module in modules]
        self.dtype = require_weights([self.embed, model.norm.weight, *every])
        self.cos_sin = RotaryTable(attentions[0].rotary_emb, max_positions(worker))
        self.final_norm = model.norm.weight.detach()
        # Last, as it changes the model: every parameter becomes a view of a stack over the layers, so that nothing is
        # held twice, and weights that are loaded into the parameters later reach the stack.
        self.weights = {name: _stack(modules) for name, modules in groups.items()}

    def _embedding(self, worker: Any) -> torch.Tensor:
        require(float(getattr(worker, "_noise_embed_scale", 1.0)) == 1.0, "a scale on the block's embedding")
        require(getattr(worker, "_full_embed_gpu", None) is None, "DP attention")
        module = worker.model_runner.model.get_input_embeddings()
        require(type(module).__name__ == "VocabParallelEmbedding", f"target embedding {type(module).__name__}")
        method = getattr(module, "quant_method", None)
        plain = method is None or type(method).__name__ == "UnquantizedEmbeddingMethod"
        require(plain, f"quantised target embedding ({type(method).__name__})")
        return module.weight.detach()

    def bind(self, worker: Any) -> None:
        from dflash_kernels import ops

        self.pool = DraftPool(worker, self.dtype)
        self.req_to_token = worker.draft_model_runner.req_to_token_pool.req_to_token
        model = worker.draft_model
        first = model.layers[0].self_attn
        hidden, device = self.embed.shape[1], self.embed.device
        inner = self.weights["down"].shape[2]

        def most(fp8_codes: bool) -> int:
            """Requests of a pass."""
            rows = self.settings.limit("forward", fp8_codes)
            return min(max(1, rows // self.block_size), self.req_to_token.shape[0])

        self.packed, self.note = self._pack(first)
        self.codes = self._chain_codes(most(fp8_codes=True) * self.block_size)
        if self.codes is not None:
            self.note += ", as codes for many rows as much again"
        batch = most(fp8_codes=self.codes is not None)
        needed = ops.draft_forward_workspace if self.codes is None else ops.draft_forward_fp8_workspace
        size = needed(batch, self.block_size, hidden, inner, first.num_heads, first.num_kv_heads, first.head_dim)
        if self.packed is not None:
            self.streamed = streamed_tokens(self.packed.weight_format, self.codes is not None)
            streamed = max(1, self.streamed // self.block_size)
            size = max(size, ops.draft_forward_packed_workspace(min(batch, streamed), self.block_size, self.packed))
            follow_loading(model, self._repack)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self.out = torch.empty(batch * self.block_size, hidden, dtype=self.dtype, device=device)
        stock = model.forward

        # The graph runner looks for `input_embeds` in the signature.
        def forward(
            input_ids: torch.Tensor,
            positions: torch.Tensor,
            forward_batch: Any,
            input_embeds: torch.Tensor | None = None,
            **rest: Any,
        ) -> Any:
            output = None
            if self.active and input_embeds is not None and self._fits(input_ids, forward_batch):
                try:
                    output = self._output(self.run(input_ids, positions, forward_batch))
                except Exception as error:
                    self.failed(error)
                    # Seam `inputs` may have left the embedding to this pass.
                    input_embeds = torch.nn.functional.embedding(input_ids, self.embed)
                    if self.settings.strict:
                        raise Refused(f"dflash-kernels: seam {self.name} failed: {error}") from error
            if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
                change = self.captured_sizes.discard if output is None else self.captured_sizes.add
                change(int(forward_batch.batch_size))
            if output is not None:
                return output
            return stock(input_ids, positions, forward_batch, input_embeds, **rest)

        model.forward = forward

    def _pack(self, attention: Any) -> tuple[PackedDraft | None, str]:
        """The layers' matrices once more, for the kernel that streams them, and a note for the table.

        Made before the graphs are captured. The graphs of all batch sizes share its counters: the draft graphs of a
        worker are replayed one after the other.
        """
        matrices = [self.weights[name] for name in MATRICES]
        allowed, note = may_pack(self.settings, matrices)
        if not allowed:
            return None, note
        reason = why_not_packed(
            tokens=0, num_layers=len(self.windows), head_dim=attention.head_dim, dtype=matrices[0].dtype
        )
        if reason is not None:
            return None, f"weights not packed: {reason}"
        sizes = {"num_kv_heads": attention.num_kv_heads, "head_dim": attention.head_dim}
        heads, inner = (attention.num_heads, attention.num_kv_heads), self.weights["down"].shape[2]
        shape = tuning.draft_shape(
            len(self.windows), self.embed.shape[1], inner, heads, attention.head_dim, self.settings.weights
        )
        device = matrices[0].device
        sizes["blocks"] = tuning.stream_blocks("draft", shape, device, default_blocks(matrices, device))
        if sizes["blocks"] == 0:
            return None, "weights not packed: by this machine's tuning the chain of kernels is faster"
        self._pack_again = lambda: pack_draft(*(for_packing(self.settings, m) for m in matrices), **sizes)
        return self._pack_again(), note

    def _chain_codes(self, rows: int) -> list[QuantizedWeight] | None:
        """The packed matrices' codes once more, of fp8 where a pass may have more rows than are streamed, for
        `draft_forward_fp8`. None: those rows take the model's own weights."""
        packed = self.packed
        if packed is None or packed.weight_format is None or rows <= streamed_tokens(packed.weight_format, True):
            return None
        allowed, _ = may_pack(self.settings, [self.weights[name] for name in MATRICES])
        if not allowed:
            return None
        codes = packed.unpack()
        return [code for code in codes if isinstance(code, QuantizedWeight)] if has_fp8_chain(codes) else None

    def _repack(self) -> None:
        """Weights that were loaded later, at the addresses that the graphs know."""
        assert self.packed is not None
        self.packed.weights.copy_(self._pack_again().weights)
        if self.codes is not None:
            for held, loaded in zip(self.codes, self.packed.unpack(), strict=True):
                assert isinstance(loaded, QuantizedWeight)
                held.codes.copy_(loaded.codes)
                held.scale.copy_(loaded.scale)

    def _fits(self, input_ids: torch.Tensor, forward_batch: Any) -> bool:
        rows = input_ids.numel()
        return (
            0 < rows <= self.out.shape[0]
            and forward_batch.forward_mode.is_target_verify()
            and rows == forward_batch.batch_size * self.block_size
        )

    @staticmethod
    def _output(hidden: torch.Tensor) -> Any:
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput

        return LogitsProcessorOutput(next_token_logits=None, hidden_states=hidden)

    def run(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        """Hidden rows ``[B * T, H]`` of a block a request."""
        from dflash_kernels.ops import draft_forward, draft_forward_fp8, draft_forward_packed

        batch = int(forward_batch.batch_size)
        self.pool.refresh()
        weights = self.weights
        inputs = (
            input_ids.view(batch, self.block_size),
            positions.view(batch, self.block_size),
            forward_batch.seq_lens[:batch],
            forward_batch.req_pool_indices[:batch],
            self.req_to_token,
            self.pool.k,
            self.pool.v,
            self.embed,
            weights["input_norm"],
        )
        out = self.out[: input_ids.numel()]
        if self.packed is not None and input_ids.numel() <= self.streamed:
            return draft_forward_packed(
                *inputs,
                None,
                weights["q_norm"],
                weights["k_norm"],
                None,
                weights["post_norm"],
                self.final_norm,
                self.cos_sin.table,
                self.packed,
                self.windows,
                self.causal,
                self.eps,
                self.scale,
                out=out,
                workspace=self.workspace,
            )
        if self.codes is not None:
            qkv, o, gate_up, down = self.codes
            return draft_forward_fp8(
                *inputs,
                qkv.codes,
                qkv.scale,
                None,
                weights["q_norm"],
                weights["k_norm"],
                o.codes,
                o.scale,
                None,
                weights["post_norm"],
                gate_up.codes,
                gate_up.scale,
                down.codes,
                down.scale,
                self.final_norm,
                self.cos_sin.table,
                self.windows,
                self.causal,
                self.eps,
                self.scale,
                out=out,
                workspace=self.workspace,
            )
        return draft_forward(
            *inputs,
            weights["qkv"],
            None,
            weights["q_norm"],
            weights["k_norm"],
            weights["o"],
            None,
            weights["post_norm"],
            weights["gate_up"],
            weights["down"],
            self.final_norm,
            self.cos_sin.table,
            self.windows,
            self.causal,
            self.eps,
            self.scale,
            out=out,
            workspace=self.workspace,
        )


def _masks(attentions: list[Any]) -> tuple[list[int], list[int]]:
    """Window and causality of each layer.

    Source: ``models/dflash.py`` _get_dflash_layer_attention_params: a window is stored as the tokens to the left of the
    query, -1 for none; ENCODER_ONLY sees the whole block, DECODER is causal in it.
    """
    windows, causal = [], []
    for attention in attentions:
        kind, left = attention.attn_type.name, int(attention.sliding_window_size)
        require(kind in ("ENCODER_ONLY", "DECODER"), f"attention type {kind}")
        require(left < 0 or kind == "DECODER", "a sliding window without causality")
        windows.append(left + 1 if left >= 0 else 0)
        causal.append(int(kind == "DECODER"))
    return windows, causal


def _stack(modules: list[Any]) -> torch.Tensor:
    stacked = torch.stack([module.weight.detach() for module in modules]).contiguous()
    for module, view in zip(modules, stacked.unbind(0), strict=True):
        module.weight.data = view
    return stacked

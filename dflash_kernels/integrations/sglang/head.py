"""Seam `head`: the draft tokens from the drafter's hidden rows, without logits, inside the captured draft graph.

Replaces the object that ``dflash_worker_v2.py`` DFlashWorkerV2._maybe_build_draft_sampler makes for a dense LM head
(_DflashDraftSampler): called with the hidden rows at the end of the draft graph (``draft_worker_common.py``
make_draft_sampler_capture_hook), it leaves the tokens of block positions 1.. in ``out``, where the worker reads them
after a replay. Ties go to the smallest id, over all ranks, as there. The other samplers (DFlash2 selector, Domino,
LiLiCorr) and a head that SGLang keeps eager (quantised, added vocabulary) stay stock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dflash_kernels import tuning
from dflash_kernels.draft_stream import MAX_TOKENS
from dflash_kernels.head_stream import PackedHead, pack_head
from dflash_kernels.integrations.sglang.seam import (
    WORKER_MODULE,
    Seam,
    Target,
    follow_loading,
    for_packing,
    may_pack,
    require,
)
from dflash_kernels.tiles import Weight, format_of


class HeadSeam(Seam):
    name = "head"
    switchable = False
    targets = (
        Target(WORKER_MODULE, "DFlashWorkerV2._maybe_build_draft_sampler", ()),
        Target(
            WORKER_MODULE,
            "_DflashDraftSampler.__init__",
            ("weight", "block_size", "num_org", "org_vocab_start", "max_bs", "tp_group"),
        ),
        Target(WORKER_MODULE, "_DflashDraftSampler.__call__", ("hidden_states", "input_ids")),
    )

    def prepare(self, worker: Any) -> None:
        self.model = worker.model_runner.model
        require(worker.block_size > 1, "blocks of one token")

    def replace(self, stock: Any) -> DraftSampler:
        """The sampler to capture in place of SGLang's; `Declined` where that is not the plain greedy one."""
        require(stock is not None, "SGLang keeps the draft head eager")
        require(type(stock).__name__ == "_DflashDraftSampler", f"draft sampler {type(stock).__name__}")
        weight = stock.weight
        on_cpu = weight.device.type == "cpu"
        require(weight.dtype is torch.bfloat16 or (on_cpu and weight.dtype is torch.float32), f"head in {weight.dtype}")
        require(weight.is_contiguous() and weight.shape[1] % 8 == 0, f"head of shape {tuple(weight.shape)}")
        require(0 < stock.num_org <= 1 << 22, f"a vocabulary shard of {stock.num_org}")
        sampler = DraftSampler(stock, self.settings.rows["head"])
        allowed, self.note = may_pack(self.settings, [sampler.weight])
        if allowed and sampler.weight.dtype is torch.bfloat16:
            sampler.pack(lambda: for_packing(self.settings, sampler.weight))
            follow_loading(self.model, sampler.repack)
        return sampler


class DraftSampler:
    """Greedy tokens of one rank's LM head, merged over the ranks; all buffers at fixed addresses.

    Batches of more than ``max_rows`` rows (requests times block size) go to SGLang's own sampler, which has the same
    output. The values travel as float32: a bfloat16 logit is one exactly, so ranks compare what SGLang's ranks compare.
    """

    def __init__(self, stock: Any, max_rows: int | None = None) -> None:
        from dflash_kernels.ops import lm_head_workspace

        self.stock, self.max_rows = stock, max_rows
        self.weight = stock.weight.detach()[: stock.num_org]
        self.block_size, self.vocab_start = int(stock.block_size), int(stock.org_vocab_start)
        self.tp_group = stock.tp_group
        self.out = stock.out
        rows, device = self.out.numel(), self.out.device
        self.values = torch.empty(rows, dtype=torch.float32, device=device)
        self.workspace = lm_head_workspace(rows, device)
        self.packed: PackedHead | None = None
        if self.tp_group is not None:
            world = int(self.tp_group.world_size)
            self.ids = torch.empty(rows, dtype=torch.int64, device=device)
            self.all_ids = torch.empty(world * rows, dtype=torch.int64, device=device)
            self.all_values = torch.empty(world * rows, dtype=torch.float32, device=device)

    def pack(self, weight: Callable[[], Weight]) -> None:
        """Hold the shard once more, for the kernel that streams it for few rows; one copy for all batch sizes."""
        from dflash_kernels.ops import lm_head_argmax_packed_workspace

        def packed() -> PackedHead:
            head = weight()
            shape = tuning.head_shape(head.shape[0], head.shape[1], format_of(head))
            return pack_head(head, blocks=tuning.stream_blocks("head", shape, self.out.device))

        self._pack_again = packed
        self.packed = self._pack_again()
        self.packed_workspace = lm_head_argmax_packed_workspace(self.packed)

    def repack(self) -> None:
        """Weights that were loaded later, at the addresses that the graphs know."""
        assert self.packed is not None
        self.packed.weights.copy_(self._pack_again().weights)

    def __call__(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> None:
        from dflash_kernels.ops import merge_vocab_shards

        width = hidden_states.shape[-1]
        if self.max_rows is not None and hidden_states.numel() > self.max_rows * width:
            self.stock(hidden_states, input_ids)
            return
        hidden = hidden_states.view(-1, self.block_size, width)[:, 1:].reshape(-1, width).to(self.weight.dtype)
        rows = hidden.shape[0]
        out = (self.out[:rows], self.values[:rows])
        if self.tp_group is None:
            self._best(hidden, out)
            return
        ids, values = self.ids[:rows], self.values[:rows]
        self._best(hidden, (ids, values))
        world = int(self.tp_group.world_size)
        all_ids, all_values = self.all_ids[: world * rows], self.all_values[: world * rows]
        self.tp_group.all_gather_into_tensor(all_values, values)
        self.tp_group.all_gather_into_tensor(all_ids, ids)
        merge_vocab_shards(all_ids.view(world, rows), all_values.view(world, rows), out=out)

    def _best(self, hidden: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Best token of this rank's shard for each row, and its logit."""
        from dflash_kernels.ops import lm_head_argmax, lm_head_argmax_packed

        if self.packed is not None and len(hidden) <= MAX_TOKENS:
            workspace = self.packed_workspace
            lm_head_argmax_packed(hidden, self.packed, self.vocab_start, out=out, workspace=workspace)
            return
        lm_head_argmax(hidden, self.weight, None, self.vocab_start, out=out, workspace=self.workspace)

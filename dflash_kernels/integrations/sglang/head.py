"""Seam `head`: the draft tokens from the drafter's hidden rows, without logits, inside the captured draft graph.

Replaces the object that ``dflash_worker_v2.py`` DFlashWorkerV2._maybe_build_draft_sampler makes for a dense LM head
(_DflashDraftSampler): called with the hidden rows at the end of the draft graph (``draft_worker_common.py``
make_draft_sampler_capture_hook), it leaves the tokens of block positions 1.. in ``out``, where the worker reads them
after a replay. Ties go to the smallest id, over all ranks, as there; over weights in fp8 or 4 bits the logits are those
of the rounded weights, and of many rows in fp8 those of rounded rows, too. The other samplers (DFlash2 selector,
Domino, LiLiCorr) and a head that SGLang keeps eager (quantised, added vocabulary) stay stock.

With tensor parallelism each rank takes the best token of its part of the vocabulary. Kernels of the ranks that write to
each other's memory find the best of these, or two gathers by the engine and one kernel more.
"""

from __future__ import annotations

from typing import Any

import torch

from dflash_kernels.integrations.sglang.ranks import Merge
from dflash_kernels.integrations.sglang.seam import (
    WORKER_MODULE,
    Seam,
    Target,
    follow_loading,
    for_packing,
    may_pack,
    require,
)
from dflash_kernels.lm_head import LMHead


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
        """The sampler to capture in place of SGLang's, once it has met the other ranks'; `Declined` where that is not
        the plain greedy one."""
        require(stock is not None, "SGLang keeps the draft head eager")
        require(type(stock).__name__ == "_DflashDraftSampler", f"draft sampler {type(stock).__name__}")
        weight = stock.weight
        on_cpu = weight.device.type == "cpu"
        require(weight.dtype is torch.bfloat16 or (on_cpu and weight.dtype is torch.float32), f"head in {weight.dtype}")
        require(weight.is_contiguous() and weight.shape[1] % 8 == 0, f"head of shape {tuple(weight.shape)}")
        require(0 < stock.num_org <= 1 << 22, f"a vocabulary shard of {stock.num_org}")
        sampler = DraftSampler(stock)
        self._hold_more(sampler)
        return sampler

    def meet_with(self, sampler: DraftSampler) -> DraftSampler:
        """The sampler with what all ranks have to share, where all have one: the limit of rows, and an exchange."""
        if not all(self.ranks.gather(sampler.head.codes is not None)):
            sampler.head.drop_codes()  # where one rank lacks the memory: more rows than `max_rows` take SGLang's way
        if sampler.head.codes is not None:
            self.note += ", as codes for many rows as much again"
        sampler.max_rows = self.settings.limit("head", fp8_codes=sampler.head.codes is not None)
        if sampler.merge is not None:
            self.note = "; ".join(filter(None, (self.note, sampler.merge.meet(self.ranks, self.settings))))
        return sampler

    def _hold_more(self, sampler: DraftSampler) -> None:
        """The shard once more for the kernel that streams it for few rows, and in fp8, where that is asked for, again
        for the one that multiplies many; one copy each for all batch sizes."""
        head, settings = sampler.head, self.settings
        allowed, self.note = may_pack(settings, [head.weight])
        if allowed and head.weight.dtype is torch.bfloat16:
            head.pack(for_packing(settings, head.weight))
            follow_loading(self.model, lambda: head.load(for_packing(settings, head.weight)))
            requests = settings.limit("head", fp8_codes=True) // sampler.block_size
            rows = min(head.max_rows, requests * (sampler.block_size - 1))
            if head.needs_codes(rows) and may_pack(settings, [head.weight])[0]:
                head.hold_codes(rows)


class DraftSampler:
    """Greedy tokens of one rank's LM head, merged over the ranks; all buffers at fixed addresses.

    Batches of more than ``max_rows`` rows (requests times block size; None: no limit) go to SGLang's own sampler, which
    has the same output. The values travel as float32: a bfloat16 logit is one exactly, so ranks compare what SGLang's
    ranks compare.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.max_rows: int | None = None
        self.block_size, self.vocab_start = int(stock.block_size), int(stock.org_vocab_start)
        self.out = stock.out
        rows, device = self.out.numel(), self.out.device
        self.head = LMHead(stock.weight.detach()[: stock.num_org], rows)
        self.values = torch.empty(rows, dtype=torch.float32, device=device)
        self.merge: Merge | None = None
        if stock.tp_group is not None:
            self.ids = torch.empty(rows, dtype=torch.int64, device=device)
            self.merge = Merge(stock.tp_group, rows, device)

    def __call__(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> None:
        width = hidden_states.shape[-1]
        if self.max_rows is not None and hidden_states.numel() > self.max_rows * width:
            self.stock(hidden_states, input_ids)
            return
        hidden = hidden_states.view(-1, self.block_size, width)[:, 1:].reshape(-1, width).to(self.head.weight.dtype)
        rows = hidden.shape[0]
        out = (self.out[:rows], self.values[:rows])
        if self.merge is None:
            self.head.argmax(hidden, self.vocab_start, out=out)
            return
        ids, values = self.ids[:rows], self.values[:rows]
        self.head.argmax(hidden, self.vocab_start, out=(ids, values))
        self.merge(ids, values, out)

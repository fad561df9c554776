"""Seam `accept`: the greedy acceptance of a block from the target's top-1 tokens.

Replaces the function ``_compute_dflash_accept_bonus_triton_unchecked`` (``kernels/ops/speculative/dflash.py``), which
``dflash_worker_v2.py`` calls inline in forward_batch_generation (0.5.16) or in _accept_block (0.5.23), into the
double-buffered outputs of _next_accept_bonus_buffers. Sampling, grammar and penalties are settled before it, and a
forced acceptance length after it, so they are as they were. Blocks of more than 32 tokens stay stock.
"""

from __future__ import annotations

from typing import Any

import torch

from dflash_kernels.integrations.sglang.seam import WORKER_MODULE, FunctionSeam, Target, require


class AcceptSeam(FunctionSeam):
    name = "accept"
    targets = (
        Target(
            WORKER_MODULE,
            "_compute_dflash_accept_bonus_triton_unchecked",
            (
                "candidates",
                "target_top1",
                "accept_lens_out",
                "commit_lens_out",
                "bonus_ids_out",
                "out_tokens_out",
                "prefix_lens",
                "new_seq_lens_out",
            ),
        ),
    )

    def prepare(self, worker: Any) -> None:
        require(1 <= int(worker.block_size) <= 32, f"block size {worker.block_size}, at most 32")

    def bind(self, worker: Any) -> None:
        # From top-1 tokens the op uses no scratch, it only wants to be given some.
        self.workspace = torch.zeros(0, dtype=torch.int64, device=worker.device)

    def run(
        self,
        *,
        candidates: torch.Tensor,
        target_top1: torch.Tensor,
        accept_lens_out: torch.Tensor,
        commit_lens_out: torch.Tensor,
        bonus_ids_out: torch.Tensor,
        out_tokens_out: torch.Tensor,
        prefix_lens: torch.Tensor,
        new_seq_lens_out: torch.Tensor,
    ) -> bool:
        from dflash_kernels.ops import Verified, verify_block, verify_workspace

        batch, block = candidates.shape
        needed = batch * (2 * block + 2)
        if self.workspace.numel() < needed:
            self.workspace = verify_workspace(2 * batch, block, candidates.device)
        out = Verified(accept_lens_out, commit_lens_out, bonus_ids_out, out_tokens_out, new_seq_lens_out)
        verify_block(candidates, target_top1, prefix_lens, out=out, workspace=self.workspace)
        return True

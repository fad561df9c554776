"""Seam `prepare`: ids, positions and KV slots of the next block of every request.

Replaces the function ``_prepare_dflash_draft_block_unchecked`` (``kernels/ops/speculative/dflash.py``), which
``dflash_worker_v2.py`` forward_batch_generation calls into the worker's own block buffers.
"""

from __future__ import annotations

from typing import Any

import torch

from dflash_kernels.integrations.sglang.seam import WORKER_MODULE, FunctionSeam, Target, require


class PrepareSeam(FunctionSeam):
    name = "prepare"
    targets = (
        Target(
            WORKER_MODULE,
            "_prepare_dflash_draft_block_unchecked",
            (
                "bonus_tokens",
                "prefix_lens",
                "req_pool_indices",
                "req_to_token",
                "block_ids_out",
                "positions_out",
                "cache_loc_out",
                "mask_token_id",
            ),
        ),
    )

    def bind(self, worker: Any) -> None:
        table = worker.model_runner.req_to_token_pool.req_to_token
        require(table.dtype in (torch.int32, torch.int64), f"req_to_token in {table.dtype}")
        require(table.dim() == 2 and table.stride(1) == 1, "req_to_token with gaps in its rows")

    def run(
        self,
        *,
        bonus_tokens: torch.Tensor,
        prefix_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        block_ids_out: torch.Tensor,
        positions_out: torch.Tensor,
        cache_loc_out: torch.Tensor,
        mask_token_id: int,
    ) -> bool:
        from dflash_kernels.ops import prepare_block

        prepare_block(
            bonus_tokens,
            prefix_lens,
            req_pool_indices,
            req_to_token,
            block_ids_out.shape[1],
            mask_token_id,
            out=(block_ids_out, positions_out, cache_loc_out),
        )
        return True

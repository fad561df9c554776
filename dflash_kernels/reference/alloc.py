"""Oracle of block preparation and of the page allocator: whole-batch tensor arithmetic, no loop over requests or pages.

The allocator functions return the new state instead of writing the old one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["PoolState", "prepare_block", "release_kv_slots", "reserve_and_prepare_block", "reserve_kv_slots"]


class PoolState(NamedTuple):
    """req_to_token ``[R, W]``, alloc_lens ``[R]``, free_pages ``[P]``, ring ``[4]`` (head, count, missing, calls)."""

    req_to_token: torch.Tensor
    alloc_lens: torch.Tensor
    free_pages: torch.Tensor
    ring: torch.Tensor

    def clone(self) -> PoolState:
        return PoolState(*(t.clone() for t in self))


def prepare_block(
    anchor_ids: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    block_size: int,
    mask_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``block_ids``, ``positions``, ``slots``, each ``[B, T]`` int64; see :func:`dflash_kernels.ops.prepare_block`."""
    steps = torch.arange(block_size, device=anchor_ids.device)
    block_ids = torch.where(steps == 0, anchor_ids.long()[:, None], mask_token_id)
    positions = prefix_lens.long()[:, None] + steps
    width = req_to_token.size(1)
    # One more column of zeros takes the positions beyond the table.
    padded = torch.nn.functional.pad(req_to_token.long(), (0, 1))
    slots = padded[req_pool_indices.long()[:, None], positions.clamp(max=width)]
    return block_ids, positions, slots


def _entries(
    rows: torch.Tensor, first: torch.Tensor, count: torch.Tensor, page_size: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Table row ``[N]``, positions ``[N, page_size]`` and which of them exist, of the N pages that move, in order."""
    owner = torch.repeat_interleave(torch.arange(rows.numel(), device=rows.device), count)
    rank = torch.arange(owner.numel(), device=rows.device) - (count.cumsum(0) - count)[owner]
    positions = ((first[owner] + rank) * page_size)[:, None] + torch.arange(page_size, device=rows.device)
    return rows[owner], positions, positions < width


def reserve_kv_slots(
    state: PoolState, req_pool_indices: torch.Tensor, target_lens: torch.Tensor, page_size: int
) -> PoolState:
    """The state after the reservation; see :func:`dflash_kernels.ops.reserve_kv_slots`.

    Raises:
        ValueError: too few free pages.
    """
    table, alloc_lens, free_pages, ring = state.clone()
    rows = req_pool_indices.long()
    held = alloc_lens[rows].long() // page_size
    count = ((target_lens.long() + page_size - 1) // page_size - held).clamp(min=0)
    total = int(count.sum())
    if total > int(ring[1]):
        raise ValueError(f"{total - int(ring[1])} pages are missing")
    owner_rows, positions, exists = _entries(rows, held, count, page_size, table.size(1))
    order = (ring[0] + torch.arange(total, device=ring.device)) % free_pages.numel()
    slots = free_pages[order][:, None] * page_size + torch.arange(page_size, device=ring.device, dtype=torch.int32)
    table[owner_rows[:, None].expand_as(positions)[exists], positions[exists]] = slots[exists].int()
    alloc_lens[rows] = ((held + count) * page_size).int()
    ring[0] = (ring[0] + total) % free_pages.numel()
    ring[1] -= total
    ring[3] += 1
    return PoolState(table, alloc_lens, free_pages, ring)


def release_kv_slots(
    state: PoolState, req_pool_indices: torch.Tensor, keep_lens: torch.Tensor, page_size: int
) -> PoolState:
    """The state after giving back; see :func:`dflash_kernels.ops.release_kv_slots`."""
    table, alloc_lens, free_pages, ring = state.clone()
    rows = req_pool_indices.long()
    held = alloc_lens[rows].long() // page_size
    kept = torch.minimum((keep_lens.long() + page_size - 1) // page_size, held)
    count = held - kept
    total = int(count.sum())
    owner_rows, positions, exists = _entries(rows, kept, count, page_size, table.size(1))
    order = (ring[0] + ring[1] + torch.arange(total, device=ring.device)) % free_pages.numel()
    free_pages[order] = table[owner_rows, positions[:, 0]] // page_size
    table[owner_rows[:, None].expand_as(positions)[exists], positions[exists]] = 0
    alloc_lens[rows] = (kept * page_size).int()
    ring[1] += total
    ring[3] += 1
    return PoolState(table, alloc_lens, free_pages, ring)


def reserve_and_prepare_block(
    state: PoolState,
    anchor_ids: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    page_size: int,
    mask_token_id: int,
    *,
    block_size: int,
    reserve_tokens: int | None = None,
    active: torch.Tensor | None = None,
) -> tuple[PoolState, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The state after the reservation, and the block; see :func:`dflash_kernels.ops.reserve_and_prepare_block`."""
    reserve_tokens = block_size if reserve_tokens is None else reserve_tokens
    on = torch.ones_like(prefix_lens) if active is None else active
    live = on != 0
    targets = (prefix_lens.long() + reserve_tokens).clamp(max=state.req_to_token.size(1))
    state = reserve_kv_slots(state, req_pool_indices[live], targets[live], page_size)
    rows = torch.where(live, req_pool_indices.long(), 0)
    block_ids, positions, slots = prepare_block(
        anchor_ids, prefix_lens, rows, state.req_to_token, block_size, mask_token_id
    )
    covered = torch.where(live, state.alloc_lens[rows].long(), 0)
    return state, (block_ids, positions, torch.where(positions < covered[:, None], slots, 0))

"""Block preparation and the page allocator of a paged KV cache, on the device and in stream order.

State of one allocator (all on one device; :func:`init_free_pages` makes the last two):

* ``req_to_token`` ``[R, W]`` int32: row r maps the positions of one request to slots; unmapped positions hold 0;
* ``alloc_lens`` ``[R]`` int32: tokens that the pages of a row cover, always whole pages;
* ``free_pages`` ``[P]`` int32: the free list, a ring of page ids. Page p is slots ``p * page_size ..``; page 0 is the
  dummy page, never free, so slot 0 is where unmapped positions point;
* ``ring`` ``[4]`` int64: ``head, count, missing, calls``. Pops take ``free_pages[(head + i) % P]`` in the order of the
  batch, then of the positions; pushes append at ``(head + count) % P`` in the same order. So the pages that a call
  hands out are the same on every device.

A block in flight is over-reserved (its length is not known before it is verified). What was not committed is either
kept, as the next block needs it, or given back by :func:`release_kv_slots`.

Too few pages: on the CPU an error. On CUDA, where the host does not wait, a call is then refused whole: no page moves,
and ``ring[2]`` (``missing``) rises to the number of pages that lacked. It keeps the largest such number until the
caller clears it, so that a host that looks now and then misses no failure. It should never come to this: the host keeps
its own books (:class:`dflash_kernels.ledger.KvLedger`), never below what the device holds, and refuses before the
launch.

Indices lie on the device, so on CUDA their values are checked only under DFLASH_DEBUG=1, synchronously, with the errors
of the CPU (not while a graph is captured). Unchecked, a row outside the table takes no part (slots 0) and lengths are
clamped to the table: no input reaches memory outside the tensors. Rows given twice break the books.
"""

from __future__ import annotations

import torch

from dflash_kernels.ops._errors import dflash_errors

__all__ = ["init_free_pages", "prepare_block", "release_kv_slots", "reserve_and_prepare_block", "reserve_kv_slots"]

_BlockTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def init_free_pages(
    num_pages: int, page_size: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Free list of an empty pool of ``num_pages`` pages, the dummy page 0 included.

    Returns:
        ``free_pages [num_pages]`` int32, holding pages ``1 .. num_pages - 1`` in this order, and ``ring [4]`` int64.

    Raises:
        ValueError: ``num_pages`` < 2, ``page_size`` outside 1..64, or slots that int32 cannot count.
    """
    if not 1 <= page_size <= 64:
        raise ValueError(f"init_free_pages: page_size must be in 1..64, got {page_size}")
    if num_pages < 2:
        raise ValueError(f"init_free_pages: num_pages must be at least 2 (page 0 is the dummy page), got {num_pages}")
    if num_pages * page_size > 2**31:
        raise ValueError(f"init_free_pages: num_pages * page_size must be at most 2**31, got {num_pages * page_size}")
    free_pages = torch.arange(1, num_pages + 1, dtype=torch.int32, device=device)
    free_pages[-1] = 0  # not in the list: it has num_pages - 1 entries
    return free_pages, torch.tensor([0, num_pages - 1, 0, 0], dtype=torch.int64, device=device)


@dflash_errors
def prepare_block(
    anchor_ids: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    block_size: int,
    mask_token_id: int,
    *,
    out: _BlockTensors | None = None,
) -> _BlockTensors:
    """Ids, positions and KV slots of the next block of every request.

    For j in 0..T-1::

        block_ids[b, j] = anchor_ids[b] if j == 0 else mask_token_id
        positions[b, j] = prefix_lens[b] + j
        slots[b, j]     = req_to_token[req_pool_indices[b], positions[b, j]]     (0 beyond the table)

    Args:
        anchor_ids, prefix_lens, req_pool_indices: ``[B]`` int32 or int64; last verified token, committed length, row.
        req_to_token: ``[R, W]`` int32 or int64, rows free, last dimension contiguous.
        block_size: T >= 1; must equal the outputs' second size when ``out`` is given.
        out: three contiguous int64 tensors ``[B, T]`` to write instead of new ones.

    Returns:
        ``block_ids``, ``positions``, ``slots``, each ``[B, T]`` int64.

    Raises:
        ValueError: wrong shape, dtype, device or stride; on the CPU (on CUDA only under DFLASH_DEBUG=1) also a row
            outside the table or a negative length.

    Source: SGLang's preparation of a DFLASH draft block (speculative/dflash_worker_v2.py).
    """
    ops = torch.ops.dflash.prepare_block
    if out is None:
        return ops.default(anchor_ids, prefix_lens, req_pool_indices, req_to_token, block_size, mask_token_id)
    _check_block_size("prepare_block", out, block_size)
    ops.out(
        anchor_ids,
        prefix_lens,
        req_pool_indices,
        req_to_token,
        mask_token_id,
        block_ids=out[0],
        positions=out[1],
        slots=out[2],
    )
    return out


@dflash_errors
def reserve_kv_slots(
    req_to_token: torch.Tensor,
    alloc_lens: torch.Tensor,
    free_pages: torch.Tensor,
    ring: torch.Tensor,
    req_pool_indices: torch.Tensor,
    target_lens: torch.Tensor,
    page_size: int,
) -> None:
    """Make the pages of each row cover at least its target length; rows that already do keep what they have.

    Pops ``ceil(target_lens[b] / page_size) - alloc_lens[row] / page_size`` pages (if positive) for each request and
    writes their slots into ``req_to_token``. All requests are served, or none.

    Args:
        req_to_token, alloc_lens, free_pages, ring: the allocator's state, see the module's docstring; written.
        req_pool_indices: ``[B]`` int32 or int64, distinct rows; B <= 4096.
        target_lens: ``[B]`` int32 or int64, tokens, in 0..W.
        page_size: 1..64.

    Raises:
        ValueError: wrong shape, dtype, device or stride; on the CPU (on CUDA only under DFLASH_DEBUG=1) also rows
            outside the table or not distinct, lengths out of range, too few free pages. Nothing has changed then.

    Source: SGLang's paged allocation of a draft block's slots, which the host does there; the order of pages is ours.
    """
    torch.ops.dflash.reserve_kv_slots.default(
        req_to_token, alloc_lens, free_pages, ring, req_pool_indices, target_lens, page_size
    )


@dflash_errors
def release_kv_slots(
    req_to_token: torch.Tensor,
    alloc_lens: torch.Tensor,
    free_pages: torch.Tensor,
    ring: torch.Tensor,
    req_pool_indices: torch.Tensor,
    keep_lens: torch.Tensor,
    page_size: int,
) -> None:
    """Give back the pages of each row that lie wholly beyond its first ``keep_lens[b]`` tokens (0: all of them).

    The pages go to the end of the free list and their entries of ``req_to_token`` become 0. A row that holds no more
    than what it may keep stays as it is.

    Args:
        req_to_token, alloc_lens, free_pages, ring: the allocator's state, see the module's docstring; written.
        req_pool_indices: ``[B]`` int32 or int64, distinct rows; B <= 4096.
        keep_lens: ``[B]`` int32 or int64, tokens, in 0..W.
        page_size: 1..64.

    Raises:
        ValueError: as :func:`reserve_kv_slots`.
    """
    torch.ops.dflash.release_kv_slots.default(
        req_to_token, alloc_lens, free_pages, ring, req_pool_indices, keep_lens, page_size
    )


@dflash_errors
def reserve_and_prepare_block(
    req_to_token: torch.Tensor,
    alloc_lens: torch.Tensor,
    free_pages: torch.Tensor,
    ring: torch.Tensor,
    anchor_ids: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    page_size: int,
    mask_token_id: int,
    *,
    block_size: int,
    reserve_tokens: int | None = None,
    active: torch.Tensor | None = None,
    out: _BlockTensors | None = None,
) -> _BlockTensors:
    """One launch for :func:`reserve_kv_slots` and :func:`prepare_block`: the start of a decode step.

    Reserves pages for ``min(prefix_lens[b] + reserve_tokens, W)`` tokens of every active request, then prepares its
    block. Slots of positions that are not covered (beyond the reservation or the table, inactive requests, a refused
    call) are 0.

    Args:
        req_to_token, alloc_lens, free_pages, ring: the allocator's state, see the module's docstring; written.
        anchor_ids, prefix_lens, req_pool_indices: ``[B]`` int32 or int64, as in :func:`prepare_block`; the rows of
            active requests are distinct; prefix_lens in 0..W; B <= 4096.
        page_size: 1..64.
        block_size: T in 1..1024.
        reserve_tokens: tokens beyond the prefix to cover, >= 0; None: T. More keeps a reserve for a step in flight.
        active: ``[B]`` int32 or int64; 0 marks a padding row of the batch, whose row index is not used.
        out: three contiguous int64 tensors ``[B, T]`` to write instead of new ones.

    Returns:
        ``block_ids``, ``positions``, ``slots``, each ``[B, T]`` int64.

    Raises:
        ValueError: as :func:`reserve_kv_slots`.
    """
    ops = torch.ops.dflash.reserve_and_prepare_block
    state = (req_to_token, alloc_lens, free_pages, ring)
    inputs = (anchor_ids, prefix_lens, req_pool_indices, page_size, mask_token_id)
    if out is None:
        return ops.default(*state, *inputs, block_size=block_size, reserve_tokens=reserve_tokens, active=active)
    _check_block_size("reserve_and_prepare_block", out, block_size)
    block_ids, positions, slots = out
    ops.out(
        *state,
        *inputs,
        reserve_tokens=reserve_tokens,
        active=active,
        block_ids=block_ids,
        positions=positions,
        slots=slots,
    )
    return out


def _check_block_size(op: str, out: _BlockTensors, block_size: int) -> None:
    if out[0].dim() == 2 and out[0].size(1) != block_size:
        raise ValueError(f"dflash::{op}: out must have {block_size} columns (block_size), got {out[0].size(1)}")


def _new_block(anchor_ids: torch.Tensor, block_size: int) -> _BlockTensors:
    ids, positions, slots = (
        anchor_ids.new_empty((anchor_ids.size(0), block_size), dtype=torch.int64) for _ in range(3)
    )
    return ids, positions, slots


# -- fakes ------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("dflash::prepare_block")
def _prepare_block_fake(
    anchor_ids: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    block_size: int,
    mask_token_id: int,
) -> _BlockTensors:
    return _new_block(anchor_ids, block_size)


@torch.library.register_fake("dflash::reserve_and_prepare_block")
def _reserve_and_prepare_block_fake(
    req_to_token: torch.Tensor,
    alloc_lens: torch.Tensor,
    free_pages: torch.Tensor,
    ring: torch.Tensor,
    anchor_ids: torch.Tensor,
    *args: object,
    block_size: int,
    **kwargs: object,
) -> _BlockTensors:
    return _new_block(anchor_ids, block_size)


@torch.library.register_fake("dflash::prepare_block.out")
@torch.library.register_fake("dflash::reserve_kv_slots")
@torch.library.register_fake("dflash::release_kv_slots")
@torch.library.register_fake("dflash::reserve_and_prepare_block.out")
def _mutating_fake(*args: object, **kwargs: object) -> None:
    return None

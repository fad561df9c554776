"""Block preparation and the page allocator against their oracle; a refused or wrong call changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import on_device

from dflash_kernels import ops
from dflash_kernels.reference import alloc as reference
from dflash_kernels.reference.alloc import PoolState

MASK, POISON = 77, -9
INDEX = [torch.int32, torch.int64]
PAGE_SIZES = [1, 3, 16, 64]


def new_pool(rows: int, width: int, num_pages: int, page_size: int) -> PoolState:
    """An empty pool on the CPU, whose ring is turned so that every schedule wraps around."""
    free_pages, ring = ops.init_free_pages(num_pages, page_size)
    head = num_pages - 1 - num_pages // 4
    ring[0] = head
    return PoolState(
        torch.zeros(rows, width, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.int32),
        free_pages.roll(head),
        ring,
    )


def on(device: str, state: PoolState) -> PoolState:
    return PoolState(*(t.to(device) for t in state)).clone()


def assert_same(got: PoolState, expected: PoolState) -> None:
    for name, a, b in zip(PoolState._fields, got, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu()), name


def assert_sound(state: PoolState, page_size: int) -> None:
    """Every page but the dummy is free or owned by one row, and the table holds the owned pages and nothing else."""
    head, count = int(state.ring[0]), int(state.ring[1])
    num_pages, width = state.free_pages.numel(), state.req_to_token.size(1)
    pages = state.free_pages.roll(-head)[:count].tolist()
    for row, length in zip(state.req_to_token, state.alloc_lens.tolist(), strict=True):
        covered = min(length, width)
        owned = row[:covered:page_size] // page_size
        pages += owned.tolist()
        slots = (owned[:, None] * page_size + torch.arange(page_size)).reshape(-1)[:covered]
        assert torch.equal(row[:covered], slots.int()) and not row[covered:].any()
    assert sorted(pages) == list(range(1, num_pages))


def draw(rng: torch.Generator, low: int, high: int, size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(low, high, (size,), generator=rng).to(dtype)


def poisoned(batch: int, block: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, positions, slots = (torch.full((batch, block), POISON, dtype=torch.int64, device=device) for _ in range(3))
    return ids, positions, slots


def assert_blocks(got: Any, expected: Any) -> None:
    for name, a, b in zip(("block_ids", "positions", "slots"), got, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu()), name


# -- prepare_block ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table_dtype", INDEX)
@pytest.mark.parametrize("index", INDEX)
@pytest.mark.parametrize("batch,block", [(1, 1), (3, 10), (7, 5), (64, 7), (65, 8), (256, 16)])
def test_prepare_block(
    rng: torch.Generator, device: str, batch: int, block: int, index: torch.dtype, table_dtype: torch.dtype
) -> None:
    rows, width = batch + 5, 83
    table = torch.randint(0, 10**6, (rows, width + 4), generator=rng).to(table_dtype).to(device)[:, :width]
    # Every second entry of a longer tensor: strides are honoured.
    anchors, lens, pool_rows = (
        torch.stack([t, t + 1], dim=1).to(index).to(device)[:, 0]
        for t in (draw(rng, 0, 10**6, batch), draw(rng, 0, width + 3, batch), draw(rng, 0, rows, batch))
    )
    expected = reference.prepare_block(anchors.cpu(), lens.cpu(), pool_rows.cpu(), table.cpu(), block, MASK)
    assert_blocks(ops.prepare_block(anchors, lens, pool_rows, table, block, MASK), expected)
    out = poisoned(batch, block, device)
    assert ops.prepare_block(anchors, lens, pool_rows, table, block, MASK, out=out) is out
    assert_blocks(out, expected)
    order = torch.randperm(batch, generator=rng).to(device)
    permuted = ops.prepare_block(anchors[order], lens[order], pool_rows[order], table, block, MASK)
    assert_blocks(permuted, [t[order.cpu()] for t in expected])


# -- the allocator ----------------------------------------------------------------------------------------------------


def random_call(rng: torch.Generator, rows: int, width: int, index: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct rows and a length for each: mostly short steps, sometimes the ends of the range."""
    batch = int(torch.randint(1, rows + 1, (), generator=rng))
    pool_rows = torch.randperm(rows, generator=rng)[:batch]
    lens = draw(rng, 0, width + 1, batch)
    ends = torch.rand(batch, generator=rng)
    lens[ends < 0.1], lens[ends > 0.9] = 0, width
    return pool_rows.to(index), lens.to(index)


@pytest.mark.parametrize("index", INDEX)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_random_schedule_equals_the_oracle(
    rng: torch.Generator, device: str, page_size: int, index: torch.dtype
) -> None:
    """Reserve, release and the fused step at random: the same pages in the same order, on every device."""
    rows, width = 12, 150  # not a multiple of the page sizes: the last page of a row is cut off
    num_pages = rows * -(-width // page_size) // 2  # about half of what the rows could ask for
    expected = new_pool(rows, width, num_pages, page_size)
    state = on(device, expected)
    refused = 0
    for step in range(120):
        pool_rows, lens = random_call(rng, rows, width, index)
        args = (pool_rows.to(device), lens.to(device))
        kind = step % 3
        if kind == 0:
            try:
                expected = reference.reserve_kv_slots(expected, pool_rows, lens, page_size)
            except ValueError:
                refused += 1
                continue
            ops.reserve_kv_slots(*state, *args, page_size)
        elif kind == 1:
            expected = reference.release_kv_slots(expected, pool_rows, lens // 2, page_size)
            ops.release_kv_slots(*state, args[0], args[1] // 2, page_size)
        else:
            block = int(torch.randint(1, 20, (), generator=rng))
            options: dict[str, Any] = {"block_size": block}
            if step % 2:
                options["reserve_tokens"] = int(torch.randint(0, 2 * block + 1, (), generator=rng))
            active = draw(rng, 0, 2, pool_rows.numel(), index) if step % 4 else None
            anchors = draw(rng, 0, 1000, pool_rows.numel(), index)
            try:
                expected, blocks = reference.reserve_and_prepare_block(
                    expected, anchors, lens, pool_rows, page_size, MASK, active=active, **options
                )
            except ValueError:
                refused += 1
                continue
            out = poisoned(pool_rows.numel(), block, device) if step % 5 else None
            got = ops.reserve_and_prepare_block(
                *state,
                anchors.to(device),
                args[1],
                args[0],
                page_size,
                MASK,
                active=None if active is None else active.to(device),
                out=out,
                **options,
            )
            assert_blocks(got, blocks)
        assert_same(state, expected)
    assert 0 < refused < 70  # the schedule reached the edge and did not stay there
    assert_sound(on("cpu", state), page_size)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("batch", [1, 2, 31, 33, 64, 256, 512, 513, 1025, 4096])
def test_batch_sizes(rng: torch.Generator, device: str, batch: int, page_size: int) -> None:
    """A decode step at every cluster size, then giving back what was not committed, then everything."""
    block, width, rows = 16, 96, batch + 2
    expected = new_pool(rows, width, rows * -(-width // page_size) + 1, page_size)
    state = on(device, expected)
    pool_rows = torch.randperm(rows, generator=rng)[:batch]
    lens = draw(rng, 0, width - 40, batch)
    anchors = draw(rng, 0, 1000, batch)
    active = draw(rng, 0, 8, batch).clamp(max=1)
    rows_d, lens_d, anchors_d, active_d = (t.to(device) for t in (pool_rows, lens, anchors, active))
    expected = reference.reserve_kv_slots(expected, pool_rows, lens, page_size)
    ops.reserve_kv_slots(*state, rows_d, lens_d, page_size)
    assert_same(state, expected)
    expected, blocks = reference.reserve_and_prepare_block(
        expected, anchors, lens, pool_rows, page_size, MASK, block_size=block, active=active
    )
    out = poisoned(batch, block, device)
    ops.reserve_and_prepare_block(
        *state, anchors_d, lens_d, rows_d, page_size, MASK, block_size=block, active=active_d, out=out
    )
    assert_blocks(out, blocks)
    assert_same(state, expected)
    live = active.bool()
    live_slots = out[2].cpu()[live]
    assert live_slots.unique().numel() == live_slots.numel() and bool((live_slots > 0).all())
    assert not out[2].cpu()[~live].any()
    for keep in (lens + draw(rng, 1, block + 1, batch), torch.zeros_like(lens)):
        expected = reference.release_kv_slots(expected, pool_rows, keep, page_size)
        ops.release_kv_slots(*state, rows_d, keep.to(device), page_size)
        assert_same(state, expected)
    assert int(state.ring[1]) == state.free_pages.numel() - 1
    assert_sound(on("cpu", state), page_size)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_fused_equals_reserve_then_prepare(rng: torch.Generator, device: str, page_size: int) -> None:
    rows, width, batch, block = 9, 131, 7, 11
    one = on(device, new_pool(rows, width, rows * width, page_size))
    two = one.clone()
    for _ in range(6):
        pool_rows = torch.randperm(rows, generator=rng)[:batch].to(device)
        lens = draw(rng, 0, width - block, batch).to(device)
        anchors = draw(rng, 0, 1000, batch).to(device)
        got = ops.reserve_and_prepare_block(*one, anchors, lens, pool_rows, page_size, MASK, block_size=block)
        ops.reserve_kv_slots(*two, pool_rows, lens + block, page_size)
        # The prefix of a fresh row was never written to: only the block's slots are compared.
        assert_blocks(got, ops.prepare_block(anchors, lens, pool_rows, two.req_to_token, block, MASK))
        assert_same(one, two)


def test_long_row(device: str) -> None:
    """A prompt: one row takes far more pages than a CTA has threads."""
    page_size, width = 1, 5000
    expected = new_pool(2, width, width + 10, page_size)
    state = on(device, expected)
    for op, oracle, length in (
        (ops.reserve_kv_slots, reference.reserve_kv_slots, 4999),
        (ops.release_kv_slots, reference.release_kv_slots, 17),
    ):
        expected = oracle(expected, torch.tensor([1]), torch.tensor([length]), page_size)
        op(*state, torch.tensor([1], device=device), torch.tensor([length], device=device), page_size)
        assert_same(state, expected)


def test_strided_table_and_expanded_lengths(device: str) -> None:
    expected = new_pool(6, 40, 30, 4)
    state = on(device, expected)
    whole = torch.full((6, 64), POISON, dtype=torch.int32, device=device)
    whole[:, :40] = 0
    state = state._replace(req_to_token=whole[:, :40])
    pool_rows, lens = torch.tensor([4, 0, 3]), torch.tensor([9]).expand(3)
    expected = reference.reserve_kv_slots(expected, pool_rows, lens, 4)
    ops.reserve_kv_slots(*state, pool_rows.to(device), torch.tensor([9], device=device).expand(3), 4)
    assert_same(state, expected)
    assert bool((whole[:, 40:] == POISON).all())


def test_empty_batch(device: str) -> None:
    state = on(device, new_pool(3, 20, 9, 4))
    before = state.clone()
    none = torch.empty(0, dtype=torch.int64, device=device)
    ops.reserve_kv_slots(*state, none, none, 4)
    ops.release_kv_slots(*state, none, none, 4)
    for out in (
        ops.prepare_block(none, none, none, state.req_to_token, 8, MASK),
        ops.reserve_and_prepare_block(*state, none, none, none, 4, MASK, block_size=8),
    ):
        assert all(t.shape == (0, 8) for t in out)
    assert_same(state._replace(ring=state.ring[:3]), before._replace(ring=before.ring[:3]))


def test_padding_rows_take_no_part(device: str) -> None:
    """An inactive request's row index is not looked at: it may be anything, and may repeat."""
    state = on(device, new_pool(3, 40, 20, 4))

    def tensor(*values: int) -> torch.Tensor:
        return torch.tensor(values, device=device)

    _, positions, slots = ops.reserve_and_prepare_block(
        *state,
        tensor(5, 6, 7, 8),
        tensor(2, 0, 0, 0),
        tensor(1, 1, 999, -1),
        4,
        MASK,
        block_size=3,
        active=tensor(1, 0, 0, 0),
    )
    assert state.alloc_lens.tolist() == [0, 8, 0]
    assert bool((slots[0] > 0).all()) and not slots[1:].any()
    assert positions[0].tolist() == [2, 3, 4]
    assert int(state.ring[1]) == 19 - 2


# -- too few pages ----------------------------------------------------------------------------------------------------


def test_too_few_pages_change_nothing(device: str) -> None:
    """The CPU raises; CUDA, which nobody waits for, records how many pages lacked, until that is cleared."""
    state = on(device, new_pool(4, 64, 9, 4))  # 8 pages to give
    rows = torch.tensor([0, 2], device=device)
    ops.reserve_kv_slots(*state, rows, torch.tensor([9, 4], device=device), 4)  # 3 + 1
    before = state.clone()
    lens = torch.tensor([29, 8], device=device)  # 5 + 1 more, 4 are left
    anchors = torch.tensor([1, 2], device=device)

    def fused() -> tuple[torch.Tensor, ...]:
        return ops.reserve_and_prepare_block(
            *state, anchors, torch.tensor([9, 3], device=device), rows, 4, MASK, block_size=6, reserve_tokens=20
        )

    calls: list[Callable[[], Any]] = [lambda: ops.reserve_kv_slots(*state, rows, lens, 4), fused]
    for call in calls:
        if device == "cpu":
            with pytest.raises(ValueError, match=r"free_pages must hold all the pages asked for, got \d too few"):
                call()
            assert_same(state, before)
            continue
        out = call()
        assert int(state.ring[2]) > 0
        assert_same(state._replace(ring=state.ring[:2]), before._replace(ring=before.ring[:2]))
        if out is not None:  # what was mapped is still found, the rest is the dummy
            slots = state.req_to_token[rows.long()][:, :12]
            assert out[2][0].tolist() == slots[0, 9:12].tolist() + [0, 0, 0]
            assert out[2][1].tolist() == [int(slots[1, 3]), 0, 0, 0, 0, 0]
    # 4 pages are left, and can still be had; the record of the failure stays.
    ops.reserve_kv_slots(*state, rows, torch.tensor([28, 4], device=device), 4)
    assert int(state.ring[1]) == 0
    assert int(state.ring[2]) == (0 if device == "cpu" else 6)


# -- errors -----------------------------------------------------------------------------------------------------------


def arguments(op: str, device: str = "cpu") -> dict[str, Any]:
    """Valid arguments of an op, by name."""
    state = on(device, new_pool(5, 32, 20, 4))._asdict()

    def three(*values: int) -> torch.Tensor:
        return torch.tensor(values, device=device)

    rows = three(3, 0, 4)
    if op == "prepare_block":
        return {
            "anchor_ids": three(1, 2, 3),
            "prefix_lens": three(4, 5, 6),
            "req_pool_indices": rows,
            "req_to_token": state["req_to_token"],
            "block_size": 4,
            "mask_token_id": MASK,
        }
    if op == "reserve_and_prepare_block":
        return {
            **state,
            "anchor_ids": three(1, 2, 3),
            "prefix_lens": three(4, 5, 6),
            "req_pool_indices": rows,
            "page_size": 4,
            "mask_token_id": MASK,
            "block_size": 4,
            "active": three(1, 1, 1),
        }
    lens = "target_lens" if op == "reserve_kv_slots" else "keep_lens"
    return {**state, "req_pool_indices": rows, lens: three(4, 5, 6), "page_size": 4}


ALLOCATE = ["reserve_kv_slots", "release_kv_slots", "reserve_and_prepare_block"]
EVERY = ["prepare_block", *ALLOCATE]


def lens_name(op: str) -> str:
    return {"reserve_kv_slots": "target_lens", "release_kv_slots": "keep_lens"}.get(op, "prefix_lens")


def bad_arguments() -> list[Any]:
    """(op, argument, replacement, message): what can be seen without reading a tensor, an error on every device."""
    half, wide = torch.zeros(3, dtype=torch.float16), torch.zeros(3, 1, dtype=torch.int64)
    cases: list[tuple[str, str, Any, str]] = []
    for op in EVERY:
        cases += [
            (op, "req_pool_indices", wide, "req_pool_indices must have shape"),
            (op, "req_pool_indices", half, "req_pool_indices must have dtype int32 or int64, got float16"),
            (op, lens_name(op), half, f"{lens_name(op)} must have dtype int32 or int64, got float16"),
            (op, lens_name(op), torch.zeros(2).long(), f"{lens_name(op)} must have shape [3], got [2]"),
            (op, "req_to_token", torch.zeros(5, dtype=torch.int32), "req_to_token must have shape [*, *], got [5]"),
        ]
    for op in ALLOCATE:
        table = torch.zeros(5, 64, dtype=torch.int32)[:, ::2]
        cases += [
            (op, "req_to_token", table, "req_to_token must have a contiguous last dimension, got stride 2"),
            (op, "req_to_token", torch.zeros(5, 32).long(), "req_to_token must have dtype int32, got int64"),
            (op, "alloc_lens", torch.zeros(4).int(), "alloc_lens must have shape [5], got [4]"),
            (op, "alloc_lens", torch.zeros(5).long(), "alloc_lens must have dtype int32, got int64"),
            (op, "alloc_lens", torch.zeros(10).int()[::2], "alloc_lens must be contiguous"),
            (op, "free_pages", torch.zeros(2, 2).int(), "free_pages must have shape [*], got [2, 2]"),
            (op, "free_pages", torch.zeros(9), "free_pages must have dtype int32, got float32"),
            (op, "ring", torch.zeros(3).long(), "ring must have shape [4], got [3]"),
            (op, "ring", torch.zeros(4).int(), "ring must have dtype int64, got int32"),
            (op, "page_size", 0, "page_size must be in 1..64, got 0"),
            (op, "page_size", 65, "page_size must be in 1..64, got 65"),
        ]
    for op in ("prepare_block", "reserve_and_prepare_block"):
        cases += [
            (op, "anchor_ids", wide, "anchor_ids must have shape [*], got [3, 1]"),
            (op, "anchor_ids", half, "anchor_ids must have dtype int32 or int64, got float16"),
            (op, "block_size", 0, "block_size must be at least 1, got 0"),
        ]
    op = "reserve_and_prepare_block"
    cases += [
        (op, "block_size", 1025, "block_size must be at most 1024, got 1025"),
        (op, "reserve_tokens", -1, "reserve_tokens must be in [0, "),
        (op, "active", torch.zeros(2).long(), "active must have shape [3], got [2]"),
        (op, "active", torch.zeros(3).bool(), "active must have dtype int32 or int64, got bool"),
    ]
    return cases


@pytest.mark.parametrize("op,argument,value,message", bad_arguments())
def test_bad_argument(device: str, op: str, argument: str, value: Any, message: str) -> None:
    given = arguments(op, device)
    given[argument] = on_device(value, device) if isinstance(value, torch.Tensor) else value
    before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match=re.escape(f"dflash::{op}: {message}")):
        getattr(ops, op)(**given)
    assert all(torch.equal(v, given[k]) for k, v in before.items())


@pytest.mark.parametrize("op", ALLOCATE)
def test_row_limit(op: str) -> None:
    rows = 2**31
    given = arguments(op)
    given["req_to_token"] = given["req_to_token"][:1].expand(rows, 32)
    given["alloc_lens"] = given["alloc_lens"][:1].expand(rows)
    with pytest.raises(ValueError, match="req_to_token must have at most 2147483647 rows, got 2147483648"):
        getattr(ops, op)(**given)


def test_block_reaches_past_the_pages(device: str) -> None:
    """Fewer tokens are reserved than the block has, or more: the rest of the block is the dummy, the rest of the pages
    is written to the table only."""
    for page_size, reserve in ((1, 3), (1, 40), (4, 5), (16, 40)):
        expected = new_pool(3, 96, 250, page_size)
        state = on(device, expected)
        lens, rows, anchors = torch.tensor([7, 0, 80]), torch.tensor([2, 0, 1]), torch.tensor([5, 6, 7])
        expected = reference.reserve_kv_slots(expected, rows, lens, page_size)
        ops.reserve_kv_slots(*state, rows.to(device), lens.to(device), page_size)
        expected, blocks = reference.reserve_and_prepare_block(
            expected, anchors, lens, rows, page_size, MASK, block_size=9, reserve_tokens=reserve
        )
        out = poisoned(3, 9, device)
        ops.reserve_and_prepare_block(
            *state,
            anchors.to(device),
            lens.to(device),
            rows.to(device),
            page_size,
            MASK,
            block_size=9,
            reserve_tokens=reserve,
            out=out,
        )
        assert_blocks(out, blocks)
        assert_same(state, expected)


def test_batch_limit(device: str) -> None:
    state = on(device, new_pool(4097, 8, 20, 4))
    rows = torch.arange(4097, device=device)
    with pytest.raises(ValueError, match="req_pool_indices must have at most 4096 entries, got 4097"):
        ops.reserve_kv_slots(*state, rows, torch.zeros_like(rows), 4)


def test_out_must_fit(device: str) -> None:
    given = arguments("prepare_block", device)
    with pytest.raises(ValueError, match=re.escape("out must have 4 columns (block_size), got 5")):
        ops.prepare_block(**given, out=poisoned(3, 5, device))
    ids, positions, slots = poisoned(3, 4, device)
    with pytest.raises(ValueError, match=re.escape("positions must have shape [3, 4], got [2, 4]")):
        ops.prepare_block(**given, out=(ids, positions[:2], slots))
    with pytest.raises(ValueError, match="slots must have dtype int64, got int32"):
        ops.prepare_block(**given, out=(ids, positions, slots.int()))
    with pytest.raises(ValueError, match="positions must be contiguous"):
        ops.prepare_block(**given, out=(ids, poisoned(3, 8, device)[1][:, ::2], slots))
    assert bool((ids == POISON).all())


@pytest.mark.gpu
@pytest.mark.parametrize("op", EVERY)
def test_mixed_devices(op: str) -> None:
    given = arguments(op, "cuda")
    given["req_pool_indices"] = given["req_pool_indices"].cpu()
    with pytest.raises(ValueError, match="req_pool_indices must be on cuda:0, got cpu"):
        getattr(ops, op)(**given)


def bad_values() -> list[Any]:
    """(op, argument, replacement, message): seen only in the values."""
    cases: list[tuple[str, str, list[int], str]] = []
    for op in EVERY:
        cases += [
            (op, "req_pool_indices", [3, 5, 0], "req_pool_indices must be in [0, 5), got 5"),
            (op, "req_pool_indices", [3, -1, 0], "req_pool_indices must be in [0, 5), got -1"),
            (op, lens_name(op), [1, -1, 1], f"{lens_name(op)} must be "),
        ]
    for op in ALLOCATE:
        cases += [
            (op, "req_pool_indices", [3, 0, 3], "req_pool_indices must be distinct, got 3 twice"),
            (op, lens_name(op), [1, 33, 1], f"{lens_name(op)} must be in [0, 32], got 33"),
            (op, "alloc_lens", [2, 0, 0, 0, 0], "alloc_lens must hold whole pages of 4 within the table, got 2"),
            (op, "ring", [20, 3, 0, 0], "ring must hold a head below and a count of at most 20, got 20 and 3"),
        ]
    lacking = "free_pages must hold all the pages asked for, got"
    cases += [
        ("reserve_kv_slots", "ring", [0, 3, 0, 0], f"{lacking} 2 too few"),
        ("reserve_and_prepare_block", "ring", [0, 3, 0, 0], f"{lacking} 5 too few"),
    ]
    return cases


@pytest.mark.parametrize("op,argument,value,message", bad_values())
def test_bad_value(
    monkeypatch: pytest.MonkeyPatch, device: str, op: str, argument: str, value: list[int], message: str
) -> None:
    """On CUDA only DFLASH_DEBUG=1 looks at values."""
    monkeypatch.setenv("DFLASH_DEBUG", "1" if device == "cuda" else "0")
    given = arguments(op, device)
    given[argument] = torch.tensor(value, dtype=given[argument].dtype, device=device)
    before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match=re.escape(f"dflash::{op}: {message}")):
        getattr(ops, op)(**given)
    assert all(torch.equal(v, given[k]) for k, v in before.items())


def test_pages_given_back_must_fit() -> None:
    given = arguments("release_kv_slots")
    given["alloc_lens"][3] = 32
    with pytest.raises(ValueError, match="free_pages must have room for the pages given back, got 6 too many"):
        ops.release_kv_slots(**given)


@pytest.mark.gpu
def test_unchecked_values_stay_inside_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without DFLASH_DEBUG a wrong row takes no part and lengths are clamped to the table."""
    monkeypatch.setenv("DFLASH_DEBUG", "0")
    given = arguments("reserve_kv_slots", "cuda")
    given["req_pool_indices"] = torch.tensor([3, 99, -7], device="cuda")
    given["target_lens"] = torch.tensor([10**12, 8, 8], device="cuda")
    guarded = torch.full((7, 32), POISON, dtype=torch.int32, device="cuda")
    guarded[1:6] = 0
    given["req_to_token"] = guarded[1:6]
    ops.reserve_kv_slots(**given)
    assert given["alloc_lens"].tolist() == [0, 0, 0, 32, 0]
    assert given["ring"].tolist()[1:3] == [19 - 8, 0]
    assert bool((guarded[0] == POISON).all()) and bool((guarded[6] == POISON).all())
    _, _, slots = ops.prepare_block(
        given["req_pool_indices"], given["target_lens"] - 5, given["req_pool_indices"], given["req_to_token"], 4, MASK
    )
    assert not slots.any()


@pytest.mark.parametrize(
    "num_pages,page_size,message",
    [(1, 4, "num_pages must be at least 2"), (9, 0, "page_size must be in 1..64"), (2**31, 2, "at most 2\\*\\*31")],
)
def test_init_free_pages_errors(num_pages: int, page_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.init_free_pages(num_pages, page_size)


# -- torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", EVERY)
def test_opcheck(device: str, op: str) -> None:
    given = arguments(op, device)
    packet = getattr(torch.ops.dflash, op)
    keywords = {k: given.pop(k) for k in ("block_size", "active") if k in given and op != "prepare_block"}
    torch.library.opcheck(packet.default, tuple(given.values()), keywords)
    if "prepare" in op:
        block = given.pop("block_size", None) or keywords.pop("block_size")
        names = ("block_ids", "positions", "slots")
        keywords |= dict(zip(names, poisoned(3, block, device), strict=True))
        torch.library.opcheck(packet.out, tuple(given.values()), keywords)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [3, 300])
def test_graph_replay_equals_eager(rng: torch.Generator, batch: int) -> None:
    """A captured step, replayed on new values, moves the same pages as the oracle."""
    block, page_size, width, rows = 8, 4, 120, batch + 5
    expected = new_pool(rows, width, rows * 30 + 1, page_size)
    state = on("cuda", expected)
    anchors, lens, pool_rows, keep = (torch.zeros(batch, dtype=torch.int64, device="cuda") for _ in range(4))
    pool_rows.copy_(torch.arange(batch))
    out = poisoned(batch, block, "cuda")

    def step(state: PoolState) -> None:
        ops.reserve_and_prepare_block(*state, anchors, lens, pool_rows, page_size, MASK, block_size=block, out=out)
        ops.release_kv_slots(*state, pool_rows, keep, page_size)

    step(state.clone())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            step(state)
    torch.cuda.synchronize()
    assert_same(state, expected)  # capturing runs nothing
    for _ in range(5):
        now = (draw(rng, 0, 999, batch), draw(rng, 0, 100, batch), torch.randperm(rows, generator=rng)[:batch])
        kept = now[1] + draw(rng, 0, block, batch)
        for tensor, value in zip((anchors, lens, pool_rows, keep), (*now, kept), strict=True):
            tensor.copy_(value)
        graph.replay()
        expected, blocks = reference.reserve_and_prepare_block(
            expected, now[0], now[1], now[2], page_size, MASK, block_size=block
        )
        expected = reference.release_kv_slots(expected, now[2], kept, page_size)
        assert_blocks(out, blocks)
        assert_same(state, expected)

"""Packed tiles, and a schedule run by an interpreter: every tile once, in order, no wait that cannot end, no race."""

from __future__ import annotations

import random

import pytest
import torch

from bench.shapes import DEMO, DFLASH2_27B, QWEN3_8B, QWEN35_397B_TP8, DrafterShape
from dflash_kernels.draft_stream import PackedDraft, draft_schedule
from dflash_kernels.ops.inject import inject_schedule
from dflash_kernels.stream import TILE_ROWS, UNIT_FIELDS, Schedule, pack_tiles, unpack_tiles


@pytest.mark.parametrize(("rows", "k"), [(128, 64), (256, 192), (1, 1), (130, 72), (511, 1000)])
def test_packing_is_invertible(rng: torch.Generator, rows: int, k: int) -> None:
    weight = torch.randn(rows, k, generator=rng).bfloat16()
    tiles = pack_tiles(weight)
    assert tiles.shape == (-(-rows // 128), -(-k // 64), 128 * 64)
    assert torch.equal(unpack_tiles(tiles, rows, k), weight)


def test_packed_order_is_the_tensor_cores() -> None:
    """Lane l's registers of a fragment, one by one, by the instruction's definition."""
    weight = torch.arange(128 * 64).reshape(128, 64)
    tile = pack_tiles(weight).reshape(8, 2, 2, 32, 4, 2)
    for m16, half, step, lane, register, element in [(0, 0, 0, 0, 0, 0), (7, 1, 1, 31, 3, 1), (3, 1, 0, 13, 1, 0)]:
        g, q = lane // 4, lane % 4
        row = 16 * m16 + g + 8 * (register % 2)
        k = 32 * half + 8 * q + 4 * step + 2 * (register // 2) + element
        assert tile[m16, half, step, lane, register, element] == weight[row, k]


class Interpreter:
    """Runs the units of all blocks in a random order that the counters allow, with integers for products.

    A product of ones counts the tiles of a row tile; memory knows its last writer, and what it may be read by.
    """

    def __init__(self, schedule: Schedule, launches: int) -> None:
        self.units = [[dict(zip(UNIT_FIELDS, u, strict=True)) for u in block] for block in schedule.units().tolist()]
        self.counters = [0] * schedule.counters
        self.slots: list[object] = [None] * schedule.slots
        self.weights_read: list[int] = []
        self.finished: list[tuple[int, int, int]] = []  # stage, row tile, K tiles that were added
        self.launches = launches

    def run(self, seed: int) -> None:
        order = random.Random(seed)
        for launch in range(self.launches):
            self.launch, self.finished, self.weights_read = launch, [], []
            at = [0] * len(self.units)
            while True:
                ready = [b for b, i in enumerate(at) if self._tiles(b, i) >= 0 and self._may_run(self.units[b][i])]
                if not ready:
                    break
                block = order.choice(ready)
                self._run(self.units[block][at[block]])
                at[block] += 1
            assert all(self._tiles(b, i) < 0 for b, i in enumerate(at)), "units wait for ever"

    def _tiles(self, block: int, i: int) -> int:
        return self.units[block][i]["tiles"] if i < len(self.units[block]) else -1

    def _may_run(self, u: dict[str, int]) -> bool:
        if u["rank"] == 0 and not all(self._has_part(u, rank) for rank in range(1, u["contributors"])):
            return False
        if u["wait"] < 0:
            return True
        last = u["k_tile"] + max(u["tiles"], 1) - 1
        counters = range(u["wait"] + (u["k_tile"] >> u["wait_shift"]), u["wait"] + (last >> u["wait_shift"]) + 1)
        return all(self.counters[c] >= (self.launch + 1) * u["wait_target"] for c in counters)

    def _has_part(self, u: dict[str, int], rank: int) -> bool:
        part = self.slots[u["slot"] + rank]
        return part is not None and part[:5] == [self.launch, u["stage"], u["row_tile"], rank, False]  # type: ignore[index]

    def _run(self, u: dict[str, int]) -> None:
        self.weights_read += range(u["weight_tile"], u["weight_tile"] + u["tiles"])
        pieces = [(u["k_tile"], u["tiles"])]
        if u["contributors"] > 1:
            mine = (self.launch, u["stage"], u["row_tile"], u["rank"])
            old = self.slots[u["slot"] + u["rank"]]
            assert old is None or old[4], "a part is overwritten before it was added"  # type: ignore[index]
            if u["rank"] > 0:
                self.slots[u["slot"] + u["rank"]] = [*mine, False, u["k_tile"], u["tiles"]]
                return
            for rank in range(1, u["contributors"]):
                part = self.slots[u["slot"] + rank]
                assert part[:4] == [self.launch, u["stage"], u["row_tile"], rank]  # type: ignore[index]
                part[4] = True  # type: ignore[index]
                pieces.append((part[5], part[6]))  # type: ignore[index]
        assert all(a + n == b for (a, n), (b, _) in zip(pieces, pieces[1:], strict=False)), (
            "parts are added out of order"
        )
        self.finished.append((u["stage"], u["row_tile"], sum(n for _, n in pieces)))
        if u["signal"] >= 0:
            self.counters[u["signal"]] += 1


SHAPES = {  # K, H, L * 2 * Hkv, D
    "qwen3-8b": (5, 4096, 80, 128),
    "qwen3.5-397b, one of 8 shards": (8, 4096, 12, 128),
    "smollm2": (5, 576, 30, 64),
    "tiny": (1, 8, 2, 2),
}


@pytest.mark.parametrize("blocks", [1, 3, 77, 132, 148])
@pytest.mark.parametrize("shape", SHAPES)
def test_inject_schedule(shape: str, blocks: int) -> None:
    taps, hidden, heads, dim = SHAPES[shape]
    schedule = inject_schedule(taps, hidden, heads, dim, blocks)
    fc_tiles, fc_k = -(-hidden // TILE_ROWS), -(-taps * hidden // 64)
    kv_tiles, kv_k = -(-heads // (TILE_ROWS // dim)), -(-hidden // 64)
    assert schedule.slots <= 4 * blocks
    machine = Interpreter(schedule, launches=2)
    machine.run(seed=blocks)
    assert sorted(machine.weights_read) == list(range(fc_tiles * fc_k + kv_tiles * kv_k))
    expected = [(0, row, fc_k) for row in range(fc_tiles)] + [(1, row, kv_k) for row in range(kv_tiles)]
    assert sorted(machine.finished) == expected
    stages = [stage for stage, _, _ in machine.finished]
    assert stages == sorted(stages), "the projection needs all of fc"
    loads = [sum(max(u["tiles"], 0) for u in units) for units in machine.units]
    assert max(loads) - min(loads) <= 1, "every block reads the same"


@pytest.mark.parametrize("blocks", [132, 148])
@pytest.mark.parametrize("shape", [QWEN3_8B, QWEN35_397B_TP8, DEMO, DFLASH2_27B], ids=lambda shape: shape.name)
def test_draft_schedule(shape: DrafterShape, blocks: int) -> None:
    """Two layers of every published shape, as many blocks as an H100 and a B200 have multiprocessors."""
    layers, none = 2, torch.empty(0)
    shapes = PackedDraft(none, none, none, 0, shape.H, shape.I, shape.Hq, shape.Hkv, shape.D, layers).shapes()
    machine = Interpreter(draft_schedule(shapes, layers, blocks), launches=2)
    machine.run(seed=blocks)
    tiles = [(-(-rows // TILE_ROWS), -(-k // 64)) for rows, k in shapes]
    assert sorted(machine.weights_read) == list(range(layers * sum(rows * k for rows, k in tiles)))
    products = [(stage, row, k) for stage, row, k in machine.finished if k]
    stages = list(dict.fromkeys(stage for stage, _, _ in products))
    assert len(stages) == layers * len(tiles)
    for stage, (rows, k) in zip(stages, tiles * layers, strict=True):
        assert sorted(p for p in products if p[0] == stage) == [(stage, row, k) for row in range(rows)]
    assert [p[0] for p in products] == sorted(p[0] for p in products), "each product needs all of the one before"


def test_an_impossible_wait_is_found() -> None:
    schedule = Schedule(2)
    counter = schedule.new_counters()
    schedule.add_product(0, 2, 3, 0, signal=counter)
    schedule.add_product(1, 2, 3, 6, wait=(counter, 31, 3))
    with pytest.raises(AssertionError, match="wait for ever"):
        Interpreter(schedule, launches=1).run(0)


@pytest.mark.parametrize("blocks", [1, 5, 16])
def test_waits_for_single_tiles_and_jobs(blocks: int) -> None:
    """A second product starts where the first is done; jobs follow the products of their block."""
    schedule = Schedule(blocks)
    first = schedule.new_counters(6)
    done = schedule.new_counters()
    schedule.add_product(0, 6, 4, 0, signal=first, signal_each=True)
    schedule.add_product(1, 5, 12, 24, wait=(first, 1, 1), signal=done)  # 2 tiles of 64 columns from each row tile
    schedule.add_job(2, blocks - 1, wait=(done, 5))
    machine = Interpreter(schedule, launches=3)
    machine.run(7)
    assert sorted(machine.weights_read) == list(range(24 + 60))
    assert machine.finished[-1][0] == 2
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        Schedule(0)

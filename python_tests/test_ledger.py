"""The KV ledger: its arithmetic, its errors, and random schedules in which it must never be below the device."""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from dflash_kernels import ops
from dflash_kernels.ledger import KvLedger, PyKvLedger

try:
    from dflash_kernels._host import KvLedger as HostKvLedger
except ImportError:
    HostKvLedger = None

LEDGERS = [
    pytest.param(PyKvLedger, id="python"),
    pytest.param(HostKvLedger, id="host", marks=pytest.mark.skipif(HostKvLedger is None, reason="_host was not built")),
]


@pytest.fixture(params=LEDGERS)
def ledger_class(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_the_host_module_is_used_where_it_is_built() -> None:
    assert KvLedger is (HostKvLedger or PyKvLedger)


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_books(ledger_class: Any) -> None:
    ledger = ledger_class(10, 4, 3)
    assert (ledger.num_pages, ledger.page_size, ledger.rows) == (10, 4, 3)
    assert ledger.try_reserve([0, 2], [5, 16])  # 2 + 4 pages
    assert (ledger.used_pages, ledger.free_pages) == (6, 4)
    assert [ledger.row_len(r) for r in range(3)] == [8, 0, 16]
    assert ledger.try_reserve([0], [8]) and ledger.try_reserve([2], [3])  # covered already: nothing to do
    assert ledger.used_pages == 6
    assert not ledger.try_reserve([1, 0], [16, 9])  # 4 + 1 of 4: none of it
    assert (ledger.used_pages, ledger.row_len(0), ledger.row_len(1)) == (6, 8, 0)
    assert ledger.try_reserve([1], [16]) and ledger.free_pages == 0
    assert ledger.try_reserve([], []) and ledger.try_reserve([0], [0])
    ledger.shrink(2, 5)
    assert (ledger.row_len(2), ledger.free_pages) == (8, 2)
    ledger.shrink(2, 100)  # never grows
    ledger.release(1, 100)
    assert ledger.free_pages == 2
    ledger.release(1, 0)
    ledger.release(1, 0)
    assert (ledger.row_len(1), ledger.free_pages) == (0, 6)
    assert not ledger.try_reserve([0, 1], [2**62, 2**62])  # no overflow


def test_empty(ledger_class: Any) -> None:
    ledger = ledger_class(0, 1, 1)
    assert not ledger.try_reserve([0], [1]) and ledger.try_reserve([0], [0])
    assert ledger_class(5, 1, 0).try_reserve([], [])


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda x: x.try_reserve([0, 3], [1, 1]), "row must be in [0, 3), got 3"),
        (lambda x: x.try_reserve([-1], [1]), "row must be in [0, 3), got -1"),
        (lambda x: x.try_reserve([0, 1], [1, -2]), "length must be at least 0, got -2"),
        (lambda x: x.try_reserve([1, 0, 1], [1, 1, 1]), "rows must be distinct, got 1 twice"),
        (lambda x: x.try_reserve([1, 0, 1], [99, 1, 1]), "rows must be distinct, got 1 twice"),
        (lambda x: x.try_reserve([0, 1], [1]), "lens must have 2 entries, as rows, got 1"),
        (lambda x: x.shrink(3, 0), "row must be in [0, 3), got 3"),
        (lambda x: x.shrink(0, -1), "length must be at least 0, got -1"),
        (lambda x: x.release(0, -1), "length must be at least 0, got -1"),
        (lambda x: x.release(-1, 0), "row must be in [0, 3), got -1"),
        (lambda x: x.row_len(3), "row must be in [0, 3), got 3"),
        (lambda x: type(x)(-1, 4, 3), "num_pages must be at least 0, got -1"),
        (lambda x: type(x)(1, 0, 3), "page_size must be at least 1, got 0"),
        (lambda x: type(x)(1, 4, -3), "rows must be at least 0, got -3"),
    ],
)
def test_errors_change_nothing(ledger_class: Any, call: Any, message: str) -> None:
    ledger = ledger_class(10, 4, 3)
    ledger.try_reserve([0, 1], [9, 1])
    with pytest.raises(ValueError, match=re.escape(message)):
        call(ledger)
    assert [ledger.row_len(r) for r in range(3)] == [12, 4, 0] and ledger.used_pages == 4
    assert ledger.try_reserve([1, 0], [1, 1])  # nothing is left behind that a later call would stumble over


@pytest.mark.parametrize("value", [1.5, "1", None])
def test_only_integers(ledger_class: Any, value: Any) -> None:
    ledger = ledger_class(10, 4, 3)
    with pytest.raises(TypeError):
        ledger.row_len(value)
    with pytest.raises(TypeError):
        ledger.try_reserve([value], [1])
    assert ledger.try_reserve([np.int64(1)], [np.int32(3)])


@pytest.mark.skipif(HostKvLedger is None, reason="_host was not built")
@pytest.mark.parametrize("seed", range(4))
def test_both_ledgers_agree(seed: int) -> None:
    """Random calls, right and wrong: the same answers, errors and books."""
    rng = random.Random(seed)
    pages, page_size, rows = rng.randint(0, 60), rng.choice([1, 3, 16, 64]), rng.randint(1, 9)
    one, two = PyKvLedger(pages, page_size, rows), HostKvLedger(pages, page_size, rows)

    def answer(ledger: Any, name: str, args: Sequence[Any]) -> Any:
        try:
            return getattr(ledger, name)(*args)
        except ValueError as error:
            return str(error)

    for _ in range(2000):
        name = rng.choice(["try_reserve", "try_reserve", "shrink", "release"])
        row = rng.randint(-1 if rng.random() < 0.02 else 0, rows if rng.random() < 0.02 else rows - 1)
        length = rng.randint(-1 if rng.random() < 0.05 else 0, 12 * page_size)
        args: tuple[Any, ...] = (row, length)
        if name == "try_reserve":
            picked = [rng.randrange(rows) for _ in range(rng.randint(0, 3))]
            args = ([*picked, row], [rng.randint(0, 12 * page_size) for _ in picked] + [length])
        assert answer(one, name, args) == answer(two, name, args)
        assert [one.row_len(r) for r in range(rows)] == [two.row_len(r) for r in range(rows)]
        assert (one.used_pages, one.free_pages) == (two.used_pages, two.free_pages)


# -- schedules --------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """What the device knows, and what the host knows of it."""

    row: int
    length: int  # on the device
    known: int  # read back so far; the steps in `flight` come on top
    limit: int
    flight: deque[int] = field(default_factory=deque)  # tokens committed by the steps not yet read back


class Scheduler:
    """A host that runs one or two steps ahead, against the CPU ops as the device.

    Before every launch it books what the device may hold afterwards: the known length, a whole block for each step in
    flight, and the reservation. The CPU ops raise when pages run out, so a ledger that books too little fails the test.
    """

    def __init__(self, ledger_class: Any, seed: int, page_size: int, depth: int) -> None:
        self.rng = random.Random(seed)
        self.block, self.page_size, self.depth = self.rng.randint(2, 16), page_size, depth
        self.extra = self.rng.choice([0, 0, self.block])  # SGLang reserves a second block
        self.rows, self.width = 8, 200 + self.rng.randint(0, 63)
        self.num_pages = 1 + self.rows * -(-self.width // page_size) * self.rng.randint(3, 9) // 10
        self.ledger = ledger_class(self.num_pages - 1, page_size, self.rows)
        self.table = torch.zeros(self.rows, self.width, dtype=torch.int32)
        self.alloc_lens = torch.zeros(self.rows, dtype=torch.int32)
        self.free_pages, self.ring = ops.init_free_pages(self.num_pages, page_size)
        self.state = (self.table, self.alloc_lens, self.free_pages, self.ring)
        self.running: list[Request] = []
        self.counts = dict.fromkeys(["admit", "step", "read", "give_back", "finish", "abort", "evict", "refused"], 0)

    def bound(self, tokens: int) -> int:
        return min(tokens, self.width)

    def ahead(self, request: Request) -> int:
        """Most that the device's length can be."""
        return request.known + self.block * len(request.flight)

    # Each of the following is one operation.

    def admit(self) -> None:
        free = sorted(set(range(self.rows)) - {r.row for r in self.running})
        prompt = self.rng.randint(1, 120)
        if not free or not self.ledger.try_reserve([free[0]], [prompt]):
            self.counts["refused"] += 1
            return
        limit = min(prompt + self.rng.randint(1, 80), self.width - (self.depth + 1) * self.block)
        self.running.append(Request(free[0], prompt, prompt, max(limit, prompt)))
        ops.reserve_kv_slots(*self.state, torch.tensor([free[0]]), torch.tensor([prompt]), self.page_size)

    def step(self) -> None:
        batch = [r for r in self.running if len(r.flight) < self.depth and self.ahead(r) + self.block <= self.width]
        self.rng.shuffle(batch)
        reserve = self.block + self.extra
        rows, lens = [r.row for r in batch], [self.bound(self.ahead(r) + reserve) for r in batch]
        if not batch or not self.ledger.try_reserve(rows, lens):
            self.counts["refused"] += 1
            (self.read if any(r.flight for r in self.running) else self.evict)()
            return
        padding = self.rng.randint(0, 2)
        prefix = [r.length for r in batch] + [0] * padding
        _, positions, slots = ops.reserve_and_prepare_block(
            *self.state,
            torch.zeros(len(prefix), dtype=torch.int64),
            torch.tensor(prefix),
            torch.tensor(rows + [0] * padding),
            self.page_size,
            1,
            block_size=self.block,
            reserve_tokens=reserve,
            active=torch.tensor([1] * len(batch) + [0] * padding),
        )
        live = slots[: len(batch)].flatten().tolist()
        assert 0 not in live and len(set(live)) == len(live)
        for request in batch:
            committed = self.rng.randint(1, self.block)
            request.length += committed
            request.flight.append(committed)

    def read(self) -> None:
        """The oldest step of every request arrives; what is known by then bounds what the device can hold."""
        for request in self.running:
            if not request.flight:
                continue
            before = request.known
            request.known += request.flight.popleft()
            # Prefix of the latest step launched, at most: each step before it that is still in flight adds a block.
            latest = request.known + self.block * (len(request.flight) - 1) if request.flight else before
            self.ledger.shrink(request.row, self.bound(latest + self.block + self.extra))

    def give_back(self) -> None:
        """Release what the steps so far reserved but did not commit, without having read them."""
        batch = self.rng.sample(self.running, self.rng.randint(0, len(self.running)))
        ops.release_kv_slots(
            *self.state,
            torch.tensor([r.row for r in batch], dtype=torch.int32),
            torch.tensor([r.length for r in batch], dtype=torch.int32),
            self.page_size,
        )
        for request in batch:
            self.ledger.release(request.row, self.bound(self.ahead(request)))

    def drop(self, request: Request) -> None:
        """All pages go back, whatever is in flight."""
        self.running.remove(request)
        ops.release_kv_slots(*self.state, torch.tensor([request.row]), torch.tensor([0]), self.page_size)
        self.ledger.release(request.row, 0)

    def finish(self) -> None:
        for request in [r for r in self.running if r.known >= r.limit]:
            self.drop(request)

    def abort(self) -> None:
        if self.running:
            self.drop(self.rng.choice(self.running))

    def evict(self) -> None:
        """The youngest request makes room."""
        if self.running:
            self.drop(self.running[-1])

    # Checks.

    def check_ledger(self) -> None:
        """Never below the truth, and sound in itself."""
        booked = [self.ledger.row_len(row) for row in range(self.rows)]
        assert all(b >= held for b, held in zip(booked, self.alloc_lens.tolist(), strict=True))
        assert sum(booked) == self.ledger.used_pages * self.page_size
        assert 0 <= self.ledger.used_pages <= self.num_pages - 1
        owned = {r.row for r in self.running}
        assert all(b == 0 for row, b in enumerate(booked) if row not in owned)

    def check_pages(self) -> None:
        """No page lost, none booked twice, and the table names each page's slots in order."""
        head, count, missing, _ = self.ring.tolist()
        assert missing == 0
        pages = [np.roll(self.free_pages.numpy(), -head)[:count]]
        table = self.table.numpy()
        for row, length in enumerate(self.alloc_lens.tolist()):
            covered = table[row, : min(length, self.width)]
            owned = covered[:: self.page_size] // self.page_size
            slots = (owned[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)
            assert np.array_equal(covered, slots[: covered.size]) and not table[row, covered.size :].any()
            pages.append(owned)
        assert np.array_equal(np.sort(np.concatenate(pages)), np.arange(1, self.num_pages))

    def run(self, operations: int) -> None:
        names = ["admit", "step", "read", "give_back", "finish", "abort", "evict"]
        weights = [10, 40, 30, 8, 8, 1, 1]
        for i, name in enumerate(self.rng.choices(names, weights, k=operations)):
            getattr(self, name)()
            self.counts[name] += 1
            self.check_ledger()
            if i % 64 == 0:
                self.check_pages()
        while self.running:
            self.abort()
        self.check_ledger()
        self.check_pages()
        assert self.ledger.used_pages == 0 and int(self.ring[1]) == self.num_pages - 1


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_random_schedule(ledger_class: Any, depth: int, page_size: int) -> None:
    """24 schedules of 4200 operations: 10^5 in all."""
    scheduler = Scheduler(ledger_class, 100 * depth + page_size, page_size, depth)
    scheduler.run(4200)
    assert all(scheduler.counts.values()), scheduler.counts  # every kind of operation happened

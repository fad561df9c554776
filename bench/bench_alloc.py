"""The start of a decode step: pages for the block, its slots in the page table, ids, positions, slots; and giving back.

Rows, each at page size 1 and 16 with T 16 (so that every request takes 16 pages or one):

* `prepare_block`: ids, positions and slots of a block that has its pages;
* `fused, covered`: reserve_and_prepare_block where no request needs a page: one launch;
* `fused + reset`: every request takes pages, one launch, after a copy that takes the pages back, so that the call can
  be repeated; the baselines make the same copy, and `reset` is the copy alone;
* `fused + release`: every request takes pages for a block and gives all of them back: two launches;
* `... (host)`: microseconds of host time a call, eager, nothing waited for.

Baselines: `sglang`, where SGLang can be imported: the launches of its allocation and of its block preparation, with the
lengths already known to the host and the free list a slice, as its scheduler has them; and `torch`: the same job in the
fewest torch calls, which also needs what is known here (every request takes the same number of pages). Giving back is
one gather and one concatenation of the free list in both. None of them keeps books on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch

from bench import sglang_kernels
from bench.ceilings import measure
from bench.harness import Calls, Case, Row, measure_case
from bench.runner import Problem
from dflash_kernels import ops

SUITE = "alloc"
T, WIDTH, MASK = 16, 4096, 151669
FREE_PAGES = 65536  # in the list beside those that are taken: what a server of that size would have


@dataclass(frozen=True)
class SGLang:
    """SGLang's launches, found where its versions keep them."""

    version: str
    prepare: Callable[..., None]
    assign: Callable[..., None]
    get_last_loc: Callable[..., torch.Tensor]
    alloc_extend_kernel: Any


@cache
def _sglang() -> SGLang | None:
    """None where SGLang or one of the pieces is not there."""

    try:
        return SGLang(
            sglang_kernels.version(),
            sglang_kernels.find("_prepare_dflash_draft_block_unchecked"),
            sglang_kernels.assign_req_to_token_pool(),
            sglang_kernels.find("get_last_loc_triton"),
            sglang_kernels.find("alloc_extend_kernel"),
        )
    except Exception as error:  # whatever a file of another version can raise
        print(f"# alloc: no sglang baseline: {type(error).__name__}: {error}")
        return None


class Step:
    """One independent pool of B requests at random lengths, holding just the pages of their prefixes."""

    def __init__(self, batch: int, page: int, device: torch.device) -> None:
        self.batch, self.page = batch, page
        generator = torch.Generator().manual_seed(batch + page)
        lens = torch.randint(16, WIDTH - 4 * T, (batch,), generator=generator)
        held = -(-lens // page) * page
        order = torch.randperm(batch, generator=generator)
        owned = int(held.sum()) // page
        free_pages, ring = ops.init_free_pages(owned + FREE_PAGES, page, device)
        # Lengths and ring in one buffer, so that one copy puts both back.
        self.books = torch.zeros(4 + (batch + 1) // 2, dtype=torch.int64, device=device)
        self.ring, self.alloc_lens = self.books[:4], self.books[4:].view(torch.int32)[:batch]
        self.ring.copy_(ring)
        self.free_pages = free_pages
        self.table = torch.zeros(batch, WIDTH, dtype=torch.int32, device=device)
        self.state = (self.table, self.alloc_lens, self.free_pages, self.ring)
        self.rows, self.lens, self.held = order.to(device), lens.to(device), held.to(device)
        self.anchors = torch.randint(0, MASK, (batch,), generator=generator).to(device)
        ops.reserve_kv_slots(*self.state, self.rows, self.lens, page)
        self.saved = self.books.clone()
        empty = [torch.empty(batch, T, dtype=torch.int64, device=device) for _ in range(3)]
        self.out = (empty[0], empty[1], empty[2])
        # What the baselines know.
        self.ends, self.lens_cpu = self.lens + T, lens
        self.needed = batch * T
        self.steps = torch.arange(T, device=device)
        self.in_page = torch.arange(page, dtype=torch.int32, device=device)
        self.free_slots = torch.arange(1, FREE_PAGES, dtype=torch.int64, device=device) * page
        self.free_ids = self.free_slots // page

    # -- ours

    def reset(self) -> None:
        self.books.copy_(self.saved)

    def prepare(self) -> None:
        ops.prepare_block(self.anchors, self.lens, self.rows, self.table, T, MASK, out=self.out)

    def fused(self) -> None:
        ops.reserve_and_prepare_block(
            *self.state, self.anchors, self.lens, self.rows, self.page, MASK, block_size=T, out=self.out
        )

    def release(self) -> None:
        ops.release_kv_slots(*self.state, self.rows, self.lens, self.page)

    # -- torch

    def torch_prepare(self) -> None:
        ids, positions, slots = self.out
        ids.fill_(MASK)
        ids[:, 0].copy_(self.anchors)
        torch.add(self.lens[:, None], self.steps, out=positions)
        slots.copy_(self.table[self.rows[:, None], positions])

    def torch_reserve(self) -> None:
        """Writes the table of T more tokens for every request: T pages of one token, or one page of T."""
        pages = self.free_ids[: self.needed // self.page].to(torch.int32)
        slots = pages[:, None] * self.page + self.in_page if self.page > 1 else pages
        self.table[self.rows[:, None], self.held[:, None] + self.steps] = slots.view(self.batch, T)

    def torch_release(self) -> torch.Tensor:
        slots = self.table[self.rows[:, None], self.held[:, None] + self.steps[:: self.page]]
        return torch.cat([self.free_ids, slots.view(-1) // self.page])

    # -- SGLang

    def sglang_prepare(self) -> None:
        found = _sglang()
        assert found is not None
        found.prepare(self.anchors, self.lens, self.rows, self.table, *self.out, MASK)

    def sglang_reserve(self) -> None:
        found = _sglang()
        assert found is not None
        if self.page == 1:
            slots = self.free_slots[: self.needed]
        else:
            last = found.get_last_loc(self.table, self.rows, self.lens)
            slots = torch.empty(self.needed, dtype=torch.int64, device=self.lens.device)
            power = 1 << max(self.batch - 1, 0).bit_length()
            found.alloc_extend_kernel[(self.batch,)](self.lens, self.ends, last, self.free_ids, slots, power, self.page)
        found.assign(self.rows, self.table, self.lens, self.ends, slots, self.batch)


def _sequence(*calls: Callable[[], object]) -> Callable[[], object]:
    if len(calls) == 1:
        return calls[0]

    def run() -> None:
        for call in calls:
            call()

    return run


def _calls(kind: str, step: Step) -> Calls:
    """Our call of a kind of row and its baselines."""
    torch_name = f"torch {torch.__version__}"
    if kind == "reset":
        return Calls(step.reset, {})
    if kind in ("prepare_block", "fused, covered"):
        if kind == "fused, covered":
            step.fused()
            ours: Callable[[], object] = step.fused
        else:
            ours = step.prepare
        baselines = {torch_name: step.torch_prepare}
        if _sglang_here(step):
            baselines[f"sglang {_sglang_version()}"] = step.sglang_prepare
        return Calls(ours, baselines)
    before, after = ((step.reset,), ()) if kind == "fused + reset" else ((), (step.release,))
    torch_after = () if kind == "fused + reset" else (step.torch_release,)
    chains = {torch_name: _sequence(*before, step.torch_reserve, step.torch_prepare, *torch_after)}
    if _sglang_here(step):
        name = f"sglang {_sglang_version()}"
        chains[name] = _sequence(*before, step.sglang_reserve, step.sglang_prepare, *torch_after)
    return Calls(_sequence(*before, step.fused, *after), chains)


def _sglang_here(step: Step) -> bool:
    return step.lens.is_cuda and _sglang() is not None


def _sglang_version() -> str:
    found = _sglang()
    return found.version if found else ""


def _case(kind: str, batch: int, page: int) -> Case:
    tokens = batch * T
    prepare_bytes = 3 * 8 * batch + 4 * tokens + 3 * 8 * tokens
    page_bytes = {"fused + reset": 1, "fused + release": 2}.get(kind, 0) * (4 * tokens + 4 * tokens // page)
    return Case(
        suite=SUITE,
        op=kind,
        shape=f"B{batch} T{T} page {page}",
        dtype="int",
        regime="latency" if tokens <= 64 else "throughput",
        bytes=0 if kind == "reset" else prepare_bytes + page_bytes + 8 * batch,
        flops=0,
        stream="copy",
        make=lambda device: _calls(kind, Step(batch, page, device)),
    )


KINDS = ("prepare_block", "fused, covered", "fused + reset", "fused + release")


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Every kind at every batch and page size."""
    on_gpu = device.type == "cuda"
    batches = ((1, 256) if quick else (1, 32, 256)) if on_gpu else (1, 32)
    for batch in batches:
        for page in (1, 16):
            for kind in KINDS:
                yield _case(kind, batch, page)
    if on_gpu:
        yield _case("reset", batches[-1], 1)


def _host_us(call: Callable[[], object], device: torch.device) -> float:
    """Median host microseconds of a call that launches and does not wait."""
    samples = []
    for _ in range(9):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(50):  # well below the launches that a queue holds
            call()
        samples.append((time.perf_counter() - start) / 50 * 1e6)
    return median(samples[2:])


def _host_row(case: Case, device: torch.device) -> Row:
    calls = case.make(device)
    times = {name: _host_us(call, device) for name, call in calls.baselines.items()}
    best = min(times, key=lambda name: times[name])
    return Row(
        suite=SUITE,
        op=f"{case.op} (host)",
        shape=case.shape,
        dtype=case.dtype,
        regime=case.regime,
        cache="hot",
        ours_us=_host_us(calls.ours, device),
        baseline=f"{best} (eager)",
        baseline_us=times[best],
        bytes=0,
        flops=0,
        pct_ceiling=None,
    )


def rows(
    device: torch.device, quick: bool, name_filter: str, seconds_left: Callable[[], float]
) -> Iterator[Row | Problem]:
    """The cases, and on a GPU their host time."""
    ceilings = measure(device)
    for case in cases(device, quick):
        if name_filter not in case.title:
            continue
        if seconds_left() <= 0:
            yield Problem(SUITE, case.title, "time limit")
            continue
        try:
            yield from measure_case(case, device, ceilings, samples=6 if quick else 12)
            if device.type == "cuda" and case.op in ("fused, covered", "fused + release"):
                yield _host_row(case, device)
        except Exception as error:
            yield Problem(SUITE, case.title, f"{type(error).__name__}: {error}")

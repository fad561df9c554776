"""How a row is timed: rotating sets, CUDA-graph replays, interleaved with the best baseline, medians.

On CUDA a graph holds many calls of one callable. Two cache states are measured:

* **cold**: the calls walk over independent sets of inputs and outputs whose traffic exceeds 2.5 times the L2, so that a
  set has left the cache when its turn comes again;
* **hot**: all calls use one set. Left out where one set alone overflows the cache (hot would be cold again).

An op whose sets are so small that the largest rotation still fits the L2 gets a hot row only. Ours (A) and the baseline
(B) are replayed in the order A B B A, each replay between two events, with one synchronisation at the end: drift of
the clocks hits both alike. Every number is a median. A baseline that synchronises or cannot be captured is timed
eagerly and its name says so. On the CPU the same order is timed with `perf_counter`, hot only.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from bench.ceilings import Ceilings

__all__ = ["Calls", "Case", "Row", "geomean", "measure_case", "rotation_count"]

MAX_SETS = 64
MAX_SET_BYTES = 24 << 30
COLD_FACTOR = 2.5
_REPLAY_US = 2000.0  # aimed length of one replay: far above an event's resolution
_MAX_CALLS = 256  # calls in one graph


@dataclass(frozen=True)
class Calls:
    """One set of inputs and outputs.

    Attributes:
        ours: the op's call; allocates nothing, does not synchronise, can be captured in a CUDA graph.
        baselines: name (with its version) -> callable for the same job; may allocate.
        eager: the same, but called as an engine calls them, one launch after the other from the host: not candidates
            for the best baseline, but reported beside it (`eager_us`; `eager_ratio` of ours in a graph to it;
            `ours_eager_us`, ours launched by the host likewise).
    """

    ours: Callable[[], object]
    baselines: Mapping[str, Callable[[], object]]
    eager: Mapping[str, Callable[[], object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    Attributes:
        suite, op, shape, dtype: columns of the row; `shape` in the ops' letters, as "B8 T16 V151936".
        regime: "latency" (B*T <= 64 rows) or "throughput".
        bytes: fewest bytes a call must move (each input read once, each output written once).
        flops: floating-point operations of a call.
        stream: the bandwidth that bounds it, "read" or "copy" (reads and writes together).
        make: builds one independent set; called once per set of the rotation, with fresh random data each time.
    """

    suite: str
    op: str
    shape: str
    dtype: str
    regime: str
    bytes: int
    flops: int
    stream: str
    make: Callable[[torch.device], Calls]

    @property
    def title(self) -> str:
        """The row's first columns."""
        return f"{self.suite} {self.op} {self.shape} {self.dtype}"


@dataclass(frozen=True)
class Row:
    """One measured line. `ratio` is ours / baseline: below 1 we are faster. `extra` holds a suite's further keys."""

    suite: str
    op: str
    shape: str
    dtype: str
    regime: str
    cache: str
    ours_us: float
    baseline: str
    baseline_us: float | None
    bytes: int
    flops: int
    pct_ceiling: float | None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return self.ours_us / self.baseline_us if self.baseline_us else None

    @property
    def gbps(self) -> float | None:
        return self.bytes / self.ours_us * 1e-3 if self.bytes else None

    def as_json(self, card: str, commit: str) -> dict[str, Any]:
        row = asdict(self)
        extra = row.pop("extra")
        return {
            **row,
            "ratio": self.ratio,
            "gbps": self.gbps,
            "card": card,
            "torch": torch.__version__,
            "commit": commit,
            **extra,
        }

    def line(self) -> str:
        """The printed line, the same for every op."""
        if self.baseline_us is None:
            against = f"{'no baseline':>42} {'':>10} {'':>6}"
        else:
            against = f"{self.baseline[:42]:>42} {self.baseline_us:>8.1f}us {self.ratio:>5.2f}x"
        rate = f"{self.gbps:>6.0f} GB/s" if self.gbps is not None else f"{'':>11}"
        ceiling = f"{self.pct_ceiling:>4.0f}%" if self.pct_ceiling is not None else f"{'':>5}"
        return (
            f"{self.op:<25} {self.shape:<48} {self.dtype:<5} {self.regime:<10} {self.cache:<4} "
            f"{self.ours_us:>8.1f}us | {against} | {rate} {ceiling}"
        )


HEADER = (
    f"{'op':<25} {'shape':<48} {'dtype':<5} {'regime':<10} {'cache':<4} {'ours':>10} | "
    f"{'best baseline':>42} {'':>10} {'ratio':>6} | {'GB/s':>11} {'ceil.':>5}"
)


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean of positive numbers; None when there are none."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def rotation_count(call_bytes: int, set_bytes: int, l2_bytes: int) -> tuple[int, bool]:
    """How many sets to rotate over, and whether that makes the calls cold.

    Args:
        call_bytes: bytes one call touches.
        set_bytes: device memory one set holds (at least `call_bytes` in practice).
        l2_bytes: size of the cache to outrun; 0 means that there is none to speak of (CPU): one set, hot.
    """
    if l2_bytes <= 0:
        return 1, False
    wanted = math.ceil(COLD_FACTOR * l2_bytes / max(call_bytes, 1))
    fitting = max(1, MAX_SET_BYTES // max(set_bytes, 1))
    count = max(1, min(wanted, MAX_SETS, fitting))
    return count, count >= wanted


def measure_case(case: Case, device: torch.device, ceilings: Ceilings, samples: int = 12) -> list[Row]:
    """Time one case; its rows (cold, hot, or both). `samples` replays each of ours and of the baseline, per row."""
    measure = _measure_cuda if device.type == "cuda" else _measure_cpu
    torch.compiler.reset()  # a compiled baseline is for this shape, whatever shapes came before
    rows = []
    for cache, ours_us, name, baseline_us, extra in measure(case, device, ceilings, samples):
        floor = ceilings.floor_us(case.bytes, case.flops, case.stream)
        rows.append(
            Row(
                case.suite,
                case.op,
                case.shape,
                case.dtype,
                case.regime,
                cache,
                ours_us,
                name,
                baseline_us,
                case.bytes,
                case.flops,
                100 * floor / ours_us,
                extra,
            )
        )
    return rows


_Timed = tuple[str, float, str, float | None, dict[str, Any]]  # cache, ours, baseline's name, baseline, further keys


# -- CPU --------------------------------------------------------------------------------------------------------------


def _seconds(fn: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls


def _measure_cpu(case: Case, device: torch.device, _ceilings: Ceilings, samples: int) -> list[_Timed]:
    calls = case.make(device)
    once = _first_and_second(calls.ours)
    rough = {name: _first_and_second(fn) for name, fn in calls.baselines.items()}
    count = max(1, min(200, int(2e-3 / max(once, 1e-7))))
    if once > 0.1:
        samples = min(samples, 4)
    if not rough:
        return [("hot", median(_seconds(calls.ours, count) for _ in range(samples)) * 1e6, "", None, {})]
    best = min(rough, key=lambda name: rough[name])
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(max(1, samples // 2)):
        for fn, into in _abba((calls.ours, ours), (calls.baselines[best], theirs)):
            into.append(_seconds(fn, count))
    return [("hot", median(ours) * 1e6, best, median(theirs) * 1e6, {})]


def _first_and_second(fn: Callable[[], object]) -> float:
    """Seconds of the second of two calls."""
    fn()
    return _seconds(fn, 1)


# -- CUDA -------------------------------------------------------------------------------------------------------------


def _measure_cuda(case: Case, device: torch.device, ceilings: Ceilings, samples: int) -> list[_Timed]:
    before = torch.cuda.memory_allocated(device)
    sets = [case.make(device)]
    torch.cuda.synchronize(device)
    set_bytes = torch.cuda.memory_allocated(device) - before
    count, cold = rotation_count(case.bytes, set_bytes, ceilings.l2_bytes)
    if cold:
        sets += [case.make(device) for _ in range(count - 1)]
    timed = []
    if cold:
        timed.append(("cold", *_duel(sets, samples)))
    if not cold or case.bytes <= ceilings.l2_bytes:
        timed.append(("hot", *_duel(sets[:1], samples)))
    return timed


def _duel(sets: Sequence[Calls], samples: int) -> tuple[float, str, float | None, dict[str, Any]]:
    """Ours against the best baseline over `sets`: (us, name, us, further keys)."""
    ours = _replayable([s.ours for s in sets])
    best: _Player | None = None
    best_name, best_us = "", math.inf
    for name in sets[0].baselines:
        player = _replayable([s.baselines[name] for s in sets], may_be_eager=True)
        us = _time_players([player], rounds=2)[0]
        if us < best_us:
            best, best_us = player, us
            best_name = name if player.captured else f"{name} (eager)"
    if best is None:
        return _time_players([ours], rounds=samples // 2)[0], "", None, {}
    ours_us, baseline_us = _time_players([ours, best], rounds=max(1, samples // 2))
    return ours_us, best_name, baseline_us, _eager(sets, ours_us, max(1, samples // 2))


def _eager(sets: Sequence[Calls], ours_us: float, rounds: int) -> dict[str, Any]:
    """The eager baseline and ours launched by the host in turn, if the case has one."""
    extra: dict[str, Any] = {}
    for name in sets[0].eager:
        theirs = _replayable([s.eager[name] for s in sets], never_captured=True)
        ours = _replayable([s.ours for s in sets], never_captured=True)
        ours_eager_us, eager_us = _time_players([ours, theirs], rounds)
        extra |= {"eager": name, "eager_us": eager_us, "eager_ratio": ours_us / eager_us}
        extra["ours_eager_us"] = ours_eager_us
    return extra


@dataclass(frozen=True, eq=False)
class _Player:
    """Something to replay: `run` makes `calls` calls on the current stream."""

    run: Callable[[], object]
    calls: int
    captured: bool


def _replayable(
    fns: Sequence[Callable[[], object]], may_be_eager: bool = False, never_captured: bool = False
) -> _Player:
    """Warm the callables up and capture enough calls of them, in turn, in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for fn in list(fns) + list(fns[:1]) * 2:
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    once_us = _event_us(lambda: [fn() for fn in fns]) / len(fns)
    rounds = max(1, math.ceil(min(_REPLAY_US / max(once_us, 1.0), _MAX_CALLS) / len(fns)))
    calls = rounds * len(fns)

    def run() -> None:
        for _ in range(rounds):
            for fn in fns:
                fn()

    if never_captured or may_be_eager and _synchronises(fns[0]):
        return _Player(run, calls, captured=False)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception:
        if not may_be_eager:
            raise
        torch.cuda.synchronize()
        return _Player(run, calls, captured=False)
    return _Player(graph.replay, calls, captured=True)


def _synchronises(fn: Callable[[], object]) -> bool:
    """Whether a warm call waits for the device: found out before a capture, which such a call would spoil."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        fn()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _event_us(fn: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _time_players(players: Sequence[_Player], rounds: int) -> list[float]:
    """Median us a call of each player; one warm replay each, then rounds of A B B A; one synchronisation."""
    marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in players]
    for player in players:
        player.run()
    for _ in range(rounds):
        for index in (*range(len(players)), *reversed(range(len(players)))):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            players[index].run()
            end.record()
            marks[index].append((start, end))
    torch.cuda.synchronize()
    return [
        median(start.elapsed_time(end) for start, end in of_one) * 1e3 / player.calls
        for player, of_one in zip(players, marks, strict=True)
    ]


def _abba(a: Any, b: Any) -> tuple[Any, Any, Any, Any]:
    return a, b, b, a


def free_memory(device: torch.device) -> None:
    """Collect what the last case left in reference cycles, where it is much; the allocator's cache likewise."""
    if device.type != "cuda":
        return
    if torch.cuda.memory_allocated(device) > 1 << 30:
        gc.collect()
    if torch.cuda.memory_reserved(device) > torch.cuda.get_device_properties(device).total_memory // 2:
        torch.cuda.empty_cache()

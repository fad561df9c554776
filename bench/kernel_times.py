"""Where the time of a row goes, kernel by kernel: ours and each baseline, replayed as graphs under the profiler.

    python -m bench.kernel_times draft --filter "I12288 32/8x128 B32"

A kernel that starts early waits inside itself for the one before it, so its own duration says little. Counted is what
it adds: from the end of the kernel before it to its own end, the median over replays. Runs of equal layers are folded
into one table of the names in order of their first launch.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median

import torch

from bench.harness import Case

SUITES = ("verify", "alloc", "gemm", "head", "inject", "draft", "dflash2")  # those that are made of cases
ROUNDS = 6


def _short(name: str) -> str:
    """A kernel's name without its return type, namespaces and arguments."""
    name = name.replace("(anonymous namespace)::", "")
    name = re.sub(r"^(void|__global__) ", "", name)
    depth, kept = 0, ""
    for letter in name:
        if letter == "(" and depth == 0:
            break
        depth += (letter == "<") - (letter == ">")
        kept += letter
    head, sep, rest = kept.partition("<")
    return (head.split("::")[-1] + sep + rest)[:70]


def kernel_times(sets: Sequence[Callable[[], object]]) -> list[tuple[str, int, float]]:
    """(name, launches a call, us a call) of the kernels of one call, in order of their first launch."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in sets:
            call()
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in sets:
            call()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(ROUNDS):
            graph.replay()
            torch.cuda.synchronize()
    return added_times(
        [(e.time_range.start, e.time_range.end, e.name) for e in profile.events() if "CUDA" in str(e.device_type)],
        replays=ROUNDS,
        calls=len(sets),
    )


def added_times(events: list[tuple[float, float, str]], replays: int, calls: int) -> list[tuple[str, int, float]]:
    """The same from (start, end, name) of all launches of `replays` graphs of `calls` equal calls.

    Raises:
        SystemExit: the launches are not those of so many equal calls.
    """
    events = sorted(events)
    if not events or len(events) % (replays * calls):
        raise SystemExit(f"kernel_times: launches must be a multiple of {replays * calls} calls, got {len(events)}")
    size = len(events) // (replays * calls)
    added: dict[int, list[float]] = defaultdict(list)
    for index, (start, end, _name) in enumerate(events):
        before = events[index - 1][1] if index % (size * calls) else start
        added[index % size].append(end - before)
    order: dict[str, list[float]] = {}
    for place in range(size):
        order.setdefault(_short(events[place][2]), []).append(median(added[place]))
    return [(name, len(times), sum(times)) for name, times in order.items()]


def report(case: Case, device: torch.device, sets: int) -> None:
    """Prints one table for ours and one for each baseline that can be captured."""
    made = [case.make(device) for _ in range(sets)]
    players = {"ours": [calls.ours for calls in made]}
    for name in made[0].baselines:
        players[name] = [calls.baselines[name] for calls in made]
    for name, calls in players.items():
        try:
            rows = kernel_times(calls)
        except RuntimeError as error:
            print(f"## {case.title} | {name}: not captured: {str(error).splitlines()[0]}")
            continue
        total = sum(us for *_, us in rows)
        print(f"## {case.title} | {name}: {total:.1f} us, {sum(count for _, count, _ in rows)} launches")
        for kernel, count, us in rows:
            print(f"  {us:8.1f} us  {count:3d} x {us / count:7.2f}  {kernel}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_times", description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--filter", default="", metavar="SUBSTR[|SUBSTR...]", help="in op, shape, dtype")
    parser.add_argument("--sets", type=int, default=2, help="independent inputs, so that calls are cold")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernel_times: a CUDA device is needed, torch sees none")
    device = torch.device("cuda")
    for case in importlib.import_module(f"bench.bench_{args.suite}").cases(device, False):
        if any(part in case.title for part in args.filter.split("|")):
            torch.compiler.reset()
            report(case, device, args.sets)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

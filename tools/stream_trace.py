#!/usr/bin/env python3
"""Where the time of a streaming kernel goes, stage by stage.

    python tools/stream_trace.py draft|inject [--shape qwen3-8b] [--batch 1] [--context 1024]

Needs a library built with ``cmake -DDFLASH_STREAM_TRACE=ON`` and a CUDA device. Of every stage, in microseconds since
the first block's first event: when its first and last block passed each event, and what the median block spent between
events.
"""

from __future__ import annotations

import argparse
import ctypes
from statistics import median

import torch

from bench import bench_draft, bench_inject, shapes
from dflash_kernels import _library, ops

EVENTS = (
    "loader begins", "counter seen", "tokens stored", "unit begins", "first weights", "first tokens",
    "last tile", "added halves", "left part", "added parts", "finished", "signalled", "producer begins",
    "first issued", "last issued",
)  # fmt: skip
BLOCKS, UNITS, TILES = 160, 256, 2048
# Events whose distance is of interest: of a unit with weights, and of a job, whose events mean something else
# (csrc/smxx/stream/trace.cuh).
STEPS = ((0, 1), (1, 2), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (7, 9), (9, 10), (10, 11))
JOB_STEPS = ((3, 5), (5, 4), (4, 6), (6, 7), (7, 8), (8, 9), (9, 10), (10, 11))


def times(library: str, what: str) -> torch.Tensor:
    """[BLOCKS, UNITS, events] int64 of the last launch; 0 where an event did not happen."""
    host = torch.zeros(BLOCKS, UNITS, len(EVENTS), dtype=torch.int32)
    code = getattr(ctypes.CDLL(library), f"dflash_trace_{what}")(ctypes.c_void_p(host.data_ptr()))
    if code:
        raise SystemExit(f"stream_trace: CUDA error {code} while reading the times")
    return host.long() & 0xFFFFFFFF


def landed_rates(library: str, step_us: int = 3) -> list[float]:
    """TB/s at which tiles of the drafter's last launch had arrived, in steps of its time."""
    host = torch.zeros(BLOCKS, TILES, dtype=torch.int32)
    code = ctypes.CDLL(library).dflash_trace_draft_landed(ctypes.c_void_p(host.data_ptr()))
    if code:
        raise SystemExit(f"stream_trace: CUDA error {code} while reading the times")
    when = host.long() & 0xFFFFFFFF
    counts = torch.bincount((when[when > 0] - int(when[when > 0].min())) // (1000 * step_us))
    return [16384 * int(count) / (1e6 * step_us) for count in counts]


def table(when: torch.Tensor, units: torch.Tensor) -> None:
    start = int(when[when > 0].min())
    blocks = units.shape[0]
    stages: dict[int, list[tuple[int, int]]] = {}
    for block in range(blocks):
        for i, (stage, _, tiles, *_) in enumerate(units[block].tolist()):
            if tiles >= 0 and i < UNITS:
                stages.setdefault(stage, []).append((block, i))
    order = sorted(stages, key=lambda stage: min(int(w) for b, i in stages[stage] for w in when[b, i] if w > 0))
    print("stage  units  " + "  ".join(f"{name[:13]:>13}" for name in EVENTS))
    for stage in order:
        cells = []
        for event in range(len(EVENTS)):
            seen = sorted(int(when[b, i, event]) - start for b, i in stages[stage] if when[b, i, event] > 0)
            cells.append(f"{seen[0] / 1e3:6.1f}-{seen[-1] / 1e3:6.1f}" if seen else " " * 13)
        print(f"{stage:5}  {len(stages[stage]):5}  " + "  ".join(cells))
    print("\nmedian of a unit between events")
    for stage in order:
        steps = []
        block, first = stages[stage][0]
        for a, b in STEPS if units[block, first, 2] > 0 else JOB_STEPS:
            lengths = [int(when[k, i, b] - when[k, i, a]) for k, i in stages[stage] if when[k, i, a] and when[k, i, b]]
            if lengths:
                steps.append(f"{EVENTS[a]} > {EVENTS[b]} {median(lengths) / 1e3:.1f}")
        print(f"{stage:5}  " + "; ".join(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("draft", "inject"))
    parser.add_argument("--shape", default="QWEN3_8B")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--commit", type=int, default=6, help="of inject: committed tokens of a request")
    args = parser.parse_args()
    shape = getattr(shapes, args.shape)
    device = torch.device("cuda")
    captured: list[torch.Tensor] = []
    if args.what == "draft":
        real = bench_draft.pack_draft

        def pack(*matrices: torch.Tensor, **sizes: int) -> object:
            packed = real(*matrices, **sizes)
            captured.append(packed.units)
            return packed

        bench_draft.pack_draft = pack
        case = bench_draft._case(shape, args.batch, args.context)
    else:
        real_plan = ops.inject_kv_plan

        def plan(*arguments: object) -> object:
            made = real_plan(*arguments)
            captured.append(made.units)
            return made

        bench_inject.ops.inject_kv_plan = plan
        case = bench_inject._case(shape, args.batch, args.commit)
    calls = case.make(device)
    for _ in range(3):
        calls.ours()
        torch.empty(1 << 28, dtype=torch.uint8, device=device).fill_(1)
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    calls.ours()
    end.record()
    torch.cuda.synchronize()
    print(f"{case.title}: {begin.elapsed_time(end) * 1e3:.1f} us with its launch")
    table(times(str(_library.library_path()), args.what), captured[-1].cpu())
    if args.what == "draft":
        print("\nbytes of W that landed, TB/s in each 3 us")
        print(" ".join(f"{rate:.2f}" for rate in landed_rates(str(_library.library_path()))))


if __name__ == "__main__":
    main()

"""One call of `verify_block` from logits, warp by warp: when slices were reduced, how long each part of a unit took,
when rows and requests were complete. Needs a GPU and a library that was built with the trace:

    cmake -G Ninja -S . -B build/trace -DPython3_EXECUTABLE=$(which python) -DDFLASH_CUDA_ARCHS=90a \\
        -DCMAKE_CUDA_FLAGS=-DDFLASH_TRACE
    ninja -C build/trace _C && cp build/trace/_C.abi3.so dflash_kernels/
    python -m bench.trace_verify --batch 32

Stamping costs a few stores a unit, so the times are a little longer than those of `python -m bench verify`.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Iterable
from pathlib import Path

import torch

import dflash_kernels
from bench.bench_verify import MEAN_COMMITTED, _candidates, _lengths
from dflash_kernels import ops
from dflash_kernels.ops import Verified

# csrc/smxx/verify/trace.cuh
START, REDUCED, ASKED, REPORTED, ROW, REQUEST, END = range(1, 8)
BLOCKS, WARPS, STAMPS = 160, 16, 256
SETS = 4  # of logits, so that those of the traced call have left the cache


class Log:
    """The stamps of one call: `time` [us from the first], `event`, `row`, `warp`, in the order of each warp."""

    def __init__(self, words: torch.Tensor) -> None:
        flat = words.view(-1, 2)
        there = (flat[:, 1] & 0xFFFFFFFF) != 0
        self.warp = torch.arange(flat.size(0))[there] // STAMPS
        self.event, self.row = flat[there, 1] & 0xFFFFFFFF, flat[there, 1] >> 32
        time = flat[there, 0]
        start = time.min() if len(time) else 0  # none: no call since the last look
        self.time = (time - start).double() * 1e-3

    def of(self, event: int) -> torch.Tensor:
        return self.time[self.event == event]

    def after(self, event: int, before: Iterable[int]) -> torch.Tensor:
        """How long each `event` came after what the same warp stamped last, where that is one of `before`."""
        last = torch.isin(self.event[:-1], torch.tensor(list(before))) & (self.warp[1:] == self.warp[:-1])
        return (self.time[1:] - self.time[:-1])[last & (self.event[1:] == event)]


def read_log() -> Log:
    """The stamps since the last look."""
    library = next(Path(dflash_kernels.__file__).parent.glob("_C*.so"))
    take = getattr(ctypes.CDLL(str(library)), "dflash_verify_trace", None)
    if take is None:
        raise SystemExit(
            "trace_verify: the library must be built with -DCMAKE_CUDA_FLAGS=-DDFLASH_TRACE, got one without"
        )
    take.restype, take.argtypes = ctypes.c_size_t, (ctypes.c_void_p, ctypes.c_size_t)
    words = torch.zeros(BLOCKS * WARPS * STAMPS * 2, dtype=torch.int64)
    if take(words.data_ptr(), words.numel() * 8) != words.numel() * 8:
        raise SystemExit("trace_verify: the stamps could not be read: another layout, or no GPU")
    return Log(words)


def spread(values: torch.Tensor) -> str:
    """count, smallest, median, 90 %, largest."""
    if values.numel() == 0:
        return f"{0:>6}"
    ordered = values.sort().values
    at = [ordered[min(int(q * len(ordered)), len(ordered) - 1)].item() for q in (0.0, 0.5, 0.9, 1.0)]
    return f"{len(ordered):>6}" + "".join(f"{value:>9.2f}" for value in at)


def show(log: Log, batch: int, block_size: int, row_bytes: int, slices: int, lazy: int) -> None:
    head = f"{'count':>6}{'first':>9}{'median':>9}{'90 %':>9}{'last':>9}"
    print(f"{'us after the first start':<28}{head}")
    print(f"{'start':<28}{spread(log.of(START))}")
    first_slice = torch.full((BLOCKS * WARPS,), float("inf"), dtype=torch.float64)
    reduced = log.event == REDUCED
    first_slice.scatter_reduce_(0, log.warp[reduced], log.time[reduced], "amin")
    print(f"{'first slice of a warp':<28}{spread(first_slice[first_slice.isfinite()])}")
    print(f"{'slice reduced':<28}{spread(log.of(REDUCED))}")
    rows, times = log.row[log.event == ROW], log.of(ROW)
    position = rows // batch if lazy else rows % block_size
    for j in range(block_size):
        print(f"{f'row {j} complete':<28}{spread(times[position == j])}")
    print(f"{'request decided':<28}{spread(log.of(REQUEST))}")
    print(f"{'end of a warp':<28}{spread(log.of(END))}")
    print(f"{'us of a unit':<28}{head.replace('first', ' least').replace('last', 'most')}")
    print(f"{'reported -> next reduced':<28}{spread(log.after(REDUCED, (REPORTED,)))}")
    print(f"{'reduced -> next loads':<28}{spread(log.after(ASKED, (REDUCED,)))}")
    print(f"{'next loads -> reported':<28}{spread(log.after(REPORTED, (ASKED,)))}")
    print(f"{'row complete -> reported':<28}{spread(log.after(REPORTED, (ROW,)))}")
    print("us: TB/s reduced", end="")
    counts = torch.bincount((log.of(REDUCED) / 2).long())
    for i, count in enumerate(counts.tolist()):
        print(f"{'  ' if i % 8 else chr(10)}{2 * i:>3}: {count * row_bytes / slices / 2e6:.2f}", end="")
    print("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=151936)
    options = parser.parse_args()
    batch, block_size, vocab = options.batch, options.block_size, options.vocab
    if not torch.cuda.is_available():
        raise SystemExit("trace_verify: a GPU is needed, found none")

    device = torch.device("cuda")
    lengths = _lengths(batch, block_size, MEAN_COMMITTED)
    prefix = torch.zeros(batch, dtype=torch.int64, device=device)
    sets = [torch.randn(batch, block_size, vocab, device=device).to(torch.bfloat16) for _ in range(SETS)]
    guesses = [_candidates(logits.argmax(-1), vocab, lengths) for logits in sets]
    out, workspace = Verified.empty(batch, block_size, device), ops.verify_workspace(batch, block_size, device)
    slices = 0
    for lazy in (0, 1):
        for i in range(2 * SETS):
            torch.cuda.synchronize()
            read_log()  # forgets the call before
            ops.verify_block(guesses[i % SETS], sets[i % SETS], prefix, lazy=lazy, out=out, workspace=workspace)
        torch.cuda.synchronize()
        log = read_log()
        units = log.of(REDUCED).numel()
        slices = slices or units // (batch * block_size)
        mode = "lazy" if lazy else "full"
        print(f"verify_block {mode} B{batch} T{block_size} V{vocab} bf16: {units} units, {slices} a row")
        print(f"{units / slices:.1f} rows of {batch * block_size} read, {sum(lengths) + batch} needed")
        show(log, batch, block_size, vocab * 2, slices, lazy)


if __name__ == "__main__":
    main()

"""The card's ceilings, measured at the start of every run: read bandwidth, copy bandwidth, bf16 matmul rate.

A percentage of a datasheet figure says nothing about a kernel on a particular card, so every row is reported against
these. The read ceiling is the best of the reductions tried, since no single library kernel is known to be the fastest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from statistics import median
from typing import Any

import torch

__all__ = ["Ceilings", "measure"]


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device: bytes/s and FLOP/s. `copy_bw` counts bytes read plus bytes written."""

    card: str
    read_bw: float
    read_kernel: str
    copy_bw: float
    flop_rate: float
    flop_dtype: str
    l2_bytes: int

    def floor_us(self, bytes_moved: int, flops: int, stream: str) -> float:
        """Lower bound in us for work that moves `bytes_moved` and does `flops`; `stream` is "read" or "copy"."""
        bandwidth = self.read_bw if stream == "read" else self.copy_bw
        return max(bytes_moved / bandwidth, flops / self.flop_rate) * 1e6

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _time_cuda(fn: Callable[[], object], calls: int, samples: int = 7) -> float:
    """Median seconds a call of `fn`; one synchronisation in all, at the end."""
    for _ in range(3):
        fn()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(calls):
            fn()
        mark.record()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)) * 1e-3 / calls


def _time_cpu(fn: Callable[[], object], samples: int = 5) -> float:
    """Median seconds a call of `fn` on the CPU."""
    fn()
    seconds = []
    for _ in range(samples):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _triton_read(buffer: torch.Tensor) -> Callable[[], object] | None:
    """A persistent Triton kernel that only reads `buffer` (float32), or None where Triton cannot run."""
    try:
        from bench.triton_read import reader
    except ImportError:
        return None
    return reader(buffer)


def _cuda_bandwidths(device: torch.device) -> tuple[float, str, float]:
    """Read bytes/s with the best reader's name, and copy bytes/s."""
    elements = 1 << 29  # 2 GiB of float32: some forty times the L2
    source = torch.randn(1 << 14, elements >> 14, device=device)
    row_out = torch.empty(source.size(0), device=device)
    target = torch.empty_like(source)
    nbytes = elements * 4

    reads: dict[str, Callable[[], object]] = {
        "torch.sum over rows": lambda: torch.sum(source, dim=1, out=row_out),
        "torch.amax over rows": lambda: torch.amax(source, dim=1, out=row_out),
    }
    triton_read = _triton_read(source)
    if triton_read is not None:
        reads["triton persistent sum"] = triton_read
    rates: dict[str, float] = {}
    for name, fn in reads.items():
        try:
            rates[name] = nbytes / _time_cuda(fn, calls=4)
        except Exception as error:  # a Triton without a host compiler: the torch reductions remain
            print(f"# read ceiling: {name} not measured: {error}")
    best = max(rates, key=lambda name: rates[name])
    return rates[best], best, 2 * nbytes / _time_cuda(lambda: target.copy_(source), calls=4)


def _cuda_flop_rate(device: torch.device) -> float:
    """bf16 FLOP/s of the library's matrix product at 8192^3."""
    n = 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    c = torch.empty(n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / _time_cuda(lambda: torch.mm(a, b, out=c), calls=4)


def _measure_cuda(device: torch.device) -> Ceilings:
    properties = torch.cuda.get_device_properties(device)
    read_bw, reader, copy_bw = _cuda_bandwidths(device)
    flop_rate = _cuda_flop_rate(device)
    torch.cuda.empty_cache()
    return Ceilings(properties.name, read_bw, reader, copy_bw, flop_rate, "bf16", properties.L2_cache_size)


def _measure_cpu() -> Ceilings:
    source = torch.randn(1 << 24)  # 64 MiB
    target = torch.empty_like(source)
    nbytes = source.numel() * 4
    read_bw = nbytes / _time_cpu(lambda: source.sum())
    copy_bw = 2 * nbytes / _time_cpu(lambda: target.copy_(source))
    n = 768
    a, b = torch.randn(n, n), torch.randn(n, n)
    rate = 2 * n**3 / _time_cpu(lambda: torch.mm(a, b))
    return Ceilings(f"CPU, {torch.get_num_threads()} threads", read_bw, "torch.sum", copy_bw, rate, "fp32", 0)


@cache
def measure(device: torch.device) -> Ceilings:
    """Measure `device`, once a process: about a second on a GPU (2 GiB buffers)."""
    return _measure_cuda(device) if device.type == "cuda" else _measure_cpu()

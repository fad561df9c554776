"""A Triton kernel that only reads: one of the candidates for the read ceiling (see ceilings.py).

Imported only where Triton is installed. Not `from __future__ import annotations`: Triton reads the annotations.
"""

from collections.abc import Callable

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit
def _read_kernel(source, sums, tiles, elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(program, tiles, tl.num_programs(0)):
        total += tl.load(source + tile * BLOCK + lanes)
    if program == tl.num_programs(0) - 1:  # what is left after the last whole tile
        rest = tiles * BLOCK + lanes
        total += tl.load(source + rest, mask=rest < elements, other=0.0)
    tl.store(sums + program, tl.sum(total))


def reader(buffer: torch.Tensor, block: int = 4096) -> Callable[[], object]:
    """A call that reads all of `buffer` (float32, contiguous, fewer than 2^31 elements) once, in tiles of `block`."""
    elements = buffer.numel()
    tiles = elements // block
    most = torch.cuda.get_device_properties(buffer.device).multi_processor_count * 8
    programs = max(1, min(most, tiles))
    sums = torch.empty(programs, device=buffer.device)
    return lambda: _read_kernel[(programs,)](buffer, sums, tiles, elements, BLOCK=block, num_warps=8)

"""One layer's paged cache write as a Triton kernel: what an engine launches once a layer, K and V together.

Imported only where Triton is installed. Not `from __future__ import annotations`: Triton reads the annotations.
"""

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit
def _store_kernel(k, v, slots, k_cache, v_cache, cache_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    to = tl.load(slots + row).to(tl.int64) * cache_stride + columns
    tl.store(k_cache + to, tl.load(k + row * WIDTH + columns, mask=inside), mask=inside)
    tl.store(v_cache + to, tl.load(v + row * WIDTH + columns, mask=inside), mask=inside)


def store(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """`k_cache[slots] = k`, `v_cache[slots] = v`; k, v [N, Hkv, D] contiguous, caches [S, Hkv, D] of equal stride."""
    rows, width = k.shape[0], k.shape[1] * k.shape[2]
    _store_kernel[(rows,)](
        k, v, slots, k_cache, v_cache, k_cache.stride(0), WIDTH=width, BLOCK=triton.next_power_of_2(width)
    )

"""Rows of activations as e4m3 codes with a scale each, the input of fp8 products."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dflash_kernels.ops._errors import dflash_errors

__all__ = ["quantize_rows", "rmsnorm_quantize_rows"]

Codes = tuple[torch.Tensor, torch.Tensor]


@dflash_errors
def quantize_rows(x: torch.Tensor, *, out: Codes | None = None) -> Codes:
    """Each row of ``x`` as codes and one scale, ``x ~ codes * scale``::

        largest  = max(max_c |x[r, c]|, 1e-30)
        scale[r] = largest / 448
        codes[r, c] = e4m3(x[r, c] * (448 / largest))

    Quotients and products are rounded to float32 one by one; ``e4m3`` (torch's float8_e4m3fn) rounds to the nearest,
    ties to even, and saturates. Codes and scales are the same bits on every device, but for the sign of a NaN: a NaN is
    a NaN code and counts for nothing in the maximum; in a row with an infinity the scale is infinite and codes are NaN
    or 0. A row of zeros has codes 0.

    Args:
        x: ``[M, N]`` bfloat16, on the CPU also float32; contiguous, N a multiple of 8 up to 32768.
        out: contiguous codes and scale to write instead of new tensors.

    Returns:
        codes, uint8 ``[M, N]``; scale, float32 ``[M, 1]``.

    Raises:
        ValueError: wrong shape, dtype, device, stride or alignment.
    """
    ops = torch.ops.dflash.quantize_rows
    if out is None:
        return ops.default(x)
    ops.out(x, codes=out[0], scale=out[1])
    return out


@dflash_errors
def rmsnorm_quantize_rows(x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: Codes | None = None) -> Codes:
    """:func:`quantize_rows` of ``round(x * rsqrt(mean(x ** 2) + eps) * weight)``, bit for bit, in one kernel.

    Args:
        x: as of :func:`quantize_rows`, N up to 8192; ``round`` rounds to its dtype.
        weight: ``[N]`` in its dtype; eps: at least 0.
        out: contiguous codes and scale to write instead of new tensors.

    Returns:
        codes, uint8 ``[M, N]``; scale, float32 ``[M, 1]``.

    Raises:
        ValueError: wrong shape, dtype, device, stride, alignment or size.
    """
    ops = torch.ops.dflash.rmsnorm_quantize_rows
    if out is None:
        return ops.default(x, weight, eps)
    ops.out(x, weight, eps, codes=out[0], scale=out[1])
    return out


@torch.library.register_fake("dflash::quantize_rows")
def _quantize_rows_fake(x: torch.Tensor) -> Codes:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.register_fake("dflash::quantize_rows.out")
def _quantize_rows_out_fake(x: torch.Tensor, *, codes: torch.Tensor, scale: torch.Tensor) -> None:
    return None


@torch.library.register_fake("dflash::rmsnorm_quantize_rows")
def _rmsnorm_quantize_rows_fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Codes:
    return _quantize_rows_fake(x)


@torch.library.register_fake("dflash::rmsnorm_quantize_rows.out")
def _rmsnorm_quantize_rows_out_fake(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, codes: torch.Tensor, scale: torch.Tensor
) -> None:
    return None


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


@torch.library.impl("dflash::rmsnorm_quantize_rows", "CPU")
def _rmsnorm_quantize_rows_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Codes:
    torch.ops.dflash._rmsnorm_quantize_rows_check(x, weight, eps)
    return torch.ops.dflash.quantize_rows(_normed(x, weight, eps))


@torch.library.impl("dflash::rmsnorm_quantize_rows.out", "CPU")
def _rmsnorm_quantize_rows_out_cpu(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, codes: torch.Tensor, scale: torch.Tensor
) -> None:
    torch.ops.dflash._rmsnorm_quantize_rows_check(x, weight, eps, codes=codes, scale=scale)
    torch.ops.dflash.quantize_rows.out(_normed(x, weight, eps), codes=codes, scale=scale)

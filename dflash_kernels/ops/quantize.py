"""Rows of activations as codes with scales, the input of products in fp8 and nvfp4."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from dflash_kernels.formats import join_nibbles, scale_blocks
from dflash_kernels.ops._errors import dflash_errors

__all__ = ["quantize_rows", "quantize_rows_nvfp4", "rmsnorm_quantize_rows"]

Codes = tuple[torch.Tensor, torch.Tensor]
Nvfp4 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
def quantize_rows_nvfp4(x: torch.Tensor, *, out: Nvfp4 | None = None) -> Nvfp4:
    """Each row of ``x`` in NVFP4, ``x ~ codes * s * scale`` with a scale ``s[g]`` of 16 neighbours, ``g = c // 16``::

        largest  = max(max_c |x[r, c]|, 1e-30)
        scale[r] = largest / 2688
        s[r, g]  = e4m3(max_{c in g} |x[r, c]| * (448 / largest))
        codes[r, c] = e2m1(x[r, c] * (1 / (value(s[r, g]) * scale[r])))

    NVFP4's float32 scale is one a row here, not one a tensor, so that no row depends on the others of its batch.
    Quotients and products are rounded to float32 one by one; ``e4m3`` and ``e2m1`` round to the nearest, ties to even,
    and saturate. The same bits on every device. A group with a NaN has scale NaN; in a row with an infinity ``scale``
    is infinite, ``s`` 0 or NaN. Where ``s`` is 0 or NaN, codes are 0.

    Args:
        x: ``[M, N]`` bfloat16, on the CPU also float32; contiguous, N a multiple of 32 up to 32768.
        out: contiguous codes, blocks and scale to write instead of new tensors.

    Returns:
        codes, uint8 ``[M, N / 2]``, the even column's in the low half of a byte; blocks, uint8
        ``[ceil(M / 128), ceil(N / 64), 512]``, ``s`` as :func:`dflash_kernels.formats.scale_blocks` lays it out, zeros
        at the edges; scale, float32 ``[M, 1]``.

    Raises:
        ValueError: wrong shape, dtype, device, stride or alignment.
    """
    ops = torch.ops.dflash.quantize_rows_nvfp4
    if out is None:
        return ops.default(x)
    ops.out(x, codes=out[0], blocks=out[1], scale=out[2])
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


@torch.library.register_fake("dflash::quantize_rows_nvfp4")
def _quantize_rows_nvfp4_fake(x: torch.Tensor) -> Nvfp4:
    rows, columns = x.shape
    return (
        x.new_empty((rows, columns // 2), dtype=torch.uint8),
        x.new_empty(((rows + 127) // 128, (columns + 63) // 64, 512), dtype=torch.uint8),
        x.new_empty((rows, 1), dtype=torch.float32),
    )


@torch.library.register_fake("dflash::quantize_rows_nvfp4.out")
def _quantize_rows_nvfp4_out_fake(
    x: torch.Tensor, *, codes: torch.Tensor, blocks: torch.Tensor, scale: torch.Tensor
) -> None:
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


_E2M1_EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # where codes meet: half of them go to the lower, to be even


def _nvfp4(x: torch.Tensor) -> Nvfp4:
    wide = x.float()
    number = functools.partial(torch.tensor, dtype=torch.float32)  # torch takes reciprocals of Python's numbers
    groups = wide.unflatten(1, (-1, 16))
    nan = groups.isnan().any(-1)
    largest_of_groups = torch.where(groups.isnan(), 0.0, groups.abs()).amax(-1)
    largest = largest_of_groups.amax(1, keepdim=True).clamp_min(1e-30)
    scale = largest / number(2688.0)
    scaled = torch.where(nan, torch.nan, largest_of_groups * (number(448.0) / largest))
    bits = scaled.clamp(max=448.0).to(torch.float8_e4m3fn).view(torch.uint8) & 0x7F  # also of a NaN no sign
    s = bits.view(torch.float8_e4m3fn)
    usable = (s.float() > 0)[..., None]
    wanted = groups * (number(1.0) / (s.float() * scale))[..., None]
    magnitude = wanted.abs()
    code = sum(
        (magnitude > edge if even else magnitude >= edge).to(torch.uint8)
        for edge, even in zip(_E2M1_EDGES, (True, False) * 4, strict=False)
    )
    code = torch.where(usable, code | wanted.signbit().to(torch.uint8) << 3, 0)
    return join_nibbles(code.flatten(1)), scale_blocks(s), scale


@torch.library.impl("dflash::quantize_rows_nvfp4", "CPU")
def _quantize_rows_nvfp4_cpu(x: torch.Tensor) -> Nvfp4:
    torch.ops.dflash._quantize_rows_nvfp4_check(x)
    return _nvfp4(x)


@torch.library.impl("dflash::quantize_rows_nvfp4.out", "CPU")
def _quantize_rows_nvfp4_out_cpu(
    x: torch.Tensor, *, codes: torch.Tensor, blocks: torch.Tensor, scale: torch.Tensor
) -> None:
    torch.ops.dflash._quantize_rows_nvfp4_check(x, codes=codes, blocks=blocks, scale=scale)
    for to, made in zip((codes, blocks, scale), _nvfp4(x), strict=True):
        to.copy_(made)

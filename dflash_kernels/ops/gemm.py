"""Linear layers of codes: e4m3 with a scale for each row of activations and weights, and NVFP4."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dflash_kernels.formats import E2M1_VALUES, plain_scales, split_nibbles
from dflash_kernels.ops._errors import dflash_errors

__all__ = ["gemm_fp8", "gemm_nvfp4", "gemm_nvfp4_supported"]


@dflash_errors
def gemm_fp8(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Product of two matrices of e4m3 codes, scaled by row and column, stored in bf16::

        c[m, n]   = bf16(a_scale[m] * w_scale[n] * sum_k value(a[m, k]) * value(w[n, k]) + bias[n])
        out[m, n] = c[m, n],  or bf16(c[m, n] + residual[m, n])
        out[m, i] = bf16(silu(c[m, i]) * c[m, N / 2 + i])                  gated

    On CUDA the codes are multiplied as they are by the tensor cores. Those of Hopper keep about 14 bits of a sum from
    one instruction to the next, where fp32 has 24: for drafts, whose errors verification finds.

    Args:
        a: ``[M, K]`` uint8, codes of torch.float8_e4m3fn; K a multiple of 16, rows contiguous and a multiple of 16
            bytes apart. a_scale: ``[M, 1]`` float32.
        w: ``[N, K]`` uint8, contiguous; N a multiple of 8, gated: of 16. w_scale: ``[N, 1]`` float32. As
            :class:`dflash_kernels.formats.QuantizedWeight` has codes and scale of fp8.
        bias: ``[N]`` bf16 or None. residual: ``[M, N]`` bf16, contiguous, or None; not where gated.
        gated: w's first half is the gate's, the second half up's.
        out: ``[M, N]``, gated ``[M, N / 2]``, bf16, contiguous, to write; may be ``residual``.

    On CUDA all are aligned to 16 bytes.

    Returns:
        ``out``, or a new tensor of its shape.

    Raises:
        ValueError: wrong shape, dtype, device, stride or alignment, or a GPU of compute capability other than 9.0 and
            10.x, or one that the library was not built for.

    Source: the projections of a DFlash drafter layer, quantised as `compressed-tensors` does it (float-quantized).
    """
    ops = torch.ops.dflash.gemm_fp8
    if out is None:
        return ops.default(a, a_scale, w, w_scale, bias, residual, gated)
    ops.out(a, a_scale, w, w_scale, bias, residual, gated, out=out)
    return out


def gemm_nvfp4_supported(device: torch.device | str) -> bool:
    """Whether :func:`gemm_nvfp4` runs on `device`: the CPU, and CUDA devices of compute capability 10.x where the
    library has their kernel."""
    device = torch.device(device)
    if device.type != "cuda":
        return device.type == "cpu"
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.ops.dflash.gemm_nvfp4_supported(index)


@dflash_errors
def gemm_nvfp4(
    a: torch.Tensor,
    a_blocks: torch.Tensor,
    a_scale: torch.Tensor,
    w: torch.Tensor,
    w_blocks: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Product of two matrices in NVFP4, stored in bf16; with groups g of 16 columns, whose scales are sA and sW::

        c[m, n]   = bf16(a_scale[m] * w_scale[n] * sum_g sA[m, g] * sW[n, g] * sum_{k in g} a[m, k] * w[n, k] + bias[n])
        out[m, n] = c[m, n],  or bf16(c[m, n] + residual[m, n])
        out[m, i] = bf16(silu(c[m, i]) * c[m, N / 2 + i])                  gated

    On CUDA the tensor cores multiply the codes and apply sA and sW, which only those of compute capability 10.x do. How
    many bits they keep of a sum is not published, and this has not run on such a GPU.

    Args:
        a: ``[M, K / 2]`` uint8, two codes of e2m1 a byte, the even column's in the low half; K a multiple of 32, rows
            contiguous and a multiple of 16 bytes apart.
        a_blocks: ``[ceil(M / 128), ceil(K / 64), 512]`` uint8, sA in e4m3 as
            :func:`dflash_kernels.formats.scale_blocks` lays it out; edges count for nothing in ``out``, but are no NaN.
        a_scale: ``[M, 1]`` float32. All three as :func:`quantize_rows_nvfp4` makes them.
        w: ``[N, K / 2]`` uint8, contiguous; N a multiple of 8, gated: of 16.
        w_blocks: ``scale_blocks(scale, gated)`` of the weight's scales. w_scale: ``[N, 1]`` float32, one over the
            ``global_scale`` of :class:`dflash_kernels.formats.QuantizedWeight`.
        bias: ``[N]`` bf16 or None. residual: ``[M, N]`` bf16, contiguous, or None; not where gated.
        gated: w's first half is the gate's, the second half up's.
        out: ``[M, N]``, gated ``[M, N / 2]``, bf16, contiguous, to write; may be ``residual``.

    On CUDA all are aligned to 16 bytes.

    Returns:
        ``out``, or a new tensor of its shape.

    Raises:
        ValueError: wrong shape, dtype, device, stride or alignment, or a GPU that :func:`gemm_nvfp4_supported` says no
            to.

    Source: the projections of a DFlash drafter layer, quantised as `compressed-tensors` does it (nvfp4-pack-quantized).
    """
    ops = torch.ops.dflash.gemm_nvfp4
    if out is None:
        return ops.default(a, a_blocks, a_scale, w, w_blocks, w_scale, bias, residual, gated)
    ops.out(a, a_blocks, a_scale, w, w_blocks, w_scale, bias, residual, gated, out=out)
    return out


def _finished(c: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, gated: bool) -> torch.Tensor:
    """What follows the scaled sums."""
    if bias is not None:
        c += bias
    c = c.bfloat16()
    if residual is not None:
        c = c + residual
    if not gated:
        return c
    gate, up = c.float().chunk(2, dim=1)
    return (F.silu(gate) * up).bfloat16()


def _cpu(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    values = [codes.view(torch.float8_e4m3fn).float() for codes in (a, w)]
    return _finished((values[0] @ values[1].T) * a_scale * w_scale.T, bias, residual, gated)


def nvfp4_values(codes: torch.Tensor, blocks: torch.Tensor, gated: bool = False) -> torch.Tensor:
    """Codes times the scales of their groups, float32 ``[rows, K]``; exact."""
    groups = codes.shape[1] // 8
    scale = plain_scales(blocks, codes.shape[0], groups, gated).view(torch.float8_e4m3fn).float()
    table = torch.tensor(E2M1_VALUES)
    return (table[split_nibbles(codes).int()].unflatten(1, (groups, 16)) * scale[..., None]).flatten(1)


def _nvfp4_cpu(
    a: torch.Tensor,
    a_blocks: torch.Tensor,
    a_scale: torch.Tensor,
    w: torch.Tensor,
    w_blocks: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    sums = nvfp4_values(a, a_blocks) @ nvfp4_values(w, w_blocks, gated).T
    return _finished(sums * a_scale * w_scale.T, bias, residual, gated)


@torch.library.register_fake("dflash::gemm_nvfp4")
def _nvfp4_fake(
    a: torch.Tensor,
    a_blocks: torch.Tensor,
    a_scale: torch.Tensor,
    w: torch.Tensor,
    w_blocks: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    return _fake(a, a_scale, w, w_scale, bias, residual, gated)


@torch.library.impl("dflash::gemm_nvfp4", "CPU")
def _gemm_nvfp4_cpu(*inputs: object, **named: object) -> torch.Tensor:
    torch.ops.dflash._gemm_nvfp4_check(*inputs, **named)
    return _nvfp4_cpu(*inputs, **named)  # type: ignore[arg-type]


@torch.library.impl("dflash::gemm_nvfp4.out", "CPU")
def _gemm_nvfp4_out_cpu(*inputs: object, out: torch.Tensor, **named: object) -> None:
    torch.ops.dflash._gemm_nvfp4_check(*inputs, out=out, **named)
    out.copy_(_nvfp4_cpu(*inputs, **named))  # type: ignore[arg-type]


@torch.library.register_fake("dflash::gemm_fp8")
def _fake(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    return a.new_empty(a.shape[0], w.shape[0] // 2 if gated else w.shape[0], dtype=torch.bfloat16)


@torch.library.register_fake("dflash::gemm_fp8.out")
@torch.library.register_fake("dflash::gemm_nvfp4.out")
def _out_fake(*args: object, out: torch.Tensor, **kwargs: object) -> None:
    return None


@torch.library.impl("dflash::gemm_fp8", "CPU")
def _gemm_fp8_cpu(*inputs: object, **named: object) -> torch.Tensor:
    torch.ops.dflash._gemm_fp8_check(*inputs, **named)
    return _cpu(*inputs, **named)  # type: ignore[arg-type]


@torch.library.impl("dflash::gemm_fp8.out", "CPU")
def _gemm_fp8_out_cpu(*inputs: object, out: torch.Tensor, **named: object) -> None:
    torch.ops.dflash._gemm_fp8_check(*inputs, out=out, **named)
    out.copy_(_cpu(*inputs, **named))  # type: ignore[arg-type]

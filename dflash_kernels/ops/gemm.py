"""A linear layer in 8-bit floats: activations and weights as e4m3 codes with a scale for each of their rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dflash_kernels.ops._errors import dflash_errors

__all__ = ["gemm_fp8"]


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
    c = (values[0] @ values[1].T) * a_scale * w_scale.T
    if bias is not None:
        c += bias
    c = c.bfloat16()
    if residual is not None:
        c = c + residual
    if not gated:
        return c
    gate, up = c.float().chunk(2, dim=1)
    return (F.silu(gate) * up).bfloat16()


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

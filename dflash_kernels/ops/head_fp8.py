"""The best token of each hidden row over a head in 8-bit floats, for any number of rows."""

from __future__ import annotations

import torch

from dflash_kernels.ops._errors import dflash_errors

__all__ = ["lm_head_argmax_fp8"]

_CPU_LOGITS = 1 << 22  # logits that the CPU implementation holds at once

_Pair = tuple[torch.Tensor, torch.Tensor]


@dflash_errors
def lm_head_argmax_fp8(
    hidden: torch.Tensor,
    hidden_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    vocab_start: int = 0,
    *,
    out: _Pair | None = None,
    workspace: torch.Tensor | None = None,
) -> _Pair:
    """:func:`lm_head_argmax` of e4m3 codes with a scale for each row of both operands; the logits are not stored::

        logits    = bf16(hidden_scale * weight_scale.T * (value(hidden) @ value(weight).T) + bias)
        ids[n]    = vocab_start + argmax_v logits[n, v]
        values[n] = the logit of ids[n], as float32

    in the same order, and for shards of a vocabulary in the same way. On CUDA the codes are multiplied as they are by
    the tensor cores; those of Hopper keep about 14 bits of a sum from one instruction to the next, where fp32 has 24.
    That is for drafts, whose errors verification finds.

    Args:
        hidden: ``[N, H]`` uint8, codes of torch.float8_e4m3fn; H a multiple of 16, rows contiguous and a multiple of
            16 bytes apart. hidden_scale: ``[N, 1]`` float32.
        weight: ``[V, H]`` uint8, contiguous, V <= 2**22. weight_scale: ``[V, 1]`` float32. As
            :class:`dflash_kernels.formats.QuantizedWeight` has codes and scale of fp8.
        bias: ``[V]`` bf16 or None. vocab_start: id of weight's first row.
        out: ``ids [N]`` int64 and ``values [N]`` float32 to write; needs ``workspace``.
        workspace: see :func:`lm_head_workspace`.

    On CUDA hidden and weight are aligned to 16 bytes.

    Returns:
        ``ids [N]`` int64 and ``values [N]`` float32.

    Raises:
        ValueError: wrong shape, dtype, device, stride or alignment, or a GPU of compute capability other than 9.0 and
            10.x, or one that the library was not built for.

    Source: as of :func:`lm_head_argmax`, for a head quantised as `compressed-tensors` does it (float-quantized).
    """
    ops = torch.ops.dflash.lm_head_argmax_fp8
    if out is None:
        return ops.default(hidden, hidden_scale, weight, weight_scale, bias, vocab_start)
    if workspace is None:
        raise ValueError("dflash::lm_head_argmax_fp8: workspace must be given together with out, got None")
    ops.out(
        hidden,
        hidden_scale,
        weight,
        weight_scale,
        bias,
        vocab_start,
        ids=out[0],
        values=out[1],
        workspace=workspace,
    )
    return out


def _values(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.float8_e4m3fn).float()


def _cpu(
    hidden: torch.Tensor,
    hidden_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    vocab_start: int = 0,
) -> _Pair:
    """Over blocks of the vocabulary; in torch.argmax's order a later block wins only by more."""
    rows = hidden.shape[0]
    ids, best = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), -torch.inf)
    step = max(1024, _CPU_LOGITS // max(rows, 1))
    x = _values(hidden)
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        logits = (x @ _values(weight[part]).T) * hidden_scale * weight_scale[part].T
        if bias is not None:
            logits += bias[part]
        logits = logits.bfloat16()
        found = logits.argmax(-1)
        values = logits.gather(-1, found[:, None])[:, 0].float()
        better = (values > best) | (values.isnan() & ~best.isnan())
        ids = torch.where(better, found + start, ids)
        best = torch.where(better, values, best)
    return ids + vocab_start, best


@torch.library.register_fake("dflash::lm_head_argmax_fp8")
def _fake(hidden: torch.Tensor, *args: object, **kwargs: object) -> _Pair:
    rows = hidden.shape[0]
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("dflash::lm_head_argmax_fp8.out")
def _out_fake(*args: object, **kwargs: object) -> None:
    return None


@torch.library.impl("dflash::lm_head_argmax_fp8", "CPU")
def _argmax_cpu(*inputs: object, **named: object) -> _Pair:
    torch.ops.dflash._lm_head_argmax_fp8_check(*inputs, **named)
    return _cpu(*inputs, **named)  # type: ignore[arg-type]


@torch.library.impl("dflash::lm_head_argmax_fp8.out", "CPU")
def _argmax_out_cpu(
    *inputs: object, ids: torch.Tensor, values: torch.Tensor, workspace: torch.Tensor, **named: object
) -> None:
    torch.ops.dflash._lm_head_argmax_fp8_check(*inputs, ids=ids, values=values, workspace=workspace, **named)
    for out, result in zip((ids, values), _cpu(*inputs, **named), strict=True):  # type: ignore[arg-type]
        out.copy_(result)

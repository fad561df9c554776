"""The best token of few hidden rows as one kernel over an LM head that is packed once."""

from __future__ import annotations

import torch

from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.head_stream import PackedHead
from dflash_kernels.ops._errors import dflash_errors
from dflash_kernels.ops.head import _argmax, _need
from dflash_kernels.tiles import format_name

__all__ = ["lm_head_argmax_packed", "lm_head_argmax_packed_workspace"]

_Pair = tuple[torch.Tensor, torch.Tensor]


def lm_head_argmax_packed_workspace(packed: PackedHead) -> torch.Tensor:
    """Scratch memory of :func:`lm_head_argmax_packed`, for any number of rows; its content never matters.

    Returns:
        uint8, on the device of the weights.
    """
    size = torch.ops.dflash.lm_head_argmax_packed_workspace(packed.blocks)
    return torch.empty(size, dtype=torch.uint8, device=packed.weights.device)


@dflash_errors
def lm_head_argmax_packed(
    hidden: torch.Tensor,
    packed: PackedHead,
    vocab_start: int = 0,
    *,
    out: _Pair | None = None,
    workspace: torch.Tensor | None = None,
) -> _Pair:
    """:func:`lm_head_argmax` for at most 64 rows, over an LM head of :func:`dflash_kernels.head_stream.pack_head`.

    On CUDA one kernel whose blocks of threads, one a multiprocessor, stream ``packed.weights`` once. Logits and their
    order as there, ``ids`` as well, but where the head holds only some tokens::

        ids[n] = vocab_start + packed.token_ids[v]        v the best row

    Quantised weights are multiplied as codes, which bf16 holds exactly, and scaled in fp32, so that nothing of them is
    rounded. The CPU implementation rounds the dequantised weights to bf16.

    Args:
        hidden: ``[N, H]`` bf16, N <= 64, row stride free. On CUDA: aligned to 16 bytes, the row stride a multiple of 8.
        packed: made for at most as many blocks as the device has multiprocessors. Its counters change: only one launch
            at a time may use it.
        vocab_start: added to every id.
        out: ``ids [N]`` int64 and ``values [N]`` float32 to write; needs ``workspace``.
        workspace: see :func:`lm_head_argmax_packed_workspace`.

    Returns:
        ``ids [N]`` int64 and ``values [N]`` float32.

    Raises:
        ValueError: wrong shape, dtype, device, stride or alignment.
    """
    ops = torch.ops.dflash.lm_head_argmax_packed
    inputs = (
        hidden, packed.weights, format_name(packed.weight_format), packed.units, packed.counters, packed.slots,
        packed.vocab_size, packed.bias, packed.token_ids, vocab_start,
    )  # fmt: skip
    if out is None:
        return ops.default(*inputs)
    ops.out(*inputs, ids=out[0], values=out[1], workspace=_need(workspace, "lm_head_argmax_packed"))
    return out


@torch.library.register_fake("dflash::lm_head_argmax_packed")
def _packed_fake(hidden: torch.Tensor, *args: object) -> _Pair:
    rows = hidden.shape[0]
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("dflash::lm_head_argmax_packed.out")
def _packed_out_fake(*args: object, ids: torch.Tensor, values: torch.Tensor, workspace: torch.Tensor) -> None:
    return None


def _packed_argmax(
    hidden: torch.Tensor,
    weights: torch.Tensor,
    weight_format: str,
    units: torch.Tensor,
    counters: torch.Tensor,
    slots: int,
    vocab_size: int,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    vocab_start: int = 0,
) -> _Pair:
    parsed = None if weight_format == "bf16" else WeightFormat.parse(weight_format)
    head = PackedHead(weights, units, counters, slots, vocab_size, hidden.shape[1], bias, token_ids, parsed)
    weight = head.unpack()
    dense = weight.dequantize(torch.bfloat16) if isinstance(weight, QuantizedWeight) else weight
    ids, values = _argmax(hidden, dense, bias, 0)
    return vocab_start + (ids if token_ids is None else token_ids[ids]), values


@torch.library.impl("dflash::lm_head_argmax_packed", "CPU")
def _packed_cpu(*inputs: object) -> _Pair:
    torch.ops.dflash._lm_head_argmax_packed_check(*inputs)
    return _packed_argmax(*inputs)  # type: ignore[arg-type]


@torch.library.impl("dflash::lm_head_argmax_packed.out", "CPU")
def _packed_out_cpu(*inputs: object, ids: torch.Tensor, values: torch.Tensor, workspace: torch.Tensor) -> None:
    torch.ops.dflash._lm_head_argmax_packed_check(*inputs, ids=ids, values=values, workspace=workspace)
    for out, result in zip((ids, values), _packed_argmax(*inputs), strict=True):  # type: ignore[arg-type]
        out.copy_(result)

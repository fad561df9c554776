"""The drafter's forward pass for few rows as one kernel, over weights that are packed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dflash_kernels.draft_stream import Exchange, PackedDraft
from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.ops._errors import dflash_errors
from dflash_kernels.ops.draft import _forward_cpu
from dflash_kernels.tiles import format_name

__all__ = [
    "draft_exchange_words",
    "draft_forward_packed",
    "draft_forward_packed_workspace",
    "draft_forward_sharded",
]


@dflash_errors
def draft_forward_packed_workspace(batch: int, block_size: int, packed: PackedDraft) -> int:
    """Bytes of workspace that :func:`draft_forward_packed` needs for B blocks of T tokens; never fewer as B grows.

    Raises:
        ValueError: ``block_size`` below 1 or ``batch`` below 0.
    """
    return torch.ops.dflash.draft_forward_packed_workspace(
        batch,
        block_size,
        packed.hidden_size,
        packed.intermediate_size,
        packed.num_q_heads,
        packed.num_kv_heads,
        packed.head_dim,
    )


@dflash_errors
def draft_forward_packed(
    block_ids: torch.Tensor,
    positions: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    embed_weight: torch.Tensor,
    input_norm: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    o_bias: torch.Tensor | None,
    post_norm: torch.Tensor,
    final_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    packed: PackedDraft,
    windows: Sequence[int],
    causal: Sequence[int],
    eps: float,
    softmax_scale: float | None = None,
    *,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`draft_forward` for B * T <= 64 rows, bfloat16, D 64 or 128, at most 64 layers.

    On CUDA one kernel whose blocks of threads, one a multiprocessor, stay for the whole pass and stream
    ``packed.weights`` (:func:`dflash_kernels.draft_stream.pack_draft`) without a pause between the layers. Arguments,
    result and formula as there, with the four matrices of every layer in `packed`; intermediate results are rounded at
    the same places, except that an output of o_proj and down_proj is rounded once, after the residual is added.

    Quantised weights are multiplied as codes, which bf16 holds exactly, and scaled in fp32: nothing of them is rounded.
    The CPU implementation dequantises them to bf16.

    Args:
        packed: made for these sizes and for at most as many blocks as the device has multiprocessors. Its counters
            change: only one launch at a time may use it.
        workspace: uint8, at least :func:`draft_forward_packed_workspace` bytes; needed with ``out``. Overwritten.

    Raises:
        ValueError: as :func:`draft_forward`, and where the kernel is not made for the sizes
            (:func:`dflash_kernels.draft_stream.why_not_packed` says so beforehand).
    """
    inputs = (
        block_ids, positions, prefix_lens, req_pool_indices, req_to_token, list(k_caches), list(v_caches), embed_weight,
        input_norm, qkv_bias, q_norm, k_norm, o_bias, post_norm, final_norm, cos_sin, *_of_packed(packed),
        list(windows), list(causal), eps, softmax_scale,
    )  # fmt: skip
    return _call("draft_forward_packed", inputs, out, workspace)


@dflash_errors
def draft_exchange_words(world: int, hidden_size: int) -> int:
    """int32 elements of :attr:`Exchange.words` that :func:`draft_forward_sharded` needs for `world` ranks.

    Raises:
        ValueError: ``world`` not in 1..8 or ``hidden_size`` no multiple of 8.
    """
    return torch.ops.dflash.draft_exchange_words(world, hidden_size)


@dflash_errors
def draft_forward_sharded(
    block_ids: torch.Tensor,
    positions: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    embed_weight: torch.Tensor,
    input_norm: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    o_bias: torch.Tensor | None,
    post_norm: torch.Tensor,
    final_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    packed: PackedDraft,
    windows: Sequence[int],
    causal: Sequence[int],
    eps: float,
    exchange: Exchange,
    vocab_start: int,
    vocab_size: int,
    softmax_scale: float | None = None,
    *,
    patience: float = 60.0,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """One rank's part of :func:`draft_forward_packed`, with the sums over the ranks inside the kernel.

    `packed`, the caches and ``qkv_bias`` are of this rank's heads and MLP features (:mod:`dflash_kernels.model.shard`);
    ``embed_weight`` holds rows ``vocab_start ..`` of the vocabulary; norms and ``o_bias`` are whole, the same on all
    ranks. Every rank must make the same call, with its own part, and gets the whole ``[B * T, H]``, the same bits on
    all of them: parts of o_proj and down_proj are added in fp32, in the order of ranks, and rounded once, after the
    residual. One call at a time.

    CUDA only: the ranks' kernels run at the same time and write to each other's `exchange`. The CPU takes one rank;
    several take :func:`draft_attention` and :func:`draft_mlp`.

    Args:
        exchange: of as many ranks, filled with -1 by all of them before the first call. Its words change.
        vocab_size: of all ranks together. Each id in it must be in one rank's part.
        patience: seconds after which a rank that waits for another ends the kernel, and the process's use of the GPU,
            with an error.
        workspace: as there.

    Raises:
        ValueError: as :func:`draft_forward_packed`; an exchange that is too small or not this rank's; several ranks
            on the CPU.
    """
    inputs = (
        block_ids, positions, prefix_lens, req_pool_indices, req_to_token, list(k_caches), list(v_caches), embed_weight,
        input_norm, qkv_bias, q_norm, k_norm, o_bias, post_norm, final_norm, cos_sin, *_of_packed(packed),
        list(windows), list(causal), eps, softmax_scale,
        exchange.words, list(exchange.addresses), exchange.rank, exchange.one_device, vocab_start,
        vocab_size, patience,
    )  # fmt: skip
    return _call("draft_forward_sharded", inputs, out, workspace)


def _of_packed(packed: PackedDraft) -> tuple[object, ...]:
    return (
        packed.weights, format_name(packed.weight_format), packed.units, packed.counters, packed.slots,
        packed.num_q_heads, packed.intermediate_size,
    )  # fmt: skip


def _call(
    op: str, inputs: tuple[object, ...], out: torch.Tensor | None, workspace: torch.Tensor | None
) -> torch.Tensor:
    overloads = getattr(torch.ops.dflash, op)
    if (out is None) != (workspace is None):
        given, missing = ("out", "workspace") if workspace is None else ("workspace", "out")
        raise ValueError(f"dflash::{op}: {missing} must be given together with {given}, got None")
    if out is None:
        return overloads.default(*inputs)
    overloads.out(*inputs, out=out, workspace=workspace)
    return out


@torch.library.register_fake("dflash::draft_forward_sharded")
@torch.library.register_fake("dflash::draft_forward_packed")
def _packed_fake(block_ids: torch.Tensor, *args: object) -> torch.Tensor:
    embed_weight = args[6]
    assert isinstance(embed_weight, torch.Tensor)
    return embed_weight.new_empty((block_ids.shape[0] * block_ids.shape[1], embed_weight.shape[1]))


@torch.library.register_fake("dflash::draft_forward_sharded.out")
@torch.library.register_fake("dflash::draft_forward_packed.out")
def _packed_out_fake(*args: object, out: torch.Tensor, workspace: torch.Tensor) -> None:
    return None


def _packed_cpu(*inputs: Any) -> torch.Tensor:
    (
        *index_and_embedding, input_norm, qkv_bias, q_norm, k_norm, o_bias, post_norm, final_norm, cos_sin,
        weights, weight_format, units, counters, slots, num_q_heads, intermediate_size,
        windows, causal, eps, softmax_scale,
    ) = inputs  # fmt: skip
    k_caches, embed_weight = index_and_embedding[5], index_and_embedding[7]
    _, num_kv_heads, head_dim = k_caches[0].shape
    sizes = (embed_weight.shape[1], intermediate_size, num_q_heads, num_kv_heads, head_dim, len(windows))
    parsed = None if weight_format == "bf16" else WeightFormat.parse(weight_format)
    matrices = PackedDraft(weights, units, counters, slots, *sizes, parsed).unpack()
    dense = (w.dequantize(torch.bfloat16) if isinstance(w, QuantizedWeight) else w for w in matrices)
    qkv_weight, o_weight, gate_up_weight, down_weight = dense
    arguments = (
        *index_and_embedding, input_norm, qkv_weight, qkv_bias, q_norm, k_norm, o_weight, o_bias, post_norm,
        gate_up_weight, down_weight, final_norm, cos_sin, windows, causal, eps, softmax_scale,
    )  # fmt: skip
    return _forward_cpu(*arguments)


@torch.library.impl("dflash::draft_forward_packed", "CPU")
def _draft_forward_packed_cpu(*inputs: object) -> torch.Tensor:
    arguments = (*inputs, None) if len(inputs) == 26 else inputs  # the dispatcher may leave out a default
    torch.ops.dflash._draft_forward_packed_check(*arguments)
    return _packed_cpu(*arguments)


@torch.library.impl("dflash::draft_forward_packed.out", "CPU")
def _draft_forward_packed_out_cpu(*inputs: object, out: torch.Tensor, workspace: torch.Tensor) -> None:
    arguments = (*inputs, None) if len(inputs) == 26 else inputs
    torch.ops.dflash._draft_forward_packed_check(*arguments, out=out, workspace=workspace)
    out.copy_(_packed_cpu(*arguments))


_RANKS = 7  # arguments of draft_forward_sharded behind those of draft_forward_packed


def _alone_cpu(inputs: tuple[Any, ...]) -> torch.Tensor:
    peers = inputs[-_RANKS + 1]
    if len(peers) > 1:
        raise RuntimeError(f"dflash::draft_forward_sharded: peers must be one address on the CPU, got {len(peers)}")
    return _packed_cpu(*inputs[:-_RANKS])


@torch.library.impl("dflash::draft_forward_sharded", "CPU")
def _draft_forward_sharded_cpu(*inputs: object) -> torch.Tensor:
    torch.ops.dflash._draft_forward_sharded_check(*inputs)
    return _alone_cpu(inputs)


@torch.library.impl("dflash::draft_forward_sharded.out", "CPU")
def _draft_forward_sharded_out_cpu(*inputs: object, out: torch.Tensor, workspace: torch.Tensor) -> None:
    torch.ops.dflash._draft_forward_sharded_check(*inputs, out=out, workspace=workspace)
    out.copy_(_alone_cpu(inputs))

"""The two halves of one drafter layer, between which a tensor-parallel drafter adds up its ranks' parts."""

from __future__ import annotations

import torch

from dflash_kernels.ops._errors import dflash_errors
from dflash_kernels.ops.draft import _attention_cpu, _mlp_cpu

__all__ = ["draft_attention", "draft_mlp"]


@dflash_errors
def draft_attention(
    x: torch.Tensor,
    positions: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    input_norm: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    o_weight: torch.Tensor,
    o_bias: torch.Tensor | None,
    cos_sin: torch.Tensor,
    window: int,
    causal: bool,
    eps: float,
    softmax_scale: float | None = None,
    add_x: bool = True,
    *,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first half of a layer of :func:`draft_forward`::

        q, k, v = rmsnorm(x, input_norm) @ qkv_weight.T + qkv_bias
        q, k    = rope(rmsnorm(q, q_norm)), rope(rmsnorm(k, k_norm))                   per head
        out     = [x +] attention(q, [context K, k], [context V, v]) @ o_weight.T + o_bias

    A rank of a tensor-parallel drafter gives its heads' rows of ``qkv_weight`` and columns of ``o_weight``; the sum of
    all ranks' ``out``, one of them with ``add_x`` and ``o_bias``, is the next ``x``.

    Args:
        x: ``[B * T, H]``, the residual stream, contiguous; bfloat16, on the CPU also float32.
        k_cache, v_cache: ``[S, Hkv, D]`` of this layer; input_norm: ``[H]``; qkv_weight: ``[(Hq + 2 Hkv) D, H]``;
            qkv_bias: ``[(Hq + 2 Hkv) D]`` or None; q_norm, k_norm: ``[D]`` or None; o_weight: ``[H, Hq D]``;
            o_bias: ``[H]`` or None. Otherwise as :func:`draft_forward`, as are all other arguments.
        add_x: whether ``out`` holds ``x`` too (then rounded once more).
        out: contiguous ``[B * T, H]`` to write, which may be ``x``; then nothing is allocated on CUDA.
        workspace: uint8, at least :func:`draft_forward_workspace` bytes of these sizes; needed with ``out``.

    Returns:
        ``[B * T, H]``, in the dtype of ``x``.

    Raises:
        ValueError: as :func:`draft_forward`.
    """
    inputs = (
        *(x, positions, prefix_lens, req_pool_indices, req_to_token, k_cache, v_cache, input_norm, qkv_weight),
        *(qkv_bias, q_norm, k_norm, o_weight, o_bias, cos_sin, window, causal, eps, softmax_scale, add_x),
    )
    ops = torch.ops.dflash.draft_attention
    _need_both("draft_attention", out, workspace)
    if out is None:
        return ops.default(*inputs)
    ops.out(*inputs, out=out, workspace=workspace)
    return out


@dflash_errors
def draft_mlp(
    x: torch.Tensor,
    post_norm: torch.Tensor,
    gate_up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    eps: float,
    add_x: bool = True,
    *,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """The second half of a layer of :func:`draft_forward`::

        g, u = rmsnorm(x, post_norm) @ gate_up_weight.T
        out  = [x +] (silu(g) * u) @ down_weight.T

    Args:
        x: ``[N, H]``, contiguous; bfloat16, on the CPU also float32.
        post_norm: ``[H]``; gate_up_weight: ``[2 I, H]``, gate rows first; down_weight: ``[H, I]``, I a multiple of 8.
        add_x, out: see :func:`draft_attention`.
        workspace: uint8, at least ``2 * N * (H + I) + 256`` bytes; needed with ``out``. That of :func:`draft_forward`
            will do.

    Returns:
        ``[N, H]``, in the dtype of ``x``.

    Raises:
        ValueError: wrong shape, dtype, device, stride or size; ``out`` without ``workspace`` or the reverse.
    """
    inputs = (x, post_norm, gate_up_weight, down_weight, eps, add_x)
    ops = torch.ops.dflash.draft_mlp
    _need_both("draft_mlp", out, workspace)
    if out is None:
        return ops.default(*inputs)
    ops.out(*inputs, out=out, workspace=workspace)
    return out


def _need_both(op: str, out: torch.Tensor | None, workspace: torch.Tensor | None) -> None:
    if (out is None) != (workspace is None):
        given, missing = ("out", "workspace") if workspace is None else ("workspace", "out")
        raise ValueError(f"dflash::{op}: {missing} must be given together with {given}, got None")


@torch.library.register_fake("dflash::draft_attention")
@torch.library.register_fake("dflash::draft_mlp")
def _fake(x: torch.Tensor, *args: object) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("dflash::draft_attention.out")
@torch.library.register_fake("dflash::draft_mlp.out")
def _out_fake(*args: object, out: torch.Tensor, workspace: torch.Tensor) -> None:
    return None


@torch.library.impl("dflash::draft_attention", "CPU")
def _draft_attention_cpu(*inputs: object) -> torch.Tensor:
    torch.ops.dflash._draft_attention_check(*inputs)
    return _attention_cpu(*inputs)  # type: ignore[arg-type]


@torch.library.impl("dflash::draft_attention.out", "CPU")
def _draft_attention_out_cpu(*inputs: object, out: torch.Tensor, workspace: torch.Tensor) -> None:
    torch.ops.dflash._draft_attention_check(*inputs, out=out, workspace=workspace)
    out.copy_(_attention_cpu(*inputs))  # type: ignore[arg-type]


@torch.library.impl("dflash::draft_mlp", "CPU")
def _draft_mlp_cpu(*inputs: object) -> torch.Tensor:
    torch.ops.dflash._draft_mlp_check(*inputs)
    return _mlp_cpu(*inputs)  # type: ignore[arg-type]


@torch.library.impl("dflash::draft_mlp.out", "CPU")
def _draft_mlp_out_cpu(*inputs: object, out: torch.Tensor, workspace: torch.Tensor) -> None:
    torch.ops.dflash._draft_mlp_check(*inputs, out=out, workspace=workspace)
    out.copy_(_mlp_cpu(*inputs))  # type: ignore[arg-type]

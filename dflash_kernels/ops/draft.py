"""The drafter's forward pass over one block a request, from token ids to the final norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dflash_kernels.formats import NVFP4_GROUP, QuantizedWeight, WeightFormat, plain_scales
from dflash_kernels.ops._errors import dflash_errors
from dflash_kernels.ops.gemm import nvfp4_values

__all__ = [
    "draft_forward",
    "draft_forward_fp8",
    "draft_forward_fp8_supported",
    "draft_forward_fp8_workspace",
    "draft_forward_nvfp4",
    "draft_forward_nvfp4_workspace",
    "draft_forward_workspace",
]


@dflash_errors
def draft_forward_workspace(
    batch: int,
    block_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> int:
    """Bytes of workspace that :func:`draft_forward` needs for these sizes (B, T, H, I, Hq, Hkv, D).

    It holds the activations of one layer, the block's own K and V among them, and the partial results of the splits of
    the attention. More is fine, and it never shrinks as the batch grows: the workspace of a batch serves all smaller
    ones. The same on every device.

    Raises:
        ValueError: a size below 1, ``batch`` below 0, or query heads that the KV heads do not divide.
    """
    return torch.ops.dflash.draft_forward_workspace(
        batch, block_size, hidden_size, intermediate_size, num_q_heads, num_kv_heads, head_dim
    )


@dflash_errors
def draft_forward(
    block_ids: torch.Tensor,
    positions: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    embed_weight: torch.Tensor,
    input_norm: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    o_weight: torch.Tensor,
    o_bias: torch.Tensor | None,
    post_norm: torch.Tensor,
    gate_up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    final_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    windows: Sequence[int],
    causal: Sequence[int],
    eps: float,
    softmax_scale: float | None = None,
    *,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden rows of every block token after L drafter layers and the final norm.

    With ``x = embed_weight[block_ids]``, for each layer::

        q, k, v = rmsnorm(x, input_norm) @ qkv_weight.T + qkv_bias
        q, k    = rope(rmsnorm(q, q_norm)), rope(rmsnorm(k, k_norm))                   per head
        x      += attention(q, [context K, k], [context V, v]) @ o_weight.T + o_bias
        g, u    = rmsnorm(x, post_norm) @ gate_up_weight.T
        x      += (silu(g) * u) @ down_weight.T

    Context key j of request b is ``k_caches[l][req_to_token[req_pool_indices[b], j]]``, j < ``prefix_lens[b]``, already
    normed and rotated (:func:`inject_kv` writes it). A query at q sees it if ``window == 0 or q - j < window``. It sees
    its block's own key at position p if ``(not causal or p <= q) and (window == 0 or |q - p| < window)``. The
    block's own K and V are not written to the caches. Softmax and sums are in float32; results of each line above, the
    normed q and k and the rotated q and k are rounded to the dtype of the weights.

    Args:
        block_ids, positions: ``[B, T]`` int32 or int64, T <= 32; positions index ``cos_sin``.
        prefix_lens, req_pool_indices: ``[B]`` int32 or int64.
        req_to_token: ``[R, W]`` int32 or int64, any strides.
        k_caches, v_caches: L tensors ``[S, Hkv, D]``, slots strided (by a multiple of 8 elements), the rest contiguous.
            D is 32, 64, 96, 128 or 256. Slots beyond a prefix or outside every window are not read.
        embed_weight: ``[V, H]``; its dtype, bfloat16 (on the CPU also float32), is that of all weights and caches.
        input_norm, post_norm: ``[L, H]``; final_norm: ``[H]``; q_norm, k_norm: ``[L, D]`` or None.
        qkv_weight: ``[L, (Hq + 2 Hkv) D, H]``, q rows first, then k, then v; qkv_bias: ``[L, (Hq + 2 Hkv) D]`` or None.
        o_weight: ``[L, H, Hq D]``; o_bias: ``[L, H]`` or None.
        gate_up_weight: ``[L, 2 I, H]``, gate rows first; down_weight: ``[L, H, I]``. H and I are multiples of 8.
        cos_sin: ``[P, R]`` float32, R/2 cosines, then R/2 sines; rotates the pairs (i, i + R/2), i < R/2, R <= D.
        windows: L window lengths in tokens, 0 for none; causal: L flags, 0 or 1.
        eps: of all norms; softmax_scale: default ``D ** -0.5``.
        out: contiguous ``[B * T, H]`` to write instead of a new tensor; then nothing is allocated on CUDA.
        workspace: uint8, at least :func:`draft_forward_workspace` bytes; needed with ``out``. Overwritten.

    Returns:
        ``[B * T, H]``, row ``b * T + t``, in the dtype of the weights.

    Raises:
        ValueError: wrong shape, dtype, device, stride or size; ``out`` without ``workspace`` or the reverse; on the CPU
            (on CUDA only under DFLASH_DEBUG=1) also an id, position, length, row or slot out of range. Unchecked, such
            an id or slot gives zeros, lengths and positions are clamped, and a row outside the table has no context.

    Source: the published DFlash model (PyPI ``dflash``, ``DFlashDraftModel``) with the context already projected.
    """
    ops = torch.ops.dflash.draft_forward
    inputs = (
        block_ids,
        positions,
        prefix_lens,
        req_pool_indices,
        req_to_token,
        list(k_caches),
        list(v_caches),
        embed_weight,
        input_norm,
        qkv_weight,
        qkv_bias,
        q_norm,
        k_norm,
        o_weight,
        o_bias,
        post_norm,
        gate_up_weight,
        down_weight,
        final_norm,
        cos_sin,
        list(windows),
        list(causal),
        eps,
        softmax_scale,
    )
    if (out is None) != (workspace is None):
        given, missing = ("out", "workspace") if workspace is None else ("workspace", "out")
        raise ValueError(f"dflash::draft_forward: {missing} must be given together with {given}, got None")
    if out is None:
        return ops.default(*inputs)
    ops.out(*inputs, out=out, workspace=workspace)
    return out


def draft_forward_fp8_supported(device: torch.device | str) -> bool:
    """Whether :func:`draft_forward_fp8` runs on `device`: the CPU, and CUDA devices whose tensor cores multiply fp8 by
    this library's kernels (compute capability 9.0 and 10.x)."""
    device = torch.device(device)
    if device.type != "cuda":
        return device.type == "cpu"
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.ops.dflash.draft_forward_fp8_supported(index)


@dflash_errors
def draft_forward_fp8_workspace(
    batch: int,
    block_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> int:
    """Bytes of workspace that :func:`draft_forward_fp8` needs; never less than :func:`draft_forward_workspace`, and
    otherwise as that.

    Raises:
        ValueError: a size below 1, ``batch`` below 0, or query heads that the KV heads do not divide.
    """
    return torch.ops.dflash.draft_forward_fp8_workspace(
        batch, block_size, hidden_size, intermediate_size, num_q_heads, num_kv_heads, head_dim
    )


@dflash_errors
def draft_forward_fp8(
    block_ids: torch.Tensor,
    positions: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    embed_weight: torch.Tensor,
    input_norm: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_scale: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    o_weight: torch.Tensor,
    o_scale: torch.Tensor,
    o_bias: torch.Tensor | None,
    post_norm: torch.Tensor,
    gate_up_weight: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_weight: torch.Tensor,
    down_scale: torch.Tensor,
    final_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    windows: Sequence[int],
    causal: Sequence[int],
    eps: float,
    softmax_scale: float | None = None,
    *,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`draft_forward` with fp8 weights and, in the four products of a layer, fp8 activations.

    Each product ``x @ weight.T`` is, with ``codes, scale =`` :func:`quantize_rows` ``(x)``::

        scale[m] * weight_scale[n] * sum_k codes[m, k] * weight[n, k]          sums in float32, then rounded as there

    On CUDA the sums are those of :func:`gemm_fp8`, whose precision on Hopper it tells. Attention, norms, residual and
    caches are those of :func:`draft_forward`. The input of a product loses more than by rounding to bf16, so drafted
    tokens may differ from those of the kernel that streams the same weights.

    Args:
        qkv_weight, o_weight, gate_up_weight, down_weight: uint8 codes of float8_e4m3fn in the shapes of
            :func:`draft_forward`; H and I are multiples of 16, H, I and Hq D at most 32768.
        qkv_scale, o_scale, gate_up_scale, down_scale: float32 ``[L, N, 1]`` for a weight ``[L, N, K]``.
        workspace: uint8, at least :func:`draft_forward_fp8_workspace` bytes; needed with ``out``. Overwritten.

        All others: as :func:`draft_forward`, where "the dtype of the weights" is that of ``embed_weight``.

    Returns:
        ``[B * T, H]``, row ``b * T + t``, in the dtype of ``embed_weight``.

    Raises:
        ValueError: as :func:`draft_forward`, and on a device that :func:`draft_forward_fp8_supported` says no to.
    """
    ops = torch.ops.dflash.draft_forward_fp8
    inputs = (
        block_ids,
        positions,
        prefix_lens,
        req_pool_indices,
        req_to_token,
        list(k_caches),
        list(v_caches),
        embed_weight,
        input_norm,
        qkv_weight,
        qkv_scale,
        qkv_bias,
        q_norm,
        k_norm,
        o_weight,
        o_scale,
        o_bias,
        post_norm,
        gate_up_weight,
        gate_up_scale,
        down_weight,
        down_scale,
        final_norm,
        cos_sin,
        list(windows),
        list(causal),
        eps,
        softmax_scale,
    )
    if (out is None) != (workspace is None):
        given, missing = ("out", "workspace") if workspace is None else ("workspace", "out")
        raise ValueError(f"dflash::draft_forward_fp8: {missing} must be given together with {given}, got None")
    if out is None:
        return ops.default(*inputs)
    ops.out(*inputs, out=out, workspace=workspace)
    return out


@dflash_errors
def draft_forward_nvfp4_workspace(
    batch: int,
    block_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> int:
    """Bytes of workspace that :func:`draft_forward_nvfp4` needs; otherwise as :func:`draft_forward_fp8_workspace`.

    Raises:
        ValueError: a size below 1, ``batch`` below 0, or query heads that the KV heads do not divide.
    """
    return torch.ops.dflash.draft_forward_nvfp4_workspace(
        batch, block_size, hidden_size, intermediate_size, num_q_heads, num_kv_heads, head_dim
    )


@dflash_errors
def draft_forward_nvfp4(
    block_ids: torch.Tensor,
    positions: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    embed_weight: torch.Tensor,
    input_norm: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_scale: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    o_weight: torch.Tensor,
    o_scale: torch.Tensor,
    o_bias: torch.Tensor | None,
    post_norm: torch.Tensor,
    gate_up_weight: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_weight: torch.Tensor,
    down_scale: torch.Tensor,
    final_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    windows: Sequence[int],
    causal: Sequence[int],
    eps: float,
    softmax_scale: float | None = None,
    *,
    blocks: Sequence[torch.Tensor],
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`draft_forward_fp8` in NVFP4: the four products of a layer are those of :func:`gemm_nvfp4`, their inputs
    rounded by :func:`quantize_rows_nvfp4`.

    Args:
        qkv_weight, o_weight, gate_up_weight, down_weight: uint8, two codes of e2m1 a byte, ``[L, N, K / 2]``; H and I
            are multiples of 32, H, I and Hq D at most 32768.
        qkv_scale, o_scale, gate_up_scale, down_scale: float32 ``[L, N, 1]``, one over the ``global_scale``.
        blocks: scales of groups of the four, :func:`dflash_kernels.formats.scale_blocks` of ``[L, N, K / 16]``, of
            gate_up with ``gated``.
        workspace: uint8, at least :func:`draft_forward_nvfp4_workspace` bytes; needed with ``out``. Overwritten.

        All others: as :func:`draft_forward_fp8`.

    Returns:
        ``[B * T, H]``, row ``b * T + t``, in the dtype of ``embed_weight``.

    Raises:
        ValueError: as :func:`draft_forward`, and on a device that :func:`gemm_nvfp4_supported` says no to.
    """
    ops = torch.ops.dflash.draft_forward_nvfp4
    inputs = (
        block_ids,
        positions,
        prefix_lens,
        req_pool_indices,
        req_to_token,
        list(k_caches),
        list(v_caches),
        embed_weight,
        input_norm,
        qkv_weight,
        qkv_scale,
        qkv_bias,
        q_norm,
        k_norm,
        o_weight,
        o_scale,
        o_bias,
        post_norm,
        gate_up_weight,
        gate_up_scale,
        down_weight,
        down_scale,
        final_norm,
        cos_sin,
        list(windows),
        list(causal),
        eps,
        softmax_scale,
    )
    if (out is None) != (workspace is None):
        given, missing = ("out", "workspace") if workspace is None else ("workspace", "out")
        raise ValueError(f"dflash::draft_forward_nvfp4: {missing} must be given together with {given}, got None")
    if out is None:
        return ops.default(*inputs, blocks=list(blocks))
    ops.out(*inputs, blocks=list(blocks), out=out, workspace=workspace)
    return out


@torch.library.register_fake("dflash::draft_forward")
@torch.library.register_fake("dflash::draft_forward_fp8")
@torch.library.register_fake("dflash::draft_forward_nvfp4")
def _draft_forward_fake(block_ids: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    embed_weight = args[6]
    assert isinstance(embed_weight, torch.Tensor)
    return embed_weight.new_empty((block_ids.shape[0] * block_ids.shape[1], embed_weight.shape[1]))


@torch.library.register_fake("dflash::draft_forward.out")
@torch.library.register_fake("dflash::draft_forward_fp8.out")
@torch.library.register_fake("dflash::draft_forward_nvfp4.out")
def _draft_forward_out_fake(*args: object, out: torch.Tensor, workspace: torch.Tensor, **kwargs: object) -> None:
    return None


def _rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def _linear(x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``, with codes on both sides where the weight is quantised, in fp8 or nvfp4."""
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight, bias)
    if weight.global_scale is not None:
        codes, blocks, scale = torch.ops.dflash.quantize_rows_nvfp4(x)
        out = nvfp4_values(codes, blocks) @ weight.dequantize().T * scale
    else:
        codes, scale = torch.ops.dflash.quantize_rows(x)
        out = codes.view(torch.float8_e4m3fn).float() @ weight.values().T * (scale * weight.scale.T)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, T, heads, D] with cos, sin [B, T, 1, R/2] float32."""
    half = cos.shape[-1]
    first, second, rest = x.float().split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x.dtype)


def _visible(positions: torch.Tensor, low: int, prefix: int, window: int, causal: bool) -> torch.Tensor | None:
    """Mask [T, context from low on + T] of one request, or None where everything is visible."""
    if window == 0 and not causal:
        return None
    query = positions[:, None]
    context = torch.arange(low, prefix)[None]
    distance = query - positions[None]
    context_mask = query - context < window if window else torch.ones(len(positions), prefix - low, dtype=torch.bool)
    own_mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        own_mask = own_mask & (distance.abs() < window)
    return torch.cat((context_mask, own_mask), dim=1)


def _attention_cpu(
    x: torch.Tensor,
    positions: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    input_norm: torch.Tensor,
    qkv_weight: torch.Tensor | QuantizedWeight,
    qkv_bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    o_weight: torch.Tensor | QuantizedWeight,
    o_bias: torch.Tensor | None,
    cos_sin: torch.Tensor,
    window: int,
    causal: bool,
    eps: float,
    softmax_scale: float | None,
    add_x: bool,
) -> torch.Tensor:
    """The attention half of a layer, added to ``x`` [B * T, H] or by itself."""
    batch, block = positions.shape
    kv_heads, head_dim = k_cache.shape[1:]
    q_heads = qkv_weight.shape[0] // head_dim - 2 * kv_heads
    half = cos_sin.shape[1] // 2
    table = cos_sin[positions.long()][:, :, None]  # [B, T, 1, R]
    cos, sin = table[..., :half], table[..., half:]
    prefixes, rows = prefix_lens.tolist(), req_pool_indices.tolist()
    starts = positions.amin(1).tolist() if batch else []
    qkv = _linear(_rmsnorm(x, input_norm, eps), qkv_weight, qkv_bias)
    q, k, v = qkv.view(batch, block, q_heads + 2 * kv_heads, head_dim).split((q_heads, kv_heads, kv_heads), dim=2)
    q = _rotate(q if q_norm is None else _rmsnorm(q, q_norm, eps), cos, sin)
    k = _rotate(k if k_norm is None else _rmsnorm(k, k_norm, eps), cos, sin)
    attended = torch.empty(batch, block, q_heads, head_dim, dtype=x.dtype)
    for b in range(batch):
        low = min(max(starts[b] - window + 1, 0), prefixes[b]) if window else 0
        slots = req_to_token[rows[b], low : prefixes[b]].long()
        keys = torch.cat((k_cache[slots], k[b])).transpose(0, 1)[None]
        values = torch.cat((v_cache[slots], v[b])).transpose(0, 1)[None]
        attended[b] = F.scaled_dot_product_attention(
            q[b].transpose(0, 1)[None],
            keys,
            values,
            attn_mask=_visible(positions[b].long(), low, prefixes[b], window, causal),
            scale=softmax_scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    part = _linear(attended.view(batch * block, q_heads * head_dim), o_weight, o_bias)
    return x + part if add_x else part


def _mlp_cpu(
    x: torch.Tensor,
    post_norm: torch.Tensor,
    gate_up_weight: torch.Tensor | QuantizedWeight,
    down_weight: torch.Tensor | QuantizedWeight,
    eps: float,
    add_x: bool,
) -> torch.Tensor:
    """The MLP half of a layer, added to ``x`` [N, H] or by itself."""
    gate, up = _linear(_rmsnorm(x, post_norm, eps), gate_up_weight).float().chunk(2, dim=-1)
    part = _linear((F.silu(gate) * up).to(x.dtype), down_weight)
    return x + part if add_x else part


def _forward_cpu(
    block_ids: torch.Tensor,
    positions: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    k_caches: list[torch.Tensor],
    v_caches: list[torch.Tensor],
    embed_weight: torch.Tensor,
    input_norm: torch.Tensor,
    qkv_weight: torch.Tensor | QuantizedWeight,
    qkv_bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    o_weight: torch.Tensor | QuantizedWeight,
    o_bias: torch.Tensor | None,
    post_norm: torch.Tensor,
    gate_up_weight: torch.Tensor | QuantizedWeight,
    down_weight: torch.Tensor | QuantizedWeight,
    final_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    windows: list[int],
    causal: list[int],
    eps: float,
    softmax_scale: float | None,
) -> torch.Tensor:
    def of(stack: torch.Tensor | None, layer: int) -> torch.Tensor | None:
        return None if stack is None else stack[layer]

    x = F.embedding(block_ids.reshape(-1).long(), embed_weight)
    for i, (window, is_causal) in enumerate(zip(windows, causal, strict=True)):
        x = _attention_cpu(
            x,
            positions,
            prefix_lens,
            req_pool_indices,
            req_to_token,
            k_caches[i],
            v_caches[i],
            input_norm[i],
            qkv_weight[i],
            of(qkv_bias, i),
            of(q_norm, i),
            of(k_norm, i),
            o_weight[i],
            of(o_bias, i),
            cos_sin,
            window,
            bool(is_causal),
            eps,
            softmax_scale,
            True,
        )
        x = _mlp_cpu(x, post_norm[i], gate_up_weight[i], down_weight[i], eps, True)
    return _rmsnorm(x, final_norm, eps)


@torch.library.impl("dflash::draft_forward", "CPU")
def _draft_forward_cpu(*inputs: object) -> torch.Tensor:
    arguments = (*inputs, None) if len(inputs) == 23 else inputs  # the dispatcher may leave out a default
    torch.ops.dflash._draft_forward_check(*arguments)
    return _forward_cpu(*arguments)  # type: ignore[arg-type]


@torch.library.impl("dflash::draft_forward.out", "CPU")
def _draft_forward_out_cpu(*inputs: object, out: torch.Tensor, workspace: torch.Tensor) -> None:
    arguments = (*inputs, None) if len(inputs) == 23 else inputs
    torch.ops.dflash._draft_forward_check(*arguments, out=out, workspace=workspace)
    out.copy_(_forward_cpu(*arguments))  # type: ignore[arg-type]


def _from_codes(inputs: Sequence[object]) -> list[object]:
    """Arguments of :func:`_forward_cpu` from those of ``draft_forward_fp8``: each scale with its codes."""
    arguments = list(inputs)
    for at in (20, 18, 14, 9):
        codes, scale = arguments[at : at + 2]
        assert isinstance(codes, torch.Tensor) and isinstance(scale, torch.Tensor)
        arguments[at : at + 2] = [QuantizedWeight(WeightFormat("fp8"), codes, scale)]
    return arguments


@torch.library.impl("dflash::draft_forward_fp8", "CPU")
def _draft_forward_fp8_cpu(*inputs: object) -> torch.Tensor:
    arguments = (*inputs, None) if len(inputs) == 27 else inputs
    torch.ops.dflash._draft_forward_fp8_check(*arguments)
    return _forward_cpu(*_from_codes(arguments))  # type: ignore[arg-type]


@torch.library.impl("dflash::draft_forward_fp8.out", "CPU")
def _draft_forward_fp8_out_cpu(*inputs: object, out: torch.Tensor, workspace: torch.Tensor) -> None:
    arguments = (*inputs, None) if len(inputs) == 27 else inputs
    torch.ops.dflash._draft_forward_fp8_check(*arguments, out=out, workspace=workspace)
    out.copy_(_forward_cpu(*_from_codes(arguments)))  # type: ignore[arg-type]


def _from_nvfp4(inputs: Sequence[object], blocks: Sequence[torch.Tensor]) -> list[object]:
    """The same from those of ``draft_forward_nvfp4``."""
    arguments = list(inputs)
    for at, of_groups in zip((20, 18, 14, 9), reversed(blocks), strict=True):
        codes, scale = arguments[at : at + 2]
        assert isinstance(codes, torch.Tensor) and isinstance(scale, torch.Tensor)
        groups = plain_scales(of_groups, codes.shape[1], codes.shape[2] * 2 // NVFP4_GROUP, gated=at == 18)
        made = QuantizedWeight(WeightFormat.parse("nvfp4"), codes, groups.view(torch.float8_e4m3fn), 1 / scale)
        arguments[at : at + 2] = [made]
    return arguments


@torch.library.impl("dflash::draft_forward_nvfp4", "CPU")
def _draft_forward_nvfp4_cpu(*inputs: object, blocks: list[torch.Tensor]) -> torch.Tensor:
    arguments = (*inputs, None) if len(inputs) == 27 else inputs
    torch.ops.dflash._draft_forward_nvfp4_check(*arguments, blocks=blocks)
    return _forward_cpu(*_from_nvfp4(arguments, blocks))  # type: ignore[arg-type]


@torch.library.impl("dflash::draft_forward_nvfp4.out", "CPU")
def _draft_forward_nvfp4_out_cpu(
    *inputs: object, blocks: list[torch.Tensor], out: torch.Tensor, workspace: torch.Tensor
) -> None:
    arguments = (*inputs, None) if len(inputs) == 27 else inputs
    torch.ops.dflash._draft_forward_nvfp4_check(*arguments, blocks=blocks, out=out, workspace=workspace)
    out.copy_(_forward_cpu(*_from_nvfp4(arguments, blocks)))  # type: ignore[arg-type]

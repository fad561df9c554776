"""Oracle of the drafter's forward pass: dense masks, one request and one head at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dflash_kernels.formats import QuantizedWeight
from dflash_kernels.reference.formats import decode_e2m1, decode_e4m3
from dflash_kernels.reference.quantize import quantize_rows, quantize_rows_nvfp4

__all__ = ["draft_forward", "draft_forward_fp8", "draft_forward_nvfp4", "visible_keys"]


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    wide = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.to(wide.dtype)).to(x.dtype)


def _rope(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D]: pairs (i, i + R/2) as complex numbers, times cos + i sin of the row's position."""
    rotary = cos_sin.shape[1]
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    cos, sin = cos_sin[positions].to(wide.dtype)[:, None].chunk(2, dim=-1)
    turned = torch.complex(wide[..., : rotary // 2], wide[..., rotary // 2 : rotary]) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag, wide[..., rotary:]), dim=-1).to(x.dtype)


def visible_keys(positions: torch.Tensor, prefix: int, window: int, causal: bool) -> torch.Tensor:
    """Dense mask [T, prefix + T] of one request with the block's ``positions`` [T]: context first, then the block."""
    query = positions[:, None]
    key = torch.cat((torch.arange(prefix, device=positions.device), positions))[None]
    is_context = (torch.arange(key.shape[1], device=positions.device) < prefix)[None]
    seen = is_context | torch.tensor(not causal, device=positions.device) | (key <= query)
    if window > 0:
        seen = seen & (query - key < window) & (is_context | (key - query < window))
    return seen


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
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``[B * T, H]`` computed in ``dtype``; arguments as :func:`dflash_kernels.ops.draft_forward`.

    With bfloat16 every intermediate is rounded, which shows how far rounding alone may lead away from float32.
    """
    weights = {"qkv": qkv_weight, "o": o_weight, "gate_up": gate_up_weight, "down": down_weight}

    def product(x: torch.Tensor, name: str, layer: int) -> torch.Tensor:
        return x @ weights[name][layer].to(dtype).T

    return _forward(
        block_ids,
        positions,
        prefix_lens,
        req_pool_indices,
        req_to_token,
        k_caches,
        v_caches,
        embed_weight,
        input_norm,
        qkv_bias,
        q_norm,
        k_norm,
        o_bias,
        post_norm,
        final_norm,
        cos_sin,
        windows,
        causal,
        eps,
        softmax_scale,
        dtype,
        qkv_weight.shape[1],
        product,
    )


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
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The same with e4m3 on both sides of the four products; arguments as
    :func:`dflash_kernels.ops.draft_forward_fp8`."""
    table = torch.tensor([decode_e4m3(code) for code in range(256)], device=embed_weight.device)
    weights = {
        "qkv": (qkv_weight, qkv_scale),
        "o": (o_weight, o_scale),
        "gate_up": (gate_up_weight, gate_up_scale),
        "down": (down_weight, down_scale),
    }

    def product(x: torch.Tensor, name: str, layer: int) -> torch.Tensor:
        codes, scale = quantize_rows(x)
        weight, weight_scale = weights[name][0][layer], weights[name][1][layer]
        sums = table[codes.long()] @ table[weight.long()].T
        return (sums * scale * weight_scale.squeeze(-1)).to(dtype)

    return _forward(
        block_ids,
        positions,
        prefix_lens,
        req_pool_indices,
        req_to_token,
        k_caches,
        v_caches,
        embed_weight,
        input_norm,
        qkv_bias,
        q_norm,
        k_norm,
        o_bias,
        post_norm,
        final_norm,
        cos_sin,
        windows,
        causal,
        eps,
        softmax_scale,
        dtype,
        qkv_weight.shape[1],
        product,
    )


def draft_forward_nvfp4(
    weights: Mapping[str, QuantizedWeight], *, dtype: torch.dtype = torch.float32, **inputs: Any
) -> torch.Tensor:
    """The same with nvfp4 on both sides; `weights` in nvfp4 by "qkv", "o", "gate_up" and "down", `inputs` those of
    :func:`dflash_kernels.ops.draft_forward_nvfp4` that are no weights."""
    table = torch.tensor([decode_e2m1(code) for code in range(16)])

    def product(x: torch.Tensor, name: str, layer: int) -> torch.Tensor:
        codes, groups, scale = quantize_rows_nvfp4(x)
        values = table.to(x.device)[codes.long()].unflatten(1, (-1, 16)) * groups.float()[..., None]
        return (values.flatten(1) @ weights[name][layer].dequantize().T * scale).to(dtype)

    return _forward(**inputs, dtype=dtype, qkv_width=weights["qkv"].shape[1], product=product)


def _forward(
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
    windows: Sequence[int],
    causal: Sequence[int],
    eps: float,
    softmax_scale: float | None,
    dtype: torch.dtype,
    qkv_width: int,
    product: Callable[[torch.Tensor, str, int], torch.Tensor],
) -> torch.Tensor:
    """The pass with ``product(x, name, layer)`` for x times the layer's weight "qkv", "o", "gate_up" or "down"."""
    batch, block = block_ids.shape
    _, kv_heads, head_dim = k_caches[0].shape
    group = (qkv_width // head_dim - 2 * kv_heads) // kv_heads
    q_heads = group * kv_heads
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale

    rows = []
    for b in range(batch):
        x = embed_weight[block_ids[b].long()].to(dtype)
        places = positions[b].long()
        prefix = int(prefix_lens[b])
        slots = req_to_token[int(req_pool_indices[b])][:prefix].long()
        for layer in range(len(windows)):
            h = _norm(x, input_norm[layer], eps)
            qkv = product(h, "qkv", layer)
            if qkv_bias is not None:
                qkv = qkv + qkv_bias[layer].to(dtype)
            heads = qkv.reshape(block, q_heads + 2 * kv_heads, head_dim)
            q, k, v = heads[:, :q_heads], heads[:, q_heads : q_heads + kv_heads], heads[:, q_heads + kv_heads :]
            if q_norm is not None:
                q = _norm(q, q_norm[layer], eps)
            if k_norm is not None:
                k = _norm(k, k_norm[layer], eps)
            q, k = _rope(q, places, cos_sin), _rope(k, places, cos_sin)
            mask = visible_keys(places, prefix, windows[layer], bool(causal[layer]))
            seen = mask[:, :prefix].any(0)  # slots that no query sees may hold anything
            context_k = k_caches[layer].new_zeros(prefix, kv_heads, head_dim)
            context_v = torch.zeros_like(context_k)
            context_k[seen], context_v[seen] = k_caches[layer][slots[seen]], v_caches[layer][slots[seen]]
            keys = torch.cat((context_k.to(dtype), k))
            values = torch.cat((context_v.to(dtype), v))
            merged = []
            for head in range(q_heads):
                scores = (q[:, head] @ keys[:, head // group].T).to(torch.promote_types(dtype, torch.float32)) * scale
                weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1).to(dtype)
                merged.append(weights @ values[:, head // group])
            attended = product(torch.cat(merged, dim=-1), "o", layer)
            if o_bias is not None:
                attended = attended + o_bias[layer].to(dtype)
            x = x + attended
            h = _norm(x, post_norm[layer], eps)
            gate, up = product(h, "gate_up", layer).chunk(2, dim=-1)
            x = x + product(gate * torch.sigmoid(gate) * up, "down", layer)
        rows.append(_norm(x, final_norm, eps))
    return torch.cat(rows) if rows else embed_weight.new_empty((0, embed_weight.shape[1])).to(dtype)

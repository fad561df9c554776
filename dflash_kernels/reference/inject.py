"""Oracle of `inject_kv`: the published model's `k_proj(hidden_norm(fc(x)))` row by row, in any float dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, in the dtype of ``x``."""
    return x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``x [..., N, heads, D]`` as a complex product over the pairs (i, i + rotary_dim / 2)."""
    half = cos_sin.shape[1] // 2
    table = cos_sin[positions.long()].double()
    turn = torch.complex(table[:, :half], table[:, half:])[:, None, :]
    pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * turn
    turned = torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)
    return torch.cat([turned, x[..., 2 * half :]], dim=-1)


def context_kv(
    taps: Sequence[torch.Tensor],
    fc_weight: torch.Tensor,
    hidden_norm: torch.Tensor,
    kv_weight: torch.Tensor,
    kv_bias: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    head_dim: int,
    eps: float,
    dtype: torch.dtype,
    tap_norm: torch.Tensor | None = None,
    value_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of every row, each ``[L, N, Hkv, D]``, computed and rounded in ``dtype`` throughout."""
    sources = [tap.to(dtype) for tap in taps]
    if tap_norm is not None:
        sources = [rms_norm(tap, tap_norm[i].to(dtype), eps) for i, tap in enumerate(sources)]
    x = torch.cat(sources, dim=-1) @ fc_weight.to(dtype).T
    x = rms_norm(x, hidden_norm.to(dtype), eps)
    keys, values = [], []
    for layer in range(kv_weight.shape[0]):
        kv = x @ kv_weight[layer].to(dtype).T
        if kv_bias is not None:
            kv = kv + kv_bias[layer].to(dtype)
        k, v = kv.unflatten(-1, (2, -1, head_dim)).unbind(1)
        if k_norm is not None:
            k = rms_norm(k, k_norm[layer].to(dtype), eps)
        keys.append(rotate(k, cos_sin, positions))
        values.append(v * value_scale)
    return torch.stack(keys), torch.stack(values)


def live_rows(num_rows: int, commit_lens: torch.Tensor | None) -> list[int]:
    """Rows that are committed, in order."""
    if commit_lens is None:
        return list(range(num_rows))
    block = num_rows // max(len(commit_lens), 1)
    return [b * block + j for b, length in enumerate(commit_lens.tolist()) for j in range(length)]

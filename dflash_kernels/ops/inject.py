"""Context KV injection: the target's hidden states of committed tokens, written into the drafter's paged KV caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dflash_kernels.ops._errors import dflash_errors

__all__ = ["inject_kv", "inject_kv_workspace"]

_CHUNK_ROWS = 4096  # rows that a workspace is made for at most: a long prefill goes through in chunks


def inject_kv_workspace(
    num_rows: int,
    hidden_size: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    max_rows: int = _CHUNK_ROWS,
) -> torch.Tensor:
    """Scratch memory of :func:`inject_kv` for up to ``num_rows`` rows at once; its content never matters.

    More rows than that go through in chunks, so ``max_rows`` bounds the memory, not the call.

    Returns:
        A vector of ``8 + min(num_rows, max_rows) * (H + L * 2 * Hkv * D + 2)`` elements, at least one row's, of the
        weights' dtype.
    """
    rows = max(1, min(num_rows, max_rows))
    row_elements = hidden_size + num_layers * 2 * num_kv_heads * head_dim + 2
    return torch.empty(8 + rows * row_elements, dtype=dtype, device=device)


@dflash_errors
def inject_kv(
    taps: Sequence[torch.Tensor],
    fc_weight: torch.Tensor,
    hidden_norm: torch.Tensor,
    kv_weight: torch.Tensor,
    kv_bias: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    commit_lens: torch.Tensor | None,
    k_caches: Sequence[torch.Tensor],
    v_caches: Sequence[torch.Tensor],
    workspace: torch.Tensor,
    eps: float,
) -> None:
    """Fuse the tapped hidden states, project them to K and V of every drafter layer, and write the paged caches.

    For each live row n, in the weights' dtype w (bf16; fp32 too on the CPU), fp32 inside each ``w( )``::

        f   = w([taps[0][n] | .. | taps[K-1][n]] @ fc_weight.T)
        x   = w(f * rsqrt(mean(f^2) + eps) * hidden_norm)
        k|v = w(x @ kv_weight[l].T + kv_bias[l])                          each of the L layers
        k   = k * rsqrt(mean(k^2) + eps) * k_norm[l]                      per head, in fp32, not rounded
        k_caches[l][slots[n]] = w(rope(k, positions[n]));  v_caches[l][slots[n]] = v

    so context K rounds once after norm and rotation. ``rope`` turns the pairs (i, i + rotary_dim / 2) for
    i < rotary_dim / 2 and leaves elements from rotary_dim on as they are. Row n is live iff
    ``n % T < commit_lens[n // T]``, T = N / B; the taps of other rows are not read and their slots not looked at.
    Without ``commit_lens`` (prefill) every row is live.

    Args:
        taps: 1 to 8 tensors ``[N, H]``, row stride free (column slices of one ``[N, K * H]`` will do). On CUDA:
            aligned to 16 bytes, H and the row stride multiples of 8.
        fc_weight: ``[H, K * H]``; hidden_norm: ``[H]``; kv_weight: ``[L, 2 * Hkv * D, H]``, K's rows first, then V's;
            kv_bias: ``[L, 2 * Hkv * D]`` or None; k_norm: ``[L, D]``, or None for no norm. Contiguous.
        cos_sin: ``[P, rotary_dim]`` float32, cosines in the first half of a row, sines in the second.
        positions, slots: ``[N]`` int32 or int64. Slots of live rows are distinct; of equal ones, either may win.
        commit_lens: ``[B]`` int32 or int64, 0..T, or None.
        k_caches, v_caches: L <= 16 tensors each ``[S, Hkv, D]``, D contiguous, D <= 256; written.
        workspace: scratch, see :func:`inject_kv_workspace`; at least T rows of it.
        eps: of both norms.

    Raises:
        ValueError: wrong count, shape, dtype, device, stride or alignment; on the CPU (on CUDA only under
            DFLASH_DEBUG=1, outside of capture) also a live row whose slot lies outside the pool or whose position lies
            outside cos_sin, or a commit length outside 0..T. The caches are untouched then. Unchecked, such a row is
            skipped.

    Source: SGLang's materialisation of DFLASH context KV (fused_kv_materialize.py), rounding included.
    """
    torch.ops.dflash.inject_kv(
        taps, fc_weight, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots, commit_lens,
        k_caches, v_caches, workspace, eps,
    )  # fmt: skip


@torch.library.impl("dflash::inject_kv", "CPU")
def _inject_kv_cpu(
    taps: list[torch.Tensor],
    fc_weight: torch.Tensor,
    hidden_norm: torch.Tensor,
    kv_weight: torch.Tensor,
    kv_bias: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    commit_lens: torch.Tensor | None,
    k_caches: list[torch.Tensor],
    v_caches: list[torch.Tensor],
    workspace: torch.Tensor,
    eps: float,
) -> None:
    torch.ops.dflash._inject_kv_check(
        taps, fc_weight, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots, commit_lens,
        k_caches, v_caches, workspace, eps,
    )  # fmt: skip
    if commit_lens is not None and commit_lens.numel() > 0:
        block = positions.numel() // commit_lens.numel()
        live = (torch.arange(block) < commit_lens[:, None]).flatten().nonzero().flatten()
        taps = [tap[live] for tap in taps]
        positions, slots = positions[live], slots[live]
    if positions.numel() == 0:
        return
    layers, width, hidden = kv_weight.shape
    fused = F.linear(taps[0] if len(taps) == 1 else torch.cat(taps, dim=-1), fc_weight).float()
    scale = torch.rsqrt(fused.square().mean(-1, keepdim=True) + eps)
    normed = (fused * scale * hidden_norm.float()).to(fc_weight.dtype)
    bias = None if kv_bias is None else kv_bias.flatten()
    kv = F.linear(normed, kv_weight.view(layers * width, hidden), bias)
    torch.ops.dflash._inject_kv_write(kv, k_norm, cos_sin, positions, slots, None, k_caches, v_caches, eps)


@torch.library.register_fake("dflash::inject_kv")
def _inject_kv_fake(*args: object, **kwargs: object) -> None:
    return None

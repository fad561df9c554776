"""Oracles of select_path and grouped_conv: whole-tensor torch, no loop over channels or candidates."""

from __future__ import annotations

import torch

__all__ = ["grouped_conv", "select_path", "transition_scores"]


def transition_scores(
    candidate_ids: torch.Tensor,
    base_logits: torch.Tensor,
    hidden: torch.Tensor,
    previous_ids: torch.Tensor,
    predecessor_codebook: torch.Tensor,
    successor_codebook: torch.Tensor,
) -> torch.Tensor:
    """Scores ``[B, G, Kd]`` float32 of every slot's candidates, given the token ``previous_ids [B, G]`` before each.

    The products are rounded to the codebooks' dtype; the sum is taken in float64 and rounded once.
    """
    dtype = predecessor_codebook.dtype
    state = predecessor_codebook[previous_ids.long()] * hidden  # [B, G, R] in the codebooks' dtype
    keys = successor_codebook[candidate_ids.long()]  # [B, G, Kd, R]
    edges = (keys.double() @ state.double().unsqueeze(-1)).squeeze(-1).to(dtype)
    return base_logits + edges.float()


def select_path(
    candidate_ids: torch.Tensor,
    base_logits: torch.Tensor,
    hidden: torch.Tensor,
    anchor_ids: torch.Tensor,
    predecessor_codebook: torch.Tensor,
    successor_codebook: torch.Tensor,
    temperature: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``path_ids [B, G]`` and ``draft_probs [B, G, Kd]``; see :func:`dflash_kernels.ops.select_path`."""
    batch, slots, top_k = candidate_ids.shape
    if temperature is None or uniforms is None:
        temperature = torch.zeros(batch, device=hidden.device)
        uniforms = torch.zeros(batch, slots, device=hidden.device)
    path = torch.empty(batch, slots, dtype=torch.int64, device=hidden.device)
    probs = torch.empty(batch, slots, top_k, dtype=torch.float32, device=hidden.device)
    previous = anchor_ids.long()
    for j in range(slots):
        here = slice(j, j + 1)
        scores = transition_scores(
            candidate_ids[:, here],
            base_logits[:, here],
            hidden[:, here],
            previous[:, None],
            predecessor_codebook,
            successor_codebook,
        )[:, 0]
        greedy = scores.argmax(-1)
        one_hot = torch.nn.functional.one_hot(greedy, top_k).float()
        scaled = scores / temperature.clamp_min(1e-5)[:, None]
        softmax = torch.softmax(scaled.double(), -1)
        below = softmax.cumsum(-1) <= uniforms[:, here].double()  # candidates whose whole interval lies below u
        last = top_k - 1 - (softmax > 0).flip(-1).int().argmax(-1)
        drawn = torch.minimum(below.sum(-1), last)
        sampled = (temperature > 0) & scaled.isfinite().any(-1) & ~(scaled.isnan() | scaled.isposinf()).any(-1)
        index = torch.where(sampled, drawn, greedy)
        probs[:, j] = torch.where(sampled[:, None], softmax.float(), one_hot)
        previous = candidate_ids[:, j].long().gather(-1, index[:, None])[:, 0]
        path[:, j] = previous
    return path, probs


def grouped_conv(x: torch.Tensor, delta: torch.Tensor, base: torch.Tensor, block_size: int) -> torch.Tensor:
    """``[N, H]`` in x's dtype; see :func:`dflash_kernels.ops.grouped_conv`. Float32 inside, float64 for float64 x."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    hidden_size, taps, groups = x.shape[1], delta.shape[1], delta.shape[2]
    blocks = x.to(work).reshape(-1, block_size, hidden_size)
    kernel = base.to(work)[None] + delta.to(work).repeat_interleave(hidden_size // groups, dim=2)
    kernel = kernel.reshape(-1, block_size, taps, hidden_size)
    out = kernel[:, :, 0] * blocks
    for tap in range(1, taps):
        moved = torch.zeros_like(blocks)
        moved[:, tap:] = blocks[:, : max(block_size - tap, 0)]
        out = out + kernel[:, :, tap] * moved
    return out.reshape(-1, hidden_size).to(x.dtype)

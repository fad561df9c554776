"""Oracle of the LM head ops: logits in float64, rounded once, and every choice made by a stable sort."""

from __future__ import annotations

import torch

from dflash_kernels.reference.formats import decode_e4m3


def exact_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``hidden @ weight.T + bias`` in float64, not rounded: ``[N, V]``."""
    logits = hidden.double() @ weight.double().T
    return logits if bias is None else logits + bias.double()


def topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, descending, the smaller index first among equals, NaN above all."""
    ranks = torch.where(logits.isnan(), torch.inf, logits.double())
    # NaN and +inf are one rank now: put NaN first by a second, more significant, stable sort.
    order = torch.sort(ranks, dim=-1, descending=True, stable=True).indices
    nan_first = torch.sort(logits.isnan().long().gather(-1, order), dim=-1, descending=True, stable=True).indices
    ids = order.gather(-1, nan_first)[:, :k]
    return ids, logits.gather(-1, ids).float()


def verify_greedy(
    candidates: list[list[int]], targets: list[list[int]], prefix_lens: list[int]
) -> list[tuple[int, int, int, list[int], int]]:
    """(accept_len, commit_len, bonus_id, out_tokens, new_seq_len) of each request, token by token."""
    results = []
    for draft, target, prefix in zip(candidates, targets, prefix_lens, strict=True):
        accepted = 0
        while accepted + 1 < len(draft) and draft[accepted + 1] == target[accepted]:
            accepted += 1
        tokens = [*draft[1:], 0]
        tokens[accepted] = target[accepted]
        results.append((accepted, accepted + 1, target[accepted], tokens, prefix + accepted + 1))
    return results


def exact_logits_fp8(
    hidden: torch.Tensor,
    hidden_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same of e4m3 codes ``[N, H]`` and ``[V, H]`` with scales ``[N, 1]`` and ``[V, 1]``."""
    table = torch.tensor([decode_e4m3(code) for code in range(256)], dtype=torch.float64, device=hidden.device)
    logits = exact_logits(table[hidden.long()], table[weight.long()]) * hidden_scale.double() * weight_scale.double().T
    return logits if bias is None else logits + bias.double()

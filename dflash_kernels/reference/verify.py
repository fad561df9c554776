"""Torch oracle of chain verification: written from the definitions, in float64, one request and one row at a time."""

from __future__ import annotations

import torch

from dflash_kernels.ops.verify import Verified

__all__ = ["argmax", "philox", "target_probs", "verify_block", "verify_block_sampled"]

_MASK32 = 0xFFFFFFFF


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index of the first NaN, else of the first largest value, over the last dimension."""
    values = logits.float()
    nan = values.isnan()
    top = torch.where(nan, torch.inf, values).amax(-1, keepdim=True)
    hit = torch.where(nan.any(-1, keepdim=True), nan, values == top)
    return hit.to(torch.uint8).argmax(-1)  # of equal maxima on the CPU: the first


def _outputs(candidates: torch.Tensor, prefix_lens: torch.Tensor, accept: list[int], bonus: list[int]) -> Verified:
    batch, block_size = candidates.shape
    tokens = torch.zeros(batch, block_size, dtype=torch.int64)
    for b in range(batch):
        tokens[b, : block_size - 1] = candidates[b, 1:]
        tokens[b, accept[b]] = bonus[b]
    accept_lens = torch.tensor(accept, dtype=torch.int32)
    return Verified(
        accept_lens,
        accept_lens + 1,
        torch.tensor(bonus, dtype=torch.int64),
        tokens,
        prefix_lens.to(torch.int64).cpu() + accept_lens + 1,
    )


def verify_block(candidates: torch.Tensor, target: torch.Tensor, prefix_lens: torch.Tensor) -> Verified:
    """Greedy verification, on the CPU whatever the inputs' device."""
    candidates, target = candidates.cpu(), target.cpu()
    top1 = argmax(target) if target.dim() == 3 else target
    accept, bonus = [], []
    for row, top in zip(candidates.tolist(), top1.tolist(), strict=True):
        equal = [guess == truth for guess, truth in zip(row[1:], top[:-1], strict=True)] + [False]
        accept.append(equal.index(False))
        bonus.append(top[accept[-1]])
    return _outputs(candidates, prefix_lens, accept, bonus)


def philox(seed: int, offset: int, position: int) -> tuple[float, float]:
    """The two uniforms of a position: Philox4x32-10, words 0 and 1, 24 bits each."""
    counter = [offset & _MASK32, (offset >> 32) & _MASK32, position, 0]
    key = [seed & _MASK32, (seed >> 32) & _MASK32]
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (product1 >> 32) ^ counter[1] ^ key[0],
            product1 & _MASK32,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & _MASK32,
        ]
        key = [(key[0] + 0x9E3779B9) & _MASK32, (key[1] + 0xBB67AE85) & _MASK32]
    return (counter[0] >> 8) / 2**24, (counter[1] >> 8) / 2**24


def target_probs(
    logits: torch.Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    bitmask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    margins: list[float] | None = None,
) -> torch.Tensor:
    """[V] float64 probabilities of one row of logits, filtered: the p that verification must reproduce.

    Appends to ``margins`` how far, relatively, the masses that top-p compares are from its threshold.
    """
    values = logits.cpu().float()
    if bias is not None:
        values = values + bias.cpu()
    if bitmask is not None:
        words = bitmask.cpu().to(torch.int64) & _MASK32
        index = torch.arange(values.numel())
        allowed = (words[index // 32] >> (index % 32)) & 1
        values = values.masked_fill(allowed == 0, -torch.inf)
    best = int(argmax(values))
    if temperature == 0.0 or values.isnan().any() or values[best] in (torch.inf, -torch.inf):
        return torch.nn.functional.one_hot(torch.tensor(best), values.numel()).double()
    distance = values[best] - values  # float32: the ties of the filters
    probs = torch.softmax(-distance.double() / temperature, 0)
    if 0 < top_k < values.numel():
        probs = probs.masked_fill(distance > distance.sort().values[top_k - 1], 0.0)
    if top_p < 1.0:
        order = distance.argsort(stable=True)
        mass = probs[order].cumsum(0)
        cut = min(int((mass < top_p * mass[-1]).sum()), values.numel() - 1)
        if margins is not None:
            margins.append(float((mass / mass[-1] - top_p).abs().min()))
        probs = probs.masked_fill(distance > distance[order[cut]], 0.0)
    if margins is not None and min_p > 0.0:
        margins.append(float((probs / probs.max() - min_p).abs().min()) / min_p)
    probs = probs.masked_fill(probs < min_p * probs.max(), 0.0)
    return probs / probs.sum()


def _draw(weights: torch.Tensor, u: float, last: list[int], margins: list[float]) -> int:
    """Inverse CDF over `weights` [V] in the order of ids, the ids of `last` after all others."""
    ids = torch.arange(weights.numel())
    if last:
        tail = torch.tensor(last)
        ids = torch.cat([ids[~torch.isin(ids, tail)], tail])
    ordered = weights[ids]
    cumulative = ordered.cumsum(0)
    margins.append(float((cumulative[:-1] / cumulative[-1] - u).abs().min()) if weights.numel() > 1 else 1.0)
    beyond = (cumulative > u * cumulative[-1]).nonzero()
    return int(ids[int(beyond[0]) if beyond.numel() else int(ordered.nonzero()[-1])])


def verify_block_sampled(
    candidates: torch.Tensor,
    logits: torch.Tensor,
    prefix_lens: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    offsets: torch.Tensor,
    draft_ids: torch.Tensor | None = None,
    draft_probs: torch.Tensor | None = None,
    token_bitmask: torch.Tensor | None = None,
    logit_bias: torch.Tensor | None = None,
    rule: str = "token",
    margins: list[float] | None = None,
) -> Verified:
    """Speculative sampling with the op's random numbers.

    Appends to ``margins``, for each request, how close the closest decision was: the smallest distance of a uniform
    from what it was compared with, and of a mass from a filter's threshold. An implementation with rounding errors
    below it must give the same result.
    """
    batch, block_size, vocab = logits.shape
    drafts = block_size - 1
    accept, bonus = [], []
    for b in range(batch):
        tokens = candidates[b].tolist()
        heat = float(temperature[b])
        near: list[float] = []
        p = [
            target_probs(
                logits[b, j],
                heat,
                int(top_k[b]),
                float(top_p[b]),
                float(min_p[b]),
                None if token_bitmask is None else token_bitmask[b, j],
                None if logit_bias is None else logit_bias[b],
                near,
            )
            for j in range(block_size)
        ]
        q = torch.zeros(drafts, vocab, dtype=torch.float64)
        pairs: list[list[int]] = [[] for _ in range(drafts)]
        for j in range(drafts):
            if draft_ids is None or draft_probs is None or heat == 0.0:
                q[j, tokens[j + 1]] = 1.0
            else:
                pairs[j] = [
                    i for i, w in zip(draft_ids[b, j].tolist(), draft_probs[b, j].tolist(), strict=True) if w > 0
                ]
                q[j].index_add_(0, draft_ids[b, j].cpu().long(), draft_probs[b, j].cpu().double())
        u = [philox(int(seeds[b]), int(offsets[b]), j) for j in range(block_size)]
        guess_p = [float(p[j][tokens[j + 1]]) for j in range(drafts)]
        guess_q = [float(q[j][tokens[j + 1]]) for j in range(drafts)]
        scale, length = 1.0, 0
        if rule == "token" or heat == 0.0:
            while length < drafts and u[length][0] * guess_q[length] < guess_p[length]:
                length += 1
            if heat > 0.0:
                near += [abs(u[j][0] * guess_q[j] - guess_p[j]) for j in range(min(length + 1, drafts))]
        else:
            weight = 1.0
            for i in range(1, drafts + 1):
                ratio = weight * guess_p[i - 1]
                weight = 0.0 if ratio == 0.0 else min(ratio / guess_q[i - 1], 1.0) if guess_q[i - 1] > 0 else 1.0
                if i < drafts:
                    rest = float((weight * p[i] - q[i]).clamp_min(0).sum())
                    chance = 1.0 if weight >= 1.0 else rest / (rest + 1.0 - weight)
                else:
                    chance = weight
                near.append(abs(u[i - 1][0] - chance))
                if u[i - 1][0] < chance:
                    length, scale = i, weight
        accept.append(length)
        weights, last = p[length], []
        if length < drafts:
            residual = (scale * p[length] - q[length]).clamp_min(0)
            if float(residual.sum()) > 0.0:
                weights, last = residual, pairs[length]
        bonus.append(_draw(weights, u[length][1], last, near))
        if margins is not None:
            margins.append(min(near) if heat > 0.0 else 1.0)
    return _outputs(candidates.cpu(), prefix_lens, accept, bonus)

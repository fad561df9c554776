"""The drafter's loss and its evaluation by walking the target's own greedy text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass
class Texts:
    """Token rows [R, S], padded at the right, and for each row where its continuation begins and ends."""

    tokens: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, index: torch.Tensor, device: torch.device) -> Texts:
        return Texts(self.tokens[index].to(device).long(), self.begin[index].to(device), self.end[index].to(device))


def pack_texts(prompts: list[list[int]], continuations: list[list[int]], length: int, pad: int) -> Texts:
    """Rows of prompt + continuation, cut at `length`; rows with fewer than 4 continuation tokens are dropped."""
    pairs = [(p, c) for p, c in zip(prompts, continuations, strict=True) if len(c) >= 4 and len(p) + 4 <= length]
    tokens = torch.full((len(pairs), length), pad, dtype=torch.int32)
    begin = torch.tensor([len(p) for p, _ in pairs])
    end = torch.tensor([min(len(p) + len(c), length) for p, c in pairs])
    for row, (prompt, continuation) in enumerate(pairs):
        text = (prompt + continuation)[:length]
        tokens[row, : len(text)] = torch.tensor(text, dtype=torch.int32)
    return Texts(tokens, begin, end)


def tapped_hidden(target: LlamaForCausalLM, tokens: torch.Tensor, layer_ids: list[int]) -> torch.Tensor:
    """Hidden states after the tapped layers, concatenated: [R, S, K*H]. Stops after the last tapped layer."""
    taps: dict[int, torch.Tensor] = {}
    hooks = []
    for layer_id in layer_ids:

        def keep(_module: Any, _inputs: Any, output: Any, layer_id: int = layer_id) -> None:
            taps[layer_id] = output[0] if isinstance(output, tuple) else output

        hooks.append(target.model.layers[layer_id].register_forward_hook(keep))
    with torch.no_grad():
        target.model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.cat([taps[layer_id] for layer_id in layer_ids], dim=-1)


def draft_hidden(
    drafter: torch.nn.Module,
    target: LlamaForCausalLM,
    tokens: torch.Tensor,
    hidden: torch.Tensor,
    anchors: torch.Tensor,
) -> torch.Tensor:
    """One drafter pass over many blocks of each row.

    Args:
        tokens: [R, S]; hidden: [R, S, K*H] taps; anchors: [R, A] positions of the anchor tokens.

    Returns:
        [R, A, T, H] final-normed hidden rows; a block sees the context before its anchor, and itself.
    """
    rows, length = tokens.shape
    count, size = anchors.shape[1], drafter.block_size
    device = tokens.device
    ids = torch.full((rows, count, size), drafter.mask_token_id, device=device)
    ids[:, :, 0] = tokens.gather(1, anchors)
    offsets = torch.arange(size, device=device)
    block_positions = (anchors[:, :, None] + offsets).flatten(1)
    positions = torch.cat((torch.arange(length, device=device).expand(rows, length), block_positions), dim=1)
    context = torch.arange(length, device=device) < anchors[:, :, None]  # [R, A, S]
    context = context[:, :, None].expand(rows, count, size, length).reshape(rows, count * size, length)
    own = torch.eye(count, dtype=torch.bool, device=device).repeat_interleave(size, 0).repeat_interleave(size, 1)
    mask = torch.cat((context, own.expand(rows, -1, -1)), dim=-1)[:, None]
    embedded = F.embedding(ids.flatten(1), target.get_input_embeddings().weight)
    out = drafter(position_ids=positions, attention_mask=mask, noise_embedding=embedded, target_hidden=hidden)
    return out.view(rows, count, size, -1)


def block_loss(
    drafter: torch.nn.Module, target: LlamaForCausalLM, texts: Texts, layer_ids: list[int], anchors: int, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the T-1 drafted positions of random blocks, weighted by exp(-(k-1)/gamma), and the mean
    number of leading tokens that the argmax gets right."""
    rows, _ = texts.tokens.shape
    device, size = texts.tokens.device, drafter.block_size
    span = (texts.end - 1 - texts.begin).clamp_min(1)
    places = texts.begin[:, None] + (torch.rand(rows, anchors, device=device) * span[:, None]).long()
    hidden = tapped_hidden(target, texts.tokens, layer_ids)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        out = draft_hidden(drafter, target, texts.tokens, hidden, places)[:, :, 1:]
        label_at = places[:, :, None] + torch.arange(1, size, device=device)
        live = label_at < texts.end[:, None, None]
        labels = texts.tokens.gather(1, label_at.clamp_max(texts.tokens.shape[1] - 1).flatten(1)).view_as(label_at)
        logits = F.linear(out.to(target.lm_head.weight.dtype), target.lm_head.weight)
    losses = F.cross_entropy(logits.flatten(0, 2).float(), labels.flatten(), reduction="none").view_as(label_at)
    weight = torch.exp(-torch.arange(size - 1, device=device) / gamma) * live
    with torch.no_grad():
        right = (logits.argmax(-1) == labels) & live
        accepted = right.int().cumprod(-1).sum(-1).float().mean()
    return (losses * weight).sum() / weight.sum(), accepted


def train(
    drafter: torch.nn.Module,
    target: LlamaForCausalLM,
    texts: Texts,
    layer_ids: list[int],
    *,
    seconds: float,
    batch: int,
    anchors: int,
    learning_rate: float,
    gamma: float,
    seed: int,
    checkpoint: Callable[[], None],
    max_steps: int | None = None,
) -> dict[str, float]:
    """Muon on the matrices and AdamW on the norms, with a warm-up and a cosine decay over the given wall-clock time (so
    that any time limit ends annealed)."""
    device = target.device
    matrices = [p for p in drafter.parameters() if p.ndim == 2]
    others = [p for p in drafter.parameters() if p.ndim != 2]
    optimizers = [
        # match_rms_adamw: updates of AdamW's size, so that one learning rate serves both.
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    generator = torch.Generator().manual_seed(seed)
    begin, last_saved, step, seen = time.time(), time.time(), 0, 0
    recent: list[torch.Tensor] = []
    order = torch.randperm(len(texts), generator=generator)
    warmup = 100 if max_steps is None else max(1, max_steps // 10)
    while (progress := (time.time() - begin) / seconds) < 1 and step != max_steps:
        if seen + batch > len(order):
            order, seen = torch.randperm(len(texts), generator=generator), 0
        index, seen = order[seen : seen + batch], seen + batch
        scale = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * scale
        loss, accepted = block_loss(drafter, target, texts.rows(index, device), layer_ids, anchors, gamma)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(torch.stack((loss.detach(), accepted)))
        step += 1
        if step % 200 == 0 or step in (10, 30, 60):
            mean = torch.stack(recent[-200:]).mean(0).tolist()
            print(f"step {step} {time.time() - begin:.0f} s  loss {mean[0]:.3f}  accepted {mean[1]:.2f}", flush=True)
        if time.time() - last_saved > 60:
            checkpoint()
            last_saved = time.time()
    mean = torch.stack(recent[-200:]).mean(0).tolist()
    return {
        "steps": step,
        "seconds": round(time.time() - begin, 1),
        "epochs": round(step * batch / len(texts), 2),
        "blocks": step * batch * anchors,
        "final_loss": round(mean[0], 4),
        "final_accepted": round(mean[1], 3),
    }


@torch.inference_mode()
def evaluate(
    drafter: torch.nn.Module, target: LlamaForCausalLM, texts: Texts, layer_ids: list[int], batch: int = 128
) -> dict[str, float]:
    """Mean acceptance length (committed tokens a step, bonus included) of greedy generation of these texts.

    The texts are the target's own greedy continuations, so a step's outcome is known without running the target
    again: the drafted tokens that agree with the text are accepted, the next token of the text is the bonus.
    """
    device, size = target.device, drafter.block_size
    steps = committed = 0
    for first in range(0, len(texts), batch):
        part = texts.rows(torch.arange(first, min(first + batch, len(texts))), device)
        hidden = tapped_hidden(target, part.tokens, layer_ids)
        anchor = part.begin.clone()
        while bool((live := anchor < part.end - 1).any()):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                out = draft_hidden(drafter, target, part.tokens, hidden, anchor[:, None])[:, 0, 1:]
                drafted = F.linear(out.to(target.lm_head.weight.dtype), target.lm_head.weight).argmax(-1)
            at = anchor[:, None] + torch.arange(1, size, device=device)
            truth = part.tokens.gather(1, at.clamp_max(part.tokens.shape[1] - 1))
            right = (drafted == truth) & (at < part.end[:, None])
            commit = (right.int().cumprod(-1).sum(-1) + 1).minimum(part.end - 1 - anchor)
            commit = torch.where(live, commit, 0)
            steps += int(live.sum())
            committed += int(commit.sum())
            anchor = anchor + commit
    mean = committed / max(steps, 1)
    return {"texts": len(texts), "tokens": committed, "steps": steps, "mean_acceptance_length": mean}

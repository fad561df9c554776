"""The drafter's loss and its evaluation by walking the target's own greedy text."""

from __future__ import annotations

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


# Share of the drafted positions whose cross-entropy a step computes: the LM head is the dearest part of the step.
_KEPT = 0.36


def block_loss(
    drafter: torch.nn.Module, target: LlamaForCausalLM, texts: Texts, layer_ids: list[int], anchors: int, gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of drafted positions of random blocks, and the share of them that the argmax gets right.

    Position k of a block counts with weight exp(-(k-1)/gamma), k = 1..T-1. The weights are not factors: positions are
    drawn without replacement in proportion to them, and those drawn count alike. No host sync: it can be captured.
    """
    rows, _ = texts.tokens.shape
    device, size = texts.tokens.device, drafter.block_size
    span = (texts.end - 1 - texts.begin).clamp_min(1)
    places = texts.begin[:, None] + (torch.rand(rows, anchors, device=device) * span[:, None]).long()
    hidden = tapped_hidden(target, texts.tokens, layer_ids)
    # No cache of casted weights: a captured step must not read one that an earlier step made.
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
        out = draft_hidden(drafter, target, texts.tokens, hidden, places)[:, :, 1:]
        label_at = places[:, :, None] + torch.arange(1, size, device=device)
        live = label_at < texts.end[:, None, None]
        labels = texts.tokens.gather(1, label_at.clamp_max(texts.tokens.shape[1] - 1).flatten(1)).flatten()
        gumbel = -torch.empty(label_at.shape, device=device).exponential_().log()
        score = gumbel - torch.arange(size - 1, device=device) / gamma
        kept = score.masked_fill(~live, -torch.inf).flatten().topk(int(_KEPT * labels.numel())).indices
        labels, counts = labels[kept], live.flatten()[kept].float()
        logits = F.linear(out.flatten(0, 2)[kept].to(target.lm_head.weight.dtype), target.lm_head.weight)
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    total = counts.sum().clamp_min(1)
    with torch.no_grad():
        right = ((logits.argmax(-1) == labels) * counts).sum() / total
    return (losses * counts).sum() / total, right


class Step:
    """Loss and gradients of one batch of fixed shape; with `graphs`, a captured CUDA graph after two eager runs."""

    _pool: Any = None  # one memory pool for all graphs: they never run side by side

    def __init__(
        self, loss: Callable[[Texts], tuple[torch.Tensor, torch.Tensor]], drafter: torch.nn.Module, graphs: bool
    ) -> None:
        self._loss, self._parameters, self._graphs = loss, list(drafter.parameters()), graphs
        self._calls = 0
        self._texts: Texts | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result = torch.zeros(2)

    def _run(self, texts: Texts) -> torch.Tensor:
        torch._foreach_zero_([p.grad for p in self._parameters])
        loss, right = self._loss(texts)
        loss.backward()
        return torch.stack((loss.detach(), right))

    def __call__(self, texts: Texts) -> torch.Tensor:
        """Fills the parameters' gradients; returns (loss, share of right tokens), valid until the next call."""
        if not self._graphs:
            return self._run(texts)
        self._calls += 1
        if self._texts is None:
            self._texts = Texts(*(value.clone() for value in vars(texts).values()))
        for to, value in zip(vars(self._texts).values(), vars(texts).values(), strict=True):
            to.copy_(value)
        if self._calls <= 2:
            side = torch.cuda.Stream()  # as the capture will: autograd remembers the stream of a parameter's first use
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = self._run(self._texts)
            torch.cuda.current_stream().wait_stream(side)
            return result
        if self._graph is None:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            Step._pool = Step._pool or torch.cuda.graph_pool_handle()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=Step._pool):
                self._result = self._run(self._texts)
        self._graph.replay()
        return self._result


class Batches:
    """Endless batches of texts of similar length; each width has its own row count: as many tokens in every batch."""

    def __init__(self, texts: Texts, widths: list[int], tokens: int, generator: torch.Generator) -> None:
        self._texts, self._generator = texts, generator
        self.rows = {width: max(1, tokens // width) for width in widths}
        below = [0, *widths[:-1]]
        self._groups = {
            width: torch.nonzero((texts.end > low) & (texts.end <= width)).flatten()
            for low, width in zip(below, widths, strict=True)
        }
        self._epoch: list[tuple[int, torch.Tensor]] = []

    def next(self, device: torch.device) -> tuple[int, Texts]:
        """Width and rows of the next batch."""
        while not self._epoch:
            for width, group in self._groups.items():
                order = group[torch.randperm(len(group), generator=self._generator)]
                parts = order.split(self.rows[width])
                self._epoch += [(width, part) for part in parts if len(part) == self.rows[width]]
            order = torch.randperm(len(self._epoch), generator=self._generator).tolist()
            self._epoch = [self._epoch[i] for i in order]
        width, index = self._epoch.pop()
        texts = self._texts
        part = Texts(texts.tokens[:, :width], texts.begin, texts.end)
        return width, part.rows(index, device)


def train(
    drafter: torch.nn.Module,
    target: LlamaForCausalLM,
    texts: Texts,
    layer_ids: list[int],
    *,
    seconds: float,
    batch_tokens: int,
    tokens_per_anchor: int,
    learning_rate: float,
    gamma: float,
    seed: int,
    checkpoint: Callable[[], None],
    graphs: bool = True,
    max_steps: int | None = None,
) -> dict[str, float]:
    """Muon on the matrices and AdamW on the norms, with a warm-up and a linear decay over the given wall-clock time (so
    that any time limit ends annealed)."""
    device = target.device
    matrices = [p for p in drafter.parameters() if p.ndim == 2]
    others = [p for p in drafter.parameters() if p.ndim != 2]
    optimizers = [
        # match_rms_adamw: updates of AdamW's size, so that one learning rate serves both.
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for parameter in drafter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    length = texts.tokens.shape[1]
    widths = [length * 3 // 8, length // 2, length * 3 // 4, length]
    batches = Batches(texts, widths, batch_tokens, torch.Generator().manual_seed(seed))
    steps = {
        width: Step(
            lambda part, count=width // tokens_per_anchor: block_loss(drafter, target, part, layer_ids, count, gamma),
            drafter,
            graphs and device.type == "cuda",
        )
        for width in batches.rows
    }
    begin, last_saved, step, seen, blocks = time.time(), time.time(), 0, 0, 0
    recent: list[torch.Tensor] = []
    warmup = 60 if max_steps is None else max(1, max_steps // 10)
    while (progress := (time.time() - begin) / seconds) < 1 and step != max_steps:
        width, part = batches.next(device)
        seen += len(part)
        blocks += len(part) * (width // tokens_per_anchor)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / warmup) * max(0.01, min(1.0, 1.15 * (1 - progress)))
        recent.append(steps[width](part).clone())
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if step % 250 == 0 or step in (10, 30, 60, 120):
            mean = torch.stack(recent[-250:]).mean(0).tolist()
            print(f"step {step} {time.time() - begin:.0f} s  loss {mean[0]:.3f}  right {mean[1]:.3f}", flush=True)
        if time.time() - last_saved > 60:
            checkpoint()
            last_saved = time.time()
    mean = torch.stack(recent[-250:]).mean(0).tolist()
    return {
        "steps": step,
        "seconds": round(time.time() - begin, 1),
        "epochs": round(seen / len(texts), 2),
        "blocks": blocks,
        "final_loss": round(mean[0], 4),
        "final_right": round(mean[1], 4),
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

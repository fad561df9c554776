"""select_path and grouped_conv at the DFlash2 27B drafter's sizes.

Baselines, both with torch's version in the name: the formula in eager torch, and the same under torch.compile, which is
how engines run it (the walk as a lattice: the scores of all Kd x Kd transitions at once, then a chain of look-ups).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch

from bench.harness import Calls, Case
from bench.shapes import DFLASH2_27B, TINY, DrafterShape
from dflash_kernels import ops

SUITE = "dflash2"
TAPS, GROUP = 2, 16
RANK, TOP_K = 256, 16


def _torch(how: str) -> str:
    return f"torch {how} {torch.__version__}"


def _eager_conv(x: torch.Tensor, delta: torch.Tensor, base: torch.Tensor, block_size: int) -> torch.Tensor:
    blocks = x.float().unflatten(0, (-1, block_size))
    kernel = base.float() + delta.float().repeat_interleave(GROUP, dim=-1)
    kernel = kernel.unflatten(0, (-1, block_size))
    out = kernel[:, :, 0] * blocks
    out[:, 1:] += kernel[:, 1:, 1] * blocks[:, :-1]
    return out.flatten(0, 1).to(x.dtype)


def _compilable_conv(x: torch.Tensor, delta: torch.Tensor, base: torch.Tensor, block_size: int) -> torch.Tensor:
    blocks = x.unflatten(-1, (-1, GROUP)).float()
    kernel = base.unflatten(-1, (-1, GROUP)).float() + delta.float().unsqueeze(-1)
    above = torch.nn.functional.pad(blocks[:-1], (0, 0, 0, 0, 1, 0))
    inside = torch.arange(x.shape[0], device=x.device) % block_size > 0
    out = kernel[:, 0] * blocks + kernel[:, 1] * above.where(inside[:, None, None], 0)
    return out.flatten(-2).to(x.dtype)


def _lattice_walk(
    ids: torch.Tensor,
    logits: torch.Tensor,
    hidden: torch.Tensor,
    anchors: torch.Tensor,
    predecessors: torch.Tensor,
    successors: torch.Tensor,
    temperature: torch.Tensor | None,
    uniforms: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    slots, top_k = ids.shape[1:]
    before = torch.cat([anchors[:, None, None].expand(-1, 1, top_k), ids[:, :-1]], 1)
    states = predecessors[before] * hidden.unsqueeze(2)
    scores = logits.unsqueeze(2) + states @ successors[ids].transpose(-1, -2)  # [B, G, previous, candidate]
    maps = scores.argmax(-1)
    probs = None
    if temperature is not None and uniforms is not None:
        probs = torch.softmax(scores / temperature.clamp_min(1e-5)[:, None, None, None], -1)
        drawn = (uniforms[:, :, None, None] >= probs.cumsum(-1)).sum(-1).clamp_max(top_k - 1)
        maps = torch.where((temperature > 0)[:, None, None], drawn, maps)
    indices = [maps[:, 0, 0]]
    for slot in range(1, slots):
        indices.append(maps[:, slot].gather(1, indices[-1][:, None])[:, 0])
    index = torch.stack(indices, 1)
    path = ids.gather(2, index.unsqueeze(-1)).squeeze(-1)
    one_hot = torch.nn.functional.one_hot(index, top_k).float()
    if probs is None or temperature is None:
        return path, one_hot
    rows = torch.cat([torch.zeros_like(index[:, :1]), index[:, :-1]], 1)
    taken = probs.gather(2, rows[:, :, None, None].expand(-1, -1, 1, top_k)).squeeze(2)
    return path, torch.where((temperature > 0)[:, None, None], taken, one_hot)


@cache
def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, dynamic=False)


def _baselines(eager: Callable[..., object], compilable: Callable[..., object], args: tuple) -> dict:
    """Eager always; compiled where Triton makes the kernels."""
    found = {_torch("eager"): lambda: eager(*args)}
    if args[0].is_cuda:
        found[_torch("compile")] = lambda: _compiled(compilable)(*args)
    return found


def _conv_case(shape: DrafterShape, batch: int) -> Case:
    rows, groups = batch * shape.T, shape.H // GROUP

    def make(device: torch.device) -> Calls:
        x = torch.randn(rows, shape.H, device=device, dtype=torch.bfloat16)
        delta = torch.randn(rows, 2, TAPS, groups, device=device, dtype=torch.bfloat16)[:, 0]
        base = torch.randn(TAPS, shape.H, device=device, dtype=torch.bfloat16)
        out = torch.empty_like(x)
        args = (x, delta, base, shape.T)
        return Calls(lambda: ops.grouped_conv(*args, out=out), _baselines(_eager_conv, _compilable_conv, args))

    return Case(
        suite=SUITE,
        op="grouped_conv",
        shape=f"{shape.name} B{batch} T{shape.T} H{shape.H}",
        dtype="bf16",
        regime="latency" if rows <= 64 else "throughput",
        bytes=2 * (2 * rows * shape.H + rows * TAPS * groups + TAPS * shape.H),
        flops=3 * TAPS * rows * shape.H,
        stream="copy",
        make=make,
    )


def _walk_case(
    shape: DrafterShape,
    batch: int,
    sampled: bool,
    codebooks: Callable[[torch.device], tuple[torch.Tensor, torch.Tensor]],
) -> Case:
    slots = shape.T - 1

    def make(device: torch.device) -> Calls:
        ids = torch.randint(0, shape.V, (batch, slots, TOP_K), device=device)
        logits = torch.randn(batch, slots, TOP_K, device=device) * 4
        hidden = torch.randn(batch, slots, RANK, device=device, dtype=torch.bfloat16)
        anchors = torch.randint(0, shape.V, (batch,), device=device)
        temperature = torch.ones(batch, device=device) if sampled else None
        uniforms = torch.rand(batch, slots, device=device) if sampled else None
        path = torch.empty(batch, slots, dtype=torch.int64, device=device)
        probs = torch.empty(batch, slots, TOP_K, device=device)
        args = (ids, logits, hidden, anchors, *codebooks(device), temperature, uniforms)
        return Calls(lambda: ops.select_path(*args, out=(path, probs)), _baselines(_lattice_walk, _lattice_walk, args))

    each_slot = TOP_K * (8 + 4) + 2 * RANK + 8 + 4 * TOP_K  # ids, logits, hidden, outputs
    rows = (TOP_K + 1) * 2 * RANK  # successors of all candidates, predecessor of the one before
    return Case(
        suite=SUITE,
        op="select_path",
        shape=f"{shape.name} B{batch} T{shape.T} Kd{TOP_K} R{RANK} {'sampled' if sampled else 'greedy'}",
        dtype="bf16",
        regime="latency" if batch * shape.T <= 64 else "throughput",
        bytes=batch * slots * (each_slot + rows),
        flops=2 * batch * slots * TOP_K * RANK,
        stream="read",
        make=make,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The suite's rows, the small ones first."""
    shape = DFLASH2_27B if device.type == "cuda" else TINY
    batches = (1, 64) if quick else (1, 8, 64, 256)

    @cache
    def codebooks(where: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """[V, R] each, shared by all sets: the rows a set gathers are its own."""
        return (
            torch.randn(shape.V, RANK, device=where, dtype=torch.bfloat16),
            torch.randn(shape.V, RANK, device=where, dtype=torch.bfloat16),
        )

    for batch in batches:
        yield _conv_case(shape, batch)
    for batch in batches:
        yield _walk_case(shape, batch, False, codebooks)
    for batch in batches[-1:] if quick else batches[1:]:
        yield _walk_case(shape, batch, True, codebooks)

"""inject_kv at published drafter sizes, against the steps that engines take: cuBLAS GEMMs, then norm, rotation, writes.

Baselines, with versions in the name, all captured in graphs; the best of them is the row's:

* SGLang's: fc, norm, the KV projection into a scratch tensor, SGLang's Triton kernel for K-norm and RoPE into another,
  one write a layer (its own kernels where its files are installed);
* torch's eager kernels, and everything around the GEMMs under torch.compile.

Beside it, `eager`: SGLang's steps launched one by one from the host, as the engine does (torch's where SGLang is not
installed). Taps are one concatenated tensor for all, as SGLang's target graph leaves them. Baselines compute every row
of a block; the op skips the rows that were not committed. Rows named `commit 6.5` have 6 or 7 of T rows committed,
requests in turn; `prefill` has no lengths; the others have all. `fc 1/R` is the work of one of R ranks that share fc by
output rows, without the all-gather between the two halves; its baselines hold all of fc, as engines do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F

from bench import sglang_kernels
from bench.harness import Calls, Case
from bench.shapes import DEMO, DFLASH2_27B, QWEN3_8B, QWEN35_397B_TP8, TINY, DrafterShape
from dflash_kernels import ops

SUITE = "inject"
EPS = 1e-6
POSITIONS = 8192


def _norm(fused: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(fused, (fused.shape[-1],), weight, EPS)


def _write(
    kv: torch.Tensor,
    k_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_caches: list[torch.Tensor],
    v_caches: list[torch.Tensor],
) -> None:
    layers, head_dim = k_norm.shape
    kv = kv.view(kv.shape[0], layers, 2, -1, head_dim)
    k = kv[:, :, 0].float()
    k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + EPS) * k_norm.float()[:, None]
    cos, sin = cos_sin[positions][:, None, None].chunk(2, dim=-1)
    a, b = k.chunk(2, dim=-1)
    k = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(kv.dtype)
    for layer in range(layers):
        k_caches[layer][slots] = k[:, layer]
        v_caches[layer][slots] = kv[:, layer, 1]


@cache
def _sglang() -> tuple[str, Callable[..., tuple[torch.Tensor, torch.Tensor]], Callable[..., None]] | None:
    """Name, K-norm and RoPE of all layers, and the write of one layer; None where they are not installed."""
    try:
        from bench.triton_store import store

        fused: Callable[..., tuple[torch.Tensor, torch.Tensor]] = sglang_kernels.find("_fused_norm_rope_stacked")
        return f"sglang {sglang_kernels.version()}", fused, store
    except (ImportError, AttributeError, OSError):
        return None


@cache
def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, dynamic=False)


def _case(shape: DrafterShape, batch: int, commit: float, prefill: bool = False, ranks: int = 1) -> Case:
    """`commit` rows of T committed on average; `prefill`: batch * T rows without lengths; `ranks` that share fc."""
    rows = batch * shape.T
    commits = [int(commit) + (1 if b % 2 == 0 and commit % 1 else 0) for b in range(batch)]
    live = rows if prefill else sum(commits)

    def make(device: torch.device) -> Calls:
        def draw(*size: int, std: float = 1.0) -> torch.Tensor:
            return torch.empty(*size, device=device, dtype=torch.bfloat16).normal_(std=std)

        def caches() -> list[torch.Tensor]:
            empty = torch.zeros(shape.L, pool, shape.Hkv, shape.D, device=device, dtype=torch.bfloat16)
            return list(empty.unbind(0))

        pool = 2 * rows if prefill else 4 * rows
        hidden = draw(rows, shape.K * shape.H)
        taps = list(hidden.chunk(shape.K, dim=-1))
        width = 2 * shape.Hkv * shape.D
        fc_weight = draw(shape.H, shape.K * shape.H, std=0.02)
        kv_weight = draw(shape.L, width, shape.H, std=0.02)
        flat_kv_weight = kv_weight.view(-1, shape.H)
        hidden_norm, k_norm = draw(shape.H), draw(shape.L, shape.D)
        angles = torch.rand(POSITIONS, shape.D // 2, device=device) * 6
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
        positions = torch.randint(0, POSITIONS, (rows,), device=device)
        slots = torch.randperm(pool, device=device)[:rows]
        commit_lens = None if prefill else torch.tensor(commits, dtype=torch.int32, device=device)
        k_caches, v_caches = caches(), caches()
        workspace = ops.inject_kv_workspace(
            rows, shape.H, shape.L, shape.Hkv, shape.D, device=device, num_taps=0 if prefill else shape.K
        )
        plan = ops.inject_kv_plan(fc_weight, kv_weight, shape.D) if device.type == "cuda" and rows <= 64 else None

        def ours() -> None:
            ops.inject_kv(
                taps, fc_weight, hidden_norm, kv_weight, None, k_norm, cos_sin, positions, slots, commit_lens,
                k_caches, v_caches, workspace, EPS, plan,
            )  # fmt: skip

        shard, gathered = fc_weight[: shape.H // ranks], draw(ranks, rows, shape.H // ranks)

        def ours_sharded() -> None:
            ops.inject_kv_fuse(taps, shard, commit_lens, gathered[0], workspace, EPS)
            ops.inject_kv_project(
                gathered, hidden_norm, kv_weight, None, k_norm, cos_sin, positions, slots, commit_lens,
                k_caches, v_caches, workspace, EPS,
            )  # fmt: skip

        mine = ours if ranks == 1 else ours_sharded

        def chain(norm: Callable[..., torch.Tensor], write: Callable[..., object]) -> None:
            fused = norm(F.linear(hidden, fc_weight), hidden_norm)
            kv = F.linear(fused, flat_kv_weight)
            write(kv, k_norm, cos_sin, positions, slots, k_caches, v_caches)

        torch_eager = f"torch eager {torch.__version__}"
        baselines = {torch_eager: lambda: chain(_norm, _write)}
        if device.type != "cuda":
            return Calls(mine, baselines)
        baselines[f"torch compile {torch.__version__}"] = lambda: chain(_compiled(_norm), _compiled(_write))
        found = _sglang()
        if found is None:
            return Calls(mine, baselines, {torch_eager: baselines[torch_eager]})
        name, norm_and_rotate, store = found
        projected = torch.empty(rows, shape.L * width, device=device, dtype=torch.bfloat16)
        k_scratch, v_scratch = torch.empty(2, shape.L, rows, shape.Hkv, shape.D, device=device, dtype=torch.bfloat16)
        epsilons = torch.full((shape.L,), EPS, device=device)
        flat_kv_weight_t = flat_kv_weight.t().contiguous()

        def engine() -> None:
            fused = _norm(F.linear(hidden, fc_weight), hidden_norm)
            torch.mm(fused, flat_kv_weight_t, out=projected)
            norm_and_rotate(
                projected.view(rows, shape.L, width), k_norm, epsilons, cos_sin, positions, shape.Hkv, shape.D,
                shape.D, k_out=k_scratch, v_out=v_scratch,
            )  # fmt: skip
            for layer in range(shape.L):
                store(k_scratch[layer], v_scratch[layer], slots, k_caches[layer], v_caches[layer])

        baselines[name] = engine
        return Calls(mine, baselines, {f"{name} eager": engine})

    share = f" fc 1/{ranks}" if ranks > 1 else ""
    weights = shape.K * shape.H * shape.H // ranks + shape.L * 2 * shape.Hkv * shape.D * shape.H
    detail = f"prefill {rows}" if prefill else f"B{batch} T{shape.T}"
    if not prefill and commit != shape.T:
        detail += f" commit {commit:g}"
    return Case(
        suite=SUITE,
        op="inject_kv",
        shape=f"{shape.name} {detail}{share} L{shape.L} K{shape.K} H{shape.H} {shape.Hkv}x{shape.D}",
        dtype="bf16",
        regime="latency" if rows <= 64 else "throughput",
        bytes=2 * (weights + live * (shape.K * shape.H + shape.kv_token)),
        flops=2 * live * weights,
        stream="read",
        make=make,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Latency and throughput cases of the published sizes; a small one on the CPU."""
    if device.type != "cuda":
        yield _case(TINY, 2, TINY.T)
        yield _case(TINY, 2, 3)
        yield _case(TINY, 2, 3, ranks=2)
        return
    for batch in (1, 4, 32, 64):
        yield _case(QWEN3_8B, batch, 6.5)
    yield _case(QWEN3_8B, 4096 // QWEN3_8B.T, QWEN3_8B.T, prefill=True)
    yield _case(QWEN35_397B_TP8, 1, 6.5)
    yield _case(QWEN35_397B_TP8, 1, 6.5, ranks=8)
    if quick:
        return
    for batch in (1, 4, 32):
        yield _case(QWEN3_8B, batch, QWEN3_8B.T)
    for shape in (DEMO, DFLASH2_27B):
        for batch in (1, 8, 32):
            yield _case(shape, batch, shape.T)

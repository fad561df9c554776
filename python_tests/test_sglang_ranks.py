"""The SGLang plugin on the ranks of a tensor-parallel engine: processes over gloo, each with its part of one drafter.

The parts are cut as SGLang's linear layers, embedding and LM head cut them; its group of ranks is one over gloo.
"""

from __future__ import annotations

import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sglang_source import Source, make_module
from test_sglang import APPEND, HKV, HQ, INFO_MODULE, D, H, Linear, T, V, VocabParallelEmbedding, block, build_drafter
from test_sglang import build_pool, injection, linear, make_worker, parts, table, worker_module

from dflash_kernels.integrations.sglang.ranks import Ranks
from dflash_kernels.integrations.sglang.seam import WORKER_MODULE, Refused
from dflash_kernels.tensor_parallel import process_group, start_ranks

BATCHES = (1, 3)
PADDED = 64  # rows of the vocabulary, as SGLang fills it up


class EngineGroup:
    """SGLang's GroupCoordinator: sums that are made elsewhere than in their input, which is then worth nothing."""

    def __init__(self) -> None:
        self.world_size, self.rank_in_group, self.cpu_group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD

    def all_reduce(self, part: torch.Tensor) -> torch.Tensor:
        total = part.clone()
        dist.all_reduce(total)
        part.fill_(float("nan"))
        return total

    def all_gather_into_tensor(self, out: torch.Tensor, value: torch.Tensor) -> None:
        dist.all_gather_into_tensor(out, value)


class RowParallelLinear(Linear):
    reduce_results = True

    def forward(self, x: torch.Tensor) -> Any:
        return self.group.all_reduce(F.linear(x, self.weight)), None


class CutEmbedding(VocabParallelEmbedding):
    """Zeros for ids of other ranks, then the sum."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        shard = self.shard_indices
        own = (ids >= shard.org_vocab_start_index) & (ids < shard.org_vocab_end_index)
        rows = F.embedding(torch.where(own, ids - shard.org_vocab_start_index, 0), self.weight)
        return self.group.all_reduce(rows.masked_fill(~own[..., None], 0))


CutEmbedding.__name__ = "VocabParallelEmbedding"


def shard_of_vocabulary(rank: int, world: int) -> Any:
    start, stop = (min(V, PADDED // world * r) for r in (rank, rank + 1))
    return types.SimpleNamespace(
        org_vocab_start_index=start,
        org_vocab_end_index=stop,
        num_org_elements=stop - start,
        num_added_elements=0,
    )


def whole_parts(source: Source) -> dict[str, Any]:
    torch.manual_seed(11)
    return parts(source)


def parts_of_rank(source: Source, group: EngineGroup) -> dict[str, Any]:
    """What the worker of a rank has, out of `whole_parts`, which are the same on all ranks."""
    given, rank, world = whole_parts(source), group.rank_in_group, group.world_size
    heads, kv_heads, shared = HQ // world, max(1, HKV // world), max(1, world // HKV)
    for layer in given["draft_model"].layers:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.qkv_proj.weight.split([HQ * D, HKV * D, HKV * D])
        own_q, own_kv = slice(rank * heads * D, (rank + 1) * heads * D), rank // shared * kv_heads * D
        own = [q[own_q], *(x[own_kv : own_kv + kv_heads * D] for x in (k, v))]
        attention.num_heads, attention.num_kv_heads = heads, kv_heads
        attention.q_size, attention.kv_size = heads * D, kv_heads * D
        gate_up = [x.chunk(world)[rank] for x in mlp.gate_up_proj.weight.chunk(2)]
        attention.qkv_proj, mlp.gate_up_proj = replaced(torch.cat(own)), replaced(torch.cat(gate_up))
        attention.o_proj = replaced(attention.o_proj.weight[:, own_q], group)
        mlp.down_proj = replaced(mlp.down_proj.weight.chunk(world, dim=1)[rank], group)
    runner, model = given["draft_model_runner"], given["model_runner"].model
    runner.token_to_kv_pool = build_pool(source, torch.float32, kv_heads)
    shard = shard_of_vocabulary(rank, world)
    rows = slice(shard.org_vocab_start_index, shard.org_vocab_end_index)
    more = PADDED // world - shard.num_org_elements
    embed = CutEmbedding(1, H)
    embed.weight = torch.nn.Parameter(F.pad(model.get_input_embeddings().weight.data[rows], (0, 0, 0, more)))
    embed.group, embed.tp_size, embed.shard_indices = group, world, shard
    embed.num_embeddings = embed.org_vocab_size = V
    model.get_input_embeddings = lambda: embed
    model.lm_head.weight = F.pad(model.lm_head.weight[rows], (0, 0, 0, more), value=99.0)
    model.lm_head.shard_indices = shard
    return given


def replaced(weight: torch.Tensor, group: EngineGroup | None = None) -> torch.nn.Linear:
    layer = linear(weight.shape[1], weight.shape[0])
    layer.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    if group is not None:
        layer.__class__, layer.group = RowParallelLinear, group
    return layer


def engine_module(source: Source, group: EngineGroup) -> types.ModuleType:
    module = worker_module(source)
    parallel = types.SimpleNamespace(tp_group=group, tp_rank=group.rank_in_group, attn_dp_enabled=False)
    module.get_parallel = lambda: parallel
    if source.version == "0.5.16":
        module.get_tp_group = lambda: group
    else:
        del module.get_tp_group
    sys.modules[WORKER_MODULE] = module
    name = "sglang.srt.layers.logits_processor"
    sys.modules[name] = make_module(name, {"LogitsProcessorOutput": types.SimpleNamespace})
    return module


def passes(worker: Any, kv: slice | None = None) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Hidden rows, draft tokens and the pool after an injection, of blocks that every rank draws alike; ``kv``: the
    heads of the pool that the worker has."""
    found = []
    pool = worker.draft_model_runner.token_to_kv_pool
    for batch in BATCHES:
        draw = torch.Generator().manual_seed(batch)
        whole = build_pool_like(pool, draw)
        arguments = block(worker, batch, draw)
        for buffer, values in zip((*pool.k_buffer, *pool.v_buffer), whole, strict=True):
            buffer.copy_(values if kv is None else values[:, kv])
        hidden = worker.draft_model.forward(**arguments).hidden_states.clone()
        worker._draft_sampler(hidden, None)
        tokens = worker._draft_sampler.out[: batch * (T - 1)].clone()
        getattr(worker, APPEND)(**injection(batch, torch.float32, draw))
        found.append((hidden, tokens, torch.stack([*pool.k_buffer, *pool.v_buffer])))
    return found


def build_pool_like(pool: Any, draw: torch.Generator) -> list[torch.Tensor]:
    """Values of all heads of every buffer of a pool."""
    buffers = (*pool.k_buffer, *pool.v_buffer)
    return [torch.randn(buffer.shape[0], HKV, D, generator=draw) for buffer in buffers]


def _run_passes(rank: int, world: int, port: int, folder: str, root: str, version: str) -> None:
    with process_group(rank, world, torch.device("cpu"), port):
        group, source = EngineGroup(), Source(Path(root), version)
        engine, given = engine_module(source, group), parts_of_rank(source, group)
        heads, shared = max(1, HKV // world), max(1, world // HKV)
        kv = slice(rank // shared * heads, rank // shared * heads + heads)
        worker = make_worker(engine, given)
        ours = passes(worker, kv)
        worker._dflash_seams["forward"].active = worker._dflash_seams["inject"].active = False
        worker._draft_sampler = worker._draft_sampler.stock
        report = {"table": table(worker), "ours": ours, "stock": passes(worker, kv), "kv": kv}
        torch.save(report, Path(folder) / f"{rank}.pt")


def run(world: int, folder: Path, function: Callable[..., None], source: Source, *more: Any) -> list[dict[str, Any]]:
    ranks = start_ranks(range(world), world, function, str(folder), str(source.root), source.version, *more)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.pt"))) < world and time.monotonic() < deadline:
        assert not ranks.failed()
        time.sleep(0.05)
    ranks.end()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_draft_what_one_rank_does(source: Source, tmp_path: Path, world: int) -> None:
    """Hidden rows, draft tokens and injected K and V, and SGLang's own pass over the same parts; on four ranks two
    share each KV head."""
    found = run(world, tmp_path, _run_passes, source)
    sys.modules.pop(INFO_MODULE, None)
    whole = whole_parts(source)
    alone = make_worker(worker_module(source), whole)
    for name in ("forward", "inject"):
        alone._dflash_seams[name].active = False
    expected = passes(alone)
    for report in found:
        assert report["table"] == found[0]["table"]
        assert {report["table"][name] for name in ("inject", "accept", "prepare", "reserve")} == {"active"}
        assert report["table"]["head"] == "active gathered by the engine"
        assert report["table"]["forward"] == f"active sums over {world} ranks by the engine"
        for (hidden, tokens, pool), stock, one in zip(report["ours"], report["stock"], expected, strict=True):
            torch.testing.assert_close(hidden, one[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(hidden, stock[0], rtol=1e-4, atol=1e-4)
            assert torch.equal(hidden, report["ours"][0][0]) or hidden.shape != report["ours"][0][0].shape
            assert torch.equal(tokens, one[1]) and torch.equal(tokens, stock[1])
            # Stock's pass writes the block's own K and V, too: only what was injected is alike.
            written = (pool[:, 1:] != one[2][:, 1:, report["kv"]]).flatten(2).any(-1)
            assert written.sum() < written.numel()

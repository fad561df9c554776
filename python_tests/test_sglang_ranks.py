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
from test_sglang import (
    APPEND,
    HKV,
    HQ,
    INFO_MODULE,
    Algorithm,
    D,
    H,
    Linear,
    T,
    V,
    VocabParallelEmbedding,
    block,
    build_pool,
    injection,
    linear,
    make_worker,
    parts,
    table,
    worker_module,
)
from test_sglang_steps import build_logits

from dflash_kernels import ops
from dflash_kernels.draft_stream import Exchange
from dflash_kernels.integrations.sglang import plugin
from dflash_kernels.integrations.sglang.forward import ForwardSeam
from dflash_kernels.integrations.sglang.ranks import Merge, Ranks, ranks_of
from dflash_kernels.integrations.sglang.seam import WORKER_MODULE, Refused
from dflash_kernels.integrations.sglang.settings import read_settings
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

    def all_gather(self, value: torch.Tensor, dim: int) -> torch.Tensor:
        every = [torch.empty_like(value) for _ in range(self.world_size)]
        dist.all_gather(every, value.contiguous())
        return torch.cat(every, dim=dim)

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


def whole_parts(source: Source, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(11)
    return parts(source, dtype)


def parts_of_rank(source: Source, group: EngineGroup, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the worker of a rank has, out of `whole_parts`, which are the same on all ranks."""
    given, rank, world = whole_parts(source, dtype), group.rank_in_group, group.world_size
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
    runner.token_to_kv_pool = build_pool(source, dtype, kv_heads)
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


def passes(worker: Any, kv: slice = slice(HKV)) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Hidden rows, draft tokens, and what an injection writes, of blocks that every rank draws alike; ``kv``: the KV
    heads that the worker has."""
    runner, found = worker.draft_model_runner, []
    pool = runner.token_to_kv_pool
    buffers = (*pool.k_buffer, *pool.v_buffer)
    for batch in BATCHES:
        draw = torch.Generator().manual_seed(batch)
        drawn = [torch.empty(len(buffer), HKV, D) for buffer in buffers]
        runner.token_to_kv_pool = types.SimpleNamespace(k_buffer=drawn, v_buffer=[])
        arguments = block(worker, batch, draw)
        runner.token_to_kv_pool = arguments["forward_batch"].pool = pool
        for buffer, values in zip(buffers, drawn, strict=True):
            buffer.copy_(values[:, kv])
        hidden = worker.draft_model.forward(**arguments).hidden_states.clone()
        worker._draft_sampler(hidden, None)
        tokens = worker._draft_sampler.out[: batch * (T - 1)].clone()
        for buffer in buffers:
            buffer.fill_(-7)
        getattr(worker, APPEND)(**injection(batch, torch.float32, draw))
        found.append((hidden, tokens, torch.stack(buffers)))
    return found


def _run_passes(rank: int, world: int, port: int, folder: str, root: str, version: str) -> None:
    with process_group(rank, world, torch.device("cpu"), port):
        group, source = EngineGroup(), Source(Path(root), version)
        engine, given = engine_module(source, group), parts_of_rank(source, group)
        heads, shared = max(1, HKV // world), max(1, world // HKV)
        kv = slice(rank // shared * heads, rank // shared * heads + heads)
        worker = make_worker(engine, given)
        states, ours = table(worker), passes(worker, kv)
        worker._dflash_seams["forward"].active = worker._dflash_seams["inject"].active = False
        worker._draft_sampler = worker._draft_sampler.stock
        report = {"table": states, "ours": ours, "stock": passes(worker, kv), "kv": kv}
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
def test_ranks_draft_what_one_rank_does(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """Hidden rows, draft tokens and injected K and V, and SGLang's own pass over the same parts; on four ranks two
    share each KV head."""
    found = run(world, tmp_path, _run_passes, source)
    monkeypatch.delitem(sys.modules, INFO_MODULE, raising=False)
    monkeypatch.setitem(sys.modules, WORKER_MODULE, worker_module(source))
    alone = make_worker(sys.modules[WORKER_MODULE], whole_parts(source))
    for name in ("forward", "inject"):
        alone._dflash_seams[name].active = False
    expected = passes(alone)
    for report in found:
        assert report["table"] == found[0]["table"]
        assert {report["table"][name] for name in ("inject", "accept", "prepare", "reserve")} == {"active"}
        assert report["table"]["head"] == "active gathered by the engine: no peer memory on cpu"
        assert report["table"]["forward"] == f"active sums over {world} ranks by the engine"
        for (hidden, tokens, pool), stock, one in zip(report["ours"], report["stock"], expected, strict=True):
            for other in (stock, one):
                torch.testing.assert_close(hidden, other[0], rtol=1e-4, atol=1e-4)
                assert torch.equal(tokens, other[1])
            torch.testing.assert_close(pool, stock[2], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(pool, one[2][:, :, report["kv"]], rtol=1e-4, atol=1e-4)


# What one rank has against a seam, and which, and why; the others have nothing against any.
def _bias(given: dict[str, Any], engine: types.ModuleType) -> None:
    given["draft_model"].layers[1].self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(H))


def _cap(given: dict[str, Any], engine: types.ModuleType) -> None:
    given["draft_model"].layers[0].self_attn.attn.logit_cap = 30.0


def _broken_pool(given: dict[str, Any], engine: types.ModuleType) -> None:
    given["draft_model_runner"].token_to_kv_pool.v_buffer = [None, None]


def _no_vocabulary(given: dict[str, Any], engine: types.ModuleType) -> None:
    shard = given["model_runner"].model.lm_head.shard_indices
    given["model_runner"].model.lm_head.shard_indices = types.SimpleNamespace(**{**vars(shard), "num_org_elements": 0})


def _other_vocabulary(given: dict[str, Any], engine: types.ModuleType) -> None:
    embed = given["model_runner"].model.get_input_embeddings()
    embed.shard_indices = types.SimpleNamespace(**{**vars(embed.shard_indices), "org_vocab_start_index": 40})


def _no_sum(given: dict[str, Any], engine: types.ModuleType) -> None:
    given["draft_model"].layers[0].mlp.down_proj.reduce_results = False


def _symmetric(given: dict[str, Any], engine: types.ModuleType) -> None:
    given["server_args"].enable_symm_mem = True


def _not_finite(given: dict[str, Any], engine: types.ModuleType) -> None:
    given["draft_model"].norm.weight.data.fill_(float("nan"))


def _changed_function(given: dict[str, Any], engine: types.ModuleType) -> None:
    engine._prepare_dflash_draft_block_unchecked = lambda **kwargs: None


def _rows(given: dict[str, Any], engine: types.ModuleType) -> None:
    os.environ["DFLASH_KERNELS_ROWS"] = "forward=8"


DISAGREEMENTS: dict[str, tuple[Callable[..., None], dict[str, str]]] = {
    "attention bias": (_bias, dict.fromkeys(("inject", "forward"), "attention bias (rank 1)")),
    "logit cap": (_cap, {"forward": "a logit cap in the attention (rank 1)"}),
    "an error": (_broken_pool, dict.fromkeys(("inject", "forward"), "AttributeError: 'NoneType' object has no")),
    "no part of the head": (_no_vocabulary, {"head": "a vocabulary shard of 0 (rank 1)"}),
    "parts of the vocabulary": (_other_vocabulary, {"forward": "a vocabulary in parts [(0, 32), (40, 58)]"}),
    "sums elsewhere": (_no_sum, {"forward": "a layer whose sum over the ranks is elsewhere (rank 1)"}),
    "symmetric memory": (_symmetric, {"forward": "--enable-symm-mem (rank 1)"}),
    "a pass that fails": (_not_finite, {"forward": "rows that are not finite"}),
    "settings": (_rows, {"*": "ranks with different settings"}),
    "a changed function": (_changed_function, {"*": "ranks with different settings"}),
}


def _run_disagreements(rank: int, world: int, port: int, folder: str, root: str, version: str) -> None:
    with process_group(rank, world, torch.device("cpu"), port):
        group, source, found = EngineGroup(), Source(Path(root), version), {}
        for name, (change, _) in DISAGREEMENTS.items():
            os.environ.pop("DFLASH_KERNELS_ROWS", None)
            sys.modules.pop(INFO_MODULE, None)
            engine, given = engine_module(source, group), parts_of_rank(source, group)
            if rank == 1:
                change(given, engine)
            found[name] = table(make_worker(engine, given))
        torch.save(found, Path(folder) / f"{rank}.pt")


def test_what_one_rank_declines_all_do(source: Source, tmp_path: Path) -> None:
    first, second = run(2, tmp_path, _run_disagreements, source)
    for name, (_, reasons) in DISAGREEMENTS.items():
        for seam in first[name]:
            state = first[name][seam]
            assert state.split()[0] == second[name][seam].split()[0], f"{name}: {seam}"
            reason = reasons.get(seam, reasons.get("*"))
            if reason is not None:
                assert state.startswith(f"stock {reason}"), f"{name}: {seam} {state}"
                if not state.startswith("stock ranks"):
                    assert state == second[name][seam]
            elif seam not in ("logits", "inputs", "metadata"):  # which need graphs
                assert state.startswith("active"), f"{name}: {seam} {state}"


def _run_failures(rank: int, world: int, port: int, folder: str, root: str, version: str) -> None:
    """A pass that fails on one rank after all agreed, and strict ranks of which one has a reason."""
    with process_group(rank, world, torch.device("cpu"), port):
        group, source = EngineGroup(), Source(Path(root), version)
        worker = make_worker(engine_module(source, group), parts_of_rank(source, group))
        arguments, said = block(worker, 1, torch.Generator().manual_seed(1)), {}
        worker._dflash_seams["forward"].windows = []
        try:
            worker.draft_model.forward(**arguments)
        except Refused as refused:
            said["failed"] = str(refused)
        os.environ["DFLASH_KERNELS_STRICT"], os.environ["DFLASH_KERNELS_SEAMS"] = "1", "forward,accept"
        given = parts_of_rank(source, group)
        if rank == 1:
            _cap(given, worker)
        sys.modules.pop(INFO_MODULE, None)
        try:
            make_worker(engine_module(source, group), given)
        except Refused as refused:
            said["strict"] = str(refused)
        torch.save(said, Path(folder) / f"{rank}.pt")


def test_no_rank_falls_back_alone(source: Source, tmp_path: Path) -> None:
    for said in run(2, tmp_path, _run_failures, source):
        assert said["failed"].startswith("dflash-kernels: seam forward failed on one rank: ")
        assert said["strict"] == "dflash-kernels: seam forward declined: a logit cap in the attention (rank 1)"


def _run_in_one_kernel(rank: int, world: int, port: int, folder: str, root: str, version: str) -> None:
    """With a stand-in for the kernel of GPUs: right, right on one rank only, and wrong on both; and without a pack."""
    with process_group(rank, world, torch.device("cpu"), port):
        os.environ["DFLASH_KERNELS_PACK"], os.environ["DFLASH_KERNELS_SEAMS"] = "1", "forward,head"
        group, source, found = EngineGroup(), Source(Path(root), version), {}
        taken: list[int] = []

        def kernel(*given: Any, out: torch.Tensor, **_: Any) -> torch.Tensor:
            taken.append(out.shape[0])
            rows = passes_of[0]._chain(given[0].flatten(), given[:7])
            return out.copy_(rows * {"right": 1.0, "wrong": 4.0, "one": 1.0 + rank / 64}[case])

        def merge(ids: torch.Tensor, values: torch.Tensor, exchange: Any, *, patience: float, out: Any = None) -> Any:
            pairs = [torch.zeros(world * len(ids), dtype=x.dtype) for x in (ids, values)]
            for pair, x in zip(pairs, (ids, values), strict=True):
                group.all_gather_into_tensor(pair, x)
            best = ops.merge_vocab_shards(*(pair.view(world, -1) for pair in pairs), out=out)
            return (best[0] + (case == "wrong"), best[1]) if out is None else best

        ops.draft_forward_sharded, ops.merge_vocab_ranks = kernel, merge
        Ranks.exchange = lambda *args: (types.SimpleNamespace(), "")
        prepare = ForwardSeam.prepare
        passes_of: list[ForwardSeam] = []
        ForwardSeam.prepare = lambda seam, worker: (passes_of.insert(0, seam), prepare(seam, worker))[1]
        for case in ("right", "wrong", "one"):
            sys.modules.pop(INFO_MODULE, None)
            given = parts_of_rank(source, group, torch.bfloat16)
            worker = make_worker(engine_module(source, group), given)
            found[case] = table(worker)
            if case == "right":
                os.environ["DFLASH_KERNELS_ROWS"] = "forward=12"
                worker = make_worker(engine_module(source, group), parts_of_rank(source, group, torch.bfloat16))
                worker._dflash_seams["forward"].streamed = 2 * T
                taken.clear()
                for batch in (1, 2, 3):
                    arguments = block(worker, batch, torch.Generator().manual_seed(batch))
                    hidden = worker.draft_model.forward(**arguments).hidden_states
                    stock = type(worker.draft_model).forward(worker.draft_model, **arguments).hidden_states
                    torch.testing.assert_close(hidden, stock, rtol=2**-4, atol=2**-4)
                worker._draft_sampler(hidden, None)
                tokens = worker._draft_sampler.out.clone()
                worker._draft_sampler.stock(hidden, None)
                assert torch.equal(tokens, worker._draft_sampler.stock.out)
                found["taken"] = list(taken)
                del os.environ["DFLASH_KERNELS_ROWS"]
        os.environ["DFLASH_KERNELS_PACK"] = str(1 - rank)
        found["pack"] = table(make_worker(engine_module(source, group), parts_of_rank(source, group, torch.bfloat16)))
        torch.save(found, Path(folder) / f"{rank}.pt")


def test_one_kernel_is_taken_where_it_is_right_on_all_ranks(source: Source, tmp_path: Path) -> None:
    for found in run(2, tmp_path, _run_in_one_kernel, source):
        assert found["right"]["forward"].endswith("more; sums over 2 ranks in its kernel")
        assert found["right"]["head"].endswith("; merged over peer memory")
        assert found["taken"] == [T, 2 * T]  # of more rows the chain
        assert found["wrong"]["forward"] == "stock one kernel's rows differ from the chain's by 3.000 of their norm"
        assert found["wrong"]["head"].endswith("; gathered by the engine: a merge over peer memory was wrong")
        assert found["one"]["forward"] == "stock one kernel gave the ranks different rows"
        assert set(found["pack"].values()) == {"stock ranks with different settings"} | {"stock not asked for"}


def _run_logits(rank: int, world: int, port: int, folder: str, root: str, version: str) -> None:
    """The target's logits of verify passes, greedy or not, beside SGLang's that are gathered over the ranks."""
    with process_group(rank, world, torch.device("cpu"), port):
        os.environ["DFLASH_KERNELS_SEAMS"] = "logits"
        group, source, found = EngineGroup(), Source(Path(root), version), {}
        engine, given = engine_module(source, group), parts_of_rank(source, group, torch.bfloat16)
        processor, model = build_logits(source), given["model_runner"].model
        processor.do_tensor_parallel_all_gather, processor.use_attn_tp_group = True, False
        processor._logits_gatherer = lambda logits: group.all_gather(logits, dim=-1)
        stock, model.logits_processor = processor._get_logits, processor
        model.lm_head.weight[: model.lm_head.shard_indices.num_org_elements].round_()  # so that rows tie
        verify = types.SimpleNamespace(is_target_verify=lambda: True)

        def metadata(rows: int) -> Any:
            return types.SimpleNamespace(next_token_logits_buffer=torch.empty(rows, V), forward_mode=verify)

        given["_target_worker"].forward_batch_generation = lambda logits, is_verify: types.SimpleNamespace(
            logits_output=types.SimpleNamespace(next_token_logits=logits)
        )
        cls = plugin.create_worker(lambda algorithm, args: engine.DFlashWorkerV2, Algorithm(), None)
        worker = cls(given)
        held = [processor._get_logits(torch.zeros(n, H).bfloat16(), model.lm_head, metadata(n)) for n in (8, 4)]
        assert held[0].data_ptr() == held[1].data_ptr()
        assert held[0].shape[1] == model.lm_head.shard_indices.num_org_elements
        worker.init_cuda_graphs()
        found["table"] = table(worker)
        seam, same = worker._dflash_seams["logits"], []
        draw = torch.Generator().manual_seed(3)
        for greedy in (True, False, True):
            hidden = torch.randint(-2, 3, (4, H), generator=draw).bfloat16()
            theirs = stock(hidden, model.lm_head, metadata(4))
            local = processor._get_logits(hidden, model.lm_head, metadata(4))
            seam.greedy = greedy
            output = worker._target_worker.forward_batch_generation(local[:3], is_verify=True).logits_output
            ours = output.next_token_logits
            same.append(torch.equal(torch.argmax(ours, dim=-1), torch.argmax(theirs[:3], dim=-1)))
            if not greedy:
                same.append(torch.equal(ours, theirs[:3]))
        found["same"], found["switchable"] = same, seam.switchable
        torch.save(found, Path(folder) / f"{rank}.pt")


def test_verified_tokens_are_the_best_of_all_ranks(source: Source, tmp_path: Path) -> None:
    if source.version != "0.5.16":
        pytest.skip("the seam declines there")
    for found in run(2, tmp_path, _run_logits, source):
        assert found["table"]["logits"].endswith("; tokens gathered by the engine: no peer memory on cpu")
        assert found["table"]["logits"].startswith("active a buffer of")
        assert found["same"] == [True] * 4 and not found["switchable"]


def test_the_kernels_arguments_are_in_order(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank of one, which the CPU takes: the same rows as without ranks."""
    monkeypatch.setenv("DFLASH_KERNELS_PACK", "1")
    monkeypatch.delitem(sys.modules, INFO_MODULE, raising=False)
    monkeypatch.setitem(sys.modules, WORKER_MODULE, worker_module(source))
    worker = make_worker(sys.modules[WORKER_MODULE], whole_parts(source, torch.bfloat16))
    seam = worker._dflash_seams["forward"]
    arguments = block(worker, 2, torch.Generator().manual_seed(1))
    given = [arguments[name] for name in ("input_ids", "positions", "forward_batch")]
    expected = seam.run(*given).clone()
    [seam.exchange] = Exchange.simulated(1, ops.draft_exchange_words(1, H), "cpu")
    seam.vocab_start, seam.vocab_size = 0, V
    assert torch.equal(seam._one_kernel(seam._inputs(*given), seam.out[: 2 * T]), expected)


def test_ranks_that_cannot_be_found_decline(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = worker_module(source)
    del engine.get_tp_group, engine.get_parallel
    assert ranks_of(engine, types.SimpleNamespace()).world == 1
    assert ranks_of(engine, types.SimpleNamespace(server_args=types.SimpleNamespace(tp_size=2))) is None
    monkeypatch.setattr(plugin, "ranks_of", lambda *args: None)
    monkeypatch.delitem(sys.modules, INFO_MODULE, raising=False)
    monkeypatch.setitem(sys.modules, WORKER_MODULE, worker_module(source))
    states = table(make_worker(sys.modules[WORKER_MODULE], parts(source)))
    assert set(states.values()) == {"stock tensor parallelism, and no group of its ranks"}


def test_one_rank_has_nobody_to_ask() -> None:
    alone = Ranks(types.SimpleNamespace(world_size=1))
    part = torch.ones(2)
    assert alone.gather("x") == ["x"] and alone.total(part) is part
    assert alone.exchange(8, torch.device("cpu")) == (None, "one rank")


def _meet_on_gpus(rank: int, world: int, port: int, folder: str) -> None:
    """Peer memory found over a group of gloo, as the engine's ranks find it, and a merge in it, captured."""
    device = torch.device("cuda", rank)
    with process_group(rank, world, device, port):
        cpu_group = dist.new_group(backend="gloo")
        group = types.SimpleNamespace(world_size=world, rank_in_group=rank, cpu_group=cpu_group)
        ranks, merge = Ranks(group), Merge(group, 8, device)
        note = merge.meet(ranks, read_settings((), {}))
        draw = torch.Generator().manual_seed(5)
        values = torch.randint(0, 3, (world, 8), generator=draw).float()
        ids = torch.arange(world)[:, None] * 100 + torch.arange(8)
        own, out = (
            (ids[rank].to(device), values[rank].to(device)),
            (torch.zeros(8).long().to(device), values[0].to(device)),
        )
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            merge(*own, out)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        right = torch.equal(out[0].cpu(), ids.gather(0, values.argmax(0)[None])[0])
        every = ranks.gather((note, right, rank))
        torch.save({"every": every}, Path(folder) / f"{rank}.pt")
        del graph


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_meet_over_peer_memory(tmp_path: Path) -> None:
    ranks = start_ranks(range(2), 2, _meet_on_gpus, str(tmp_path))
    ranks.end(120)
    for rank in range(2):
        every = torch.load(tmp_path / f"{rank}.pt", weights_only=False)["every"]
        assert every == [("merged over peer memory", True, 0), ("merged over peer memory", True, 1)]

"""Tensor parallelism: every cut adds up, the best of the shards is the best of all, and the text stays the same.

Ranks are threads of this process (`run_simulated`) or processes with gloo; on two GPUs, NCCL.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

pytest.importorskip("transformers")
from test_engine import VOCAB, make_target, random_drafter  # noqa: E402
from test_readme import demo_is_there  # noqa: E402

from dflash_kernels import ops  # noqa: E402
from dflash_kernels.cli import main  # noqa: E402
from dflash_kernels.engine import Engine, GenerationResult, SamplingParams  # noqa: E402
from dflash_kernels.engine.sharded_target import shard_target  # noqa: E402
from dflash_kernels.engine.target import TargetRunner, decoder_layers  # noqa: E402
from dflash_kernels.model.drafter import Drafter  # noqa: E402
from dflash_kernels.model.shard import shard_heads, shard_range  # noqa: E402
from dflash_kernels.model.sharded_drafter import ShardedDrafter  # noqa: E402
from dflash_kernels.tensor_parallel import (  # noqa: E402
    Communicator,
    PeerMemory,
    VocabShards,
    process_group,
    run_simulated,
    start_ranks,
)

PROMPTS = [[5, 9, 31], list(range(20, 37)), [1]]
PARAMS, SHORT = SamplingParams(max_new_tokens=24), SamplingParams(max_new_tokens=8)


# -- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads,num_kv_heads", [(9, 3), (32, 8), (4, 1), (6, 2), (16, 4), (5, 5), (28, 4)])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
def test_heads_are_cut_once_and_keep_their_kv_head(num_heads: int, num_kv_heads: int, world: int) -> None:
    if world > num_heads:
        with pytest.raises(ValueError, match=rf"num_attention_heads must be at least the number of ranks \({world}\)"):
            shard_heads(num_heads, num_kv_heads, 0, world)
        return
    shards = [shard_heads(num_heads, num_kv_heads, rank, world) for rank in range(world)]
    assert [h for s in shards for h in range(s.q0, s.q1)] == list(range(num_heads))
    counts = [s.num_heads for s in shards]
    assert max(counts) - min(counts) <= (num_heads // num_kv_heads if num_kv_heads >= world else 1)
    for shard in shards:
        group, rest = divmod(shard.num_heads, len(shard.kv_heads))
        assert rest == 0 and group >= 1
        for i, head in enumerate(range(shard.q0, shard.q1)):
            assert shard.kv_heads[i // group] == head // (num_heads // num_kv_heads)
    if num_kv_heads % world == 0:
        assert {len(s.kv_heads) for s in shards} == {num_kv_heads // world}


def test_the_demo_pairs_heads() -> None:
    two = [shard_heads(9, 3, rank, 2) for rank in range(2)]
    assert [(s.q0, s.q1, s.kv_heads) for s in two] == [(0, 6, (0, 1)), (6, 9, (2,))]
    four = [shard_heads(9, 3, rank, 4) for rank in range(4)]
    assert [(s.q0, s.q1, s.kv_heads) for s in four] == [(0, 3, (0,)), (3, 5, (1,)), (5, 7, (1, 2)), (7, 9, (2,))]


@pytest.mark.parametrize("size,unit", [(1536, 8), (97, 1), (60, 8), (24, 8)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranges_cover_everything_in_runs(size: int, unit: int, world: int) -> None:
    parts = [shard_range(size, rank, world, "size", unit) for rank in range(world)]
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(size))
    if size % unit == 0:
        assert all(start % unit == 0 and stop % unit == 0 for start, stop in parts)


def test_ranges_that_are_too_small() -> None:
    with pytest.raises(ValueError, match=r"size must be at least 8 times the number of ranks \(4\), got 24"):
        shard_range(24, 0, 4, "intermediate_size", unit=8)
    with pytest.raises(ValueError, match=r"rank must be in 0..1 \(world 2\), got 2"):
        shard_range(24, 2, 2, "intermediate_size")


# -- the vocabulary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 4])
def test_best_of_the_shards_is_the_best_of_all(world: int, device: str, rng: torch.Generator) -> None:
    """Ties within and between shards, infinities and NaN included: argmax of the whole row, and the whole row back."""
    logits = torch.randint(0, 4, (2, 3, 11), generator=rng).float()
    logits[0, 1, 7], logits[1, 0, :] = float("inf"), float("-inf")
    logits[1, 2, 3] = logits[1, 2, 9] = float("nan")
    logits = logits.to(device)

    def rank(communicator: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        shards = VocabShards.of(communicator, 11)
        own = logits[..., shards.start : shards.stop].contiguous()
        out = torch.full((6,), -1, dtype=torch.int64, device=device)
        best = shards.merge(*ops.argmax_logits(own.view(6, -1), shards.start), out=out)
        assert best is out and torch.equal(shards.best(own), out.view(2, 3))
        return out, shards.gather(own)

    for best, whole in run_simulated(world, rank):
        assert torch.equal(best.view(2, 3), logits.argmax(-1))
        torch.testing.assert_close(whole, logits, rtol=0, atol=0, equal_nan=True)


# -- drafter and target -----------------------------------------------------------------------------------------------


def bound_drafter(device: str) -> Drafter:
    """A random drafter of 4 query and 2 KV heads, with an embedding and an LM head of its own."""
    generator = torch.Generator().manual_seed(3)
    drafter = random_drafter(device)
    shape = (VOCAB, drafter.hidden_size)
    drafter.embed_weight, drafter.lm_head_weight = (
        torch.randn(shape, generator=generator).to(device, drafter.dtype) for _ in range(2)
    )
    return drafter


def caches(drafter: Drafter, slots: int, fill: float = 0.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    shape = (slots, drafter.num_kv_heads, drafter.head_dim)
    k, v = (
        [torch.full(shape, fill, dtype=drafter.dtype, device=drafter.device) for _ in range(drafter.num_layers)]
        for _ in range(2)
    )
    return k, v


def refusal(whole: Drafter, communicator: Communicator) -> str:
    """What ShardedDrafter says to sizes that its ops do not take."""
    with pytest.raises(ValueError) as refused:
        ShardedDrafter(whole, communicator, "sharded")
    return str(refused.value)


@pytest.mark.parametrize("fc", ["replicated", "sharded"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_sharded_drafter_equals_the_whole(
    world: int, fc: Literal["replicated", "sharded"], device: str, rng: torch.Generator
) -> None:
    """Injected K and V are the whole's for the rank's heads, dead rows untouched; the pass gives the whole's rows."""
    whole = bound_drafter(device)
    if device == "cuda" and fc == "sharded" and whole.hidden_size % (8 * world):
        for refused in run_simulated(world, lambda communicator: refusal(whole, communicator)):
            assert refused.endswith(f"8 times the number of ranks ({world}) to shard fc, got {whole.hidden_size}")
        return
    batch, block = 2, whole.block_size
    lens = torch.tensor([11, 4], device=device)
    positions = torch.arange(16, device=device).repeat(2)
    slots = torch.randperm(60, generator=rng).to(device)[:32]
    taps = [torch.randn(32, whole.hidden_size, generator=rng).to(device) for _ in range(2)]
    block_ids = torch.randint(0, VOCAB, (batch, block), generator=rng).to(device)
    at = lens[:, None] + torch.arange(block, device=device)
    table = slots.view(2, 16).to(torch.int32)

    def run(drafter: Drafter) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        k, v = caches(drafter, 60, fill=7.0)
        drafter.reserve(batch, 32)
        drafter.inject(taps, positions, slots, lens.to(torch.int32), k, v)
        rows = drafter.forward(block_ids, at, at, lens, torch.arange(2, device=device), table, k, v)
        return rows.clone(), k, v

    rows, k, v = run(whole)
    assert k[0][slots[11]].eq(7).all() and not k[0][slots[10]].eq(7).any()
    atol = 1e-5 if whole.dtype == torch.float32 else 0.06
    for rank, (own_rows, own_k, own_v) in enumerate(
        run_simulated(world, lambda communicator: run(ShardedDrafter(whole, communicator, fc)))
    ):
        torch.testing.assert_close(own_rows, rows, atol=atol, rtol=0.02)
        heads = list(shard_heads(4, 2, rank, world).kv_heads)
        for own, all_heads in zip(own_k + own_v, k + v, strict=True):
            torch.testing.assert_close(own, all_heads[:, heads], atol=atol, rtol=0.02)
            assert own[slots[11:16]].eq(7).all()


def test_drafters_that_cannot_be_sharded() -> None:
    with pytest.raises(ValueError, match="bound to its target before it is sharded"):
        run_simulated(2, lambda communicator: ShardedDrafter(random_drafter("cpu"), communicator))
    with pytest.raises(ValueError, match=r"num_attention_heads must be at least the number of ranks \(5\), got 4"):
        run_simulated(5, lambda communicator: ShardedDrafter(bound_drafter("cpu"), communicator))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_sharded_target_equals_the_whole(family: str, world: int, device: str, rng: torch.Generator) -> None:
    target = make_target(family).to(device)
    ids = torch.randint(0, VOCAB, (2, 9), generator=rng).to(device)
    where = torch.arange(9, device=device).repeat(2, 1)

    def run(communicator: Communicator | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = copy.deepcopy(target)
        runner = TargetRunner(model, (1, 3), rows=2, max_positions=16, communicator=communicator)
        assert runner.vocab_size == VOCAB
        output = runner.forward(ids, where, 9)
        return runner.whole_logits(output.logits), output.taps

    logits, taps = run(None)
    for own_logits, own_taps in run_simulated(world, run):
        torch.testing.assert_close(own_logits, logits, atol=2e-4, rtol=1e-4)
        for own, tap in zip(own_taps, taps, strict=True):
            torch.testing.assert_close(own, tap, atol=2e-4, rtol=1e-4)


def test_targets_that_cannot_be_cut_are_left_as_they_are() -> None:
    target = make_target("llama")
    target.model.layers[1].mlp.down_proj = torch.nn.Identity()  # type: ignore[union-attr, operator]
    before = target.get_input_embeddings().weight  # type: ignore[operator]
    layers = decoder_layers(target)
    with pytest.raises(ValueError, match="must have a linear layer down_proj in each layer, found none"):
        run_simulated(2, lambda communicator: shard_target(target, layers, communicator))
    assert target.get_input_embeddings().weight is before  # type: ignore[operator]
    assert target.model.layers[0].self_attn.q_proj.out_features == 48  # type: ignore[union-attr, operator]


# -- the engine -------------------------------------------------------------------------------------------------------


def tokens(results: list[GenerationResult]) -> list[list[int]]:
    return [result.token_ids for result in results]


def generate(target: Any, device: str, params: Any, communicator: Communicator | None) -> list[list[list[int]]]:
    """DFlash and plain texts of a copy of the target."""
    model = copy.deepcopy(target).to(device)
    engine = Engine(model, random_drafter(device), max_batch=2, max_len=64, use_graphs=False, communicator=communicator)
    texts = [tokens(engine.generate(PROMPTS, params)), tokens(engine.decode_plain(PROMPTS, params))]
    assert engine.pool is not None
    engine.pool.assert_sound()
    return texts


@pytest.mark.parametrize("world", [2, 3, 4])
def test_simulated_ranks_generate_the_same_text(world: int, device: str) -> None:
    target = make_target("qwen3")
    want = generate(target, device, PARAMS, None)
    assert want[0] == want[1]
    for got in run_simulated(world, lambda communicator: generate(target, device, PARAMS, communicator)):
        assert got == want


def test_sampled_ranks_draw_the_same_text(device: str) -> None:
    target = make_target("llama")
    params = [SamplingParams(max_new_tokens=12, temperature=0.8, top_k=20, seed=i) for i in range(len(PROMPTS))]
    want = generate(target, device, params, None)
    got = run_simulated(2, lambda communicator: generate(target, device, params, communicator))
    assert got[0] == got[1] == want


def test_other_drafters_are_refused() -> None:
    from bench.stand_in import ConstantDrafter, tiny_target

    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="a drafter for several ranks must be a Drafter, got ConstantDrafter"):
        run_simulated(2, lambda communicator: Engine(tiny_target(cpu), ConstantDrafter(cpu), communicator=communicator))


# -- processes --------------------------------------------------------------------------------------------------------


def _write_texts(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    with process_group(rank, world, torch.device("cpu"), port) as communicator:
        texts = generate(make_target("qwen3"), "cpu", SHORT, communicator)
        Path(folder, f"{rank}.json").write_text(json.dumps(texts))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_generate_the_same_text(world: int, tmp_path: Path) -> None:
    """gloo between processes of this host."""
    ranks = start_ranks(range(world), world, _write_texts, str(tmp_path))
    want = generate(make_target("qwen3"), "cpu", SHORT, None)
    ranks.end(240)
    assert ranks.failed() == []
    for rank in range(world):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == want


def _sum_over_peers(rank: int, world: int, port: int, folder: str) -> None:
    """Many sums in a row, eagerly and in a graph, each from what the last left."""
    device = torch.device("cuda", rank)
    with process_group(rank, world, device, port):
        peers = PeerMemory(16 * 512, torch.bfloat16, device)
        x = torch.arange(16 * 512, device=device).remainder(7).view(16, 512).bfloat16()
        part = peers.part_like(x)
        assert part is not x and peers.part_like(x.float()) is not part

        def step() -> None:
            torch.div(x, world, out=part)
            if rank == 0:
                part.add_(1)
            peers.sum_parts(part, x)  # x + 1

        for _ in range(3):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(10):
                step()
        graph.replay()
        Path(folder, f"{rank}.json").write_text(json.dumps(x.float().tolist()))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sums_over_peer_memory(tmp_path: Path) -> None:
    ranks = start_ranks(range(2), 2, _sum_over_peers, str(tmp_path))
    ranks.end(120)
    assert ranks.failed() == []
    want = (torch.arange(16 * 512).remainder(7).view(16, 512) + 13).float()
    for rank in range(2):
        assert torch.equal(torch.tensor(json.loads((tmp_path / f"{rank}.json").read_text())), want)


def _pass_on_peers(rank: int, world: int, port: int, folder: str) -> None:
    """A drafter's pass as one kernel a rank, eagerly and in graphs, ranks started apart; the chain's rows beside it."""
    from test_draft import Case, make_inputs
    from test_draft_sharded import forward_of, make_drafter

    device = torch.device("cuda", rank)
    with process_group(rank, world, device, port) as communicator:
        case = Case(contexts=(300, 20), T=16, H=1024, I=2048, heads=(16, 4), D=128, biases=True)
        inputs = make_inputs(case, torch.Generator().manual_seed(7), str(device), torch.bfloat16)
        part = ShardedDrafter(make_drafter(inputs), communicator)
        part.reserve(2, 16)
        assert part.exchange is not None and part.exchange.world == world
        forward = forward_of(part, inputs)
        rows = forward().clone()
        assert part.shards.exchange is not None
        ids, values = torch.arange(32, device=device) * world + rank, torch.randint(3, (32,), device=device).float()
        best = replace(part.shards, exchange=None).merge(ids, values)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            replayed = [forward().clone() for _ in range(5)]
            merged = [part.shards.merge(ids, values) for _ in range(5)]
        for i in range(20):
            if (i + rank) % 7 == 0:
                time.sleep(0.01)
            graph.replay()
            assert torch.equal(forward(), rows)
            assert torch.equal(part.shards.merge(ids, values), best)
        torch.cuda.synchronize()
        assert all(torch.equal(again, rows) for again in replayed)
        assert all(torch.equal(again, best) for again in merged)
        assert bool((part.exchange.words == -1).all())
        del graph
        part.exchange = None
        chain = forward()
        torch.save((rows.cpu(), chain.cpu()), Path(folder, f"{rank}.pt"))


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4, 8])
def test_pass_over_peer_memory(world: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    ranks = start_ranks(range(world), world, _pass_on_peers, str(tmp_path))
    ranks.end(120)
    assert ranks.failed() == []
    first, chain = torch.load(tmp_path / "0.pt")
    torch.testing.assert_close(first, chain, atol=0.2, rtol=0.03)
    for rank in range(1, world):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt")[0], first)


def _no_exchange(rank: int, world: int, port: int, folder: str) -> None:
    with process_group(rank, world, torch.device("cpu"), port) as communicator:
        found = communicator.exchange(64, torch.device("cpu"))
        Path(folder, f"{rank}.json").write_text(json.dumps(found is None))


def test_processes_without_peer_memory(tmp_path: Path) -> None:
    """They are told so, all of them, and take the chain."""
    ranks = start_ranks(range(2), 2, _no_exchange, str(tmp_path))
    ranks.end(60)
    assert ranks.failed() == []
    assert all(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))


def command(*more: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "dflash_kernels", "generate", *more, "--max-new-tokens", "12", "Count to ten."]
    return subprocess.run(line, capture_output=True, text=True, timeout=280, check=False, env=dict(os.environ))


@pytest.mark.skipif(not demo_is_there(), reason="the demo pair is not here")
def test_command_line() -> None:
    done = command("--tp", "2", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "identical to plain decoding: yes" in done.stdout
    assert "2 ranks on cpu" in done.stdout
    assert done.stdout.count("mean acceptance length") == 1  # one rank speaks


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_command_line_on_two_gpus() -> None:
    done = command("--tp", "2")
    assert done.returncode == 0, done.stderr
    assert "identical to plain decoding: yes" in done.stdout and "2 ranks on cuda" in done.stdout


def test_command_line_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (("--tp", "0"), "--tp must be at least 1, got 0"),
        (("--tp", "2", "--device", "cuda:1"), "--device must be auto, cpu or cuda with --tp, got cuda:1"),
        (("--tp", "99", "--device", "cuda"), f"--tp 99 needs 99 CUDA devices, torch sees {torch.cuda.device_count()}"),
    ):
        assert main(["generate", *more, "Count to ten."]) == 2
        assert message in capsys.readouterr().err

"""A tensor-parallel drafter on several GPUs, a process each: `python -m bench tp --tp 2,4`.

For every number of ranks, times are medians of CUDA-graph replays, of the slowest rank, in the order A B B A:

* `all_reduce`: a rank's part of the residual stream, [rows, 4096] bf16, summed by one kernel that reads the other GPUs'
  memory (torch's symmetric memory, without multicast), against NCCL; both in graphs of many sums.
* `drafter_step`: ids to draft tokens: embedding, layers, LM head, best of the ranks' tokens. Ours is the pass as one
  kernel a rank, which sums over peer memory, the head, and a kernel that finds the best over peer memory, or the chain
  where there is no peer memory (`what`).
  The baseline is the same sharded pass of cuBLAS GEMMs, SDPA over a dense context, small kernels (eager or compiled)
  and NCCL, in one graph. Further keys: `chain_us`, the chain of kernels with NCCL's sums; `chain_peer_us`, with sums
  over peer memory; `packed_alone_us` and `chain_alone_us`, both without the layers' sums (tokens are wrong); `sums`,
  how many a step has. `pass`: the same with a vocabulary of 1024, the pass almost alone.
* `inject_fc`: injection with fc sharded by output rows and the fused rows gathered, against fc replicated on every rank
  (which takes the packed plan). `gather_us`: the gather alone.
* `generate`: the demo pair on 208 prompts, few at a time, against one rank. `one_kernel`: whether the ranks' drafter is
  one; `identical`: prompts whose tokens equal that rank's;
  `differing`: the numbers of the others and the first place where they differ.

On the CPU (gloo) sizes are small and times mean nothing: it shows that the suite runs.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from bench import bench_draft as stock
from bench.harness import Row
from bench.runner import Problem
from bench.shapes import QWEN3_8B, TINY, DrafterShape
from dflash_kernels import ops
from dflash_kernels.draft_stream import MAX_TOKENS
from dflash_kernels.engine import Engine, GenerationResult, SamplingParams
from dflash_kernels.model.config import load_config, parse_config
from dflash_kernels.model.drafter import Drafter
from dflash_kernels.model.sharded_drafter import ShardedDrafter
from dflash_kernels.model.weights import DrafterWeights
from dflash_kernels.tensor_parallel import Communicator, PeerMemory, ProcessGroup, process_group, start_ranks

SUITE = "tp"
ITEM_SECONDS = {"cuda": 120.0, "cpu": 400.0}  # without a row: the ranks have lost each other
EPS = 1e-6
# The whole of which `shapes.QWEN35_397B_TP8` is an eighth.
QWEN35_397B = DrafterShape("qwen3.5-397b", L=6, K=8, H=4096, I=12288, Hq=32, Hkv=8, D=128, T=16, V=248320)
Item = Row | Problem | None

wanted: tuple[int, ...] = ()  # numbers of ranks; empty: 2, 4 and 8 where there are as many GPUs


def rows(
    device: torch.device, quick: bool, name_filter: str, seconds_left: Callable[[], float]
) -> Iterator[Row | Problem]:
    """Starts the ranks, for each number of them, and passes on what rank 0 reports."""
    found = torch.cuda.device_count() if device.type == "cuda" else 0
    worlds = wanted or tuple(n for n in (2, 4, 8) if n <= found)
    if not worlds:
        print("  # tp: needs two GPUs, or --tp N on the CPU", flush=True)
    for world in worlds:
        if device.type == "cuda" and world > found:
            yield Problem(SUITE, f"TP{world}", f"needs {world} GPUs, found {found}")
            continue
        yield from _run_ranks(device, world, quick, name_filter, seconds_left())


def _run_ranks(
    device: torch.device, world: int, quick: bool, name_filter: str, seconds: float
) -> Iterator[Row | Problem]:
    reports = multiprocessing.get_context("spawn").Queue()
    ranks = start_ranks(range(world), world, _rank, device.type, quick, name_filter, seconds, reports)
    last = time.monotonic()
    try:
        while True:
            try:
                item: Item = reports.get(timeout=1.0)
            except queue.Empty:
                if failed := ranks.failed():
                    yield Problem(SUITE, f"TP{world}", f"a rank ended with code {failed[0]}")
                    return
                if time.monotonic() - last > ITEM_SECONDS[device.type]:
                    yield Problem(SUITE, f"TP{world}", f"no row for {ITEM_SECONDS[device.type]:.0f} s")
                    return
                continue
            last = time.monotonic()
            if item is None:
                return
            yield item
    finally:
        ranks.end(10.0)


# -- in a rank --------------------------------------------------------------------------------------------------------


def _rank(
    rank: int, world: int, port: int, kind: str, quick: bool, name_filter: str, seconds: float, reports: Any
) -> None:
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a handful of kernels: no pool of compilers a rank
    ends = time.monotonic() + seconds
    with process_group(rank, world, device, port) as group:
        for title, measure in _cases(group, device, quick):
            if name_filter not in f"{SUITE} {title}":
                continue
            item: Item
            if group.all_reduce(torch.tensor([float(time.monotonic() > ends)], device=device)).item() > 0:
                item = Problem(SUITE, title, "time limit")
            else:
                try:
                    item = measure()
                except Exception as error:  # the same on every rank, or the others wait until they are ended
                    item = Problem(SUITE, title, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            if rank == 0:
                reports.put(item)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if rank == 0:
            reports.put(None)
            reports.close()
            reports.join_thread()


def _cases(group: ProcessGroup, device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    at = f"TP{group.world}"
    cuda = device.type == "cuda"
    for count in (16,) if quick or not cuda else (16, 64, 256):
        yield f"all_reduce {at} {count}x4096", partial(_all_reduce, group, device, count, 4096)
    shapes = (QWEN3_8B, QWEN35_397B) if cuda else (TINY,)
    for shape in shapes:
        if cuda:
            alone = replace(shape, name=f"{shape.name} pass", V=1024)
            yield f"drafter_step {at} pass {shape.sizes()}", partial(_drafter_step, group, device, alone, 1024)
        yield f"drafter_step {at} {shape.sizes()}", partial(_drafter_step, group, device, shape, 1024 if cuda else 32)
        yield f"inject_fc {at} {shape.sizes()}", partial(_inject_fc, group, device, shape)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"generate {at} demo pair {_name(dtype)}", partial(_generate, group, device, dtype, quick)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _row(op: str, shape: str, ours: float, name: str, baseline: float | None, size: int, extra: dict[str, Any]) -> Row:
    return Row(SUITE, op, shape, "bf16", "latency", "cold", ours, name, baseline, size, 0, None, extra)


def _times(group: ProcessGroup, device: torch.device, players: Sequence[Sequence[Callable[[], object]]]) -> list[float]:
    """us a call of each player, the slowest rank's median; a player's callables (sets of weights) take turns.

    Every rank makes the same number of calls, or the sums would not meet.
    """
    if device.type == "cpu":
        spans = []
        for fns in players:
            fns[0]()
            start = time.perf_counter()
            for fn in fns:
                fn()
            spans.append((time.perf_counter() - start) / len(fns) * 1e6)
        return _slowest(spans, device)
    replays = [_captured(fns) for fns in players]
    marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in players]
    for replay, _ in replays:
        replay()
    for _ in range(12):
        for i in (*range(len(players)), *reversed(range(len(players)))):
            start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start_event.record()
            replays[i][0]()
            end_event.record()
            marks[i].append((start_event, end_event))
    torch.cuda.synchronize()
    totals = [median(a.elapsed_time(b) for a, b in of_one) * 1e3 for of_one in marks]
    return _slowest([total / calls for total, (_, calls) in zip(totals, replays, strict=True)], device)


def _captured(fns: Sequence[Callable[[], object]]) -> tuple[Callable[[], None], int]:
    """A graph of at least eight calls, and how many."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for fn in [*fns, *fns[:1] * 2]:
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    rounds = -(-8 // len(fns))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(rounds):
            for fn in fns:
                fn()
    return graph.replay, rounds * len(fns)


def _slowest(values: list[float], device: torch.device) -> list[float]:
    together = torch.tensor(values, device=device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return [float(value) for value in together.tolist()]


def _nccl(device: torch.device) -> str:
    if device.type == "cpu":
        return "gloo"
    return f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


def _peers(device: torch.device, elements: int) -> tuple[PeerMemory | None, str]:
    """Sums over peer memory, or why there are none."""
    if device.type != "cuda":
        return None, "no GPU"
    try:
        return PeerMemory(elements, torch.bfloat16, device), ""
    except Exception as error:  # of torch's symmetric memory, of many kinds
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _all_reduce(group: ProcessGroup, device: torch.device, count: int, width: int) -> Row:
    x = torch.ones(count, width, device=device, dtype=torch.bfloat16)
    y = torch.full_like(x, 1 / group.world)  # sums of it stay as they are

    def nccl() -> None:
        for _ in range(8):
            group.all_reduce(y)

    extra: dict[str, Any] = {}
    peers, reason = _peers(device, x.numel())
    name = _nccl(device)
    shape = f"TP{group.world} {count}x{width}"
    size = x.nbytes
    if peers is None:
        ours = _times(group, device, [[nccl]])[0] / 8
        return _row("all_reduce", shape, ours, "", None, size, {"what": name, "no_peer_memory": reason})
    part = peers.part_like(x)

    def one_shot() -> None:
        for _ in range(8):
            peers.sum_parts(part, x)

    generator = torch.Generator(device).manual_seed(group.rank)
    mine = torch.randn(x.shape, device=device, generator=generator).bfloat16()
    part.copy_(mine)
    peers.sum_parts(part, x)
    everyones = group.all_gather(mine).float().sum(0)
    extra["correct"] = bool(((x.float() - everyones).abs() <= 0.02 * everyones.abs() + 0.05).all())
    extra["same_bits_on_all_ranks"] = bool((group.all_gather(x) == x).all())
    ours, theirs = (us / 8 for us in _times(group, device, [[one_shot], [nccl]]))
    return _row("all_reduce", shape, ours, name, theirs, size, {"what": "one kernel over peer memory", **extra})


# -- a drafter with random weights ------------------------------------------------------------------------------------


def _drafter(shape: DrafterShape, device: torch.device, seed: int, mlp: int | None = None) -> Drafter:
    """The whole of it, the same on every rank, bound to a random embedding and LM head."""
    generator = torch.Generator(device).manual_seed(seed)
    inner = shape.I if mlp is None else mlp
    vocab = shape.V if mlp is None else 256
    raw = {
        "block_size": shape.T,
        "mask_token_id": 3,
        "target_layer_ids": list(range(shape.K)),
        "hidden_size": shape.H,
        "intermediate_size": inner,
        "num_hidden_layers": shape.L,
        "num_attention_heads": shape.Hq,
        "num_key_value_heads": shape.Hkv,
        "head_dim": shape.D,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
    }

    def normal(*size: int, std: float = 0.02, mean: float = 0.0) -> torch.Tensor:
        return torch.empty(*size, device=device, dtype=torch.bfloat16).normal_(mean, std, generator=generator)

    q, kv = shape.Hq * shape.D, shape.Hkv * shape.D
    qkv = normal(shape.L, q + 2 * kv, shape.H)
    weights = DrafterWeights(
        fc_weight=normal(shape.H, shape.K * shape.H),
        hidden_norm=normal(shape.H, mean=1.0),
        kv_weight=qkv[:, q:].contiguous(),
        kv_bias=None,
        input_norm=normal(shape.L, shape.H, mean=1.0),
        qkv_weight=qkv,
        qkv_bias=None,
        q_norm=normal(shape.L, shape.D, mean=1.0),
        k_norm=normal(shape.L, shape.D, mean=1.0),
        o_weight=normal(shape.L, shape.H, q),
        o_bias=None,
        post_norm=normal(shape.L, shape.H, mean=1.0),
        gate_up_weight=normal(shape.L, 2 * inner, shape.H),
        down_weight=normal(shape.L, shape.H, inner),
        final_norm=normal(shape.H, mean=1.0),
    )
    drafter = Drafter(parse_config(raw), weights)
    drafter.embed_weight = normal(vocab, shape.H, std=1.0)
    drafter.lm_head_weight = normal(vocab, shape.H)
    return drafter


class _Alone:
    """A rank that does not wait for the others: what is left of a step without its sums."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group, self.rank, self.world = group, group.rank, group.world

    def part_like(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def sum_parts(self, part: torch.Tensor, x: torch.Tensor) -> None:
        pass

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x[None].expand(self.world, *x.shape).contiguous()


def _drafter_step(group: ProcessGroup, device: torch.device, shape: DrafterShape, context: int) -> Row:
    whole = _drafter(shape, device, seed=1)
    part = ShardedDrafter(whole, group)
    del whole
    batch = 1
    gen = torch.Generator(device).manual_seed(2)
    pool = batch * context + 1
    cache_shape = (pool, part.num_kv_heads, shape.D)
    k_caches, v_caches = (
        [torch.randn(cache_shape, device=device, generator=gen).bfloat16() for _ in range(shape.L)] for _ in range(2)
    )
    req_to_token = torch.arange(1, pool, device=device, dtype=torch.int32).view(batch, context)
    prefix_lens = torch.full((batch,), context, device=device)
    request_rows = torch.arange(batch, device=device)
    positions = prefix_lens[:, None] + torch.arange(shape.T, device=device)
    block_ids = torch.randint(0, shape.V, (batch, shape.T), device=device, generator=gen)
    part.reserve(batch, shape.T)
    count = batch * shape.T
    out = (torch.empty(count, dtype=torch.int64, device=device), torch.empty(count, device=device))
    workspace = ops.lm_head_workspace(count, device)

    exchange, shards = part.exchange, part.shards
    gathering = replace(shards, exchange=None)

    def ours(communicator: Communicator, one_kernel: bool = False) -> torch.Tensor:
        part.communicator, part.exchange = communicator, exchange if one_kernel else None
        rows = part.forward(
            block_ids, positions, positions, prefix_lens, request_rows, req_to_token, k_caches, v_caches
        )
        return head(rows, communicator)

    def head(rows: torch.Tensor, communicator: Communicator) -> torch.Tensor:
        ids, values = ops.lm_head_argmax(
            rows, part.lm_head_weight, vocab_start=part.shards.start, out=out, workspace=workspace
        )
        if communicator is alone:
            return ids
        return (gathering if part.exchange is None else shards).merge(ids, values)

    def packed_alone() -> torch.Tensor:
        """This rank's kernel, which waits for nobody."""
        w, packed = part.weights, part._packed
        assert packed is not None
        rows = ops.draft_forward_packed(
            block_ids % part.embed_weight.shape[0],
            positions,
            prefix_lens,
            request_rows,
            req_to_token,
            k_caches,
            v_caches,
            part.embed_weight,
            w.input_norm,
            w.qkv_bias,
            w.q_norm,
            w.k_norm,
            w.o_bias,
            w.post_norm,
            w.final_norm,
            part.cos_sin,
            packed,
            part._windows,
            part._causal,
            EPS,
        )
        return head(rows, alone)

    alone: Communicator = _Alone(group)
    dense_k, dense_v = ([_dense(cache, req_to_token, shape.T) for cache in caches] for caches in (k_caches, v_caches))
    theirs = _stock_step(group, part, shape, block_ids, positions, dense_k, dense_v)
    pieces = (stock._norm, stock._split, stock._merge, stock._gate, stock._add)
    players: dict[str, Callable[[], torch.Tensor]] = {"chain": partial(ours, group)}
    if exchange is not None:
        players |= {"packed": partial(ours, group, one_kernel=True), "packed_alone": packed_alone}
    name = f"torch eager {torch.__version__}, {_nccl(device)}"
    players[name] = partial(theirs, pieces)
    extra: dict[str, Any] = {"sums": 1 + 2 * shape.L}
    if device.type == "cuda":
        try:
            compiled = tuple(_compiled(piece) for piece in pieces)
            theirs(compiled)
            players[f"torch compile + SDPA {torch.__version__}, {_nccl(device)}"] = partial(theirs, compiled)
        except Exception as error:
            extra["not_compiled"] = " ".join(str(error).split())[:160]
        peers, reason = _peers(device, count * shape.H)
        if peers is not None:
            players["chain_peer"] = partial(ours, peers)
        else:
            extra["no_peer_memory"] = reason
    players["chain_alone"] = partial(ours, alone)
    mine = "chain" if exchange is None else "packed"
    agree = players[mine]().clone()
    extra["what"] = "chain of kernels, NCCL" if exchange is None else "packed, one kernel"
    extra["tokens_as_stock"] = f"{int((agree == theirs(pieces)).sum())}/{count}"
    extra["tokens_as_chain"] = f"{int((agree == players['chain']()).sum())}/{count}"
    extra["same_tokens_on_all_ranks"] = bool((group.all_gather(agree) == agree).all())
    us = dict(zip(players, _times(group, device, [[fn] for fn in players.values()]), strict=True))
    best = min((key for key in us if key.startswith("torch")), key=lambda key: us[key])
    extra |= {f"{key}_us": value for key, value in us.items() if not key.startswith("torch") and key != mine}
    extra["baselines_us"] = {key: value for key, value in us.items() if key.startswith("torch")}
    size = 2 * (shape.L * shape.layer_weights + shape.V * shape.H + batch * context * shape.kv_token) // group.world
    text = f"TP{group.world} {shape.sizes()} B{batch} T{shape.T} ctx{context}"
    return _row("drafter_step", text, us[mine], best, us[best], size, extra)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _dense(cache: torch.Tensor, req_to_token: torch.Tensor, block: int) -> torch.Tensor:
    """[B, Hkv, context + T, D], the context gathered."""
    batch, context = req_to_token.shape
    filled = cache.new_empty(batch, cache.shape[1], context + block, cache.shape[2])
    filled[:, :, :context] = cache[req_to_token.long()].transpose(1, 2)
    return filled


def _stock_step(
    group: ProcessGroup,
    part: ShardedDrafter,
    shape: DrafterShape,
    block_ids: torch.Tensor,
    positions: torch.Tensor,
    dense_k: list[torch.Tensor],
    dense_v: list[torch.Tensor],
) -> Callable[[tuple[Callable[..., Any], ...]], torch.Tensor]:
    """The same step in torch, over the same shards; takes the pieces between GEMMs and attention."""
    w, shards = part.weights, part.shards
    assert w.q_norm is not None and w.k_norm is not None
    q_norm, k_norm = w.q_norm, w.k_norm
    batch = block_ids.shape[0]

    def step(pieces: tuple[Callable[..., Any], ...]) -> torch.Tensor:
        norm, split, merge, gate, add = pieces
        table = part.cos_sin[positions][:, :, None]
        x = part._table.lookup(block_ids)
        h = norm(x, w.input_norm[0])
        for layer in range(shape.L):
            qkv = F.linear(h, w.qkv_weight[layer]).view(batch, shape.T, -1, shape.D)
            q = split(qkv, q_norm[layer], k_norm[layer], table, dense_k[layer], dense_v[layer])
            attended = merge(F.scaled_dot_product_attention(q, dense_k[layer], dense_v[layer]), shape.T)
            x, h = add(x, group.all_reduce(F.linear(attended, w.o_weight[layer])), w.post_norm[layer])
            down = F.linear(gate(F.linear(h, w.gate_up_weight[layer])), w.down_weight[layer])
            following = w.input_norm[layer + 1] if layer + 1 < shape.L else w.final_norm
            x, h = add(x, group.all_reduce(down), following)
        values, ids = F.linear(h, part.lm_head_weight).max(-1)
        all_values, all_ids = group.all_gather(values), group.all_gather(ids + shards.start)
        return all_ids.gather(0, all_values.argmax(0)[None])[0]

    return step


def _inject_fc(group: ProcessGroup, device: torch.device, shape: DrafterShape) -> Row:
    """One block of T rows, all committed, over enough sets of weights to outrun the L2."""
    rows = shape.T
    positions = torch.arange(rows, device=device)
    slots = positions + 1
    commit_lens = torch.full((1,), rows, dtype=torch.int32, device=device)
    replicated = shape.K * shape.H * shape.H * 2
    shared = replicated // group.world + 2 * shape.L * 2 * shape.Hkv * shape.D * shape.H // group.world
    sets = max(1, -(-150_000_000 // shared)) if device.type == "cuda" else 1
    taps = [torch.randn(rows, shape.H, device=device).bfloat16() for _ in range(shape.K)]
    inject: dict[str, list[Callable[[], object]]] = {"sharded": [], "replicated": []}
    for seed in range(sets):
        whole = _drafter(shape, device, seed, mlp=8 * group.world)
        for fc in ("sharded", "replicated"):
            part = ShardedDrafter(whole, group, fc)  # type: ignore[arg-type]
            part.reserve(1, rows)
            shape_of = (shape.L, 64, part.num_kv_heads, shape.D)
            k, v = (list(torch.zeros(shape_of, device=device, dtype=torch.bfloat16)) for _ in range(2))
            inject[fc].append(partial(part.inject, taps, positions, slots, commit_lens, k, v))
    piece = torch.randn(rows, shape.H // group.world, device=device).bfloat16()
    players = [inject["sharded"], inject["replicated"], [lambda: group.all_gather(piece)]]
    ours, theirs, gather = _times(group, device, players)
    text = f"TP{group.world} {shape.sizes()} K{shape.K} rows{rows}"
    extra = {"gather_us": gather, "sets": sets}
    return _row("inject_fc", text, ours, "fc replicated, packed plan", theirs, shared, extra)


# -- the demo pair ----------------------------------------------------------------------------------------------------


def _prompts(count: int) -> list[str]:
    doings = ("sorts", "counts", "reverses", "joins", "filters", "doubles", "compares", "prints")
    doings += ("merges", "removes", "copies", "checks", "splits", "rounds", "groups", "finds")
    things = ("numbers", "words", "files", "dates", "lines", "names", "lists", "keys", "pairs", "digits", "strings")
    things += ("prices", "rows")
    return [f"Write a Python function that {doing} {thing}." for thing in things for doing in doings][:count]


def _generate(group: ProcessGroup, device: torch.device, dtype: torch.dtype, quick: bool) -> Row:
    from bench.demo_pair import load_demo_pair
    from dflash_kernels.cli import DEMO_DRAFTER

    cpu = device.type == "cpu"
    few = max(1, MAX_TOKENS // load_config(DEMO_DRAFTER).block_size)  # requests whose rows are one kernel's
    prompts, new_tokens, batch = (_prompts(2), 8, 2) if cpu else (_prompts(64 if quick else 208), 64, few)
    params = SamplingParams(max_new_tokens=new_tokens)

    def run(communicator: Communicator | None) -> tuple[list[GenerationResult], float, dict[str, Any]]:
        model, tokenizer, drafter = load_demo_pair(dtype, device)
        engine = Engine(model, drafter, tokenizer, max_batch=batch, max_len=160, communicator=communicator)
        ids = [engine.encode(prompt) for prompt in prompts]
        engine.generate(ids[: 2 * batch], params)  # graphs
        results = engine.generate(ids, params)
        stats, drafter = engine.last_stats, engine.drafter
        engine.close()
        steps = max(stats.steps, 1)
        one_kernel = isinstance(drafter, ShardedDrafter) and drafter.exchange is not None
        more = {
            "one_kernel": one_kernel,
            "steps": stats.steps,
            "ms_per_step": stats.seconds * 1e3 / steps,
            "graph_replays": stats.graph_replays,
        }
        return results, stats.seconds * 1e6 / max(stats.new_tokens, 1), more

    alone, alone_us, _ = run(None)
    together, us, extra = run(group)
    texts = [result.token_ids for result in together]
    differing = {
        str(i): next((j for j, (x, y) in enumerate(zip(a.token_ids, b, strict=False)) if x != y), -1)
        for i, (a, b) in enumerate(zip(alone, texts, strict=True))
        if a.token_ids != b
    }
    everywhere: list[Any] = [None] * group.world
    dist.all_gather_object(everywhere, texts)
    commits = [n for result in together for n in result.stats.commit_lens]
    extra |= {
        "identical": f"{len(prompts) - len(differing)}/{len(prompts)}",
        "differing": differing,
        "ranks_agree": all(other == texts for other in everywhere),
        "mean_acceptance": sum(commits) / max(len(commits), 1),
        "tokens": sum(map(len, texts)),
    }
    us, alone_us = _slowest([us, alone_us], device)
    text = f"TP{group.world} demo pair B{batch} {new_tokens} tokens"
    return Row(SUITE, "generate", text, _name(dtype), "throughput", "cold", us, "one rank", alone_us, 0, 0, None, extra)

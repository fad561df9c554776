"""draft_forward_sharded: ranks whose kernels sum over each other's memory give the whole pass, the same bits each.

On CUDA the ranks are simulated: streams of one device, each with a share of its multiprocessors. On a CPU the kernels
run in the emulator (test_emulated_kernels.py), a thread and an emulated device for each rank.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_draft import Case, Inputs, make_inputs
from test_draft_layer import cut
from test_draft_packed import FORMATS, MATRICES, Interpreter, dequantized, outputs, pack

from dflash_kernels.draft_stream import Exchange, Kind, PackedDraft, pack_draft
from dflash_kernels.formats import WeightFormat
from dflash_kernels.model.config import parse_config
from dflash_kernels.model.drafter import Drafter
from dflash_kernels.model.quantize import quantize
from dflash_kernels.model.shard import shard_heads, shard_range
from dflash_kernels.model.sharded_drafter import ShardedDrafter
from dflash_kernels.model.weights import DrafterWeights
from dflash_kernels.ops import (
    draft_exchange_words,
    draft_forward_packed,
    draft_forward_sharded,
    merge_exchange_words,
    merge_vocab_ranks,
    merge_vocab_shards,
)
from dflash_kernels.reference import draft as reference
from dflash_kernels.stream import UNIT_FIELDS

INDICES = ("block_ids", "positions", "prefix_lens", "req_pool_indices")


class Rank:
    """One rank's part, packed, and the calls that it makes."""

    def __init__(
        self, inputs: Inputs, exchange: Exchange, blocks: int, weight_format: WeightFormat | None = None
    ) -> None:
        self.exchange, self.vocab = exchange, inputs["embed_weight"].shape[0]
        start, stop = shard_range(self.vocab, exchange.rank, exchange.world, "vocab_size")
        part = cut(inputs, exchange.rank, exchange.world)
        if weight_format is None:
            self.packed = pack(part, blocks)
        else:
            self.packed = pack_codes(inputs, exchange, weight_format, blocks)
        self.arguments = {name: value for name, value in part.items() if name not in MATRICES}
        self.arguments |= {
            "embed_weight": inputs["embed_weight"][start:stop].clone(),
            "o_bias": inputs["o_bias"],
            "packed": self.packed,
            "exchange": exchange,
            "vocab_start": start,
            "vocab_size": self.vocab,
        }

    def ready(self, indices: Inputs, patience: float = 10.0) -> Callable[[], torch.Tensor]:
        """A call for which all memory is there."""
        arguments = {**self.arguments, **indices, "patience": patience}
        arguments |= outputs(arguments, self.packed)
        return lambda: draft_forward_sharded(**arguments)


def pack_codes(inputs: Inputs, exchange: Exchange, weight_format: WeightFormat, blocks: int) -> PackedDraft:
    """This rank's part of the codes of the whole; heads and MLP features divide."""
    rank, world = exchange.rank, exchange.world
    _, kv_heads, dim = inputs["k_caches"][0].shape
    q_width, inter = inputs["o_weight"].shape[2], inputs["down_weight"].shape[2]
    qkv, o, gate_up, down = (quantize(inputs[name], weight_format) for name in MATRICES)

    def part(size: int, by: int = 0) -> slice:
        return slice(by + size * rank // world, by + size * (rank + 1) // world)

    k_width = kv_heads * dim
    return pack_draft(
        qkv.rows(part(q_width), part(k_width, q_width), part(k_width, q_width + k_width)),
        o.columns(part(q_width).start, part(q_width).stop),
        gate_up.rows(part(inter), part(inter, inter)),
        down.columns(part(inter).start, part(inter).stop),
        num_kv_heads=kv_heads // world,
        head_dim=dim,
        blocks=blocks,
    )


def together(ranks: Sequence[Any], passes: Sequence[Callable[[Any], Any]]) -> list[list[Any]]:
    """What each pass gives on each rank: on CUDA each rank on a stream, on a CPU on a thread, started apart.

    A pass must allocate nothing, nor launch a kernel for the first time: that may wait for kernels which wait for it.
    """
    if ranks[0].exchange.words.is_cuda:
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in ranks]
        results = []
        for work in passes:  # of all ranks: the next of one may queue before this one of another
            results.append([])
            for rank, stream in zip(ranks, streams, strict=True):
                with torch.cuda.stream(stream):
                    results[-1].append(work(rank))
        torch.cuda.synchronize()
        return results

    def run(rank: Any) -> list[torch.Tensor]:
        made = []
        for i, work in enumerate(passes):
            time.sleep(0.02 * ((rank.exchange.rank + i) % rank.exchange.world))
            made.append(work(rank))
        return made

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(map(list, zip(*pool.map(run, ranks), strict=True)))


def make_ranks(inputs: Inputs, world: int, on: str, weight_format: WeightFormat | None = None) -> list[Rank]:
    exchanges = Exchange.simulated(world, draft_exchange_words(world, inputs["embed_weight"].shape[1]), on)
    if on == "cpu":  # a device each
        exchanges = [replace(exchange, one_device=False) for exchange in exchanges]
    blocks = 3 if on == "cpu" else torch.cuda.get_device_properties(on).multi_processor_count // world
    return [Rank(inputs, exchange, blocks, weight_format) for exchange in exchanges]


def launches(inputs: Inputs, rng: torch.Generator) -> list[Inputs]:
    """Index tensors of a pass of all requests, of one of them, and of all again, with other ids; one is in no part."""
    batch, vocab = inputs["block_ids"].shape[0], inputs["embed_weight"].shape[0]
    made = []
    for count in (batch, 1, batch):
        indices = {name: inputs[name][:count].clone() for name in INDICES}
        ids = indices["block_ids"]
        ids.copy_(torch.randint(0, vocab, ids.shape, generator=rng))
        made.append(indices)
    return made


def check(inputs: Inputs, world: int, on: str, rng: torch.Generator, weight_format: WeightFormat | None = None) -> None:
    """Passes in a row, of different sizes, ranks started apart; by the rule for bf16, and no word left behind."""
    ranks, passes = make_ranks(inputs, world, on, weight_format), launches(inputs, rng)
    exact_inputs = inputs if weight_format is None else dequantized(inputs, weight_format)
    calls = [[rank.ready(indices) for rank in ranks] for indices in passes]
    results = together(ranks, [lambda rank, made=made: made[rank.exchange.rank]() for made in calls])
    for i, (indices, made) in enumerate(zip(passes, results, strict=True)):
        whole = {**exact_inputs, **indices}
        exact = reference.draft_forward(**whole, dtype=torch.float32)
        rounding = (reference.draft_forward(**whole, dtype=torch.bfloat16).float() - exact).abs().max().item()
        error = (made[0].float() - exact).abs().max().item()
        assert error <= 2 * rounding + 4e-3, f"pass {i}: error {error}, rounding alone {rounding}"
        for rank, other in enumerate(made):
            assert torch.equal(other, made[0]), f"pass {i}: rank {rank} differs from rank 0"
    for rank in ranks:
        assert bool((rank.exchange.words == -1).all()), "words are left in the exchange"


CASES = [
    Case(contexts=(5, 40)),
    Case(contexts=(64, 3), T=7, heads=(9, 3), H=136, I=48, index=torch.int32),
    Case(contexts=(70,), T=16, heads=(8, 1), D=128, H=264, I=64, windows=(33,), causal=(1,), biases=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_whole(case: Case, world: int, rng: torch.Generator, on: str = "cuda") -> None:
    """Heads that do not divide, KV heads on several ranks, row tiles that are not filled."""
    check(make_inputs(case, rng, on, torch.bfloat16), world, on, rng)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp8", "e2m1-g64"])
def test_ranks_of_codes_give_the_whole(name: str, rng: torch.Generator, on: str = "cuda") -> None:
    assert name in FORMATS
    inputs = make_inputs(Case(contexts=(20, 3), T=16, H=128, I=256), rng, on, torch.bfloat16)
    check(inputs, 2, on, rng, WeightFormat.parse(name))


LARGE = [
    Case(contexts=(1024,), H=4096, I=12288, heads=(32, 8), D=128),
    Case(contexts=(900, 0, 33, 1024), H=4096, I=1536, heads=(32, 8), D=128, windows=(512, 0), causal=(1, 0)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_large_ranks_on_cuda(case: Case, world: int, rng: torch.Generator) -> None:
    check(make_inputs(case, rng, "cuda", torch.bfloat16), world, "cuda", rng)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_find_the_best(world: int, rng: torch.Generator, on: str = "cuda") -> None:
    """As merge_vocab_shards of all: ties, infinities and NaN included; launch after launch, of any number of rows."""
    exchanges = Exchange.simulated(world, merge_exchange_words(world), on)
    ranks = [SimpleNamespace(exchange=exchange) for exchange in exchanges]
    calls, expected = [], []
    for rows in (16, 1, 300, 16, 64):
        values = torch.randint(-2, 2, (world, rows), generator=rng).float()
        values[0, 0], values[-1, rows // 2] = float("nan"), float("-inf")
        if rows > 3:
            values[:, 3], values[-1, 2] = float("-inf"), float("inf")
        values.view(torch.int32)[-1, -1] = -1  # the NaN that is no word
        ids = torch.stack([torch.randperm(1000, generator=rng)[:rows] * world + rank for rank in range(world)])
        ids, values = ids.to(on), values.to(on)
        expected.append(merge_vocab_shards(ids, values))
        outs = [(ids[rank].clone(), values[rank].clone()) for rank in range(world)]  # in place
        calls.append(
            [partial(merge_vocab_ranks, *out, exchanges[i], patience=10.0, out=out) for i, out in enumerate(outs)]
        )
    results = together(ranks, [lambda rank, made=made: made[rank.exchange.rank]() for made in calls])
    for made, (ids, values) in zip(results, expected, strict=True):
        for own_ids, own_values in made:
            assert torch.equal(own_ids, ids)
            torch.testing.assert_close(own_values, values, rtol=0, atol=0, equal_nan=True)
    for exchange in exchanges:
        assert bool((exchange.words[:-4] == -1).all()) and int(exchange.words[-4]) == len(calls) - 1


def test_merge_of_one_rank(device: str, rng: torch.Generator) -> None:
    ids, values = torch.arange(5, device=device), torch.randn(5, generator=rng).to(device)
    [exchange] = Exchange.simulated(1, merge_exchange_words(1), device)
    for got, want in zip(merge_vocab_ranks(ids, values, exchange), (ids, values), strict=True):
        assert torch.equal(got, want)
    assert merge_vocab_ranks(ids[:0], values[:0], exchange)[0].shape == (0,)
    many = torch.zeros(1025, dtype=torch.int64, device=device)
    for bad, match in [
        ((ids.int(), values, exchange), "ids must have dtype int64"),
        ((ids, values[:4], exchange), r"values must have shape \[5\], got \[4\]"),
        ((many, many.float(), exchange), "ids must have at most 1024 elements, got 1025"),
        ((ids, values, replace(exchange, words=exchange.words[:-4])), "exchange must have at least"),
    ]:
        with pytest.raises(ValueError, match=f"merge_vocab_ranks: {match}"):
            merge_vocab_ranks(*bad)
    with pytest.raises(ValueError, match="merge_exchange_words: world must be in 1..8, got 0"):
        merge_exchange_words(0)


def test_opcheck_of_the_merge(device: str) -> None:
    ids, values = torch.arange(5, device=device), torch.zeros(5, device=device)
    [exchange] = Exchange.simulated(1, merge_exchange_words(1), device)
    op = torch.ops.dflash.merge_vocab_ranks
    inputs = (ids, values, exchange.words, [0], 0, 1.0)
    tests = ["test_schema", "test_faketensor"]  # on CUDA the exchange counts launches
    torch.library.opcheck(op.default, inputs, test_utils=tests)
    outs = {"out_ids": torch.empty_like(ids), "out_values": torch.empty_like(values)}
    torch.library.opcheck(op.out, inputs, outs, test_utils=tests)


@pytest.mark.gpu
def test_ids_outside_the_vocabulary(rng: torch.Generator, on: str = "cuda") -> None:
    """They are nobody's: rows of zeros, as in the whole pass, and no rank waits for them."""
    inputs = make_inputs(Case(contexts=(9,), T=8), rng, on, torch.bfloat16)
    indices = {name: inputs[name].clone() for name in INDICES}
    vocab = inputs["embed_weight"].shape[0]
    indices["block_ids"][0, :3] = torch.tensor([-1, vocab, vocab + 40])
    whole = pack(inputs, 3)
    arguments = {**{name: value for name, value in inputs.items() if name not in MATRICES}, **indices, "packed": whole}
    expected = draft_forward_packed(**arguments, **outputs(arguments, whole))
    ranks = make_ranks(inputs, 2, on)
    calls = [rank.ready(indices) for rank in ranks]
    [[first, second]] = together(ranks, [lambda rank: calls[rank.exchange.rank]()])
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, atol=0.06, rtol=0.02)


def test_one_rank_is_the_packed_pass(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(CASES[0], rng, device, torch.bfloat16)
    [rank] = make_ranks(inputs, 1, device)
    arguments = {name: value for name, value in inputs.items() if name not in MATRICES}
    expected = draft_forward_packed(**arguments, packed=pack(inputs, rank.packed.blocks))
    assert torch.equal(rank.ready({})(), expected)
    assert torch.equal(draft_forward_sharded(**rank.arguments), expected)


class Meeting:
    """A communicator that has nothing but an exchange: what a pass as one kernel needs of it."""

    def __init__(self, exchange: Exchange) -> None:
        self.rank, self.world, self._exchange = exchange.rank, exchange.world, exchange

    def exchange(self, words: int, device: torch.device) -> Exchange:
        assert words <= self._exchange.words.numel() and device == self._exchange.words.device
        return self._exchange


def make_drafter(inputs: Inputs) -> Drafter:
    """A drafter, bound, with the weights of `inputs`; its rope is its own."""
    _, kv_heads, dim = inputs["k_caches"][0].shape
    layers, hidden = inputs["input_norm"].shape
    q_width, inter = inputs["o_weight"].shape[2], inputs["down_weight"].shape[2]
    raw = {
        "block_size": inputs["block_ids"].shape[1],
        "mask_token_id": 3,
        "target_layer_ids": [0],
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": q_width // dim,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "vocab_size": inputs["embed_weight"].shape[0],
        "max_position_embeddings": 512,
    }
    names = ("input_norm", "qkv_weight", "qkv_bias", "q_norm", "k_norm", "o_weight", "o_bias", "post_norm")
    weights = DrafterWeights(
        fc_weight=inputs["embed_weight"].new_zeros(hidden, hidden),
        hidden_norm=inputs["final_norm"],
        kv_weight=inputs["qkv_weight"][:, q_width:].contiguous(),
        kv_bias=None if inputs["qkv_bias"] is None else inputs["qkv_bias"][:, q_width:].contiguous(),
        **{name: inputs[name] for name in (*names, "gate_up_weight", "down_weight", "final_norm")},
    )
    drafter = Drafter(parse_config(raw), weights)
    drafter.embed_weight = drafter.lm_head_weight = inputs["embed_weight"]
    return drafter


def forward_of(part: ShardedDrafter, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """A rank's pass over its heads of the caches; the result is valid until the next."""
    communicator, kv_heads = part.communicator, inputs["k_caches"][0].shape[1]
    q_heads = inputs["o_weight"].shape[2] // part.head_dim
    own = list(shard_heads(q_heads, kv_heads, communicator.rank, communicator.world).kv_heads)
    k, v = ([cache[:, own].contiguous() for cache in inputs[name]] for name in ("k_caches", "v_caches"))
    index = [inputs[name] for name in ("positions", "prefix_lens", "req_pool_indices", "req_to_token")]
    return lambda: part.forward(inputs["block_ids"], index[0], *index, k, v)


@pytest.mark.gpu
def test_sharded_drafter_is_one_kernel(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, on: str = "cuda") -> None:
    """reserve() makes the exchange and forward() takes it, without a collective; o's bias counts once."""
    inputs = make_inputs(Case(contexts=(40, 7), biases=True), rng, on, torch.bfloat16)
    whole = make_drafter(inputs)
    if on == "cpu":
        monkeypatch.setattr(ShardedDrafter, "why_not_one_kernel", lambda self, rows: None)
        monkeypatch.setattr(ShardedDrafter, "_blocks", lambda self: 3)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    exchanges = Exchange.simulated(2, draft_exchange_words(2, whole.hidden_size), whole.device)
    if on == "cpu":
        exchanges = [replace(exchange, one_device=False) for exchange in exchanges]
    parts = [ShardedDrafter(whole, Meeting(exchange)) for exchange in exchanges]  # type: ignore[arg-type]
    for part in parts:
        part.reserve(2, 16)
        assert part.exchange is not None
    calls = [forward_of(part, inputs) for part in parts]
    [[first, second]] = together(parts, [lambda part: calls[part.communicator.rank]()])
    assert torch.equal(first, second)
    exact = reference.draft_forward(**{**inputs, "cos_sin": whole.cos_sin}, dtype=torch.float32)
    torch.testing.assert_close(first.float(), exact, atol=0.08, rtol=0.02)


def test_opcheck(rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=(5, 12), T=7, H=64), rng, "cpu", torch.bfloat16)
    [rank] = make_ranks(inputs, 1, "cpu")
    seen: list[Any] = []

    class Overload:
        def default(self, *flat: Any) -> None:
            seen.extend(flat)

    class Ops:
        draft_forward_sharded = Overload()

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(RuntimeError):
        patch.setattr(torch.ops, "dflash", Ops())
        draft_forward_sharded(**rank.arguments)
    op = torch.ops.dflash.draft_forward_sharded
    torch.library.opcheck(op.default, tuple(seen))
    torch.library.opcheck(op.out, tuple(seen), outputs(rank.arguments, rank.packed))


def test_errors(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=(5, 12), T=7), rng, device, torch.bfloat16)
    [rank] = make_ranks(inputs, 1, device)
    own, two = rank.exchange, Exchange.simulated(2, draft_exchange_words(2, inputs["embed_weight"].shape[1]), device)[0]
    another = r"peers\[1\] must be an address of another rank, a multiple of 16, got "

    def with_exchange(**changes: Any) -> Inputs:
        return {"exchange": replace(own, **changes)}

    for bad, match in [
        (with_exchange(words=own.words[:-4]), r"exchange must have at least \d+ elements, got \d+"),
        (with_exchange(words=own.words.float()), "exchange must have dtype"),
        (with_exchange(rank=1), r"rank must be in 0..0, got 1"),
        (with_exchange(addresses=()), "peers must have 1..8 addresses, got 0"),
        (with_exchange(addresses=(*own.addresses, 0)), "exchange must have at least"),
        ({"exchange": replace(two, addresses=(two.addresses[0], 24))}, another + "24"),
        ({"exchange": replace(two, addresses=two.addresses[:1] * 2)}, another + str(two.addresses[0])),
        ({"vocab_start": 1}, r"vocab_start must be in 0..0 \(vocab_size less the rows of embed_weight\), got 1"),
        ({"patience": 0.0}, "patience must be above 0 and below 1e9 seconds, got 0"),
    ]:
        with pytest.raises(ValueError, match=f"^dflash::draft_forward_sharded: {match}"):
            draft_forward_sharded(**{**rank.arguments, **bad})
    with pytest.raises(ValueError, match="^dflash::draft_exchange_words: world must be in 1..8, got 9"):
        draft_exchange_words(9, 64)
    assert bool((own.words == -1).all())


def test_several_ranks_on_a_cpu(rng: torch.Generator) -> None:
    """Their kernels could not wait for each other."""
    inputs = make_inputs(Case(contexts=(5,), T=7), rng, "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="draft_forward_sharded: peers must be one address on the CPU, got 2"):
        make_ranks(inputs, 2, "cpu")[0].ready({})()


def test_a_rank_that_never_comes(rng: torch.Generator) -> None:
    """Emulated: the launch ends with an error instead of waiting for ever."""
    inputs = make_inputs(Case(contexts=(5,), T=7), rng, "cpu", torch.bfloat16)
    if torch.ops.dflash is not getattr(torch.ops, "dflash_emulated", None):
        pytest.skip("on a GPU the error would be the process's last")
    with pytest.raises(RuntimeError, match="emulator: a trap"):
        make_ranks(inputs, 2, "cpu")[1].ready({}, patience=2e-9)()


# ---- the ranks' schedules, interpreted -------------------------------------------------------------------------------


class Waits(Exception):
    """A unit has written its words and waits for those of other ranks."""


class Member(Interpreter):
    """A rank among others, which run between any two of its steps, a pass ahead or behind."""

    def __init__(self, inputs: Inputs, rank: int, world: int, blocks: int, buffers: int) -> None:
        start, stop = shard_range(inputs["embed_weight"].shape[0], rank, world, "vocab_size")
        part = {**cut(inputs, rank, world), "o_bias": inputs["o_bias"]}
        super().__init__(part, pack(part, blocks))
        self.rank, self.buffers, self.own = rank, buffers, range(start, stop)
        self.others: list[Member] = []
        self.words: dict[tuple[Any, ...], torch.Tensor] = {}  # of others, not yet read
        self.waiting: dict[int, tuple[list[tuple[Any, ...]], Callable[[], None]]] = {}  # of a block: places, the rest
        self.passes: list[torch.Tensor] = []
        self.queues: list[list[dict[str, int]]] = []

    def begin(self) -> None:
        """The next launch."""
        super().__init__(self.inputs, self.packed)
        self.queues = [
            [dict(zip(UNIT_FIELDS, unit, strict=True)) for unit in units if unit[2] >= 0]
            for units in self.packed.units.tolist()
        ]

    def publish(self, place: tuple[Any, ...], words: torch.Tensor) -> None:
        for other in self.others:
            assert place not in other.words, f"rank {self.rank} writes over words that rank {other.rank} has not read"
            other.words[place] = words.clone()

    def finish(self, kind: Kind, layer: int, row_tile: int, block: torch.Tensor) -> None:
        if kind not in (Kind.OUT, Kind.DOWN):
            super().finish(kind, layer, row_tile, block)
            return
        buffer = kind if self.buffers == 2 else 0
        self.publish((buffer, self.rank, row_tile), block)

        def rest() -> None:
            parts = {other.rank: self.words.pop((buffer, other.rank, row_tile)) for other in self.others}
            parts[self.rank] = block
            total = torch.stack([parts[rank] for rank in sorted(parts)]).sum(0)
            super(Member, self).finish(kind, layer, row_tile, total)

        self.waiting[self.now] = ([(buffer, other.rank, row_tile) for other in self.others], rest)
        raise Waits

    def job(self, kind: Kind, layer: int, index: tuple[int, int]) -> None:
        if kind != Kind.EMBED:
            super().job(kind, layer, index)
            return
        rows = range(index[0], self.tokens, index[1])
        ids = self.inputs["block_ids"].flatten().tolist()
        for row in rows:
            if ids[row] in self.own:
                self.publish(("row", row), self.inputs["embed_weight"][ids[row]].float())
        places = [("row", row) for row in rows if ids[row] not in self.own]

        def rest() -> None:
            for row in rows:
                own = ids[row] in self.own
                self.x[row] = self.inputs["embed_weight"][ids[row]].float() if own else self.words.pop(("row", row))

        self.waiting[self.now] = (places, rest)
        raise Waits

    def ready(self) -> list[int]:
        """Blocks that can go on."""
        return [
            block
            for block, queue in enumerate(self.queues)
            if queue
            and (
                all(place in self.words for place in self.waiting[block][0])
                if block in self.waiting
                else self.is_ready(queue[0])
            )
        ]

    def step(self, block: int) -> None:
        unit = self.queues[block][0]
        if block in self.waiting:
            self.waiting.pop(block)[1]()
            if unit["signal"] >= 0:
                self.counters[unit["signal"]] += 1
        else:
            self.now = block
            try:
                self.perform(unit)
            except Waits:
                return
        self.queues[block].pop(0)
        if not any(self.queues):
            assert not self.slots and bool((self.read == 1).all())
            self.passes.append(self.out)


def interpret(case: Case, world: int, blocks: int, rng: torch.Generator, buffers: int = 2, passes: int = 3) -> None:
    """Passes of all ranks in any order, with one block that is seldom its turn; the result is the whole's."""
    inputs = make_inputs(case, rng, "cpu", torch.bfloat16)
    members = [Member(inputs, rank, world, blocks, buffers) for rank in range(world)]
    for member in members:
        member.others = [other for other in members if other is not member]

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=rng))

    slow = (draw(world), draw(blocks))
    while True:
        for member in members:
            if not any(member.queues) and len(member.passes) < passes:
                member.begin()
        ready = [(member.rank, block) for member in members for block in member.ready()]
        if not ready:
            break
        if len(ready) > 1 and slow in ready and draw(200):
            ready.remove(slow)
        rank, block = ready[draw(len(ready))]
        members[rank].step(block)
        if draw(400) == 0:
            slow = (draw(world), draw(blocks))
    exact = reference.draft_forward(**inputs, dtype=torch.float32)
    for member in members:
        assert len(member.passes) == passes, "ranks wait for each other in a circle"
        assert not member.words, "words are left"
        for out in member.passes:
            torch.testing.assert_close(out, exact, atol=2e-4, rtol=0)
            assert torch.equal(out, members[0].passes[0])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("blocks", [1, 3, 20])
def test_ranks_in_any_order(world: int, blocks: int, rng: torch.Generator) -> None:
    """No word is written over before it is read, and nobody waits in a circle, also where blocks finish many tiles."""
    case = Case(contexts=(5, 9), T=4, heads=(6, 3), H=520, I=200, biases=True)
    interpret(case, world, blocks, rng)


def test_one_buffer_is_not_enough(rng: torch.Generator) -> None:
    """The rule above can fail: o's words and down's in one place."""
    with pytest.raises(AssertionError, match="writes over words that rank . has not read"):
        interpret(Case(contexts=(5,), T=4, H=520, I=200), 2, 20, rng, buffers=1, passes=20)

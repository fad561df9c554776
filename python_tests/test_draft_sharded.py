"""draft_forward_sharded: ranks whose kernels sum over each other's memory give the whole pass, the same bits each.

On CUDA the ranks are simulated: streams of one device, each with a share of its multiprocessors. On a CPU the kernels
run in the emulator (test_emulated_kernels.py), a thread and an emulated device for each rank.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_draft import Case, Inputs, make_inputs
from test_draft_layer import cut
from test_draft_packed import FORMATS, MATRICES, dequantized, outputs, pack

from dflash_kernels.draft_stream import Exchange, PackedDraft, pack_draft
from dflash_kernels.formats import WeightFormat
from dflash_kernels.model.config import parse_config
from dflash_kernels.model.drafter import Drafter
from dflash_kernels.model.quantize import quantize
from dflash_kernels.model.shard import shard_heads, shard_range
from dflash_kernels.model.sharded_drafter import ShardedDrafter
from dflash_kernels.model.weights import DrafterWeights
from dflash_kernels.ops import draft_exchange_words, draft_forward_packed, draft_forward_sharded
from dflash_kernels.reference import draft as reference

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

    def call(self, indices: Inputs, **more: Any) -> torch.Tensor:
        arguments = {**self.arguments, **indices}
        return draft_forward_sharded(**arguments, **outputs(arguments, self.packed), **more)


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


def together(ranks: list[Any], work: Callable[[Any], Any]) -> list[Any]:
    """The work of ranks, which have an exchange, at the same time."""
    if ranks[0].exchange.words.is_cuda:
        torch.cuda.synchronize()
        results = []
        for rank in ranks:
            with torch.cuda.stream(torch.cuda.Stream()):
                results.append(work(rank))
        torch.cuda.synchronize()
        return results
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(work, ranks))


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

    def work(rank: Rank) -> list[torch.Tensor]:
        results = []
        for i, indices in enumerate(passes):
            if on == "cpu":
                time.sleep(0.02 * ((rank.exchange.rank + i) % world))
            results.append(rank.call(indices))
        return results

    results = together(ranks, work)
    for i, indices in enumerate(passes):
        whole = {**exact_inputs, **indices}
        exact = reference.draft_forward(**whole, dtype=torch.float32)
        rounding = (reference.draft_forward(**whole, dtype=torch.bfloat16).float() - exact).abs().max().item()
        error = (results[0][i].float() - exact).abs().max().item()
        assert error <= 2 * rounding + 4e-3, f"pass {i}: error {error}, rounding alone {rounding}"
        for rank, others in enumerate(results[1:], 1):
            assert torch.equal(others[i], results[0][i]), f"pass {i}: rank {rank} differs from rank 0"
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
def test_ids_outside_the_vocabulary(rng: torch.Generator, on: str = "cuda") -> None:
    """They are nobody's: rows of zeros, as in the whole pass, and no rank waits for them."""
    inputs = make_inputs(Case(contexts=(9,), T=8), rng, on, torch.bfloat16)
    indices = {name: inputs[name].clone() for name in INDICES}
    vocab = inputs["embed_weight"].shape[0]
    indices["block_ids"][0, :3] = torch.tensor([-1, vocab, vocab + 40])
    whole = pack(inputs, 3)
    arguments = {**{name: value for name, value in inputs.items() if name not in MATRICES}, **indices, "packed": whole}
    expected = draft_forward_packed(**arguments, **outputs(arguments, whole))
    first, second = together(make_ranks(inputs, 2, on), lambda rank: rank.call(indices))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, atol=0.06, rtol=0.02)


def test_one_rank_is_the_packed_pass(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(CASES[0], rng, device, torch.bfloat16)
    [rank] = make_ranks(inputs, 1, device)
    arguments = {name: value for name, value in inputs.items() if name not in MATRICES}
    expected = draft_forward_packed(**arguments, packed=pack(inputs, rank.packed.blocks))
    assert torch.equal(rank.call({}), expected)
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


def forward(drafter: Drafter, inputs: Inputs) -> torch.Tensor:
    """Of the drafter or of a rank's part, whose caches are cut from those of `inputs`."""
    dim, kv_heads = drafter.head_dim, inputs["k_caches"][0].shape[1]
    own = list(range(kv_heads))
    if isinstance(drafter, ShardedDrafter):
        q_heads = inputs["o_weight"].shape[2] // dim
        own = list(shard_heads(q_heads, kv_heads, drafter.communicator.rank, drafter.communicator.world).kv_heads)
    k, v = ([cache[:, own].contiguous() for cache in inputs[name]] for name in ("k_caches", "v_caches"))
    index = [inputs[name] for name in ("positions", "prefix_lens", "req_pool_indices", "req_to_token")]
    return drafter.forward(inputs["block_ids"], index[0], *index, k, v).clone()


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
    first, second = together(parts, lambda part: forward(part, inputs))
    assert torch.equal(first, second)
    exact = reference.draft_forward(**{**inputs, "cos_sin": whole.cos_sin}, dtype=torch.float32)
    torch.testing.assert_close(first.float(), exact, atol=0.08, rtol=0.02)


@pytest.mark.gpu
def test_graphs_of_ranks(rng: torch.Generator) -> None:
    """Replays among eager calls, without a pause between them."""
    inputs = make_inputs(Case(contexts=(300, 1), D=128), rng, "cuda", torch.bfloat16)
    ranks = make_ranks(inputs, 2, "cuda")
    expected = together(ranks, lambda rank: rank.call({}))
    held = [outputs(rank.arguments, rank.packed) for rank in ranks]
    graphs = [torch.cuda.CUDAGraph() for _ in ranks]
    for rank, graph, out in zip(ranks, graphs, held, strict=True):
        with torch.cuda.graph(graph):
            for _ in range(3):
                draft_forward_sharded(**rank.arguments, **out)
    streams = [torch.cuda.Stream() for _ in ranks]
    for _ in range(4):
        for stream, graph, out, rank in zip(streams, graphs, held, ranks, strict=True):
            with torch.cuda.stream(stream):
                out["out"].fill_(float("nan"))
                graph.replay()
                rank.call({})
    torch.cuda.synchronize()
    for out in held:
        assert torch.equal(out["out"], expected[0])


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
        make_ranks(inputs, 2, "cpu")[0].call({})


def test_a_rank_that_never_comes(rng: torch.Generator) -> None:
    """Emulated: the launch ends with an error instead of waiting for ever."""
    inputs = make_inputs(Case(contexts=(5,), T=7), rng, "cpu", torch.bfloat16)
    if torch.ops.dflash is not getattr(torch.ops, "dflash_emulated", None):
        pytest.skip("on a GPU the error would be the process's last")
    with pytest.raises(RuntimeError, match="emulator: a trap"):
        make_ranks(inputs, 2, "cpu")[1].call({}, patience=2e-9)

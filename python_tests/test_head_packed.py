"""lm_head_argmax_packed against the oracle, its schedule, and the packed head."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from test_head import BF16, assert_same, integers

from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.head_stream import PackedHead, Stage, head_schedule, pack_head
from dflash_kernels.model.quantize import quantize
from dflash_kernels.ops import lm_head_argmax, lm_head_argmax_packed, lm_head_argmax_packed_workspace
from dflash_kernels.reference.formats import linear
from dflash_kernels.reference.head import exact_logits, topk
from dflash_kernels.tiles import Weight, tile_columns

FORMATS = ("fp8", "int4-g64", "int4-g128", "e2m1-g64", "e2m1-g128")
Pair = tuple[torch.Tensor, torch.Tensor]


def multiprocessors(device: str) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device == "cuda" else 4


def run(hidden: torch.Tensor, packed: PackedHead, vocab_start: int = 0, launches: int = 2) -> Pair:
    """Into poisoned outputs, several times on the same counters and workspace; all results must be the same."""
    workspace = lm_head_argmax_packed_workspace(packed).fill_(255)
    results = []
    for _ in range(launches):
        ids = torch.full((hidden.shape[0],), -7, dtype=torch.int64, device=hidden.device)
        values = torch.full((hidden.shape[0],), float("nan"), device=hidden.device)
        out = lm_head_argmax_packed(hidden, packed, vocab_start, out=(ids, values), workspace=workspace)
        assert out[0] is ids and out[1] is values
        results.append(out)
    results.append(lm_head_argmax_packed(hidden, packed, vocab_start))
    for other in results[1:]:
        assert_same(other, results[0])
    return results[0]


def best(logits: torch.Tensor) -> Pair:
    ids, values = topk(logits, 1)
    return ids[:, 0], values[:, 0]


def random_codes(rng: torch.Generator, weight_format: WeightFormat, rows: int, columns: int) -> QuantizedWeight:
    """Small whole numbers with scales that are powers of two: all sums are exact."""
    weight = quantize(integers(rng, rows, columns).float(), weight_format)
    scale = 2.0 ** torch.randint(-1, 2, weight.scale.shape, generator=rng)
    return QuantizedWeight(weight_format, weight.codes, scale.to(weight.scale.dtype))


SHAPES = [(1, 8, 1), (7, 72, 300), (16, 256, 1000), (17, 64, 513), (33, 136, 700), (64, 192, 1290)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "hidden_size", "vocab"), SHAPES)
def test_exact_where_sums_are(
    device: str, rng: torch.Generator, rows: int, hidden_size: int, vocab: int, with_bias: bool
) -> None:
    """Whole numbers: rounding to bf16 makes ties in plenty, and the first id must win each."""
    hidden, weight = integers(rng, rows, hidden_size).to(device), integers(rng, vocab, hidden_size).to(device)
    bias = integers(rng, vocab).to(device) if with_bias else None
    packed = pack_head(weight, blocks=multiprocessors(device), bias=bias)
    assert_same(run(hidden, packed), best(exact_logits(hidden, weight, bias).to(BF16)))
    ids, values = run(hidden, packed, vocab_start=1000)
    assert_same((ids, values), lm_head_argmax(hidden, weight, bias, 1000))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "groups", "vocab"), [(3, 1, 300), (16, 5, 900), (40, 2, 200)])
def test_exact_on_codes(device: str, rng: torch.Generator, name: str, rows: int, groups: int, vocab: int) -> None:
    weight_format = WeightFormat.parse(name)
    hidden_size = groups * (weight_format.group_size or 72)
    weight, hidden = random_codes(rng, weight_format, vocab, hidden_size), integers(rng, rows, hidden_size)
    packed = pack_head(weight.to(device), blocks=multiprocessors(device))
    plain = weight.codes if weight_format.kind == "fp8" else torch.stack((weight.codes & 15, weight.codes >> 4), -1)
    logits = linear(hidden, plain.flatten(1), weight.scale, weight_format.kind)
    ids, values = run(hidden.to(device), packed)
    assert_same((ids.cpu(), values.cpu()), best(logits.to(BF16)))


@pytest.mark.parametrize("blocks", [1, 3])
def test_some_tokens(device: str, rng: torch.Generator, blocks: int) -> None:
    """A head over a subset gives real ids, the smallest of equals, whatever the order the subset is given in."""
    hidden, weight = integers(rng, 9, 64).to(device), integers(rng, 2000, 64).to(device)
    bias = integers(rng, 2000).to(device)
    subset = torch.randperm(2000, generator=rng)[:700].to(device)
    packed = pack_head(weight, blocks=blocks, bias=bias, token_ids=subset)
    logits = exact_logits(hidden, weight, bias).to(BF16)
    kept = torch.zeros(2000, dtype=torch.bool, device=device)
    kept[subset] = True
    assert_same(run(hidden, packed), best(logits.masked_fill(~kept, float("-inf"))))


@pytest.mark.parametrize("rows", [3, 64])
def test_order_of_special_values(device: str, rng: torch.Generator, rows: int) -> None:
    """NaN above +inf above all, -inf below, one zero: torch.argmax's order of the same logits."""
    vocab = 700
    for special in ([float("nan"), float("inf")], [float("inf"), float("-inf")], [0.0, -0.0, float("-inf")]):
        weight = torch.zeros(vocab, 8)
        weight[:, 0] = torch.randint(-3, 1, (vocab,), generator=rng)
        for value in special:
            weight[torch.randint(0, vocab, (2,), generator=rng), 0] = value
        hidden = torch.zeros(rows, 8)
        hidden[:, 0] = torch.randint(0, 2, (rows,), generator=rng) * 2 - 1
        hidden, weight = hidden.to(BF16).to(device), weight.to(BF16).to(device)
        expected = best(hidden[:, :1] * weight[:, 0])
        ids, values = run(hidden, pack_head(weight, blocks=multiprocessors(device)))
        assert_same((ids, values), expected)


def test_rows_with_a_stride(device: str, rng: torch.Generator) -> None:
    wide, weight = integers(rng, 5, 96).to(device), integers(rng, 400, 64).to(device)
    packed = pack_head(weight, blocks=2)
    assert_same(run(wide[:, 16:80], packed), run(wide[:, 16:80].contiguous(), packed))


def test_no_rows(device: str, rng: torch.Generator) -> None:
    packed = pack_head(integers(rng, 130, 16).to(device), blocks=2)
    ids, values = run(torch.empty(0, 16, dtype=BF16, device=device), packed)
    assert ids.shape == (0,) and values.shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("bf16", *FORMATS))
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_a_large_head_on_cuda(rng: torch.Generator, name: str, rows: int) -> None:
    hidden = torch.randn(rows, 4096, generator=rng).to(BF16).cuda()
    dense = torch.randn(151936, 4096, device="cuda", dtype=BF16) * 0.02
    weight: Weight = dense if name == "bf16" else quantize(dense, WeightFormat.parse(name))
    exact = dense.float() if isinstance(weight, torch.Tensor) else weight.dequantize()
    logits = hidden.float() @ exact.T
    ids, values = run(hidden, pack_head(weight, blocks=multiprocessors("cuda")), launches=5)
    chosen, top = logits.gather(-1, ids[:, None])[:, 0], logits.max(-1).values
    assert (chosen >= top - top.abs() * 2.0**-7).all()
    assert ((values - chosen).abs() <= chosen.abs() * 2.0**-7).all()


@pytest.mark.gpu
def test_graph_replay_equals_eager(rng: torch.Generator) -> None:
    hidden, weight = integers(rng, 16, 512).cuda(), integers(rng, 30000, 512).cuda()
    packed = pack_head(weight, blocks=multiprocessors("cuda"))
    workspace = lm_head_argmax_packed_workspace(packed)
    expected = lm_head_argmax(hidden, weight)
    out = torch.empty(16, dtype=torch.int64, device="cuda"), torch.empty(16, device="cuda")
    lm_head_argmax_packed(hidden, packed, out=out, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lm_head_argmax_packed(hidden, packed, out=out, workspace=workspace)
    for _ in range(3):
        out[0].fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(out, expected)
        assert_same(lm_head_argmax_packed(hidden, packed), expected)


def test_opcheck(device: str, rng: torch.Generator) -> None:
    hidden = integers(rng, 5, 64).to(device)
    packed = pack_head(integers(rng, 300, 64).to(device), blocks=2, token_ids=torch.arange(0, 300, 2))
    inputs = (hidden, packed.weights, "bf16", packed.units, packed.counters, packed.slots)
    inputs = (*inputs, packed.vocab_size, None, packed.token_ids, 3)
    # One launch at a time, and the counters are written on CUDA only: what opcheck compares must be the CPU's.
    tests = ["test_schema", "test_faketensor"]
    if device == "cpu":
        tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.dflash.lm_head_argmax_packed.default, inputs, test_utils=tests)
    ids, values = torch.empty(5, dtype=torch.int64, device=device), torch.empty(5, device=device)
    outputs = {"ids": ids, "values": values, "workspace": lm_head_argmax_packed_workspace(packed)}
    torch.library.opcheck(torch.ops.dflash.lm_head_argmax_packed.out, inputs, outputs, test_utils=tests)


def test_errors(device: str, rng: torch.Generator) -> None:
    hidden, weight = integers(rng, 5, 64).to(device), integers(rng, 300, 64).to(device)
    packed = pack_head(weight, blocks=2)
    ids, values = torch.full((5,), -7, device=device), torch.full((5,), 7.0, device=device)
    held = {"out": (ids, values), "workspace": lm_head_argmax_packed_workspace(packed)}

    def with_packed(**changes: object) -> PackedHead:
        return PackedHead(**{**packed.__dict__, **changes})  # type: ignore[arg-type]

    for bad_hidden, bad_packed, match in [
        (hidden[0], packed, r"hidden must have shape \[\*, \*\]"),
        (hidden.float(), packed, "hidden must have dtype bfloat16"),
        (hidden.repeat(13, 1), packed, r"hidden.size\(0\) must be at most 64, got 65"),
        (hidden[:, :60], packed, r"hidden.size\(1\) must be a multiple of 8, got 60"),
        (hidden.repeat(1, 2), packed, r"weights must have shape \[6, 8192\], got \[3, 8192\]"),
        (hidden, with_packed(vocab_size=400), r"weights must have shape \[4, 8192\], got \[3, 8192\]"),
        (hidden, with_packed(vocab_size=0), r"vocab_size must be in 1..2\*\*22, got 0"),
        (hidden, with_packed(weight_format=WeightFormat("fp8")), "weights must have dtype uint8"),
        (hidden, with_packed(units=packed.units.long()), "units must have dtype int32"),
        (hidden, with_packed(counters=packed.counters[None]), r"counters must have shape \[\*\]"),
        (hidden, with_packed(slots=-1), "slots must be in 0..2\\^20, got -1"),
        (hidden, with_packed(bias=values), r"bias must have shape \[300\]"),
        (hidden, with_packed(token_ids=torch.arange(300, device=device).int()), "token_ids must have dtype int64"),
    ]:
        with pytest.raises(ValueError, match=f"^dflash::lm_head_argmax_packed: {match}"):
            lm_head_argmax_packed(bad_hidden, bad_packed, **held)
    with pytest.raises(ValueError, match="vocab_start must be at least 0, got -1"):
        lm_head_argmax_packed(hidden, packed, -1, **held)
    with pytest.raises(ValueError, match="workspace must hold at least"):
        lm_head_argmax_packed(hidden, packed, out=held["out"], workspace=held["workspace"][1:])
    with pytest.raises(ValueError, match="workspace must be given with out, got None"):
        lm_head_argmax_packed(hidden, packed, out=held["out"])
    assert (ids == -7).all() and (values == 7).all()
    for arguments, match in [
        ({"weight": weight.float()}, "weight must be bfloat16 or quantised, got torch.float32"),
        ({"weight": weight[:, :60]}, r"weight must have shape \[V, H\] with H a multiple of 8, got \[300, 60\]"),
        ({"weight": weight, "bias": values}, r"bias must be bfloat16 \[300\]"),
        ({"weight": weight, "token_ids": torch.tensor([3, 3])}, "token_ids must be different rows of the 300"),
        ({"weight": weight, "token_ids": torch.tensor([300])}, "token_ids must be different rows of the 300"),
    ]:
        with pytest.raises(ValueError, match=f"^pack_head: {match}"):
            pack_head(blocks=2, **arguments)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="weight_format must be one of bf16, fp8, int4-g64, .*, got fp4"):
        torch.ops.dflash.lm_head_argmax_packed(
            hidden, packed.weights, "fp4", packed.units, packed.counters, packed.slots, packed.vocab_size
        )


@pytest.mark.parametrize("name", ("bf16", *FORMATS))
def test_packing_loses_nothing(name: str, rng: torch.Generator) -> None:
    weight: Weight = torch.randn(300, 320, generator=rng).to(BF16)
    if name != "bf16":
        weight_format = WeightFormat.parse(name)
        weight = quantize(weight[:, :256], weight_format)
    back = pack_head(weight, blocks=3).unpack()
    if isinstance(weight, torch.Tensor):
        assert isinstance(back, torch.Tensor) and torch.equal(back, weight)
    else:
        assert isinstance(back, QuantizedWeight) and back.format == weight.format
        assert torch.equal(back.codes, weight.codes) and torch.equal(back.scale, weight.scale)


def pieces(units: Iterable[list[int]]) -> list[tuple[int, int, int]]:
    """(row tile, first K tile, K tiles), in order, of all products."""
    return sorted((u[3], u[4], u[2]) for u in units if u[2] > 0)


@pytest.mark.parametrize("blocks", [1, 3, 77, 132, 148])
@pytest.mark.parametrize(
    ("vocab", "hidden_size"), [(151936, 4096), (31040, 4096), (248320, 5120), (1, 8), (49152, 576)]
)
@pytest.mark.parametrize("name", [None, "fp8", "int4-g64"])
def test_schedule(vocab: int, hidden_size: int, name: str | None, blocks: int) -> None:
    """Every tile once, in one place; whole row tiles but for what is left over; blocks read nearly the same."""
    weight_format = None if name is None else WeightFormat.parse(name)
    row_tiles, k_tiles = -(-vocab // 128), -(-hidden_size // tile_columns(weight_format))
    units = head_schedule(vocab, hidden_size, blocks, weight_format).units().tolist()
    products = pieces(unit for block in units for unit in block)
    covered = [(row, k) for row, first, count in products for k in range(first, first + count)]
    assert covered == [(row, k) for row in range(row_tiles) for k in range(k_tiles)]
    loads = [sum(u[2] for u in block if u[2] > 0) for block in units]
    assert max(loads) - -(-row_tiles * k_tiles // blocks) <= 2
    cut = {row for row, _, count in products if count < k_tiles}
    assert len(cut) < blocks
    for block in units:
        kinds = [u[0] for u in block if u[2] >= 0]
        assert kinds == sorted(kinds) and kinds.count(Stage.PUBLISH) == 1
    assert [u[0] for u in units[0] if u[2] >= 0][-1] == Stage.CHOOSE

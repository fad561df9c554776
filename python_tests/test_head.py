"""LM head ops: argmax, top-k and greedy verification of logits that are never stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import on_device

from dflash_kernels.ops import (
    lm_head_argmax,
    lm_head_topk,
    lm_head_topk_workspace,
    lm_head_workspace,
    verify_block_from_hidden,
)
from dflash_kernels.reference.head import exact_logits, topk, verify_greedy

BF16 = torch.bfloat16
SHAPES = [  # N, H, V
    (1, 8, 1),
    (1, 576, 257),
    (7, 2880, 1000),
    (16, 576, 49152),
    (17, 64, 128),
    (32, 4096, 129),
    (64, 4096, 257),
    (65, 40, 4097),
    (128, 576, 257),
]


def integers(rng: torch.Generator, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Small whole numbers: every product and every fp32 sum of theirs is exact in any order."""
    return torch.randint(-2, 3, shape, generator=rng).to(dtype)


def run_argmax(hidden: torch.Tensor, weight: torch.Tensor, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The out form on poisoned outputs; the functional form must agree, and the workspace be zero again."""
    rows = hidden.shape[0]
    ids = torch.full((rows,), -1, device=hidden.device)
    values = torch.full((rows,), 123.0, device=hidden.device)
    workspace = lm_head_workspace(rows, hidden.device)
    lm_head_argmax(hidden, weight, *args, out=(ids, values), workspace=workspace)
    assert not workspace.any()
    again_ids, again_values = lm_head_argmax(hidden, weight, *args)
    assert torch.equal(ids, again_ids) and torch.equal(values.view(torch.int32), again_values.view(torch.int32))
    return ids, values


def run_topk(hidden: torch.Tensor, weight: torch.Tensor, k: int, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
    rows = hidden.shape[0]
    ids = torch.full((rows, k), -1, device=hidden.device)
    values = torch.full((rows, k), 123.0, device=hidden.device)
    workspace = lm_head_topk_workspace(rows, weight.shape[0], k, hidden.device).fill_(-1)
    lm_head_topk(hidden, weight, k, *args, out=(ids, values), workspace=workspace)
    again_ids, again_values = lm_head_topk(hidden, weight, k, *args)
    assert torch.equal(ids, again_ids) and torch.equal(values.view(torch.int32), again_values.view(torch.int32))
    return ids, values


def assert_same(out: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1].isnan(), expected[1].isnan())
    assert torch.equal(out[1].nan_to_num(nan=0.0), expected[1].nan_to_num(nan=0.0))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "hidden_size", "vocab"), SHAPES)
def test_exact_where_sums_are(
    device: str, rng: torch.Generator, rows: int, hidden_size: int, vocab: int, with_bias: bool
) -> None:
    """Whole numbers: rounding to bf16 makes ties in plenty, and the first id must win each."""
    hidden, weight = integers(rng, rows, hidden_size).to(device), integers(rng, vocab, hidden_size).to(device)
    bias = integers(rng, vocab).to(device) if with_bias else None
    logits = exact_logits(hidden, weight, bias).to(BF16)
    ids, values = topk(logits, 1)
    assert_same(run_argmax(hidden, weight, bias), (ids[:, 0], values[:, 0]))
    k = min(vocab, 16)
    assert_same(run_topk(hidden, weight, k, bias), topk(logits, k))


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 64])
def test_topk_sizes(device: str, rng: torch.Generator, k: int) -> None:
    hidden, weight = integers(rng, 5, 48).to(device), integers(rng, 9000, 48).to(device)
    assert_same(run_topk(hidden, weight, k), topk(exact_logits(hidden, weight).to(BF16), k))
    few = weight[: max(k, 3)].contiguous()
    assert_same(run_topk(hidden, few, k), topk(exact_logits(hidden, few).to(BF16), k))


def test_topk_of_one_crowded_tile(device: str, rng: torch.Generator) -> None:
    """All winners in one place, where the tiles' maxima bound the answer least."""
    weight = torch.zeros(4000, 8)
    weight[:, 0] = -1.0 - torch.randint(0, 3, (4000,), generator=rng)
    weight[1300:1400, 0] = torch.randperm(100, generator=rng) + 1.0
    hidden = torch.zeros(3, 8)
    hidden[:, 0] = torch.tensor([1.0, -1.0, 0.0])
    hidden, weight = hidden.to(BF16).to(device), weight.to(BF16).to(device)
    assert_same(run_topk(hidden, weight, 64), topk(exact_logits(hidden, weight).to(BF16), 64))


@pytest.mark.parametrize(("rows", "hidden_size", "vocab"), SHAPES)
def test_random_floats(device: str, rng: torch.Generator, rows: int, hidden_size: int, vocab: int) -> None:
    """The winner's exact logit is within rounding of the exact maximum, and so is the value reported for it."""
    hidden = torch.randn(rows, hidden_size, generator=rng).to(BF16).to(device)
    weight = torch.randn(vocab, hidden_size, generator=rng).to(BF16).to(device)
    logits = exact_logits(hidden, weight)
    best = logits.max(-1).values
    error = hidden_size * 1e-5  # of an fp32 sum, generous
    rounding = best.abs() * 2.0**-7 + error
    ids, values = run_argmax(hidden, weight)
    chosen = logits.gather(-1, ids[:, None])[:, 0]
    assert (chosen >= best - rounding).all()
    assert ((values.double() - chosen).abs() <= chosen.abs() * 2.0**-8 + error).all()
    assert torch.equal(values, values.to(BF16).float())
    k = min(vocab, 8)
    ids, values = run_topk(hidden, weight, k)
    chosen = logits.gather(-1, ids)
    exact = logits.topk(k).values
    assert (chosen >= exact - exact.abs() * 2.0**-7 - error).all()
    assert ((values.double() - chosen).abs() <= chosen.abs() * 2.0**-8 + error).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    assert (values[:, 1:] <= values[:, :-1]).all()


@pytest.mark.parametrize("rows", [3, 70])
def test_order_of_special_values(device: str, rng: torch.Generator, rows: int) -> None:
    """NaN above +inf above all, -inf below, one zero, duplicates by id: torch.argmax's order of the same logits."""
    special = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 3.0e38, -3.0e38]
    vocab = 300
    for round_ in range(6):
        weight = torch.zeros(vocab, 8)
        weight[:, 0] = torch.randint(-3, 4, (vocab,), generator=rng)
        for value in special[round_ % 3 :]:
            weight[torch.randint(0, vocab, (2,), generator=rng), 0] = value
        hidden = torch.zeros(rows, 8)
        hidden[:, 0] = torch.randint(0, 2, (rows,), generator=rng) * 2 - 1
        hidden[0, 0] = special[round_]
        # One product and zeros: 0 * inf = NaN only where the first column says so.
        hidden, weight = hidden.to(BF16), weight.to(BF16)
        logits = (hidden[:, :1].float() * weight[None, :, 0].float()).to(BF16)
        ids, values = topk(logits, 20)
        assert torch.equal(logits.argmax(-1), ids[:, 0])
        on_device = hidden.to(device), weight.to(device)
        assert_same([t.cpu() for t in run_argmax(*on_device)], (ids[:, 0], values[:, 0]))
        assert_same([t.cpu() for t in run_topk(*on_device, 20)], (ids, values))


def test_duplicate_rows_give_the_first(device: str, rng: torch.Generator) -> None:
    """Equal weights far apart score equal; 128 and its neighbours are on both sides of a tile's edge."""
    row = torch.randn(1, 64, generator=rng).to(BF16)
    for places in ([5, 900], [127, 128], [128, 255, 256], [0, 999]):
        weight = (torch.randn(1000, 64, generator=rng) * 0.01).to(BF16)
        weight[places] = row
        ids, _ = run_argmax(row.to(device), weight.to(device))
        assert ids.tolist() == places[:1]
        ids, _ = run_topk(row.to(device), weight.to(device), len(places))
        assert ids.tolist() == [places]


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 16, 80])
def test_shards_merge_to_the_whole(device: str, rng: torch.Generator, shards: int, rows: int) -> None:
    vocab = 1000
    hidden, weight = integers(rng, rows, 96).to(device), integers(rng, vocab, 96).to(device)
    whole_ids, whole_values = run_argmax(hidden, weight)
    top_ids, top_values = run_topk(hidden, weight, 8)
    edges = [vocab * s // shards for s in range(shards + 1)]
    parts = [(weight[a:b].contiguous(), None, a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    pairs = [run_argmax(hidden, *part) for part in parts]
    ids, values = (torch.stack(x, dim=-1) for x in zip(*pairs, strict=True))
    assert_same((whole_ids, whole_values), tuple(x[:, 0] for x in merge(ids, values, 1)))
    pairs = [run_topk(hidden, part[0], 8, *part[1:]) for part in parts]
    ids, values = (torch.cat(x, dim=-1) for x in zip(*pairs, strict=True))
    assert_same((top_ids, top_values), merge(ids, values, 8))


def merge(ids: torch.Tensor, values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values, smaller ids first among equals."""
    by_id = ids.argsort(dim=-1)
    ids, values = ids.gather(-1, by_id), values.gather(-1, by_id)
    best = torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :k]
    return ids.gather(-1, best), values.gather(-1, best)


def test_rows_do_not_depend_on_their_neighbours(device: str, rng: torch.Generator) -> None:
    hidden, weight = integers(rng, 40, 64).to(device), integers(rng, 700, 64).to(device)
    ids, values = run_argmax(hidden, weight)
    order = torch.randperm(40, generator=rng).to(device)
    assert_same(run_argmax(hidden[order], weight), (ids[order], values[order]))
    assert_same(run_argmax(hidden[7:12], weight), (ids[7:12], values[7:12]))


def test_strided_hidden(device: str, rng: torch.Generator) -> None:
    """The last rows of a wider buffer, as a sampler slices them."""
    wide, weight = integers(rng, 2 * 24, 3 * 64).to(device), integers(rng, 300, 64).to(device)
    hidden = wide[::2, 64:128]
    assert_same(run_argmax(hidden, weight), run_argmax(hidden.contiguous(), weight))


def test_float32_on_the_cpu(rng: torch.Generator) -> None:
    hidden, weight = torch.randn(9, 64, generator=rng), torch.randn(20000, 64, generator=rng)
    bias = torch.randn(20000, generator=rng)
    logits = exact_logits(hidden, weight, bias)
    ids, values = run_argmax(hidden, weight, bias, 7)
    assert torch.equal(ids - 7, logits.argmax(-1))
    assert torch.allclose(values.double(), logits.max(-1).values, rtol=1e-5)
    ids, values = run_topk(hidden, weight, 50, bias, 7)
    assert torch.equal(ids - 7, logits.topk(50).indices)
    assert torch.allclose(values.double(), logits.topk(50).values, rtol=1e-5, atol=1e-5)


def test_no_rows(device: str) -> None:
    hidden, weight = torch.zeros(0, 64, dtype=BF16, device=device), torch.zeros(300, 64, dtype=BF16, device=device)
    ids, values = run_argmax(hidden, weight)
    assert ids.shape == values.shape == (0,)
    ids, values = run_topk(hidden, weight, 5)
    assert ids.shape == values.shape == (0, 5)


# -- verify_block_from_hidden -----------------------------------------------------------------------------------------


def verify_inputs(
    rng: torch.Generator, device: str, batch: int, block: int, index: torch.dtype = torch.int64
) -> tuple[torch.Tensor, ...]:
    """Candidates that follow the target for a random while."""
    hidden, weight = integers(rng, batch * block, 64), integers(rng, 2000, 64)
    targets = topk(exact_logits(hidden, weight).to(BF16), 1)[0].view(batch, block)
    candidates = torch.randint(0, 2000, (batch, block), generator=rng)
    for b in range(batch):
        follows = int(torch.randint(0, block, (1,), generator=rng))
        candidates[b, 1 : 1 + follows] = targets[b, :follows]
    prefix_lens = torch.randint(0, 5000, (batch,), generator=rng)
    return tuple(t.to(device) for t in (candidates.to(index), hidden, weight, prefix_lens.to(index)))


def poisoned_outputs(batch: int, block: int, device: str) -> tuple[torch.Tensor, ...]:
    shapes = [((batch,), torch.int32)] * 2 + [((batch,), torch.int64), ((batch, block), torch.int64)]
    return tuple(torch.full(s, -9, dtype=d, device=device) for s, d in [*shapes, ((batch,), torch.int64)])


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("batch", "block"), [(0, 4), (1, 1), (1, 16), (5, 7), (16, 8)])
def test_verify(device: str, rng: torch.Generator, batch: int, block: int, index: torch.dtype) -> None:
    candidates, hidden, weight, prefix_lens = inputs = verify_inputs(rng, device, batch, block, index)
    out = poisoned_outputs(batch, block, device)
    workspace = lm_head_workspace(batch * block, device)
    verify_block_from_hidden(*inputs, out=out, workspace=workspace)
    assert not workspace.any()
    targets = topk(exact_logits(hidden, weight).to(BF16), 1)[0].view(batch, block)
    expected = verify_greedy(candidates.tolist(), targets.tolist(), prefix_lens.tolist())
    for result, column in zip(out, zip(*expected, strict=True) if batch else [()] * 5, strict=True):
        assert result.tolist() == list(column)
    for result, again in zip(out, verify_block_from_hidden(*inputs), strict=True):
        assert result.dtype == again.dtype and torch.equal(result, again)


def test_verify_accepts_all_of_the_target(device: str, rng: torch.Generator) -> None:
    candidates, hidden, weight, prefix_lens = verify_inputs(rng, device, 4, 8)
    targets = lm_head_argmax(hidden, weight)[0].view(4, 8)
    candidates[:, 1:] = targets[:, :-1]
    accept_lens, _, bonus_ids, out_tokens, _ = verify_block_from_hidden(candidates, hidden, weight, prefix_lens)
    assert (accept_lens == 7).all()
    assert torch.equal(out_tokens, targets) and torch.equal(bonus_ids, targets[:, -1])


# -- graphs, opcheck, errors ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 128])
def test_graph_replay_equals_eager(rng: torch.Generator, rows: int) -> None:
    hidden, weight = integers(rng, rows, 256).cuda(), integers(rng, 20000, 256).cuda()
    candidates, prefix_lens = torch.zeros(rows // 8, 8, dtype=torch.int64).cuda(), torch.zeros(rows // 8).long().cuda()
    workspace, topk_workspace = lm_head_workspace(rows, "cuda"), lm_head_topk_workspace(rows, 20000, 16, "cuda")
    best = torch.zeros(rows, dtype=torch.int64).cuda(), torch.zeros(rows).cuda()
    top = torch.zeros(rows, 16, dtype=torch.int64).cuda(), torch.zeros(rows, 16).cuda()
    verified = poisoned_outputs(rows // 8, 8, "cuda")

    def step() -> None:
        lm_head_argmax(hidden, weight, out=best, workspace=workspace)
        lm_head_topk(hidden, weight, 16, out=top, workspace=topk_workspace)
        verify_block_from_hidden(candidates, hidden, weight, prefix_lens, out=verified, workspace=workspace)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        hidden.copy_(integers(rng, rows, 256))
        candidates.copy_(torch.randint(0, 20000, candidates.shape, generator=rng))
        candidates[:, 1:4] = lm_head_argmax(hidden, weight)[0].view(-1, 8)[:, :3]
        graph.replay()
        assert_same(best, lm_head_argmax(hidden, weight))
        assert_same(top, lm_head_topk(hidden, weight, 16))
        for result, eager in zip(
            verified, verify_block_from_hidden(candidates, hidden, weight, prefix_lens), strict=True
        ):
            assert torch.equal(result, eager)


def test_opcheck(device: str, rng: torch.Generator) -> None:
    ops = torch.ops.dflash
    candidates, hidden, weight, prefix_lens = verify_inputs(rng, device, 2, 4)
    bias = integers(rng, 2000).to(device)
    best = torch.zeros(8, dtype=torch.int64, device=device), torch.zeros(8, device=device)
    top = torch.zeros(8, 3, dtype=torch.int64, device=device), torch.zeros(8, 3, device=device)
    names = ("accept_lens", "commit_lens", "bonus_ids", "out_tokens", "new_seq_lens")
    verified = dict(zip(names, poisoned_outputs(2, 4, device), strict=True))
    workspace = {"workspace": lm_head_workspace(8, device)}
    check: Callable[..., object] = torch.library.opcheck
    check(ops.lm_head_argmax.default, (hidden, weight))
    check(ops.lm_head_argmax.default, (hidden, weight, bias, 5))
    check(ops.lm_head_argmax.out, (hidden, weight), {"ids": best[0], "values": best[1], **workspace})
    check(ops.lm_head_topk.default, (hidden, weight, 3, bias))
    topk_workspace = {"workspace": torch.zeros(8, 16, 3, dtype=torch.int64, device=device)}
    check(ops.lm_head_topk.out, (hidden, weight, 3), {"ids": top[0], "values": top[1], **topk_workspace})
    check(ops.verify_block_from_hidden.default, (candidates, hidden, weight, prefix_lens, bias))
    check(ops.verify_block_from_hidden.out, (candidates, hidden, weight, prefix_lens), {**verified, **workspace})


def zeros(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


GOOD = {"hidden": zeros(6, 64), "weight": zeros(300, 64)}


def call(op: Callable[..., object], device: str, arguments: dict[str, object]) -> None:
    op(**{n: on_device(v, device) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": zeros(64)}, r"hidden must have shape \[\*, \*\], got \[64\]"),
        ({"weight": zeros(300, 63)}, r"weight must have shape \[\*, 64\], got \[300, 63\]"),
        ({"weight": zeros(0, 64)}, r"weight.size\(0\) must be in 1..2\*\*22, got 0"),
        ({"bias": zeros(299)}, r"bias must have shape \[300\], got \[299\]"),
        ({"bias": zeros(300, dtype=torch.float32)}, r"bias must have dtype bfloat16, got float32"),
        ({"hidden": zeros(6, 64).half()}, r"hidden must have dtype bfloat16( or float32)?, got float16"),
        ({"weight": zeros(300, 64).float()}, r"weight must have dtype bfloat16, got float32"),
        ({"hidden": zeros(64, 6).T}, r"hidden must have a contiguous last dimension, got stride 6"),
        ({"weight": zeros(64, 300).T}, r"weight must be contiguous"),
        ({"vocab_start": -1}, r"vocab_start must be at least 0, got -1"),
    ],
)
def test_errors_name_the_argument(device: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"^dflash::lm_head_argmax: " + message):
        call(lm_head_argmax, device, {**GOOD, **changes})
    with pytest.raises(ValueError, match=r"^dflash::lm_head_topk: " + message):
        call(lm_head_topk, device, {**GOOD, "k": 4, **changes})


@pytest.mark.parametrize("k", [0, 65])
def test_k_out_of_range(device: str, k: int) -> None:
    with pytest.raises(ValueError, match=rf"^dflash::lm_head_topk: k must be in 1..64, got {k}"):
        call(lm_head_topk, device, {**GOOD, "k": k})
    with pytest.raises(ValueError, match=r"k must be in 1..3, got 4"):
        call(lm_head_topk, device, {**GOOD, "weight": zeros(3, 64), "k": 4})


def test_output_errors(device: str) -> None:
    hidden, weight = GOOD["hidden"].to(device), GOOD["weight"].to(device)
    ids, values = torch.full((6,), -1, device=device), torch.zeros(6, device=device)
    workspace = lm_head_workspace(6, device)
    bad = [
        ((ids[:5], values), workspace, r"ids must have shape \[6\], got \[5\]"),
        ((ids.int(), values), workspace, r"ids must have dtype int64, got int32"),
        ((ids, values.double()), workspace, r"values must have dtype float32, got float64"),
        ((ids, values), workspace[:6], r"workspace must hold at least 7 elements, got 6"),
        ((ids, values), None, r"workspace must be given with out"),
    ]
    for out, space, message in bad:
        with pytest.raises(ValueError, match=r"^dflash::lm_head_argmax: " + message):
            lm_head_argmax(hidden, weight, out=out, workspace=space)
    assert (ids == -1).all() and not workspace.any()
    top = torch.zeros(6, 4, dtype=torch.int64, device=device), torch.zeros(6, 4, device=device)
    with pytest.raises(ValueError, match=r"lm_head_topk: workspace must hold at least 72 elements, got 71"):
        lm_head_topk(hidden, weight, 4, out=top, workspace=torch.zeros(71, dtype=torch.int64, device=device))


def test_verify_errors(device: str, rng: torch.Generator) -> None:
    candidates, hidden, weight, prefix_lens = verify_inputs(rng, device, 3, 4)
    bad = [
        ((candidates.flatten(), hidden, weight, prefix_lens), r"candidates must have shape \[\*, \*\], got \[12\]"),
        ((candidates[:, :0], hidden, weight, prefix_lens), r"candidates.size\(1\) must be at least 1, got 0"),
        ((candidates, hidden[:11], weight, prefix_lens), r"hidden must have shape \[12, \*\], got \[11, 64\]"),
        ((candidates, hidden, weight, prefix_lens[:2]), r"prefix_lens must have shape \[3\], got \[2\]"),
        ((candidates.float(), hidden, weight, prefix_lens), r"candidates must have dtype int32 or int64, got float32"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=r"^dflash::verify_block_from_hidden: " + message):
            verify_block_from_hidden(*arguments)
    out = list(poisoned_outputs(3, 4, device))
    out[3] = out[3].T
    with pytest.raises(ValueError, match=r"out_tokens must have shape \[3, 4\], got \[4, 3\]"):
        verify_block_from_hidden(
            candidates, hidden, weight, prefix_lens, out=tuple(out), workspace=lm_head_workspace(12, device)
        )
    assert all((tensor == -9).all() for tensor in out)


@pytest.mark.gpu
def test_mixed_devices() -> None:
    hidden, weight = zeros(6, 64).cuda(), zeros(300, 64).cuda()
    for op, extra in ((lm_head_argmax, ()), (lm_head_topk, (4,))):
        with pytest.raises(ValueError, match=rf"^dflash::{op.__name__}: weight must be on cuda:0, got cpu"):
            op(hidden, weight.cpu(), *extra)
        with pytest.raises(ValueError, match=rf"^dflash::{op.__name__}: bias must be on cuda:0, got cpu"):
            op(hidden, weight, *extra, bias=zeros(300))
    candidates, prefix_lens = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^dflash::verify_block_from_hidden: \w+ must be on "):
        verify_block_from_hidden(candidates, hidden, weight, prefix_lens.cuda())


@pytest.mark.gpu
def test_alignment_errors() -> None:
    hidden, weight = zeros(6, 64).cuda(), zeros(300, 64).cuda()
    with pytest.raises(ValueError, match=r"hidden.size\(1\) must be a multiple of 8 on CUDA, got 60"):
        lm_head_argmax(hidden[:, :60], weight[:, :60].contiguous())
    with pytest.raises(ValueError, match=r"hidden must be aligned to 16 bytes, got an address 8 bytes off"):
        lm_head_argmax(hidden[:, 4:60], weight[:, :56].contiguous())
    with pytest.raises(ValueError, match=r"hidden must have a row stride that is a multiple of 8 elements, got 68"):
        lm_head_argmax(zeros(6, 68).cuda()[:, :64], weight)

"""LMHead: which op takes how many rows, its answers, and weights that are loaded later."""

from __future__ import annotations

import pytest
import torch
from test_head import BF16, assert_same, integers

from dflash_kernels import lm_head, ops
from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.lm_head import LMHead, has_fp8_head, streamed_rows
from dflash_kernels.model.quantize import quantize

FP8 = WeightFormat("fp8")
Pair = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ops that were called, in order."""
    names: list[str] = []
    for name in ("lm_head_argmax", "lm_head_argmax_fp8", "lm_head_argmax_packed"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, op=op, name=name, **k: (names.append(name), op(*a, **k))[1])
    return names


def run(head: LMHead, hidden: torch.Tensor, vocab_start: int = 0) -> Pair:
    rows, device = hidden.shape[0], hidden.device
    out = torch.full((rows,), -1, device=device), torch.full((rows,), 123.0, device=device)
    head.argmax(hidden, vocab_start, out=out)
    return out


def multiplied(hidden: torch.Tensor, weight: QuantizedWeight, vocab_start: int = 0) -> Pair:
    return ops.lm_head_argmax_fp8(*ops.quantize_rows(hidden), weight.codes, weight.scale, None, vocab_start)


def needs_fp8(device: str) -> None:
    if not ops.draft_forward_fp8_supported(device):
        pytest.skip("no fp8 products on this device")


def test_rows_choose_the_op(device: str, rng: torch.Generator, taken: list[str]) -> None:
    """Few rows stream, more multiply codes up to the buffers' rows; without codes they take the dense weight."""
    needs_fp8(device)
    limit = streamed_rows(has_codes=True)
    hidden = torch.randn(limit + 40, 160, generator=rng).to(BF16).to(device)
    weight = integers(rng, 700, 160).to(device)
    coded = quantize(weight, FP8)
    head = LMHead(weight, limit + 40)
    assert_same(run(head, hidden[:3], 7), ops.lm_head_argmax(hidden[:3], weight, None, 7))
    head.pack(coded)
    run(head, hidden[: streamed_rows()])
    run(head, hidden)
    head.hold_codes(limit + 39)
    run(head, hidden[:limit])
    assert_same(run(head, hidden[:-1], 7), multiplied(hidden[:-1], coded, 7))
    run(head, hidden)
    head.drop_codes()
    run(head, hidden[:-1])
    assert taken == [
        "lm_head_argmax", "lm_head_argmax", "lm_head_argmax_packed", "lm_head_argmax", "lm_head_argmax_packed",
        "lm_head_argmax_fp8", "lm_head_argmax_fp8", "lm_head_argmax", "lm_head_argmax",
    ]  # fmt: skip


def test_the_vocabulary_need_not_fill_tiles(device: str, rng: torch.Generator) -> None:
    """The codes are those that were packed, whatever the packing fills up; rows with gaps are taken, too."""
    needs_fp8(device)
    rows = streamed_rows(has_codes=True) + 1
    wide = torch.randn(rows, 2 * 336, generator=rng).to(BF16).to(device)
    weight = quantize(torch.randn(129, 336, generator=rng), FP8).to(device)
    head = LMHead(weight.dequantize(BF16), rows)
    head.pack(weight)
    head.hold_codes(rows)
    assert head.codes is not None and torch.equal(head.codes.codes, weight.codes)
    assert_same(run(head, wide[:, :336]), multiplied(wide[:, :336].contiguous(), weight))


def test_loaded_weights_keep_their_places(device: str, rng: torch.Generator) -> None:
    needs_fp8(device)
    rows = streamed_rows(has_codes=True) + 1
    hidden = torch.randn(rows, 64, generator=rng).to(BF16).to(device)
    first, later = (quantize(torch.randn(300, 64, generator=rng), FP8).to(device) for _ in range(2))
    head = LMHead(first.dequantize(BF16), rows)
    head.pack(first)
    head.hold_codes(rows)
    assert head.packed is not None and head.codes is not None
    places = [tensor.data_ptr() for tensor in (head.packed.weights, head.codes.codes, head.codes.scale)]
    head.load(later)
    assert places == [tensor.data_ptr() for tensor in (head.packed.weights, head.codes.codes, head.codes.scale)]
    assert_same(run(head, hidden), multiplied(hidden, later))
    fresh = LMHead(later.dequantize(BF16), rows)
    fresh.pack(later)
    assert_same(run(head, hidden[:5]), run(fresh, hidden[:5]))


@pytest.mark.gpu
def test_graph_replay_equals_eager(rng: torch.Generator) -> None:
    """Captured after the first call, nothing is allocated."""
    needs_fp8("cuda")
    hidden = torch.randn(200, 512, generator=rng).to(BF16).cuda()
    weight = quantize(torch.randn(5000, 512, generator=rng), FP8).to("cuda")
    head = LMHead(weight.dequantize(BF16), 200)
    head.pack(weight)
    head.hold_codes(200)
    eager = run(head, hidden)
    out = tuple(torch.full_like(part, -1) for part in eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        head.argmax(hidden, 0, out=out)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    for _ in range(2):
        for part in out:
            part.fill_(-1)
        graph.replay()
        assert_same(out, eager)


def test_which_heads_multiply_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp8 of a size that fits, on a GPU that can; the CPU's dense weights are more exact."""
    cuda, can = torch.device("cuda"), True
    monkeypatch.setattr("dflash_kernels.ops.draft.draft_forward_fp8_supported", lambda device: can)
    assert has_fp8_head(FP8, 4096, cuda) and has_fp8_head(FP8, 32768, cuda)
    assert not has_fp8_head(FP8, 4096, torch.device("cpu"))
    for weight_format, width in ((None, 4096), (WeightFormat("int4", 128), 4096), (FP8, 4104), (FP8, 32784)):
        assert not has_fp8_head(weight_format, width, cuda)
    can = False
    assert not has_fp8_head(FP8, 4096, cuda)


def test_codes_are_needed_for_rows_that_do_not_stream(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    monkeypatch.setattr(lm_head, "has_fp8_head", lambda weight_format, width, device: weight_format == FP8)
    weight = torch.randn(40, 64, generator=rng).to(BF16)
    limit = streamed_rows(has_codes=True)
    head = LMHead(weight, 2 * limit)
    assert not head.needs_codes(2 * limit)  # nothing is packed
    head.pack(weight)
    assert not head.needs_codes(2 * limit)
    with pytest.raises(ValueError, match=r"^LMHead.hold_codes: fp8 weights must have been packed, got others or none$"):
        head.hold_codes(2 * limit)
    head.pack(quantize(weight, FP8))
    assert not head.needs_codes(limit) and head.needs_codes(limit + 1)
    with pytest.raises(ValueError, match=f"^LMHead.hold_codes: rows must be at most {2 * limit}, got {2 * limit + 1}$"):
        head.hold_codes(2 * limit + 1)

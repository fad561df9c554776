"""lm_head_argmax_fp8: the ids and values of the exact logits where every sum is exact, within rounding elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import on_device
from test_gemm_fp8 import codes, exact_inputs, random_inputs
from test_head import assert_same

from dflash_kernels.ops import lm_head_argmax_fp8, lm_head_workspace
from dflash_kernels.reference.head import exact_logits_fp8, topk

BF16 = torch.bfloat16
SHAPES = [  # N, H, V
    (1, 16, 1),
    (1, 576, 257),
    (33, 144, 1000),
    (128, 272, 515),
    (130, 576, 4097),
    (300, 160, 700),
    (520, 2064, 300),
]
ORDER = ("hidden", "hidden_scale", "weight", "weight_scale", "bias", "vocab_start")

Inputs = dict[str, Any]


def named(inputs: Inputs, vocab_start: int = 0) -> Inputs:
    """gemm_fp8's operands by this op's names."""
    names = {"hidden": "a", "hidden_scale": "a_scale", "weight": "w", "weight_scale": "w_scale", "bias": "bias"}
    return {**{new: inputs[old] for new, old in names.items()}, "vocab_start": vocab_start}


def run(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The out form on poisoned outputs; the functional form must agree, and the workspace be zero again."""
    rows, device = inputs["hidden"].shape[0], inputs["hidden"].device
    ids, values = torch.full((rows,), -1, device=device), torch.full((rows,), 123.0, device=device)
    workspace = lm_head_workspace(rows, device)
    assert lm_head_argmax_fp8(**inputs, out=(ids, values), workspace=workspace)[0] is ids
    assert not workspace.any()
    assert_same(lm_head_argmax_fp8(**inputs), (ids, values))
    return ids, values


def logits(inputs: Inputs) -> torch.Tensor:
    return exact_logits_fp8(*(inputs[name] for name in ORDER[:-1]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "hidden_size", "vocab"), SHAPES)
def test_exact_where_sums_are(
    rows: int, hidden_size: int, vocab: int, bias: bool, device: str, rng: torch.Generator
) -> None:
    """Scales are powers of two, and rounding to bf16 makes ties: the first id must win each."""
    inputs = named(exact_inputs(rng, device, rows, vocab, hidden_size, bias=bias), 1000)
    ids, values = topk(logits(inputs).to(BF16), 1)
    assert_same(run(inputs), (ids[:, 0] + 1000, values[:, 0]))


@pytest.mark.parametrize(("rows", "hidden_size", "vocab"), SHAPES)
def test_random_floats(rows: int, hidden_size: int, vocab: int, device: str, rng: torch.Generator) -> None:
    """The winner's exact logit is within rounding of the exact maximum, and so is the value reported for it."""
    inputs = named(random_inputs(rng, device, rows, vocab, hidden_size, bias=True))
    exact = logits(inputs)
    lost = exact.abs().max() * 2**-14 * (hidden_size / 32) if device == "cuda" else 1e-4
    ids, values = run(inputs)
    best, chosen = exact.max(-1).values, exact.gather(-1, ids[:, None])[:, 0]
    assert (chosen >= best - best.abs() * 2.0**-7 - lost).all()
    assert ((values.double() - chosen).abs() <= chosen.abs() * 2.0**-8 + lost).all()
    assert torch.equal(values, values.to(BF16).float())


def test_special_values(device: str, rng: torch.Generator) -> None:
    """A NaN code wins its column's rows, the first of them; all equal: the first; no rows: nothing."""
    inputs = named(exact_inputs(rng, device, 40, 600, 48))
    weight = inputs["weight"].clone()
    weight[[77, 401], 5] = 0x7F
    ids, values = run({**inputs, "weight": weight})
    assert (ids == 77).all() and values.isnan().all()
    ids, values = run({**inputs, "weight": torch.zeros_like(weight)})
    assert (ids == 0).all() and (values == 0).all()
    empty = {**inputs, "hidden": inputs["hidden"][:0], "hidden_scale": inputs["hidden_scale"][:0]}
    assert [part.shape for part in run(empty)] == [(0,), (0,)]


def test_shards_merge_to_the_whole(device: str, rng: torch.Generator) -> None:
    inputs = named(exact_inputs(rng, device, 70, 900, 96, bias=True))
    whole = run(inputs)
    parts = []
    for start in (0, 300, 600):
        part = {name: inputs[name][start : start + 300].contiguous() for name in ("weight", "weight_scale", "bias")}
        parts.append(run({**inputs, **part, "vocab_start": start}))
    values = torch.stack([part[1] for part in parts])
    first = values.argmax(0)  # the first of equals: the smallest id
    ids = torch.stack([part[0] for part in parts]).gather(0, first[None])[0]
    assert_same((ids, values.max(0).values), whole)


def test_strided_rows(device: str, rng: torch.Generator) -> None:
    inputs = named(exact_inputs(rng, device, 45, 300, 144))
    wide = torch.full((45, 144 + 32), 0x7F, dtype=torch.uint8)
    wide[:, 16:160] = inputs["hidden"].cpu()
    assert_same(run({**inputs, "hidden": on_device(wide, device)[:, 16:160]}), run(inputs))


@pytest.mark.gpu
def test_graph_replay_equals_eager(rng: torch.Generator) -> None:
    inputs = named(random_inputs(rng, "cuda", 130, 5000, 576))
    eager = run(inputs)
    out, workspace = tuple(torch.full_like(part, -1) for part in eager), lm_head_workspace(130, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lm_head_argmax_fp8(**inputs, out=out, workspace=workspace)
    for _ in range(2):
        for part in out:
            part.fill_(-1)
        graph.replay()
        assert_same(out, eager)


def test_opcheck(device: str, rng: torch.Generator) -> None:
    inputs = named(random_inputs(rng, device, 5, 32, 48, bias=True))
    arguments = tuple(inputs[name] for name in ORDER)
    torch.library.opcheck(torch.ops.dflash.lm_head_argmax_fp8.default, arguments)
    ids, values = run(inputs)
    outputs = {"ids": ids, "values": values, "workspace": lm_head_workspace(5, device)}
    torch.library.opcheck(torch.ops.dflash.lm_head_argmax_fp8.out, arguments, outputs)


WRONG = [
    ({"hidden": lambda x: x.float()}, "hidden must have dtype uint8, got float32"),
    ({"hidden": lambda x: x[0]}, r"hidden must have shape \[\*, \*\], got \[48\]"),
    ({"hidden": lambda x: x[:, :40]}, r"hidden.size\(1\) must be a multiple of 16, got 40"),
    ({"hidden": lambda x: x[:, ::2]}, "hidden must have a contiguous last dimension, got stride 2"),
    ({"hidden": lambda x: x[:1].expand(5, -1)}, "hidden must have a row stride .* of 16 and at least 48, got 0"),
    ({"hidden_scale": lambda x: x[:, 0]}, r"hidden_scale must have shape \[5, 1\], got \[5\]"),
    ({"weight": lambda x: x[:, :32]}, r"weight must have shape \[\*, 48\], got \[32, 32\]"),
    ({"weight": lambda x: x[:0]}, r"weight.size\(0\) must be in 1..2\*\*22, got 0"),
    ({"weight": lambda x: x[::2]}, r"weight must be contiguous, got strided \[16, 48\]"),
    ({"weight_scale": lambda x: x.bfloat16()}, "weight_scale must have dtype float32, got bfloat16"),
    ({"bias": lambda x: x.float()}, "bias must have dtype bfloat16, got float32"),
    ({"vocab_start": lambda x: -1}, "vocab_start must be at least 0, got -1"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_mistakes_are_named(changes: dict[str, Any], message: str, device: str, rng: torch.Generator) -> None:
    inputs = named(random_inputs(rng, device, 5, 32, 48, bias=True))
    inputs |= {name: change(inputs[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=f"^dflash::lm_head_argmax_fp8: {message}$"):
        lm_head_argmax_fp8(**inputs)


def test_wrong_outputs_are_named(device: str, rng: torch.Generator) -> None:
    inputs = named(random_inputs(rng, device, 5, 32, 48))
    ids, values = run(inputs)
    for out, workspace, message in (
        ((ids, values), None, "workspace must be given together with out, got None"),
        ((ids, values), lm_head_workspace(4, device), "workspace must hold at least 6 elements, got 5"),
        ((ids.int(), values), lm_head_workspace(5, device), "ids must have dtype int64, got int32"),
        ((ids, values[:4]), lm_head_workspace(5, device), r"values must have shape \[5\], got \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            lm_head_argmax_fp8(**inputs, out=out, workspace=workspace)


def test_codes_of_one_row(device: str) -> None:
    """Each row of an identity finds its own token."""
    eye = codes(torch.eye(256)).to(device)
    ones = torch.ones(256, 1, device=device)
    ids, values = run({"hidden": eye, "hidden_scale": ones, "weight": eye, "weight_scale": 2 * ones})
    assert torch.equal(ids, torch.arange(256, device=device)) and (values == 2).all()

"""quantize_rows against torch's own e4m3, and the norm that quantises against the norm followed by it, bit for bit."""

from __future__ import annotations

import pytest
import torch
from test_draft import Case, make_inputs

from dflash_kernels.formats import (
    E2M1_VALUES,
    QuantizedWeight,
    WeightFormat,
    plain_scales,
    scale_blocks,
    split_nibbles,
)
from dflash_kernels.ops import draft_forward, quantize_rows, quantize_rows_nvfp4, rmsnorm_quantize_rows
from dflash_kernels.reference import quantize as reference


def same(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Equal bits; a NaN code may have either sign."""
    codes, wanted = (torch.where(c & 127 == 127, 127, c) for c in (got[0], want[0]))
    assert got[0].dtype == torch.uint8 and torch.equal(codes, wanted)
    assert got[1].dtype == torch.float32 and torch.equal(got[1], want[1])


def poisoned(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.full(x.shape, 255, dtype=torch.uint8, device=x.device)
    return codes, torch.full((x.shape[0], 1), float("nan"), device=x.device)


def check(x: torch.Tensor) -> None:
    before = x.clone()
    got = quantize_rows(x, out=poisoned(x))
    assert torch.equal(x.isnan(), before.isnan()) and torch.equal(x.nan_to_num(), before.nan_to_num())
    same(got, reference.quantize_rows(x))
    same(quantize_rows(x), got)


SHAPES = [(1, 8), (3, 72), (16, 576), (33, 2048), (5, 2056), (2, 4096), (7, 6144), (3, 6152), (2, 16384), (2, 32768)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_torchs(shape: tuple[int, int], device: str, rng: torch.Generator) -> None:
    """Rows of all magnitudes, each with elements over many binades, so that subnormal codes come up."""
    x = torch.randn(shape, generator=rng) * torch.logspace(-30, 30, shape[0])[:, None]
    check((x * torch.randn(shape, generator=rng).exp() ** 3).to(device, torch.bfloat16))


def test_float32_on_the_cpu(rng: torch.Generator) -> None:
    check(torch.randn(9, 264, generator=rng) * torch.logspace(-3, 3, 9)[:, None])


def test_every_bf16_value(device: str) -> None:
    """As the elements of rows with a largest magnitude of 448, 1 and 3.39e38 (the largest number)."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()].float()
    rows = []
    for largest in (448.0, 1.0, float(torch.finfo(torch.bfloat16).max)):
        row = finite[finite.abs() <= largest][: 2 * 32760]
        for part in row.split(32760):
            rows.append(torch.nn.functional.pad(part, (0, 32768 - len(part)), value=largest))
    check(torch.stack(rows).to(device, torch.bfloat16))


def test_zeros_tiny_rows_nan_and_infinities(device: str) -> None:
    x = torch.zeros(8, 2064)
    x[1, 7] = 1e-38  # far below what a scale can hold
    x[2, 5], x[2, 6] = 1e-30, -1e-31
    x[3, 2063], x[3, 0] = float("nan"), 2.0
    x[4] = float("nan")
    x[5, 9], x[5, 1] = float("inf"), 1.0
    x[6, 10] = -float("inf")
    x[7, 2000] = -3.0
    x = x.to(device, torch.bfloat16)
    check(x)
    codes, scale = quantize_rows(x)
    assert (codes[0] == 0).all() and scale[0] > 0 and (codes[1] & 127 == 0).all()
    assert codes[3, 2063] & 127 == 127 and codes[3, 0] == 0x7E  # the others of the row are as without the NaN
    assert codes[7, 2000] == 0xFE and scale[7] == 3 / 448


def test_codes_stand_for_the_rows(device: str, rng: torch.Generator) -> None:
    """Half a step of e4m3 off: 1/16 of the element or, below the normal codes, 2^-10 of the scale."""
    x = torch.randn(12, 512, generator=rng).to(device, torch.bfloat16)
    codes, scale = quantize_rows(x)
    back = QuantizedWeight(WeightFormat("fp8"), codes, scale).dequantize()
    assert ((back - x.float()).abs() <= torch.maximum(x.float().abs() / 16, scale * 2**-10) * (1 + 1e-6)).all()


NORMS = [(5, 64), (3, 4096), (2, 4104), (2, 8192), (1, 8)]


@pytest.mark.parametrize("shape", NORMS, ids=str)
def test_norm_that_quantises_is_norm_then_quantise(shape: tuple[int, int], device: str, rng: torch.Generator) -> None:
    """The plain norm is the last step of draft_forward, whose products are made to add nothing here."""
    rows, hidden = shape
    case = Case(contexts=(3,), T=rows, H=hidden, I=8, heads=(1, 1), D=32, windows=(0,), causal=(0,))
    inputs = make_inputs(case, rng, device, torch.bfloat16)
    inputs["o_weight"].zero_()
    inputs["down_weight"].zero_()
    normed = draft_forward(**inputs)
    x = inputs["embed_weight"][inputs["block_ids"].flatten().long()]
    got = rmsnorm_quantize_rows(x, inputs["final_norm"], inputs["eps"], out=poisoned(x))
    same(got, quantize_rows(normed))
    same(rmsnorm_quantize_rows(x, inputs["final_norm"], inputs["eps"]), got)


def test_no_rows(device: str) -> None:
    x = torch.empty(0, 64, dtype=torch.bfloat16, device=device)
    weight = torch.ones(64, dtype=torch.bfloat16, device=device)
    for codes, scale in (quantize_rows(x), quantize_rows(x, out=poisoned(x)), rmsnorm_quantize_rows(x, weight, 1e-6)):
        assert codes.shape == (0, 64) and scale.shape == (0, 1)


def test_opcheck(device: str, rng: torch.Generator) -> None:
    x = torch.randn(5, 64, generator=rng).to(device, torch.bfloat16)
    weight = torch.ones(64, dtype=torch.bfloat16, device=device)
    for op, arguments in (
        (torch.ops.dflash.quantize_rows, (x,)),
        (torch.ops.dflash.rmsnorm_quantize_rows, (x, weight, 1e-6)),
    ):
        codes, scale = poisoned(x)
        torch.library.opcheck(op.default, arguments)
        torch.library.opcheck(op.out, arguments, {"codes": codes, "scale": scale})


@pytest.mark.gpu
def test_graph_replay_equals_eager(rng: torch.Generator) -> None:
    x = torch.randn(48, 4096, generator=rng).to("cuda", torch.bfloat16)
    out = poisoned(x)
    quantize_rows(x, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantize_rows(x, out=out)
    x.copy_(torch.randn(48, 4096, generator=rng))
    graph.replay()
    same(out, quantize_rows(x))


def test_errors_name_the_argument(device: str) -> None:
    x = torch.zeros(4, 64, dtype=torch.bfloat16, device=device)
    weight = torch.ones(64, dtype=torch.bfloat16, device=device)
    codes, scale = poisoned(x)
    for bad, match in [
        (x[0], r"x must have shape \[\*, \*\]"),
        (x.half(), "x must have dtype bfloat16"),
        (x[:, :60].contiguous(), r"x.size\(1\) must be a multiple of 8 in 8..32768, got 60"),
        (x.new_zeros(1, 32776), r"x.size\(1\) must be a multiple of 8 in 8..32768, got 32776"),
        (x[:, :32], "x must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=f"^dflash::quantize_rows: {match}"):
            quantize_rows(bad)
        with pytest.raises(ValueError, match=f"^dflash::rmsnorm_quantize_rows: {match.replace('32768', '8192')}"):
            rmsnorm_quantize_rows(bad, weight, 1e-6)
    outputs: list[tuple[tuple[torch.Tensor, torch.Tensor], str]] = [
        ((codes[1:], scale), r"codes must have shape \[4, 64\], got \[3, 64\]"),
        ((codes.char(), scale), "codes must have dtype uint8, got int8"),
        ((codes, scale[:, 0]), r"scale must have shape \[4, 1\], got \[4\]"),
        ((codes, scale.double()), "scale must have dtype float32"),
        ((codes.t().contiguous().t(), scale), "codes must be contiguous"),
    ]
    for out, match in outputs:
        with pytest.raises(ValueError, match=f"^dflash::quantize_rows: {match}"):
            quantize_rows(x, out=out)
        with pytest.raises(ValueError, match=f"^dflash::rmsnorm_quantize_rows: {match}"):
            rmsnorm_quantize_rows(x, weight, 1e-6, out=out)
    for norm, eps, match in [
        (weight[1:], 1e-6, r"weight must have shape \[64\], got \[63\]"),
        (weight.double(), 1e-6, "weight must have dtype bfloat16"),
        (weight, -1.0, "eps must be at least 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=f"^dflash::rmsnorm_quantize_rows: {match}"):
            rmsnorm_quantize_rows(x, norm, eps)


# -- nvfp4 ----------------------------------------------------------------------------------------------------------

Nvfp4 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def poisoned_nvfp4(x: torch.Tensor) -> Nvfp4:
    rows, columns = x.shape
    codes = torch.full((rows, columns // 2), 255, dtype=torch.uint8, device=x.device)
    blocks = torch.full((-(-rows // 128), -(-columns // 64), 512), 255, dtype=torch.uint8, device=x.device)
    return codes, blocks, torch.full((rows, 1), float("nan"), device=x.device)


def check_nvfp4(x: torch.Tensor) -> Nvfp4:
    """Against the oracle, bit for bit, with zeros wherever a block has no row or group."""
    got = quantize_rows_nvfp4(x, out=poisoned_nvfp4(x))
    codes, groups, scale = reference.quantize_rows_nvfp4(x)
    assert torch.equal(split_nibbles(got[0]), codes)
    assert torch.equal(got[1], scale_blocks(groups))
    assert torch.equal(got[2], scale)
    assert all(torch.equal(a, b) for a, b in zip(quantize_rows_nvfp4(x), got, strict=True))
    return got


@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (130, 64), (2, 2080), (2, 6176), (1, 16416)], ids=str)
def test_nvfp4_is_the_nearest(shape: tuple[int, int], device: str, rng: torch.Generator) -> None:
    """Rows of all magnitudes, each with elements over many binades, so that scales of 0 come up."""
    x = torch.randn(shape, generator=rng) * torch.logspace(-30, 30, shape[0])[:, None]
    check_nvfp4((x * torch.randn(shape, generator=rng).exp() ** 3).to(device, torch.bfloat16))


def test_nvfp4_ties_go_to_even(device: str) -> None:
    """A group whose largest is 6, so that its scale is 448 with the row's 1/448: every half step of e2m1."""
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.cat((halves, torch.tensor([6.0]), -halves, torch.tensor([-0.0]), torch.zeros(16)))[None] * 448
    codes, _, scale = check_nvfp4(x.to(device, torch.bfloat16))
    even = [0, 2, 2, 4, 4, 6, 6, 7]
    assert scale == 1 and split_nibbles(codes)[0, :16].tolist() == even + [8 + code for code in even[:7]] + [8]


def test_nvfp4_zeros_tiny_rows_nan_and_infinities(device: str) -> None:
    x = torch.zeros(7, 2112)
    x[1, 7] = 1e-38  # far below what a scale can hold
    x[2, 5], x[2, 6] = 1e-30, -1e-31
    x[3, 2111], x[3, 0] = float("nan"), 2.0
    x[4] = float("nan")
    x[5, 9], x[5, 40] = float("inf"), 1.0
    x[6, 2000] = -3.0
    x = x.to(device, torch.bfloat16)
    codes, blocks, scale = check_nvfp4(x)
    groups = plain_scales(blocks, 7, 132)
    assert (codes[0] == 0).all() and (groups[0] == 0).all() and scale[0] > 0
    assert groups[3, 131] == 0x7F and groups[3, 0] == 0x7E  # the others of the row are as without the NaN
    assert (groups[4] == 0x7F).all() and groups[5, 0] == 0x7F and groups[5, 2] == 0 and scale[5].isinf()
    assert groups[6, 125] == 0x7E and split_nibbles(codes)[6, 2000] == 15


def test_nvfp4_stands_for_the_rows(device: str, rng: torch.Generator) -> None:
    """Half the widest step of e2m1, 4 to 6, off, and what rounding the scale of the group moves and cuts."""
    x = torch.randn(12, 512, generator=rng).to(device, torch.bfloat16)
    codes, blocks, scale = quantize_rows_nvfp4(x)
    groups = plain_scales(blocks, 12, 32).view(torch.float8_e4m3fn).float()
    values = torch.tensor(E2M1_VALUES, device=x.device)[split_nibbles(codes).int()].unflatten(1, (32, 16))
    back = (values * (groups * scale)[..., None]).flatten(1)
    largest = x.float().unflatten(1, (32, 16)).abs().amax(-1, keepdim=True).expand(-1, -1, 16).flatten(1)
    assert ((back - x.float()).abs() <= largest * (1 / 6 + 1 / 16)).all()
    assert 0.05 < (back - x.float()).norm() / x.float().norm() < 0.12


def test_nvfp4_no_rows_and_float32(device: str, rng: torch.Generator) -> None:
    x = torch.empty(0, 64, dtype=torch.bfloat16, device=device)
    assert [list(part.shape) for part in quantize_rows_nvfp4(x)] == [[0, 32], [0, 1, 512], [0, 1]]
    if device == "cpu":
        check_nvfp4(torch.randn(3, 96, generator=rng))


def test_nvfp4_opcheck(device: str, rng: torch.Generator) -> None:
    x = torch.randn(5, 96, generator=rng).to(device, torch.bfloat16)
    codes, blocks, scale = poisoned_nvfp4(x)
    torch.library.opcheck(torch.ops.dflash.quantize_rows_nvfp4.default, (x,))
    outputs = {"codes": codes, "blocks": blocks, "scale": scale}
    torch.library.opcheck(torch.ops.dflash.quantize_rows_nvfp4.out, (x,), outputs)


def test_nvfp4_errors_name_the_argument(device: str) -> None:
    x = torch.zeros(4, 64, dtype=torch.bfloat16, device=device)
    codes, blocks, scale = poisoned_nvfp4(x)
    for bad, match in [
        (x[0], r"x must have shape \[\*, \*\]"),
        (x.half(), "x must have dtype bfloat16"),
        (x[:, :48].contiguous(), r"x.size\(1\) must be a multiple of 32 in 32..32768, got 48"),
        (x[:, :32], "x must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=f"^dflash::quantize_rows_nvfp4: {match}"):
            quantize_rows_nvfp4(bad)
    outputs: list[tuple[Nvfp4, str]] = [
        ((codes[1:], blocks, scale), r"codes must have shape \[4, 32\], got \[3, 32\]"),
        ((codes, blocks[:, 0], scale), r"blocks must have shape \[1, 1, 512\], got \[1, 512\]"),
        ((codes, blocks.char(), scale), "blocks must have dtype uint8, got int8"),
        ((codes, blocks, scale.double()), "scale must have dtype float32"),
    ]
    for out, match in outputs:
        with pytest.raises(ValueError, match=f"^dflash::quantize_rows_nvfp4: {match}"):
            quantize_rows_nvfp4(x, out=out)

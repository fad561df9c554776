"""gemm_nvfp4 against its oracle: exact where every sum is, and within the error of bf16 where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import on_device

from dflash_kernels.formats import WeightFormat, join_nibbles, scale_blocks
from dflash_kernels.model.quantize import quantize
from dflash_kernels.ops import gemm_nvfp4, gemm_nvfp4_supported, quantize_rows_nvfp4
from dflash_kernels.reference import gemm as reference

# As the oracle takes them: codes one a byte, and codes of the scales of groups in plain order.
Inputs = dict[str, Any]

# M, N, K: single tiles and pairs, K whole and in parts, K that ends inside a step of 256 and of 64.
SHAPES = [
    (1, 64, 32),
    (8, 576, 576),
    (33, 64, 2880),
    (33, 592, 160),
    (64, 192, 1536),
    (130, 576, 576),
    (130, 320, 4128),
    (257, 1024, 224),
    (520, 384, 288),
]


@pytest.fixture(autouse=True)
def supported(device: str) -> None:
    if not gemm_nvfp4_supported(device):
        pytest.skip("no kernel for this GPU")


def random_inputs(rng: torch.Generator, device: str, m: int, n: int, k: int, **more: Any) -> Inputs:
    """Any codes, scales of groups from 1/4 to 15/4, of rows over some binades; bf16 bias; residual unless gated."""
    gated = more.get("gated", False)

    def matrix(rows: int) -> tuple[torch.Tensor, ...]:
        codes = torch.randint(16, (rows, k), generator=rng, dtype=torch.uint8)
        groups = torch.randint(0x28, 0x48, (rows, k // 16), generator=rng, dtype=torch.uint8)
        return codes.to(device), groups.to(device), torch.rand(rows, 1, generator=rng).exp().to(device)

    inputs: Inputs = dict(zip(("a", "a_groups", "a_scale"), matrix(m), strict=True))
    inputs |= dict(zip(("w", "w_groups", "w_scale"), matrix(n), strict=True))
    inputs["w_scale"] /= 10 * k**0.5
    inputs["gated"] = gated
    inputs["bias"] = torch.randn(n, generator=rng).bfloat16().to(device) if more.get("bias") else None
    with_residual = more.get("residual") and not gated
    inputs["residual"] = torch.randn(m, n, generator=rng).bfloat16().to(device) if with_residual else None
    return inputs


def exact_inputs(rng: torch.Generator, device: str, m: int, n: int, k: int, **more: Any) -> Inputs:
    """Few small integers, scales powers of two: sums have at most 13 bits."""
    inputs = random_inputs(rng, device, m, n, k, **more)

    def integers(rows: int) -> torch.Tensor:
        codes = torch.tensor([0, 2, 4, 5, 10, 12, 13], dtype=torch.uint8)  # 0, +-1, +-2, +-3
        values = codes[torch.randint(7, (rows, k), generator=rng)]
        return (values * (torch.rand(rows, k, generator=rng) < min(1.0, 128 / k))).to(torch.uint8).to(device)

    def of_groups(rows: int) -> torch.Tensor:
        return (8 * torch.randint(6, 9, (rows, k // 16), generator=rng)).to(torch.uint8).to(device)  # 1/2, 1, 2

    def powers(rows: int) -> torch.Tensor:
        return torch.exp2(torch.randint(-6, 3, (rows, 1), generator=rng).float()).to(device)

    inputs |= {"a": integers(m), "a_groups": of_groups(m), "a_scale": powers(m)}
    return inputs | {"w": integers(n), "w_groups": of_groups(n), "w_scale": powers(n)}


def arguments(inputs: Inputs) -> dict[str, Any]:
    """As the op takes them."""
    given = {name: value for name, value in inputs.items() if not name.endswith("_groups")}
    given |= {"a": join_nibbles(inputs["a"]), "w": join_nibbles(inputs["w"])}
    given["a_blocks"] = scale_blocks(inputs["a_groups"])
    given["w_blocks"] = scale_blocks(inputs["w_groups"], inputs["gated"])
    return given


def run(inputs: Inputs, **changed: Any) -> torch.Tensor:
    """Into poisoned memory."""
    n = inputs["w"].shape[0] // (2 if inputs["gated"] else 1)
    out = torch.full((inputs["a"].shape[0], n), float("nan"), dtype=torch.bfloat16, device=inputs["a"].device)
    assert gemm_nvfp4(**{**arguments(inputs), **changed}, out=out) is out
    return out


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_exact_where_sums_are(
    m: int, n: int, k: int, bias: bool, residual: bool, device: str, rng: torch.Generator
) -> None:
    inputs = exact_inputs(rng, device, m, n, k, bias=bias, residual=residual)
    assert torch.equal(run(inputs).double(), reference.gemm_nvfp4(**inputs))


@pytest.mark.parametrize(("bias", "residual", "gated"), [(0, 0, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1)])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_reference(
    m: int, n: int, k: int, bias: int, residual: int, gated: int, device: str, rng: torch.Generator
) -> None:
    """max |out - ref| <= 2 max |ref_bf16 - ref| + atol."""
    inputs = random_inputs(rng, device, m, n, k, bias=bool(bias), residual=bool(residual), gated=bool(gated))
    exact = reference.gemm_nvfp4(**inputs, dtype=torch.float64)
    rounding = (reference.gemm_nvfp4(**inputs) - exact).abs().max().item()
    error = (run(inputs).double() - exact).abs().max().item()
    assert error <= 2 * rounding + 1e-3, f"error {error}, rounding alone {rounding}"


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("k", [32, 2880])
def test_no_rows(k: int, gated: bool, device: str, rng: torch.Generator) -> None:
    inputs = random_inputs(rng, device, 0, 64, k, gated=gated)
    assert run(inputs).shape == gemm_nvfp4(**arguments(inputs)).shape == (0, 32 if gated else 64)


def test_every_code_and_every_scale(device: str) -> None:
    """Code c of a with scale s, times 1.0, is value(c) * value(s), in whatever group of the row it stands."""
    scales = torch.arange(127, dtype=torch.uint8)
    values = scales.view(torch.float8_e4m3fn).float()
    a = torch.zeros(127, 128, dtype=torch.uint8)
    groups = torch.zeros(127, 8, dtype=torch.uint8)
    for row in range(127):
        groups[row, row % 8] = scales[row]
        a[row, 16 * (row % 8) : 16 * (row % 8) + 16] = torch.arange(16)
    w = torch.zeros(16, 128, dtype=torch.uint8)
    for code in range(16):
        w[code, code::16] = 2  # 1.0
    inputs = {
        "a": a, "a_groups": groups, "a_scale": torch.ones(127, 1),
        "w": w, "w_groups": torch.full((16, 8), 0x38, dtype=torch.uint8), "w_scale": torch.ones(16, 1),
    }  # fmt: skip
    out = run({name: value.to(device) for name, value in inputs.items()} | {"gated": False})
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    want = (values[:, None] * torch.cat((table, -table))).bfloat16()
    assert torch.equal(out.cpu() + 0.0, want + 0.0)


def test_scales_belong_to_their_rows(device: str, rng: torch.Generator) -> None:
    """A row or column whose scale, or all of whose groups', is 0 is 0, or its bias; no other one is touched."""
    inputs = exact_inputs(rng, device, 140, 192, 160, bias=True)
    whole = run(inputs)
    for end in ("scale", "groups"):
        of_a, of_w = inputs["a_" + end].clone(), inputs["w_" + end].clone()
        of_a[135], of_w[150] = 0, 0
        out = run({**inputs, "a_" + end: of_a, "w_" + end: of_w})
        want = whole.clone()
        want[135], want[:, 150] = inputs["bias"], inputs["bias"][150]
        assert torch.equal(out, want)


def test_nan_scales_spoil_their_row_only(device: str, rng: torch.Generator) -> None:
    inputs = exact_inputs(rng, device, 70, 128, 160)
    whole = run(inputs)
    inputs["a_groups"][17, 3] = 0x7F
    out = run(inputs)
    assert out[17].isnan().all()
    assert torch.equal(out[torch.arange(70) != 17], whole[torch.arange(70) != 17])


def test_rows_do_not_depend_on_their_company(device: str, rng: torch.Generator) -> None:
    """With sums that are exact, whatever the tiles."""
    inputs = exact_inputs(rng, device, 140, 192, 416)
    whole = run(inputs)
    for rows in (slice(0, 1), slice(3, 36), slice(130, 140)):
        part = {name: inputs[name][rows].clone() for name in ("a", "a_groups", "a_scale")}
        assert torch.equal(run({**inputs, **part}), whole[rows])


def test_strided_rows(device: str, rng: torch.Generator) -> None:
    inputs = exact_inputs(rng, device, 45, 64, 160)
    wide = torch.full((45, 80 + 32), 0x77, dtype=torch.uint8)
    wide[:, 16:96] = arguments(inputs)["a"].cpu()
    assert torch.equal(run(inputs, a=on_device(wide, device)[:, 16:96]), run(inputs))


def test_out_may_be_the_residual(device: str, rng: torch.Generator) -> None:
    inputs = exact_inputs(rng, device, 130, 192, 288, bias=True, residual=True)
    want = run(inputs)
    assert torch.equal(gemm_nvfp4(**arguments(inputs), out=inputs["residual"]), want)


def test_a_quantised_layer(device: str, rng: torch.Generator) -> None:
    """From a weight and activations: the product of what both stand for, and not far from that of the floats."""
    x = torch.randn(40, 256, generator=rng).bfloat16().to(device)
    for gated in (False, True):
        weight = torch.randn(192, 256, generator=rng) / 16
        w = quantize(weight, WeightFormat.parse("nvfp4")).to(device)
        assert w.global_scale is not None
        made = gemm_nvfp4(
            *quantize_rows_nvfp4(x), w.codes, scale_blocks(w.scale, gated), 1 / w.global_scale, gated=gated
        )
        want = x.cpu().float() @ weight.T
        if gated:
            gate, up = want.chunk(2, 1)
            want = torch.nn.functional.silu(gate) * up
        assert 0.02 < (made.cpu().float() - want).norm() / want.norm() < (0.3 if gated else 0.2)


@pytest.mark.gpu
def test_graph_replay_equals_eager(rng: torch.Generator) -> None:
    if not gemm_nvfp4_supported("cuda"):
        pytest.skip("no kernel for this GPU")
    inputs = random_inputs(rng, "cuda", 130, 576, 576, bias=True, residual=True)
    eager = run(inputs)
    given, out = arguments(inputs), torch.full_like(eager, float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm_nvfp4(**given, out=out)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, eager)


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool, device: str, rng: torch.Generator) -> None:
    inputs = random_inputs(rng, device, 5, 32, 96, bias=True, residual=True, gated=gated)
    given = arguments(inputs)
    order = ("a", "a_blocks", "a_scale", "w", "w_blocks", "w_scale", "bias", "residual", "gated")
    values = tuple(given[name] for name in order)
    torch.library.opcheck(torch.ops.dflash.gemm_nvfp4.default, values)
    out = torch.zeros(5, 16 if gated else 32, dtype=torch.bfloat16, device=device)
    torch.library.opcheck(torch.ops.dflash.gemm_nvfp4.out, values, {"out": out})


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"a": lambda x: x[0]}, r"a must have shape \[\*, \*\], got \[48\]"),
    ({"a": lambda x: x[:, ::2]}, "a must have a contiguous last dimension, got stride 2"),
    ({"a": lambda x: x[:, :40]}, r"a.size\(1\) must be a multiple of 16, got 40"),
    ({"a_blocks": lambda x: x[0]}, r"a_blocks must have shape \[1, 2, 512\], got \[2, 512\]"),
    ({"a_blocks": lambda x: x.view(torch.int8)}, "a_blocks must have dtype uint8, got int8"),
    ({"a_scale": lambda x: x[:, 0]}, r"a_scale must have shape \[5, 1\], got \[5\]"),
    ({"w": lambda x: x[:, :32]}, r"w must have shape \[\*, 48\], got \[32, 32\]"),
    ({"w": lambda x: x[:20]}, r"w.size\(0\) must be a multiple of 8, got 20"),
    ({"w_blocks": lambda x: x[:, :1]}, r"w_blocks must have shape \[1, 2, 512\], got \[1, 1, 512\]"),
    ({"w_scale": lambda x: x[:8]}, r"w_scale must have shape \[32, 1\], got \[8, 1\]"),
    ({"bias": lambda x: x.float()}, "bias must have dtype bfloat16, got float32"),
    ({"residual": lambda x: x[:, :8]}, r"residual must have shape \[5, 32\], got \[5, 8\]"),
    ({"gated": lambda _: True}, "residual must be None where gated, got a tensor"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_mistakes_are_named(changes: dict[str, Any], message: str, device: str, rng: torch.Generator) -> None:
    given = arguments(random_inputs(rng, device, 5, 32, 96, bias=True, residual=True))
    given |= {name: change(given[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=f"^dflash::gemm_nvfp4: {message}$"):
        gemm_nvfp4(**given)

"""gemm_fp8 against its oracle: exact where every sum is, and within the error of bf16 where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import on_device

from dflash_kernels.ops import gemm_fp8
from dflash_kernels.reference import gemm as reference

Inputs = dict[str, Any]

# M, N, K: single tiles and pairs, K whole and in parts, K that ends inside a step of 128 and of 32.
SHAPES = [
    (1, 64, 16),
    (8, 576, 576),
    (33, 64, 2880),
    (33, 576, 144),
    (64, 192, 1536),
    (130, 576, 576),
    (130, 320, 2064),
    (257, 1024, 208),
    (520, 384, 272),
]


def codes(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float8_e4m3fn).view(torch.uint8)


def random_inputs(rng: torch.Generator, device: str, m: int, n: int, k: int, **more: Any) -> Inputs:
    """Rows quantised as a checkpoint's are, with scales that differ; bf16 bias; residual unless gated."""
    gated = more.get("gated", False)

    def quantized(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.randn(rows, k, generator=rng) * torch.rand(rows, 1, generator=rng).exp()
        scale = values.abs().amax(1, keepdim=True).clamp_min(1e-6) / 448
        return codes(values / scale).to(device), scale.to(device)

    a, a_scale = quantized(m)
    w, w_scale = quantized(n)
    inputs = {"a": a, "a_scale": a_scale, "w": w, "w_scale": w_scale / k**0.5, "gated": gated}
    inputs["bias"] = torch.randn(n, generator=rng).bfloat16().to(device) if more.get("bias") else None
    with_residual = more.get("residual") and not gated
    inputs["residual"] = torch.randn(m, n, generator=rng).bfloat16().to(device) if with_residual else None
    return inputs


def exact_inputs(rng: torch.Generator, device: str, m: int, n: int, k: int, **more: Any) -> Inputs:
    """Products are small integers whose sums have at most 13 bits, scales powers of two."""
    inputs = random_inputs(rng, device, m, n, k, **more)
    chance = min(1.0, 512 / k)

    def integers(rows: int) -> torch.Tensor:
        values = torch.randint(-3, 4, (rows, k), generator=rng).float()
        return codes(values * (torch.rand(rows, k, generator=rng) < chance)).to(device)

    def powers(rows: int) -> torch.Tensor:
        return torch.exp2(torch.randint(-6, 3, (rows, 1), generator=rng).float()).to(device)

    return {**inputs, "a": integers(m), "w": integers(n), "a_scale": powers(m), "w_scale": powers(n)}


def run(inputs: Inputs) -> torch.Tensor:
    """Into poisoned memory."""
    n = inputs["w"].shape[0] // (2 if inputs["gated"] else 1)
    out = torch.full((inputs["a"].shape[0], n), float("nan"), dtype=torch.bfloat16, device=inputs["a"].device)
    assert gemm_fp8(**inputs, out=out) is out
    return out


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_exact_where_sums_are(
    m: int, n: int, k: int, bias: bool, residual: bool, device: str, rng: torch.Generator
) -> None:
    inputs = exact_inputs(rng, device, m, n, k, bias=bias, residual=residual)
    assert torch.equal(run(inputs).double(), reference.gemm_fp8(**inputs))


@pytest.mark.parametrize(("bias", "residual", "gated"), [(0, 0, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1)])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_matches_reference(
    m: int, n: int, k: int, bias: int, residual: int, gated: int, device: str, rng: torch.Generator
) -> None:
    """max |out - ref| <= 2 max |ref_bf16 - ref| + atol, and for sums that lose bits beyond 14 at each instruction."""
    inputs = random_inputs(rng, device, m, n, k, bias=bool(bias), residual=bool(residual), gated=bool(gated))
    exact = reference.gemm_fp8(**inputs, dtype=torch.float64)
    rounding = (reference.gemm_fp8(**inputs) - exact).abs().max().item()
    lost = exact.abs().max().item() * 2**-14 * (k / 32) if device == "cuda" else 0.0
    error = (run(inputs).double() - exact).abs().max().item()
    assert error <= 2 * rounding + lost + 1e-3, f"error {error}, rounding alone {rounding}, lost bits {lost}"


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("k", [16, 2880])
def test_no_rows(k: int, gated: bool, device: str, rng: torch.Generator) -> None:
    inputs = random_inputs(rng, device, 0, 64, k, gated=gated)
    assert run(inputs).shape == gemm_fp8(**inputs).shape == (0, 32 if gated else 64)


def test_every_code(device: str) -> None:
    """Code c of a times 1.0 is its value; what follows K, and rows that follow M and N, take no part: they are NaN."""
    every = torch.arange(256, dtype=torch.uint8)
    every = every[(every & 0x7F) != 0x7F]
    a = torch.full((len(every) + 8, 32), 0x7F, dtype=torch.uint8)
    a[: len(every), :16] = 0
    a[: len(every), 3] = every
    w = torch.full((16, 16), 0x7F, dtype=torch.uint8)
    w[:8] = codes(torch.eye(16))[:8]
    out = run(
        {
            "a": on_device(a, device)[: len(every), :16],
            "a_scale": torch.ones(len(every), 1, device=device),
            "w": w.to(device)[:8],
            "w_scale": torch.ones(8, 1, device=device),
            "gated": False,
        }
    )
    want = torch.zeros(len(every), 8)
    want[:, 3] = every.view(torch.float8_e4m3fn).float()
    assert torch.equal(out.float().cpu(), want)


def test_scales_belong_to_their_rows(device: str, rng: torch.Generator) -> None:
    """A row or column whose scale is 0 is 0, or its bias; no other one is touched."""
    inputs = exact_inputs(rng, device, 70, 128, 160, bias=True)
    whole = run(inputs)
    a_scale, w_scale = inputs["a_scale"].clone(), inputs["w_scale"].clone()
    a_scale[17], w_scale[90] = 0, 0
    out = run({**inputs, "a_scale": a_scale, "w_scale": w_scale})
    want = whole.clone()
    want[17], want[:, 90] = inputs["bias"], inputs["bias"][90]
    assert torch.equal(out, want)


def test_rows_do_not_depend_on_their_company(device: str, rng: torch.Generator) -> None:
    """With sums that are exact, whatever the tiles."""
    inputs = exact_inputs(rng, device, 140, 192, 416)
    whole = run(inputs)
    for rows in (slice(0, 1), slice(3, 36), slice(130, 140)):
        part = {**inputs, "a": inputs["a"][rows], "a_scale": inputs["a_scale"][rows].clone()}
        assert torch.equal(run(part), whole[rows])


def test_strided_rows(device: str, rng: torch.Generator) -> None:
    inputs = exact_inputs(rng, device, 45, 64, 144)
    wide = torch.full((45, 144 + 32), 0x7F, dtype=torch.uint8)
    wide[:, 16:160] = inputs["a"].cpu()
    view = on_device(wide, device)[:, 16:160]
    assert torch.equal(run({**inputs, "a": view}), run(inputs))


def test_out_may_be_the_residual(device: str, rng: torch.Generator) -> None:
    inputs = exact_inputs(rng, device, 130, 192, 272, bias=True, residual=True)
    want = run(inputs)
    assert torch.equal(gemm_fp8(**inputs, out=inputs["residual"]), want)


@pytest.mark.gpu
def test_graph_replay_equals_eager(rng: torch.Generator) -> None:
    inputs = random_inputs(rng, "cuda", 130, 576, 576, bias=True, residual=True)
    eager = run(inputs)
    out = torch.full_like(eager, float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm_fp8(**inputs, out=out)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, eager)


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool, device: str, rng: torch.Generator) -> None:
    inputs = random_inputs(rng, device, 5, 32, 48, bias=True, residual=True, gated=gated)
    order = ("a", "a_scale", "w", "w_scale", "bias", "residual", "gated")
    arguments = tuple(inputs[name] for name in order)
    torch.library.opcheck(torch.ops.dflash.gemm_fp8.default, arguments)
    torch.library.opcheck(torch.ops.dflash.gemm_fp8.out, arguments, {"out": run(inputs)})


WRONG = [
    ({"a": lambda x: x.float()}, "a must have dtype uint8, got float32"),
    ({"a": lambda x: x[0]}, r"a must have shape \[\*, \*\], got \[48\]"),
    ({"a": lambda x: x[:, ::2]}, "a must have a contiguous last dimension, got stride 2"),
    ({"a": lambda x: x[:, :40]}, r"a.size\(1\) must be a multiple of 16, got 40"),
    ({"a": lambda x: x[:, :0]}, r"a.size\(1\) must be a multiple of 16, got 0"),
    ({"a": lambda x: x[:1].expand(5, -1)}, "a must have a row stride .* of 16 and at least 48, got 0"),
    ({"a_scale": lambda x: x[:, 0]}, r"a_scale must have shape \[5, 1\], got \[5\]"),
    ({"a_scale": lambda x: x.bfloat16()}, "a_scale must have dtype float32, got bfloat16"),
    ({"w": lambda x: x[:, :32]}, r"w must have shape \[\*, 48\], got \[32, 32\]"),
    ({"w": lambda x: x.view(torch.int8)}, "w must have dtype uint8, got int8"),
    ({"w": lambda x: x[::2]}, r"w must be contiguous, got strided \[16, 48\]"),
    ({"w": lambda x: x[:20]}, r"w.size\(0\) must be a multiple of 8, got 20"),
    ({"w": lambda x: x[:24], "gated": lambda _: True}, r"w.size\(0\) must be a multiple of 16, got 24"),
    ({"w_scale": lambda x: x[:8]}, r"w_scale must have shape \[32, 1\], got \[8, 1\]"),
    ({"bias": lambda x: x.float()}, "bias must have dtype bfloat16, got float32"),
    ({"bias": lambda x: x[:8]}, r"bias must have shape \[32\], got \[8\]"),
    ({"residual": lambda x: x[:, :8]}, r"residual must have shape \[5, 32\], got \[5, 8\]"),
    ({"residual": lambda x: x.T.contiguous().T}, r"residual must be contiguous, got strided \[5, 32\]"),
    ({"gated": lambda _: True}, "residual must be None where gated, got a tensor"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_mistakes_are_named(changes: dict[str, Any], message: str, device: str, rng: torch.Generator) -> None:
    inputs = random_inputs(rng, device, 5, 32, 48, bias=True, residual=True)
    inputs |= {name: change(inputs[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=f"^dflash::gemm_fp8: {message}$"):
        gemm_fp8(**inputs)


def test_wrong_out_is_named(device: str, rng: torch.Generator) -> None:
    inputs = random_inputs(rng, device, 5, 32, 48, gated=True)
    for shape, dtype, message in (
        ((5, 32), torch.bfloat16, r"out must have shape \[5, 16\], got \[5, 32\]"),
        ((5, 16), torch.float32, "out must have dtype bfloat16, got float32"),
    ):
        with pytest.raises(ValueError, match=message):
            gemm_fp8(**inputs, out=torch.empty(shape, dtype=dtype, device=device))

"""The fp8 baselines: torch's own products say what ours say, and where they do not run a row stands without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_gemm_fp8 import random_inputs

from bench import bench_draft, bench_gemm, bench_head, torch_fp8
from bench.ceilings import Ceilings
from bench.harness import Calls, Case, measure_case
from bench.model import need_of
from bench.predict import bench_rows
from bench.shapes import DEMO, QWEN3_8B, TINY, random_codes
from dflash_kernels import ops
from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.reference import gemm as reference

FP8 = WeightFormat("fp8")


@pytest.fixture(autouse=True)
def fresh_reasons() -> Iterator[None]:
    torch_fp8._say.cache_clear()
    yield


@pytest.fixture
def device(device: str, rng: torch.Generator) -> str:
    """Of those where torch multiplies rows of fp8, and this library does."""
    inputs = random_inputs(rng, device, 16, 64, 128)
    try:
        theirs(inputs)
        ops.gemm_fp8(**inputs)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        pytest.skip(f"no fp8 products on this device: {error}")
    return device


def theirs(inputs: dict[str, Any]) -> torch.Tensor:
    values = inputs["a"].view(torch.float8_e4m3fn)
    return torch_fp8.linear((values, inputs["a_scale"]), inputs["w"], inputs["w_scale"])


def refuse(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("no such\nproduct")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_quantized_as_ours_are(dtype: torch.dtype, device: str, rng: torch.Generator) -> None:
    """But for the last bits of quotients: a code in a thousand may be the next one."""
    x = (torch.randn(40, 640, generator=rng) * torch.rand(40, 1, generator=rng).exp()).to(dtype)
    x[3] = 0
    want_codes, want_scale = (part.to(device) for part in ops.quantize_rows(x))
    values, scale = torch_fp8.quantize_rows(x.to(device))
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)
    apart = (values.view(torch.uint8).int() - want_codes.int()).abs()
    assert apart.max() <= 1 and apart.float().mean() < 2e-3 and not values[3].float().any()


@pytest.mark.parametrize(("m", "n", "k"), [(16, 64, 128), (33, 576, 576), (64, 192, 1536)])
def test_product_is_the_reference(m: int, n: int, k: int, device: str, rng: torch.Generator) -> None:
    inputs = random_inputs(rng, device, m, n, k)
    exact = reference.gemm_fp8(**inputs, dtype=torch.float64)
    rounding = (reference.gemm_fp8(**inputs) - exact).abs().max().item()
    lost = exact.abs().max().item() * 2**-12 * (k / 32) if device == "cuda" else 0.0
    assert (theirs(inputs).double() - exact).abs().max().item() <= 2 * rounding + lost + 1e-3


def fp8_baselines(calls: Calls) -> list[Any]:
    found = [call for name, call in calls.baselines.items() if "fp8" in name or "_scaled_mm" in name]
    assert found, calls.baselines
    return found


@pytest.mark.parametrize("which", ["qkv", "o", "gate_up", "down"])
def test_gemm_baseline_does_the_same(which: str, device: str) -> None:
    calls = bench_gemm._case(TINY, which, 16).make(torch.device(device))
    ours = calls.ours()
    assert isinstance(ours, torch.Tensor)
    for call in fp8_baselines(calls):
        torch.testing.assert_close(call(), ours, rtol=2e-2, atol=2e-2 * ours.abs().max().item())


def test_head_baseline_chooses_the_same(device: str) -> None:
    """But where two logits are as good as equal."""
    hidden, dense = bench_head._inputs(TINY, 24, torch.device(device))
    weight = random_codes(FP8, (TINY.V, TINY.H), torch.device(device))
    bf16, fp8 = bench_head._argmax_baselines(hidden, dense, weight).values()
    coded = ops.quantize_rows(hidden)
    logits = reference.gemm_fp8(*coded, weight.codes, weight.scale, dtype=torch.float64)
    ids, _ = ops.lm_head_argmax_fp8(*coded, weight.codes, weight.scale)
    chosen = fp8()
    assert isinstance(chosen, torch.Tensor) and (chosen == ids).float().mean() > 0.7
    best, theirs = logits.amax(1), logits.gather(1, chosen[:, None])[:, 0]
    assert (theirs >= best - 0.02 * best.abs()).all()
    assert isinstance(bf16(), torch.Tensor) and list(bench_head._argmax_baselines(hidden, dense)) == [
        f"torch {torch.__version__} matmul + argmax"
    ]


@pytest.mark.parametrize("batch", [2, 8])
def test_draft_baseline_is_the_same_pass(batch: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU through the chain, which a drafter takes on CUDA alone; with codes that count beside the embedding."""

    def large_codes(*of: Any) -> QuantizedWeight:
        weight = random_codes(*of)
        weight.scale.mul_(10)
        return weight

    monkeypatch.setattr(bench_draft, "random_codes", large_codes)
    if device == "cpu":
        monkeypatch.setattr(bench_draft, "has_fp8_chain", lambda matrices: True)
    calls = bench_draft._case(TINY, batch, 32, FP8).make(torch.device(device))
    ours = calls.ours()
    assert isinstance(ours, torch.Tensor)

    def apart(other: Any) -> float:
        return ((other.float() - ours.float()).norm() / ours.float().norm()).item()

    (call,) = fp8_baselines(calls)
    assert apart(call()) < 0.1
    assert apart(calls.baselines[f"torch eager {torch.__version__}"]()) > 0.4, "bf16 has weights of its own"


def test_bf16_baseline_is_the_same_pass() -> None:
    calls = bench_draft._case(TINY, 2, 32).make(torch.device("cpu"))
    ours, (eager,) = calls.ours(), calls.baselines.values()
    torch.testing.assert_close(eager(), ours, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("case", [bench_head._fp8_case(TINY, 1), bench_gemm._case(TINY, "down", 16)])
def test_a_baseline_that_does_not_run_is_left_out(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its reason, once however many sets are made; the row stays."""
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    cpu = torch.device("cpu")
    calls = [case.make(cpu) for _ in range(3)]
    assert all(not any("_scaled_mm" in name for name in one.baselines) for one in calls)
    printed = capsys.readouterr().out
    assert printed.count("left out: RuntimeError: no such product\n") == printed.count("\n") == 1
    (row,) = measure_case(case, cpu, Ceilings("card", 2e9, "a reader", 1e9, 1e12, "fp32", 0), samples=2)
    assert row.ours_us > 0 and (row.ratio is None) == (case.suite == "gemm")


def test_gemm_rows_and_what_they_need() -> None:
    """A drafter layer's weights, each read once, at the rate of fp8."""
    rows = [row for row in bench_rows() if row["suite"] == "gemm"]
    for name, rows_each, shape in (("qwen3-8b", (64, 128, 512), QWEN3_8B), ("demo", (64,), DEMO)):
        of_shape = [row for row in rows if row["shape"].startswith(f"{name} ")]
        assert len(of_shape) == 4 * len(rows_each)
        for m in rows_each:
            layer = [row for row in of_shape if f" M{m} " in row["shape"]]
            assert sum(row["flops"] for row in layer) == m * shape.layer_weights
            assert 0 < sum(row["bytes"] for row in layer) - shape.layer_weights < 20 * m * (2 * shape.I + shape.H) + 2e6
    for row in rows:
        need = need_of(row)
        assert need.fp8 and need.flops == 2 * row["flops"] <= need.padded_flops and need.bytes == row["bytes"]

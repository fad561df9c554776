"""draft_forward_nvfp4 against its oracle, which quantises the input of the same four products, and beside draft_forward
on what the codes stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_draft import Case, Inputs, make_inputs

from dflash_kernels.formats import QuantizedWeight, WeightFormat, scale_blocks
from dflash_kernels.model.quantize import quantize
from dflash_kernels.ops import (
    draft_forward,
    draft_forward_nvfp4,
    draft_forward_nvfp4_workspace,
    draft_forward_workspace,
    gemm_nvfp4_supported,
)
from dflash_kernels.reference import draft as reference

MATRICES = ("qkv", "o", "gate_up", "down")


@pytest.fixture
def device(device: str) -> str:
    """Of those that multiply nvfp4."""
    if not gemm_nvfp4_supported(device):
        pytest.skip("no nvfp4 products on this device")
    return device


def make(
    case: Case, rng: torch.Generator, device: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[Inputs, dict[str, QuantizedWeight]]:
    """Arguments of draft_forward without its four weights, with softmax_scale, and the weights."""
    inputs = {"softmax_scale": None} | make_inputs(case, rng, device, dtype)
    weights = {
        name: quantize(inputs.pop(f"{name}_weight").cpu(), WeightFormat.parse("nvfp4")).to(device) for name in MATRICES
    }
    return inputs, weights


def arguments(inputs: Inputs, weights: dict[str, QuantizedWeight]) -> Inputs:
    """As the op takes them."""
    given = dict(inputs)
    for name, weight in weights.items():
        assert weight.global_scale is not None
        given |= {f"{name}_weight": weight.codes, f"{name}_scale": 1 / weight.global_scale}
    return given | {"blocks": [scale_blocks(weights[name].scale, gated=name == "gate_up") for name in MATRICES]}


def outputs(given: Inputs) -> dict[str, torch.Tensor]:
    """A poisoned output and a poisoned workspace of exactly the size asked for."""
    (batch, block), hidden = given["block_ids"].shape, given["embed_weight"].shape[1]
    _, kv_heads, head_dim = given["k_caches"][0].shape
    q_heads = given["qkv_weight"].shape[1] // head_dim - 2 * kv_heads
    sizes = (batch, block, hidden, 2 * given["down_weight"].shape[2], q_heads, kv_heads, head_dim)
    out = given["embed_weight"].new_full((batch * block, hidden), float("nan"))
    needed = draft_forward_nvfp4_workspace(*sizes)
    return {"out": out, "workspace": torch.full((needed,), 255, dtype=torch.uint8, device=out.device)}


def run(given: Inputs) -> torch.Tensor:
    return draft_forward_nvfp4(**given, **outputs(given))


CASES = [
    Case(),
    Case(contexts=(5,), T=7, index=torch.int32, I=96),
    Case(contexts=(33, 90), T=32, heads=(6, 2), D=96, I=64, H=96),
    Case(contexts=(64, 63), T=8, heads=(8, 2), D=128, qk_norm=False, biases=True, windows=(64, 0)),
    Case(contexts=tuple(b % 5 for b in range(18)), T=8, H=128, I=160, heads=(4, 2), windows=(0,), causal=(0,)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case, device: str, rng: torch.Generator) -> None:
    """max |out - ref32| <= 2 max |ref_bf16 - ref32| + atol, as of draft_forward_fp8."""
    inputs, weights = make(case, rng, device)
    out = run(arguments(inputs, weights))
    exact = reference.draft_forward_nvfp4(weights, **inputs, dtype=torch.float32)
    rounding = (reference.draft_forward_nvfp4(weights, **inputs, dtype=torch.bfloat16).float() - exact).abs().max()
    error = (out.float() - exact).abs().max()
    assert error <= 2 * rounding + 4e-3, f"error {error}, rounding alone {rounding}"


def test_float32_matches_reference(rng: torch.Generator) -> None:
    inputs, weights = make(CASES[1], rng, "cpu", torch.float32)
    off = (run(arguments(inputs, weights)) - reference.draft_forward_nvfp4(weights, **inputs)).abs().amax(1)
    assert off.median() < 2e-5 and (off < 2e-5).float().mean() > 0.8


def test_is_draft_forward_up_to_the_codes_of_its_activations(device: str, rng: torch.Generator) -> None:
    case = Case(contexts=(70, 0, 200, 9), H=512, I=1024, D=128, windows=(0,), causal=(0,))
    inputs, weights = make(case, rng, device)
    dense = {f"{name}_weight": weight.dequantize(torch.bfloat16) for name, weight in weights.items()}
    want = draft_forward(**inputs, **dense).float()
    off = (run(arguments(inputs, weights)).float() - want).norm(dim=1) / want.norm(dim=1)
    assert 1e-2 < off.max() < 0.25


def test_empty_batch(device: str, rng: torch.Generator) -> None:
    given = arguments(*make(Case(contexts=()), rng, device))
    assert draft_forward_nvfp4(**given).shape == run(given).shape == (0, 128)


def test_opcheck(device: str, rng: torch.Generator) -> None:
    given = arguments(*make(Case(contexts=(5, 12), T=7, H=64), rng, device))
    order = [argument.name for argument in torch.ops.dflash.draft_forward_nvfp4.default._schema.arguments]
    values = tuple(given[name] for name in order if name != "blocks")
    torch.library.opcheck(torch.ops.dflash.draft_forward_nvfp4.default, values, {"blocks": given["blocks"]})
    named = {"blocks": given["blocks"], **outputs(given)}
    torch.library.opcheck(torch.ops.dflash.draft_forward_nvfp4.out, values, named)


def test_errors_name_the_argument(device: str, rng: torch.Generator) -> None:
    given = arguments(*make(Case(contexts=(5, 12), T=7), rng, device))
    narrow = {"gate_up_weight": given["gate_up_weight"][:, :48], "down_weight": given["down_weight"][:, :, :24]}
    changes: list[tuple[dict[str, Any], str]] = [
        ({"qkv_weight": given["qkv_weight"][:, :, :32]}, "qkv_weight must have shape"),
        ({"o_weight": given["o_weight"].char()}, "o_weight must have dtype uint8, got int8"),
        (
            {name: value.contiguous() for name, value in narrow.items()},
            r"down_weight.size\(2\) must be a multiple of 16",
        ),
        ({"down_scale": given["down_scale"].double()}, "down_scale must have dtype float32, got float64"),
        ({"blocks": given["blocks"][:3]}, r"blocks must have one entry a weight \(4\), got 3"),
        ({"blocks": [*given["blocks"][:3], given["blocks"][0]]}, r"blocks\[3\] must have shape"),
        ({"blocks": [given["blocks"][0].char(), *given["blocks"][1:]]}, r"blocks\[0\] must have dtype uint8, got int8"),
    ]
    for change, match in changes:
        with pytest.raises(ValueError, match=f"^dflash::draft_forward_nvfp4: {match}"):
            draft_forward_nvfp4(**{**given, **change})
    with pytest.raises(ValueError, match="workspace must be given together with out"):
        draft_forward_nvfp4(**given, out=outputs(given)["out"])


@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64)])
def test_workspace_of_a_batch_serves_smaller_ones(heads: tuple[int, int, int]) -> None:
    needed = [draft_forward_nvfp4_workspace(batch, 16, 64, 32, *heads) for batch in range(100)]
    assert needed == sorted(needed)
    assert all(size >= draft_forward_workspace(batch, 16, 64, 32, *heads) for batch, size in enumerate(needed))

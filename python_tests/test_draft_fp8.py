"""draft_forward_fp8 against its oracle, which quantises the input of the same four products, and beside draft_forward
on what the codes stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_draft import Case, Inputs, make_inputs
from test_draft import error_cases as dense_error_cases

from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.model.quantize import quantize
from dflash_kernels.ops import (
    draft_forward,
    draft_forward_fp8,
    draft_forward_fp8_supported,
    draft_forward_fp8_workspace,
    draft_forward_workspace,
)
from dflash_kernels.reference import draft as reference

FP8 = WeightFormat("fp8")
MATRICES = ("qkv", "o", "gate_up", "down")


@pytest.fixture
def device(device: str) -> str:
    """Of those that multiply fp8."""
    if not draft_forward_fp8_supported(device):
        pytest.skip("no fp8 products on this device")
    return device


@pytest.fixture
def fp8_gpu() -> str:
    if not draft_forward_fp8_supported("cuda"):
        pytest.skip("no fp8 products on this GPU")
    return "cuda"


def with_codes(inputs: Inputs) -> Inputs:
    """Arguments of draft_forward_fp8, in its order, from those of draft_forward."""
    coded: Inputs = {}
    for name, value in inputs.items():
        if name.removesuffix("_weight") not in MATRICES:
            coded[name] = value
            continue
        weight = quantize(value.float(), FP8)
        coded[name] = weight.codes
        coded[name.replace("_weight", "_scale")] = weight.scale
    return coded


def dequantized(inputs: Inputs) -> Inputs:
    """Arguments of draft_forward with the weights that the codes stand for."""
    dense = {name: value for name, value in inputs.items() if name.removesuffix("_scale") not in MATRICES}
    for name in MATRICES:
        weight = QuantizedWeight(FP8, inputs[f"{name}_weight"], inputs[f"{name}_scale"])
        dense[f"{name}_weight"] = weight.dequantize(inputs["embed_weight"].dtype)
    return dense


def make_codes(case: Case, rng: torch.Generator, device: str, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    return with_codes(make_inputs(case, rng, device, dtype))


def sizes(inputs: Inputs) -> tuple[int, ...]:
    (batch, block), hidden = inputs["block_ids"].shape, inputs["embed_weight"].shape[1]
    _, kv_heads, head_dim = inputs["k_caches"][0].shape
    q_heads = inputs["qkv_weight"].shape[1] // head_dim - 2 * kv_heads
    return batch, block, hidden, inputs["down_weight"].shape[2], q_heads, kv_heads, head_dim


def outputs(inputs: Inputs) -> dict[str, torch.Tensor]:
    """A poisoned output and a poisoned workspace of exactly the size asked for."""
    batch, block, hidden, *_ = sizes(inputs)
    out = inputs["embed_weight"].new_full((batch * block, hidden), float("nan"))
    size = draft_forward_fp8_workspace(*sizes(inputs))
    return {"out": out, "workspace": torch.full((size,), 255, dtype=torch.uint8, device=out.device)}


def run(inputs: Inputs) -> torch.Tensor:
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    result = draft_forward_fp8(**inputs, **outputs(inputs))
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{name} was written"
    return result


def check(inputs: Inputs) -> None:
    """max |out - ref32| <= 2 max |ref_bf16 - ref32| + atol, as of draft_forward. An element that rounds to another
    code counts in both: it is what rounding to bf16 does here."""
    out = run(inputs)
    exact = reference.draft_forward_fp8(**inputs, dtype=torch.float32)
    rounding = (reference.draft_forward_fp8(**inputs, dtype=torch.bfloat16).float() - exact).abs().max().item()
    error = (out.float() - exact).abs().max().item()
    assert error <= 2 * rounding + 4e-3, f"error {error}, rounding alone {rounding}"


CASES = [
    Case(),
    Case(contexts=(5,), T=7, index=torch.int32),
    Case(contexts=(70, 3), T=10, heads=(3, 1), index=torch.int32),
    Case(contexts=(64, 63, 65, 128), T=8, heads=(8, 2), D=128),
    Case(contexts=(33, 90), T=32, heads=(6, 2), D=96, I=48, H=80),
    Case(contexts=(150, 40), windows=(5, 33), causal=(0, 1)),
    Case(contexts=(128, 20), T=8, qk_norm=False, biases=True, windows=(64, 0), heads=(64, 8)),
    Case(contexts=(21,) * 3, H=576, I=1536, heads=(9, 3), windows=(0,), causal=(0,)),
    Case(contexts=tuple(b % 5 for b in range(18)), T=8, H=256, I=512, heads=(4, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case, device: str, rng: torch.Generator) -> None:
    check(make_codes(case, rng, device))


@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
def test_float32_matches_reference(case: Case, rng: torch.Generator) -> None:
    """In float32 hardly an element lies so near the middle of two codes that the order of sums decides; where one does,
    its row is off."""
    inputs = make_codes(case, rng, "cpu", torch.float32)
    off = (run(inputs) - reference.draft_forward_fp8(**inputs, dtype=torch.float32)).abs().amax(1)
    assert off.median() < 2e-5 and (off < 2e-5).float().mean() > 0.8


CUDA_CASES = [
    Case(contexts=tuple(range(0, 512, 2)), H=512, I=256, heads=(4, 2), T=8, windows=(0,), causal=(0,)),
    Case(contexts=(40, 1, 7, 900), H=4096, I=12288, heads=(32, 8), D=128, windows=(0,), causal=(0,)),
    Case(contexts=(700,) * 12, H=1024, I=3072, heads=(32, 8), D=128),
    Case(contexts=(9,) * 3, H=8208, I=32768, heads=(2, 1), windows=(0,), causal=(0,)),  # a norm that does not quantise
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_large_cases_on_cuda(case: Case, fp8_gpu: str, rng: torch.Generator) -> None:
    check(make_codes(case, rng, fp8_gpu))


@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_each_scale_is_of_its_row(half: str, device: str, rng: torch.Generator) -> None:
    """Weights of ones and a residual of ones: by hand, with scales that differ by factors of two."""
    case = Case(contexts=(0,), T=1, H=32, I=16, heads=(1, 1), D=32, windows=(0,), causal=(0,), rotary=0, qk_norm=False)
    inputs = make_inputs(case, rng, device, torch.bfloat16)
    for name in ("embed_weight", "input_norm", "post_norm", "final_norm", *(f"{name}_weight" for name in MATRICES)):
        inputs[name].fill_(1.0)
    inputs["down_weight" if half == "attention" else "o_weight"].zero_()
    inputs = with_codes(inputs)
    scale = {}
    for name in MATRICES:
        inputs[f"{name}_weight"].clamp_(max=0x38)  # the code of 1
        inputs[f"{name}_scale"].copy_(2.0 ** torch.randint(-2, 1, inputs[f"{name}_scale"].shape, generator=rng))
        scale[name] = inputs[f"{name}_scale"].flatten().double()
    if half == "attention":
        x = 1 + (32 * scale["qkv"][64:]).sum() * scale["o"]
    else:
        gate, up = 32 * scale["gate_up"].view(2, 16)
        x = 1 + (torch.nn.functional.silu(gate) * up).sum() * scale["down"]
    torch.testing.assert_close(run(inputs)[0].double(), x / x.square().mean().sqrt(), atol=0, rtol=0.03)


def test_is_draft_forward_up_to_the_codes_of_its_activations(device: str, rng: torch.Generator) -> None:
    """Quantised activations are off by up to 1/16 an element, at random: a few percent of a row's norm."""
    inputs = make_codes(Case(contexts=(70, 0, 200, 9), H=512, I=1024, D=128, windows=(0,), causal=(0,)), rng, device)
    dense = draft_forward(**dequantized(inputs)).float()
    off = (run(inputs).float() - dense).norm(dim=1) / dense.norm(dim=1)
    assert 1e-3 < off.max() < 0.06


def test_requests_do_not_touch_each_other(device: str, rng: torch.Generator) -> None:
    """The rows of a request are the same in any order and beside other requests."""
    inputs = make_codes(Case(contexts=(70, 0, 200, 9), D=128), rng, device)
    per_request = ("block_ids", "positions", "prefix_lens", "req_pool_indices")
    whole = run(inputs).view(4, 16, -1)
    order = torch.tensor([2, 0, 3, 1], device=device)
    permuted = run({**inputs, **{name: inputs[name][order] for name in per_request}}).view(4, 16, -1)
    assert torch.equal(permuted, whole[order])


def test_empty_batch(device: str, rng: torch.Generator) -> None:
    inputs = make_codes(Case(contexts=()), rng, device)
    assert draft_forward_fp8(**inputs).shape == (0, 128)
    assert run(inputs).shape == (0, 128)


def test_functional_form_equals_out_form(device: str, rng: torch.Generator) -> None:
    inputs = make_codes(Case(), rng, device)
    assert torch.equal(draft_forward_fp8(**inputs), run(inputs))


def test_opcheck(device: str, rng: torch.Generator) -> None:
    inputs = make_codes(Case(contexts=(5, 12), T=7, H=64), rng, device)
    arguments = tuple(inputs.values())
    torch.library.opcheck(torch.ops.dflash.draft_forward_fp8.default, arguments)
    torch.library.opcheck(torch.ops.dflash.draft_forward_fp8.out, arguments, outputs(inputs))


@pytest.mark.gpu
def test_graph_replay_equals_eager(fp8_gpu: str, rng: torch.Generator) -> None:
    inputs = make_codes(Case(contexts=(300, 1, 64), D=128), rng, fp8_gpu)
    held = outputs(inputs)
    draft_forward_fp8(**inputs, **held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draft_forward_fp8(**inputs, **held)
    inputs["block_ids"].copy_(torch.randint(0, 97, inputs["block_ids"].shape, generator=rng))
    expected = run(inputs)
    held["out"].fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(held["out"], expected)


def error_cases(i: Inputs) -> list[tuple[Inputs, str]]:
    """Changed arguments and what the error must name."""

    def bad(**changes: Any) -> Inputs:
        return {**i, **changes}

    scales = [f"{name}_scale" for name in MATRICES]
    narrow = with_codes(make_inputs(Case(contexts=(5, 12), T=7, I=24), torch.Generator(), "cpu", torch.bfloat16))
    narrow = {name: narrow[name].to(i["block_ids"].device) for name in ("gate_up_weight", "down_weight")}
    return [
        *((bad(**{name: i[name][:, :-1].contiguous()}), rf"{name} must have shape") for name in scales),
        *((bad(**{name: i[name].double()}), f"{name} must have dtype float32, got float64") for name in scales),
        *((bad(**{name: i[name].squeeze(-1)}), f"{name} must have shape") for name in scales),
        *(
            (bad(**{f"{name}_weight": i[f"{name}_weight"].bfloat16()}), f"{name}_weight must have dtype uint8, got bf")
            for name in MATRICES
        ),
        (bad(**narrow), r"down_weight.size\(2\) must be a multiple of 16, got 24"),
        (bad(embed_weight=i["embed_weight"][:, :120], input_norm=i["input_norm"][:, :120]), "embed_weight.size"),
    ]


def test_errors_name_the_argument_and_leave_the_output(device: str, rng: torch.Generator) -> None:
    dense = make_inputs(Case(contexts=(5, 12), T=7), rng, device, torch.bfloat16)
    inputs = with_codes(dense)
    held = outputs(inputs)
    shared = [
        (
            {
                **inputs,
                **{k: v for k, v in bad.items() if v is not dense[k] and k.removesuffix("_weight") not in MATRICES},
            },
            m,
        )
        for bad, m in dense_error_cases(dense)
        if not m.startswith(("qkv_weight", "o_weight", "gate_up_weight", "down_weight"))
    ]
    for bad, match in error_cases(inputs) + shared:
        with pytest.raises(ValueError, match=f"^dflash::draft_forward_fp8: {match}"):
            draft_forward_fp8(**bad, **held)
        with pytest.raises(ValueError, match=f"^dflash::draft_forward_fp8: {match}"):
            draft_forward_fp8(**bad)
    for name, value, match in [
        ("out", held["out"][1:], r"out must have shape \[14, 128\]"),
        ("workspace", held["workspace"][1:], f"workspace must have at least {held['workspace'].numel()} bytes"),
        ("workspace", None, "workspace must be given together with out"),
    ]:
        with pytest.raises(ValueError, match=f"^dflash::draft_forward_fp8: {match}"):
            draft_forward_fp8(**inputs, **{**held, name: value})
    assert held["out"].isnan().all()


def test_values_out_of_range_are_named_on_the_cpu(rng: torch.Generator) -> None:
    inputs = make_codes(Case(contexts=(5, 12), T=7), rng, "cpu")
    for name, value in (("block_ids", 97), ("positions", -1), ("prefix_lens", 10**6), ("req_pool_indices", 99)):
        wrong = inputs[name].clone()
        wrong.view(-1)[0] = value
        with pytest.raises(ValueError, match=rf"draft_forward_fp8: {name} must be in \[0, \d+\), got {value}"):
            draft_forward_fp8(**{**inputs, name: wrong})


@pytest.mark.parametrize("heads", [(32, 8, 128), (4, 1, 128), (9, 3, 64)])
def test_workspace_of_a_batch_serves_smaller_ones(heads: tuple[int, int, int]) -> None:
    needed = [draft_forward_fp8_workspace(batch, 16, 64, 16, *heads) for batch in range(100)]
    assert needed == sorted(needed)
    assert all(size >= draft_forward_workspace(batch, 16, 64, 16, *heads) for batch, size in enumerate(needed))
    with pytest.raises(ValueError, match="^dflash::draft_forward_fp8_workspace: head_dim must be at least 1, got 0"):
        draft_forward_fp8_workspace(1, 16, 4096, 12288, 32, 8, 0)

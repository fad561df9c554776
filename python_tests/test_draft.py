"""draft_forward against the oracle, and what must hold for any weights: which keys a query sees, and that requests do
not touch each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dflash_kernels.ops import draft_forward, draft_forward_workspace
from dflash_kernels.reference import draft as reference

Inputs = dict[str, Any]
WEIGHTS = ("embed_weight", "input_norm", "qkv_weight", "qkv_bias", "q_norm", "k_norm", "o_weight", "o_bias")
WEIGHTS += ("post_norm", "gate_up_weight", "down_weight", "final_norm")


@dataclass(frozen=True)
class Case:
    contexts: tuple[int, ...] = (0, 1, 17)
    T: int = 16
    H: int = 128
    I: int = 64  # noqa: E741 - the project's letter
    heads: tuple[int, int] = (4, 2)
    D: int = 64
    windows: tuple[int, ...] = (0, 0)
    causal: tuple[int, ...] = (0, 0)
    rotary: int | None = None  # None: D
    qk_norm: bool = True
    biases: bool = False
    scale: float | None = None
    index: torch.dtype = torch.int64

    def __str__(self) -> str:
        text = f"B{len(self.contexts)}-T{self.T}-H{self.H}-I{self.I}-{self.heads[0]}x{self.heads[1]}-D{self.D}"
        return text + f"-w{self.windows[-1]}-c{self.causal[-1]}-ctx{max(self.contexts, default=0)}"


def make_inputs(case: Case, rng: torch.Generator, device: str, dtype: torch.dtype) -> Inputs:
    """Random arguments. Every cache element that no query may see is NaN."""
    (q_heads, kv_heads), layers, batch = case.heads, len(case.windows), len(case.contexts)
    width, vocab, table = max(case.contexts, default=0) + 40, 97, max(case.contexts, default=0) + 64

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * std + mean).to(device, dtype)

    qkv_width = (q_heads + 2 * kv_heads) * case.D
    prefix = torch.tensor(case.contexts, dtype=torch.int64)
    positions = prefix[:, None] + torch.arange(case.T) if batch else torch.empty(0, case.T, dtype=torch.int64)
    rows = torch.randperm(batch + 2, generator=rng)[:batch]
    num_slots = (batch + 2) * width + 5
    req_to_token = torch.randperm(num_slots, generator=rng)[: (batch + 2) * width].view(batch + 2, width)
    k_caches, v_caches = [], []
    for window in case.windows:
        caches = torch.full((2, num_slots, kv_heads, case.D), float("nan"))
        for b, context in enumerate(case.contexts):
            slots = req_to_token[rows[b], max(context - window + 1, 0) if window else 0 : context]
            caches[:, slots] = torch.randn(2, len(slots), kv_heads, case.D, generator=rng)
        k_caches.append(caches[0].to(device, dtype))
        v_caches.append(caches[1].to(device, dtype))
    rotary = case.D if case.rotary is None else case.rotary
    angles = torch.arange(table)[:, None] / 1000.0 ** (torch.arange(0, rotary, 2) / max(rotary, 1))
    index = {"device": device, "dtype": case.index}
    return {
        "block_ids": torch.randint(0, vocab, (batch, case.T), generator=rng).to(**index),
        "positions": positions.to(**index),
        "prefix_lens": prefix.to(**index),
        "req_pool_indices": rows.to(**index),
        "req_to_token": req_to_token.to(**index),
        "k_caches": k_caches,
        "v_caches": v_caches,
        "embed_weight": normal(vocab, case.H),
        "input_norm": normal(layers, case.H, std=0.1, mean=1.0),
        "qkv_weight": normal(layers, qkv_width, case.H, std=case.H**-0.5),
        "qkv_bias": normal(layers, qkv_width, std=0.3) if case.biases else None,
        "q_norm": normal(layers, case.D, std=0.2, mean=1.5) if case.qk_norm else None,
        "k_norm": normal(layers, case.D, std=0.2, mean=1.0) if case.qk_norm else None,
        "o_weight": normal(layers, case.H, q_heads * case.D, std=(q_heads * case.D) ** -0.5),
        "o_bias": normal(layers, case.H, std=0.3) if case.biases else None,
        "post_norm": normal(layers, case.H, std=0.1, mean=1.0),
        "gate_up_weight": normal(layers, 2 * case.I, case.H, std=case.H**-0.5),
        "down_weight": normal(layers, case.H, case.I, std=case.I**-0.5),
        "final_norm": normal(case.H, std=0.1, mean=1.0),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=1).to(device, torch.float32),
        "windows": list(case.windows),
        "causal": list(case.causal),
        "eps": 1e-6,
        "softmax_scale": case.scale,
    }


def outputs(inputs: Inputs) -> dict[str, torch.Tensor]:
    """A poisoned output and a poisoned workspace of exactly the size asked for."""
    (batch, block), hidden = inputs["block_ids"].shape, inputs["embed_weight"].shape[1]
    _, kv_heads, head_dim = inputs["k_caches"][0].shape
    q_heads = inputs["qkv_weight"].shape[1] // head_dim - 2 * kv_heads
    size = draft_forward_workspace(batch, block, hidden, inputs["down_weight"].shape[2], q_heads, kv_heads, head_dim)
    out = inputs["embed_weight"].new_full((batch * block, hidden), float("nan"))
    return {"out": out, "workspace": torch.full((size,), 255, dtype=torch.uint8, device=out.device)}


def run(inputs: Inputs) -> torch.Tensor:
    """The out form on poisoned memory (0xffff is a NaN in bf16, 0xffffffff in float32); inputs stay as they were."""
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    result = draft_forward(**inputs, **outputs(inputs))
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{name} was written"
    return result


def check(inputs: Inputs) -> None:
    """max |out - ref32| <= 2 max |ref_bf16 - ref32| + atol, bf16; close to float64 in float32."""
    out = run(inputs)
    if out.dtype == torch.float32:
        exact = reference.draft_forward(**inputs, dtype=torch.float64).float()
        torch.testing.assert_close(out, exact, atol=2e-5, rtol=0)
        return
    exact = reference.draft_forward(**inputs, dtype=torch.float32)
    rounding = (reference.draft_forward(**inputs, dtype=torch.bfloat16).float() - exact).abs().max().item()
    error = (out.float() - exact).abs().max().item()
    assert error <= 2 * rounding + 4e-3, f"error {error}, rounding alone {rounding}"


CASES = [
    Case(),
    Case(contexts=(5,), T=7, index=torch.int32),
    Case(contexts=(70, 3), T=10, heads=(3, 1), index=torch.int32),
    Case(contexts=(64, 63, 65, 128), T=8, heads=(8, 2), D=128),
    Case(contexts=(200, 130), T=16, heads=(9, 1)),
    Case(contexts=(33,), T=16, heads=(16, 1), D=32),
    Case(contexts=(33, 90), T=32, heads=(6, 2), D=96),
    Case(contexts=(100,), T=16, heads=(4, 2), D=256),
    Case(contexts=(150, 40), T=16, windows=(5, 33), causal=(0, 1)),
    Case(contexts=(90, 2), T=8, windows=(0, 0), causal=(1, 0)),
    Case(contexts=(4096,), T=16, windows=(512, 0), D=128),
    Case(contexts=(4096, 17), T=8, windows=(4096, 1024)),
    Case(contexts=(40, 50), T=7, rotary=32),
    Case(contexts=(40, 50), T=7, rotary=0, scale=0.3),
    Case(contexts=(128, 20), T=8, qk_norm=False, biases=True, windows=(64, 0), heads=(64, 8)),
    Case(contexts=(21,) * 3, H=576, I=1536, heads=(9, 3), windows=(0,), causal=(0,)),
    Case(contexts=(30,), H=2880, I=88, heads=(8, 1), T=8, windows=(128,), causal=(0,), qk_norm=False, biases=True),
    Case(contexts=(40,), H=4096, I=24, heads=(4, 1), D=128, windows=(0,), causal=(0,)),
    Case(contexts=(40,), H=5120, I=16, heads=(2, 2), D=128, T=8, windows=(0,), causal=(0,)),
    Case(contexts=tuple(range(64)), H=64, I=32, heads=(2, 1), T=7, windows=(0,), causal=(0,)),
    Case(contexts=tuple(b % 19 for b in range(256)), H=64, I=32, heads=(4, 1), T=10, windows=(16,), causal=(1,)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16_matches_reference(case: Case, device: str, rng: torch.Generator) -> None:
    check(make_inputs(case, rng, device, torch.bfloat16))


@pytest.mark.parametrize("case", [case for case in CASES if case.H <= 576], ids=str)
def test_float32_matches_reference(case: Case, rng: torch.Generator) -> None:
    check(make_inputs(case, rng, "cpu", torch.float32))


CUDA_CASES = [
    Case(contexts=tuple(range(0, 512, 2)), H=512, I=256, heads=(4, 2), T=8, windows=(0,), causal=(0,)),
    Case(contexts=(131072, 3), heads=(8, 1), D=128, windows=(0,), causal=(0,)),
    # Every tile of the GEMMs, with K whole and cut: 16, 64, 128 and 192 rows.
    Case(contexts=(40,), H=4096, I=12288, heads=(8, 1), D=128, windows=(0,), causal=(0,)),
    Case(contexts=(40, 1, 7, 900), H=4096, I=1024, heads=(32, 8), D=128, windows=(0,), causal=(0,)),
    Case(contexts=(100,) * 8, H=2048, I=1024, heads=(16, 8), D=128, windows=(0,), causal=(0,), biases=True),
    Case(contexts=(700,) * 12, H=1024, I=3072, heads=(32, 8), D=128),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_large_cases_on_cuda(case: Case, rng: torch.Generator) -> None:
    """256 requests, one context of 131072 tokens, and sizes of real models."""
    check(make_inputs(case, rng, "cuda", torch.bfloat16))


@pytest.mark.parametrize("window", [0, 1, 4, 70])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("context", [0, 1, 63, 64, 65, 129])
def test_uniform_attention_shows_the_visible_keys(
    context: int, causal: int, window: int, device: str, rng: torch.Generator
) -> None:
    """Queries of zero weigh all visible keys equally, so one key too many or too few changes the mean by far more than
    rounding does."""
    case = Case(contexts=(context, 7), T=8, H=64, heads=(1, 1), windows=(window,), causal=(causal,))
    inputs = make_inputs(case, rng, device, torch.bfloat16)
    inputs["q_norm"].zero_()
    inputs["embed_weight"].mul_(1e-3)  # the residual stream is the attention's output
    inputs["o_weight"].copy_(torch.eye(64))
    inputs["down_weight"].zero_()
    inputs["final_norm"].fill_(1.0)
    out = run(inputs).float()
    exact = reference.draft_forward(**inputs, dtype=torch.float32)
    torch.testing.assert_close(out, exact, atol=0.05, rtol=0.02)


def test_requests_do_not_touch_each_other(device: str, rng: torch.Generator) -> None:
    """The rows of a request are the same alone, in any order, and beside other requests."""
    inputs = make_inputs(Case(contexts=(70, 0, 200, 9), D=128), rng, device, torch.bfloat16)
    per_request = ("block_ids", "positions", "prefix_lens", "req_pool_indices")
    whole = run(inputs).view(4, 16, -1)
    order = torch.tensor([2, 0, 3, 1], device=device)
    permuted = run({**inputs, **{name: inputs[name][order] for name in per_request}}).view(4, 16, -1)
    assert torch.equal(permuted, whole[order])
    for b in range(4):
        alone = run({**inputs, **{name: inputs[name][b : b + 1] for name in per_request}})
        # Another batch size is another tiling: sums may round differently.
        torch.testing.assert_close(alone.float(), whole[b].float(), atol=0.1, rtol=0)


def test_block_sees_its_context(device: str, rng: torch.Generator) -> None:
    """A changed context value changes the rows of its own request only."""
    inputs = make_inputs(Case(contexts=(20, 30)), rng, device, torch.bfloat16)
    before = run(inputs)
    slot = inputs["req_to_token"][inputs["req_pool_indices"][1], 29]
    inputs["v_caches"][0][slot] += 30.0
    after = run(inputs)
    assert torch.equal(before[:16], after[:16])
    assert not torch.equal(before[16:], after[16:])


@pytest.mark.parametrize("block_size", [7, 16])
def test_empty_batch(block_size: int, device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=(), T=block_size), rng, device, torch.bfloat16)
    assert draft_forward(**inputs).shape == (0, 128)
    assert run(inputs).shape == (0, 128)


def test_functional_form_equals_out_form(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(), rng, device, torch.bfloat16)
    assert torch.equal(draft_forward(**inputs), run(inputs))


def test_strided_inputs(device: str, rng: torch.Generator) -> None:
    """Index tensors may have any strides, caches may be slices of a wider pool."""
    inputs = make_inputs(Case(contexts=(30, 66)), rng, device, torch.bfloat16)
    expected = run(inputs)
    strided = dict(inputs)
    for name in ("block_ids", "positions", "req_to_token"):
        strided[name] = inputs[name].t().contiguous().t()
    for name in ("k_caches", "v_caches"):
        pools = [torch.cat((cache.flatten(1), torch.full_like(cache.flatten(1), 3.0)), dim=1) for cache in inputs[name]]
        strided[name] = [pool[:, : pool.shape[1] // 2].unflatten(1, (2, 64)) for pool in pools]
    assert torch.equal(run(strided), expected)


def test_opcheck(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=(5, 12), T=7, H=64), rng, device, torch.bfloat16)
    arguments = tuple(inputs.values())
    torch.library.opcheck(torch.ops.dflash.draft_forward.default, arguments)
    torch.library.opcheck(torch.ops.dflash.draft_forward.out, arguments, outputs(inputs))


@pytest.mark.gpu
def test_graph_replay_equals_eager(rng: torch.Generator) -> None:
    """Captured once, replayed on new ids, positions, lengths and contexts."""
    case = Case(contexts=(300, 1, 64), D=128, windows=(100, 0))
    first, second = (make_inputs(case, rng, "cuda", torch.bfloat16) for _ in range(2))
    second = {**second, **{name: first[name] for name in WEIGHTS}}
    second["prefix_lens"], second["positions"] = first["prefix_lens"] // 2, first["positions"] - 1
    second["windows"] = [0, 0]  # half the prefix is outside the windows' poison
    first["windows"] = [0, 0]
    for inputs in (first, second):
        for cache in (*inputs["k_caches"], *inputs["v_caches"]):
            cache.nan_to_num_(nan=0.25)
    held = outputs(first)
    graph = torch.cuda.CUDAGraph()
    draft_forward(**first, **held)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        draft_forward(**first, **held)
    for inputs in (first, second):
        expected = run(inputs)
        for name in ("block_ids", "positions", "prefix_lens", "req_pool_indices", "req_to_token"):
            first[name].copy_(inputs[name])
        for name in ("k_caches", "v_caches"):
            for cache, new in zip(first[name], inputs[name], strict=True):
                cache.copy_(new)
        held["out"].fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(held["out"], expected)


def _bad(inputs: Inputs, **changes: Any) -> Inputs:
    return {**inputs, **changes}


def error_cases(i: Inputs) -> list[tuple[Inputs, str]]:
    """Changed arguments and what the error must name."""
    cut = {name: i[name][:, :-1] for name in ("qkv_weight", "gate_up_weight", "input_norm", "post_norm", "o_weight")}
    wrong_dtype = {name: i[name].double() for name in (*WEIGHTS, "cos_sin") if i[name] is not None}
    bad: list[tuple[Inputs, str]] = [
        *((_bad(i, **{name: value}), name) for name, value in cut.items()),
        *((_bad(i, **{name: value}), name) for name, value in wrong_dtype.items()),
        *((_bad(i, **{name: i[name].float()}), name) for name in ("block_ids", "positions", "prefix_lens")),
        *((_bad(i, **{name: i[name].float()}), name) for name in ("req_pool_indices", "req_to_token")),
        (_bad(i, block_ids=i["block_ids"][0]), r"block_ids must have shape \[\*, \*\]"),
        (_bad(i, block_ids=i["block_ids"].repeat(1, 5)), "block_ids must have 1..32 columns"),
        (_bad(i, positions=i["positions"][:, 1:]), r"positions must have shape \[2, 7\], got \[2, 6\]"),
        (_bad(i, prefix_lens=i["prefix_lens"][1:]), "prefix_lens must have shape"),
        (_bad(i, req_pool_indices=i["req_pool_indices"][1:]), "req_pool_indices must have shape"),
        (_bad(i, req_to_token=i["req_to_token"][0]), "req_to_token must have shape"),
        (_bad(i, k_caches=i["k_caches"][1:]), r"k_caches must have one entry a layer \(2\), got 1"),
        (_bad(i, v_caches=i["v_caches"][1:]), "v_caches must have one entry a layer"),
        (_bad(i, windows=[0]), "windows must have one entry a layer"),
        (_bad(i, causal=[0]), "causal must have one entry a layer"),
        (_bad(i, windows=[0, -1]), r"windows\[1\] must be at least 0, got -1"),
        (_bad(i, causal=[2, 0]), r"causal\[0\] must be 0 or 1, got 2"),
        (_bad(i, k_caches=[c[..., :48] for c in i["k_caches"]]), r"k_caches\[0\].size\(2\) must be a head size"),
        (_bad(i, v_caches=[c[:, :1] for c in i["v_caches"]]), r"v_caches\[0\] must have shape"),
        (_bad(i, v_caches=[c.float() for c in i["v_caches"]]), r"v_caches\[0\] must have dtype"),
        (
            _bad(i, k_caches=[c.transpose(1, 2).contiguous().transpose(1, 2) for c in i["k_caches"]]),
            r"k_caches\[0\] must have contiguous slots",
        ),
        (_bad(i, down_weight=i["down_weight"][:, :, :60]), r"down_weight.size\(2\) must be a multiple of 8, got 60"),
        (_bad(i, down_weight=i["down_weight"][:, :, :56]), "gate_up_weight must have shape"),
        (_bad(i, o_weight=i["o_weight"].transpose(1, 2).contiguous().transpose(1, 2)), "o_weight must be contiguous"),
        (_bad(i, q_norm=i["q_norm"][:, 1:]), "q_norm must have shape"),
        (_bad(i, qkv_bias=i["q_norm"]), "qkv_bias must have shape"),
        (_bad(i, o_bias=i["q_norm"]), "o_bias must have shape"),
        (_bad(i, final_norm=i["final_norm"][1:]), "final_norm must have shape"),
        (_bad(i, cos_sin=i["cos_sin"][:, :63].contiguous()), r"cos_sin.size\(1\) must be even"),
        (_bad(i, cos_sin=i["cos_sin"].repeat(1, 2)), r"cos_sin.size\(1\) must be even and at most the head size 64"),
        (_bad(i, eps=-1.0), "eps must be at least 0"),
        (_bad(i, softmax_scale=float("nan")), "softmax_scale must be finite"),
    ]
    return bad


def test_errors_name_the_argument_and_leave_the_output(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=(5, 12), T=7), rng, device, torch.bfloat16)
    held = outputs(inputs)
    for bad, match in error_cases(inputs):
        with pytest.raises(ValueError, match=f"^dflash::draft_forward: {match}"):
            draft_forward(**bad, **held)
        with pytest.raises(ValueError, match=f"^dflash::draft_forward: {match}"):
            draft_forward(**bad)
    assert held["out"].isnan().all()


def test_slots_may_not_lie_too_far_apart(rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=(1,), T=3), rng, "cpu", torch.bfloat16)
    cache = inputs["k_caches"][0]
    shape, stride = (2, *cache.shape[1:]), 1 << 31
    far = torch.empty(stride + cache[0].numel(), dtype=cache.dtype).as_strided(shape, (stride, *cache.stride()[1:]))
    bad = _bad(inputs, k_caches=[far] + inputs["k_caches"][1:])  # address space only, never touched
    with pytest.raises(
        ValueError, match=r"k_caches\[0\] must have slots less than 2\^31 elements apart, got 2147483648"
    ):
        draft_forward(**bad)


def test_output_errors(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=(5, 12), T=7), rng, device, torch.bfloat16)
    held = outputs(inputs)
    size = held["workspace"].numel()
    for name, value, match in [
        ("out", held["out"][1:], r"out must have shape \[14, 128\]"),
        ("out", held["out"].float(), "out must have dtype bfloat16, got float32"),
        ("out", held["out"].t().contiguous().t(), "out must be contiguous"),
        ("workspace", held["workspace"][1:], f"workspace must have at least {size} bytes, got {size - 1}"),
        ("workspace", held["workspace"].char(), "workspace must have dtype uint8"),
        ("workspace", None, "workspace must be given together with out"),
        ("out", None, "out must be given together with workspace"),
    ]:
        with pytest.raises(ValueError, match=f"^dflash::draft_forward: {match}"):
            draft_forward(**inputs, **{**held, name: value})
    assert held["out"].isnan().all()


@pytest.mark.gpu
def test_mixed_devices(rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=(5, 12), T=7), rng, "cuda", torch.bfloat16)
    held = outputs(inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=r"^dflash::draft_forward: \w+ must be on "):
                draft_forward(**{**inputs, name: value.cpu()}, **held)
    for name in ("k_caches", "v_caches"):
        mixed = [inputs[name][0], inputs[name][1].cpu()]
        with pytest.raises(ValueError, match=rf"^dflash::draft_forward: {name}\[1\] must be on cuda:0, got cpu"):
            draft_forward(**{**inputs, name: mixed}, **held)
    assert held["out"].isnan().all()


@pytest.mark.parametrize("debug", [False, True])
def test_index_range_checks(debug: bool, device: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU always looks at the values; CUDA under DFLASH_DEBUG=1, and stays inside all memory without."""
    monkeypatch.setenv("DFLASH_DEBUG", "1" if debug else "0")
    inputs = make_inputs(Case(contexts=(5, 12), T=7, index=torch.int32), rng, device, torch.bfloat16)
    run(inputs)
    slots = inputs["k_caches"][0].shape[0]
    for name, where, value, match in [
        ("block_ids", (1, 3), 97, r"block_ids must be in \[0, 97\), got 97"),
        ("block_ids", (0, 0), -1, r"block_ids must be in \[0, 97\), got -1"),
        ("positions", (1, 6), 10**6, r"positions must be in \[0, 76\), got 1000000"),
        ("prefix_lens", (1,), 53, r"prefix_lens must be in \[0, 53\), got 53"),
        ("prefix_lens", (0,), -4, r"prefix_lens must be in \[0, 53\), got -4"),
        ("req_pool_indices", (0,), 4, r"req_pool_indices must be in \[0, 4\), got 4"),
        ("req_to_token", (int(inputs["req_pool_indices"][1]), 11), slots, rf"req_to_token must be in \[0, {slots}\)"),
    ]:
        bad = {**inputs, name: inputs[name].clone()}
        bad[name][where] = value
        if device == "cpu" or debug:
            held = outputs(bad)
            with pytest.raises(ValueError, match=f"^dflash::draft_forward: {match}"):
                draft_forward(**bad, **held)
            assert held["out"].isnan().all()
        else:
            run(bad)
            torch.cuda.synchronize()


@pytest.mark.parametrize("heads", [(32, 8, 128), (4, 1, 128), (9, 3, 64), (64, 64, 64), (600, 300, 32)])
def test_workspace_of_a_batch_serves_smaller_ones(heads: tuple[int, int, int]) -> None:
    sizes = [draft_forward_workspace(batch, 16, 64, 8, *heads) for batch in range(300)]
    assert sizes == sorted(sizes)
    with pytest.raises(ValueError, match="^dflash::draft_forward_workspace: head_dim must be at least 1, got 0"):
        draft_forward_workspace(1, 16, 4096, 12288, 32, 8, 0)
    with pytest.raises(ValueError, match=r"num_q_heads must be a multiple of num_kv_heads \(8\), got 4"):
        draft_forward_workspace(1, 16, 4096, 12288, 4, 8, 128)

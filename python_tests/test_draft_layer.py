"""draft_attention and draft_mlp: chained they are draft_forward, and the parts of shards add up to the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_draft import CASES, Case, Inputs, make_inputs

from dflash_kernels.model.shard import shard_heads, shard_range
from dflash_kernels.ops import draft_attention, draft_forward_workspace, draft_mlp
from dflash_kernels.reference import draft as reference

INDICES = ("positions", "prefix_lens", "req_pool_indices", "req_to_token")


def of(stack: torch.Tensor | None, layer: int) -> torch.Tensor | None:
    return None if stack is None else stack[layer]


def attention_arguments(inputs: Inputs, layer: int) -> dict[str, Any]:
    """Of draft_attention, for a layer of draft_forward's arguments, without x."""
    stacks = ("input_norm", "qkv_weight", "qkv_bias", "q_norm", "k_norm", "o_weight", "o_bias")
    return {
        **{name: inputs[name] for name in (*INDICES, "cos_sin", "eps", "softmax_scale")},
        **{name: of(inputs[name], layer) for name in stacks},
        "k_cache": inputs["k_caches"][layer],
        "v_cache": inputs["v_caches"][layer],
        "window": inputs["windows"][layer],
        "causal": bool(inputs["causal"][layer]),
    }


def mlp_arguments(inputs: Inputs, layer: int) -> dict[str, Any]:
    names = ("post_norm", "gate_up_weight", "down_weight")
    return {**{name: inputs[name][layer] for name in names}, "eps": inputs["eps"]}


def workspace(inputs: Inputs) -> torch.Tensor:
    """Poisoned, of the size that draft_forward asks for."""
    (batch, block), hidden = inputs["block_ids"].shape, inputs["embed_weight"].shape[1]
    _, kv_heads, head_dim = inputs["k_caches"][0].shape
    q_heads = inputs["qkv_weight"].shape[1] // head_dim - 2 * kv_heads
    size = draft_forward_workspace(batch, block, hidden, inputs["down_weight"].shape[2], q_heads, kv_heads, head_dim)
    return torch.full((size,), 255, dtype=torch.uint8, device=inputs["embed_weight"].device)


def cut(inputs: Inputs, rank: int, world: int) -> Inputs:
    """A rank's share of the weights and caches."""
    _, kv_heads, dim = inputs["k_caches"][0].shape
    q_heads = inputs["qkv_weight"].shape[1] // dim - 2 * kv_heads
    heads = shard_heads(q_heads, kv_heads, rank, world)
    i0, i1 = shard_range(inputs["down_weight"].shape[2], rank, world, "intermediate_size", unit=8)
    own = list(heads.kv_heads)

    def rows(stack: torch.Tensor | None) -> torch.Tensor | None:
        if stack is None:
            return None
        q, k, v = stack.unflatten(1, (-1, dim)).split((q_heads, kv_heads, kv_heads), dim=1)
        return torch.cat((q[:, heads.q0 : heads.q1], k[:, own], v[:, own]), dim=1).flatten(1, 2).contiguous()

    gate, up = inputs["gate_up_weight"].chunk(2, dim=1)
    return {
        **inputs,
        "k_caches": [cache[:, own].contiguous() for cache in inputs["k_caches"]],
        "v_caches": [cache[:, own].contiguous() for cache in inputs["v_caches"]],
        "qkv_weight": rows(inputs["qkv_weight"]),
        "qkv_bias": rows(inputs["qkv_bias"]),
        "o_weight": inputs["o_weight"][:, :, heads.q0 * dim : heads.q1 * dim].contiguous(),
        "o_bias": inputs["o_bias"] if rank == 0 else None,
        "gate_up_weight": torch.cat((gate[:, i0:i1], up[:, i0:i1]), dim=1).contiguous(),
        "down_weight": inputs["down_weight"][:, :, i0:i1].contiguous(),
    }


def sharded_forward(inputs: Inputs, world: int) -> torch.Tensor:
    """draft_forward from its halves, every rank's part in poisoned memory, added up in float32."""
    shards = [cut(inputs, rank, world) for rank in range(world)]
    scratch = [workspace(shard) for shard in shards]
    x = F.embedding(inputs["block_ids"].flatten().long(), inputs["embed_weight"])
    for layer in range(len(inputs["windows"])):
        for half, arguments in ((draft_attention, attention_arguments), (draft_mlp, mlp_arguments)):
            parts = [
                half(
                    x,
                    **arguments(shard, layer),
                    add_x=rank == 0,
                    out=torch.full_like(x, float("nan")),
                    workspace=scratch[rank],
                )
                for rank, shard in enumerate(shards)
            ]
            x = torch.stack(parts).float().sum(0).to(x.dtype)
    return F.rms_norm(x.float(), (x.shape[1],), inputs["final_norm"].float(), inputs["eps"]).to(x.dtype)


def check(inputs: Inputs, world: int) -> None:
    """max |out - ref32| <= 2 max |ref_bf16 - ref32| + atol; a split sum rounds each part once more."""
    out = sharded_forward(inputs, world)
    if out.dtype == torch.float32:
        exact = reference.draft_forward(**inputs, dtype=torch.float64).float()
        torch.testing.assert_close(out, exact, atol=2e-5, rtol=0)
        return
    exact = reference.draft_forward(**inputs, dtype=torch.float32)
    rounding = (reference.draft_forward(**inputs, dtype=torch.bfloat16).float() - exact).abs().max().item()
    error = (out.float() - exact).abs().max().item()
    assert error <= (2 if world == 1 else 3) * rounding + 4e-3, f"error {error}, rounding alone {rounding}"


def bf16_matches_reference(case: Case, world: int, device: str, rng: torch.Generator) -> None:
    check(make_inputs(case, rng, device, torch.bfloat16), world)


SMALL = [case for case in CASES if max(case.contexts, default=0) < 300]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_chain_matches_reference(case: Case, device: str, rng: torch.Generator) -> None:
    bf16_matches_reference(case, 1, device, rng)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    "case",
    [
        Case(contexts=(33, 5), heads=(9, 3), I=96),
        Case(contexts=(20,), heads=(4, 1), D=128, biases=True),
        Case(contexts=(70, 3), T=7, heads=(16, 4), windows=(20, 0), causal=(0, 1)),
    ],
    ids=str,
)
def test_shards_add_up(case: Case, world: int, device: str, rng: torch.Generator) -> None:
    bf16_matches_reference(case, world, device, rng)


@pytest.mark.parametrize("world", [1, 3])
def test_float32_matches_reference(world: int, rng: torch.Generator) -> None:
    check(make_inputs(Case(heads=(9, 3), I=96, biases=True), rng, "cpu", torch.float32), world)


def test_out_may_be_x(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(), rng, device, torch.bfloat16)
    for half, arguments in ((draft_attention, attention_arguments), (draft_mlp, mlp_arguments)):
        for add_x in (True, False):
            x = torch.randn(48, 128, generator=rng).to(device, torch.bfloat16)
            want = half(x, **arguments(inputs, 1), add_x=add_x)
            assert half(x, **arguments(inputs, 1), add_x=add_x, out=x, workspace=workspace(inputs)) is x
            assert torch.equal(x, want)


def test_empty_batch(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=()), rng, device, torch.bfloat16)
    x = torch.empty(0, 128, dtype=torch.bfloat16, device=device)
    assert draft_attention(x, **attention_arguments(inputs, 0)).shape == (0, 128)
    assert draft_mlp(x, **mlp_arguments(inputs, 0)).shape == (0, 128)


def test_opcheck(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=(5, 12), T=7, H=64), rng, device, torch.bfloat16)
    x = torch.randn(14, 64, generator=rng).to(device, torch.bfloat16)
    dflash = torch.ops.dflash
    for op, half in ((dflash.draft_attention, attention_arguments), (dflash.draft_mlp, mlp_arguments)):
        named = {"x": x, **half(inputs, 0), "add_x": False}
        arguments = tuple(named[argument.name] for argument in op.default._schema.arguments)
        torch.library.opcheck(op.default, arguments)
        torch.library.opcheck(op.out, arguments, {"out": torch.empty_like(x), "workspace": workspace(inputs)})


@pytest.mark.gpu
def test_graph_replay_equals_eager(rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=(300, 1, 64), D=128), rng, "cuda", torch.bfloat16)
    x = torch.randn(48, 128, generator=rng).to("cuda", torch.bfloat16)
    scratch, out = workspace(inputs), torch.empty_like(x)

    def run() -> None:
        draft_attention(x, **attention_arguments(inputs, 0), out=out, workspace=scratch)
        draft_mlp(out, **mlp_arguments(inputs, 0), out=out, workspace=scratch)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    x.copy_(torch.randn(48, 128, generator=rng))
    run()
    want = out.clone()
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, want)


def bad_arguments(device: str) -> list[tuple[str, dict[str, Any], str]]:
    def like(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    return [
        ("draft_attention", {"x": like(47, 128)}, r"x must have shape \[48, 128\], got \[47, 128\]"),
        ("draft_attention", {"x": like(48, 128, dtype=torch.float16)}, "x must have dtype bfloat16"),
        ("draft_attention", {"k_cache": like(9, 2, 64)[:, :, :48]}, r"k_cache.size\(2\) must be a head size"),
        ("draft_attention", {"v_cache": like(9, 3, 64)}, r"v_cache must have shape \[\*, 2, 64\], got \[9, 3, 64\]"),
        ("draft_attention", {"qkv_weight": like(320, 128)}, r"qkv_weight.size\(0\) must be \(Hq \+ 2 \* Hkv\) \* D"),
        ("draft_attention", {"o_weight": like(128, 192)}, r"o_weight must have shape \[128, 256\], got \[128, 192\]"),
        ("draft_attention", {"window": -1}, "window must be at least 0, got -1"),
        ("draft_attention", {"eps": -1.0}, "eps must be at least 0, got -1"),
        ("draft_attention", {"out": like(48, 128)}, "workspace must be given together with out, got None"),
        ("draft_mlp", {"down_weight": like(128, 60)}, r"down_weight.size\(1\) must be a multiple of 8, got 60"),
        ("draft_mlp", {"gate_up_weight": like(120, 128)}, r"gate_up_weight must have shape \[128, 128\]"),
        ("draft_mlp", {"post_norm": like(64)}, r"post_norm must have shape \[128\], got \[64\]"),
        (
            "draft_mlp",
            {"out": like(48, 128), "workspace": like(7, dtype=torch.uint8)},
            "workspace must have at least 18432 bytes, got 7",
        ),
    ]


@pytest.mark.parametrize("index", range(13))
def test_errors_name_the_argument(index: int, device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(), rng, device, torch.bfloat16)
    op, changes, message = bad_arguments(device)[index]
    half, arguments = {
        "draft_attention": (draft_attention, attention_arguments),
        "draft_mlp": (draft_mlp, mlp_arguments),
    }[op]
    x = torch.zeros(48, 128, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match=f"dflash::{op}: {message}"):
        half(**{"x": x, **arguments(inputs, 0), **changes})


def test_values_out_of_range_are_named_on_the_cpu(rng: torch.Generator) -> None:
    inputs = make_inputs(Case(), rng, "cpu", torch.bfloat16)
    x = torch.zeros(48, 128, dtype=torch.bfloat16)
    for name, value in (("positions", -1), ("positions", 10**6), ("prefix_lens", 10**6), ("req_pool_indices", 99)):
        wrong = inputs[name].clone()
        wrong.view(-1)[0] = value
        with pytest.raises(ValueError, match=rf"draft_attention: {name} must be in \[0, \d+\), got {value}"):
            draft_attention(x, **{**attention_arguments(inputs, 0), name: wrong})

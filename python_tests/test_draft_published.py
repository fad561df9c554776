"""draft_forward against the method's published model code, with random weights, in float32 on the CPU.

The published model gets the target's hidden states and projects them itself; here the reference path of injection
(fc, norm, K and V projection, K norm, rotation) fills a paged cache first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dflash_kernels.ops import draft_forward

pytest.importorskip("dflash")
pytest.importorskip("transformers")

NUM_CONTEXT_FEATURES = 3


def build_model(rng: torch.Generator, **overrides: Any) -> Any:
    """A small published drafter with random weights, norms included."""
    from dflash.model import DFlashDraftModel
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Config

    settings = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 101,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "max_position_embeddings": 512,
        "attention_bias": False,
        "num_target_layers": 12,
        "layer_types": ["full_attention"] * 3,
        "sliding_window": None,
        "block_size": 8,
        "dflash_config": {"mask_token_id": 5, "target_layer_ids": [1, 5, 9][:NUM_CONTEXT_FEATURES]},
    }
    config = Qwen3Config(**{**settings, **overrides})
    config._attn_implementation = "sdpa"
    model = DFlashDraftModel(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            parameter.copy_(1.0 + 0.2 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)
    return model


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def stack(model: Any, *names: str) -> torch.Tensor:
    """[L, ...] of one parameter of all layers, or of several, one below the other."""

    def of_layer(layer: Any) -> torch.Tensor:
        return torch.cat([layer.get_parameter(name) for name in names]).detach()

    return torch.stack([of_layer(layer) for layer in model.layers])


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="full"),
        pytest.param({"is_causal": True}, id="causal"),
        pytest.param(
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 11},
            id="sliding-causal",
        ),
        pytest.param(
            {"layer_types": ["sliding_attention"] * 3, "sliding_window": 6, "is_causal": False}, id="sliding-both-sides"
        ),
        pytest.param({"attention_bias": True, "num_attention_heads": 8, "num_key_value_heads": 1}, id="biases"),
    ],
)
@pytest.mark.parametrize("context", [0, 1, 40])
@torch.no_grad()
def test_equals_the_published_model(overrides: dict[str, Any], context: int, rng: torch.Generator) -> None:
    model = build_model(rng, **overrides)
    config = model.config
    block, hidden, eps = model.block_size, config.hidden_size, config.rms_norm_eps
    embed_weight = torch.randn(config.vocab_size, hidden, generator=rng)
    ids = torch.randint(0, config.vocab_size, (1, block), generator=rng)
    taps = torch.randn(1, context, NUM_CONTEXT_FEATURES * hidden, generator=rng)
    positions = torch.arange(context + block)[None]
    published = model(
        position_ids=positions, noise_embedding=embed_weight[ids], target_hidden=taps, past_key_values=None
    )[0, -block:]

    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    angles = torch.arange(context + block)[:, None] * frequency
    cos, sin = angles[:context, None].cos(), angles[:context, None].sin()
    fused = rmsnorm(taps[0] @ model.fc.weight.T, model.hidden_norm.weight, eps)
    slots = torch.randperm(context + 9, generator=rng)[:context]
    shape = (context + 9, config.num_key_value_heads, config.head_dim)
    k_caches, v_caches = [], []
    for layer in model.layers:
        attention = layer.self_attn
        k, v = (projection(fused).view(context, *shape[1:]) for projection in (attention.k_proj, attention.v_proj))
        k_cache, v_cache = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
        k_cache[slots] = rotate_half(rmsnorm(k, attention.k_norm.weight, eps), cos, sin)
        v_cache[slots] = v
        k_caches.append(k_cache)
        v_caches.append(v_cache)

    attentions = [layer.self_attn for layer in model.layers]
    projections = [f"self_attn.{name}_proj" for name in "qkv"]
    biased = config.attention_bias
    ours = draft_forward(
        ids,
        positions[:, -block:],
        torch.tensor([context]),
        torch.tensor([0]),
        slots[None],
        k_caches,
        v_caches,
        embed_weight,
        stack(model, "input_layernorm.weight"),
        stack(model, *(f"{name}.weight" for name in projections)),
        stack(model, *(f"{name}.bias" for name in projections)) if biased else None,
        stack(model, "self_attn.q_norm.weight"),
        stack(model, "self_attn.k_norm.weight"),
        stack(model, "self_attn.o_proj.weight"),
        stack(model, "self_attn.o_proj.bias") if biased else None,
        stack(model, "post_attention_layernorm.weight"),
        stack(model, "mlp.gate_proj.weight", "mlp.up_proj.weight"),
        stack(model, "mlp.down_proj.weight"),
        model.norm.weight.detach(),
        torch.cat((angles.cos(), angles.sin()), dim=1),
        [attention.sliding_window or 0 for attention in attentions],
        [int(attention.is_causal) for attention in attentions],
        eps,
    )
    torch.testing.assert_close(ours, published, atol=3e-5, rtol=1e-4)

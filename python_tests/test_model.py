"""Drafter configs, rope tables, checkpoints and shards: what is read, and what is refused in so many words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dflash_kernels.model.checkpoint import load_weights
from dflash_kernels.model.config import load_config, parse_config
from dflash_kernels.model.drafter import Drafter, load_drafter
from dflash_kernels.model.weights import shard_weights

L, H, I, HQ, HKV, D, V, K = 3, 48, 64, 6, 2, 32, 97, 2  # noqa: E741 - the project's letters


def z_lab(**changes: Any) -> dict[str, Any]:
    """A small config as z-lab publishes them; a change to None removes a key."""
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": 8,
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": [0, 2]},
        "num_target_layers": 4,
        "hidden_size": H,
        "intermediate_size": I,
        "num_hidden_layers": L,
        "num_attention_heads": HQ,
        "num_key_value_heads": HKV,
        "head_dim": D,
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 20000.0,
        "rope_scaling": None,
        "vocab_size": V,
    } | changes
    return {key: value for key, value in config.items() if value is not None}


def speculators(**changes: Any) -> dict[str, Any]:
    """The same drafter in the layout of the speculators package."""
    inner = z_lab()
    for key in ("block_size", "dflash_config", "num_target_layers", "architectures", "rope_theta"):
        inner.pop(key)
    inner |= {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "block_size": 8,
        "mask_token_id": 3,
        "aux_hidden_state_layer_ids": [1, 3],
        "draft_vocab_size": V,
        "transformer_layer_config": inner,
    } | changes


def tensors(generator: torch.Generator, bias: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Random tensors of that drafter, by their published names."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (H, K * H), "hidden_norm.weight": (H,), "norm.weight": (H,)}
    for i in range(L):
        attention, mlp = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        rows = {"q": HQ * D, "k": HKV * D, "v": HKV * D}
        shapes |= {f"{attention}{p}_proj.weight": (n, H) for p, n in rows.items()}
        if bias:
            shapes |= {f"{attention}{p}_proj.bias": (n,) for p, n in rows.items()} | {f"{attention}o_proj.bias": (H,)}
        shapes |= {attention + "o_proj.weight": (H, HQ * D), mlp + "down_proj.weight": (H, I)}
        shapes |= {f"{attention}{p}_norm.weight": (D,) for p in "qk"}
        shapes |= {f"{mlp}{p}_proj.weight": (I, H) for p in ("gate", "up")}
        shapes |= {f"layers.{i}.{p}_layernorm.weight": (H,) for p in ("input", "post_attention")}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# -- configs --------------------------------------------------------------------------------------------------------


def test_both_layouts_say_the_same() -> None:
    ours, theirs = parse_config(z_lab()), parse_config(speculators())
    assert ours.target_layer_ids == (0, 2) and ours.layout == "z-lab" and theirs.layout == "speculators"
    assert ours.__dict__ | {"layout": ""} == theirs.__dict__ | {"layout": ""}


def test_values_lie_at_the_top_level_or_in_dflash_config() -> None:
    want = parse_config(z_lab())
    moved = z_lab(
        block_size=None,
        rope_theta=None,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        dflash_config={"mask_token_id": 3, "target_layer_ids": [0, 2], "block_size": 8},
    )
    assert parse_config(moved) == want
    assert parse_config(z_lab(dflash_config=None, mask_token_id=3, target_layer_ids=[0, 2])) == want
    assert parse_config(z_lab(block_size=None)).block_size == 16  # the published default
    spread = parse_config(z_lab(dflash_config={"mask_token_id": 3}, num_target_layers=36, num_hidden_layers=5))
    assert spread.target_layer_ids == (1, 9, 17, 25, 33)


@pytest.mark.parametrize(
    ("changes", "windows", "causal"),
    [
        ({}, (0, 0, 0), (False, False, False)),
        ({"is_causal": True}, (0, 0, 0), (True, True, True)),
        # A sliding layer is causal unless is_causal says otherwise.
        ({"layer_types": ["sliding_attention"] * 2 + ["full_attention"], "sliding_window": 32},
         (32, 32, 0), (True, True, False)),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": 32, "is_causal": False},
         (32, 32, 32), (False, False, False)),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, (0, 16, 16), (False, True, True)),
        ({"use_sliding_window": False, "sliding_window": 16}, (0, 0, 0), (False, False, False)),
    ],
)  # fmt: skip
def test_windows_and_causality(changes: dict[str, Any], windows: tuple[int, ...], causal: tuple[bool, ...]) -> None:
    config = parse_config(z_lab(**changes))
    assert (config.windows, config.causal) == (windows, causal)


def test_speculators_sliding_layers() -> None:
    inner = speculators()["transformer_layer_config"] | {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 20,
        "use_sliding_window": True,
    }
    assert parse_config(speculators(transformer_layer_config=inner)).causal == (True, False, False)
    free = parse_config(speculators(transformer_layer_config=inner, sliding_window_non_causal=True))
    assert free.windows == (20, 0, 0) and free.causal == (False, False, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size must be given, found none"),
        ({"hidden_size": "48"}, "hidden_size must be an integer of at least 1, got '48'"),
        ({"block_size": 1}, "block_size must be an integer of at least 2, got 1"),
        ({"dflash_config": {"target_layer_ids": [0]}}, "mask_token_id must be given"),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 1]}}, "distinct layer ids"),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": 1}}, "must be a list"),
        ({"num_key_value_heads": 4}, r"multiple of num_key_value_heads \(4\), got 6"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
        ({"layer_types": ["full_attention"]}, "one entry for each of 3 layers"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "got linear_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window must be given"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": 8, "use_sliding_window": False}, "must be true"),
        ({"rope_scaling": {"type": "longrope"}}, "default, linear, yarn, llama3, got longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor of rope type linear must be a positive number, got None"),
        ({"partial_rotary_factor": 0.35}, r"even and in 2..32 \(head_dim\), got 11"),
        ({"head_dim": 80}, r"head_dim must be one of \(32, 64, 96, 128, 256\), got 80"),
        ({"block_size": 33}, "block_size must be at most 32, got 33"),
    ],
)  # fmt: skip
def test_config_errors_name_key_expected_and_got(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(z_lab(**changes))


def test_unsupported_features_are_listed_together() -> None:
    raw = z_lab(
        num_experts=8,
        hidden_act="gelu",
        quantization_config={"quant_method": "fp8"},
        dflash_config={
            "mask_token_id": 3,
            "target_layer_ids": [0],
            "attention_sink_bias": True,
            "final_logit_softcapping": 30.0,
            "conv_kernel_size": 2,
            "selector_rank": 256,
        },
    )
    with pytest.raises(ValueError, match="not supported") as error:
        parse_config(raw, "x/config.json")
    for part in (
        "x/config.json",
        "experts",
        "gelu",
        "(fp8; compressed-tensors is read)",
        "sinks",
        "soft-capped",
        "convolutions",
        "selector",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="a vocabulary of its own \\(32 of 97 ids\\)"):
        parse_config(speculators(draft_vocab_size=32))
    with pytest.raises(ValueError, match="an embedding of its own"):
        parse_config(z_lab(has_embed_tokens=True))
    with pytest.raises(ValueError, match="gated attention; a norm for each tapped layer"):
        parse_config(z_lab(architectures=["DFlashLagunaForCausalLM"]))


def test_config_file_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold config.json, found none"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="could not be read as JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        load_config(tmp_path)


# -- rope -----------------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        YARN,
        YARN | {"attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        YARN | {"factor": 64.0, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"rope_type": "yarn", "factor": 2.0},
        LLAMA3,
    ],
    ids=lambda s: f"{s['rope_type']}{len(s)}",
)
def test_rope_tables_equal_transformers(scaling: dict[str, Any]) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    parameters = {"rope_theta": 150000.0, **scaling}
    theirs = modeling.Qwen3RotaryEmbedding(
        modeling.Qwen3Config(max_position_embeddings=512, rope_parameters=dict(parameters), **sizes)
    )
    cos, sin = theirs(torch.zeros(1), torch.arange(512)[None])
    raw = z_lab(rope_theta=None, rope_scaling=None, rope_parameters=parameters, **sizes)
    table = parse_config(raw).rope.cos_sin_table(512)
    torch.testing.assert_close(table[:, :32], cos[0, :, :32], atol=2e-6, rtol=0)
    torch.testing.assert_close(table[:, 32:], sin[0, :, :32], atol=2e-6, rtol=0)
    # The older spelling of the same thing.
    old = z_lab(rope_theta=150000.0, rope_scaling={"type": scaling["rope_type"], **scaling}, **sizes)
    assert torch.equal(parse_config(old).rope.cos_sin_table(512), table)


def test_partial_rotary_width() -> None:
    assert parse_config(z_lab(partial_rotary_factor=0.5)).rope.rotary_dim == 16
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [4]}
    assert parse_config(z_lab(rope_parameters=parameters)).rope.rotary_dim == 8
    # An explicit rope_dim is what was trained; the partial factor was only copied from the target.
    assert parse_config(z_lab(rope_parameters=parameters | {"rope_dim": D})).rope.rotary_dim == D
    assert parse_config(z_lab(partial_rotary_factor=0.5)).rope.cos_sin_table(7).shape == (7, 16)


# -- checkpoints ----------------------------------------------------------------------------------------------------


def test_weights_are_stacked_in_the_ops_order(tmp_path: Path, rng: torch.Generator) -> None:
    state = tensors(rng, bias=True)
    save(tmp_path, z_lab(attention_bias=True), state)
    config = load_config(tmp_path)
    w = load_weights(tmp_path, config)
    for i in range(L):
        attention = f"layers.{i}.self_attn."
        for suffix, qkv, kv in (("weight", w.qkv_weight, w.kv_weight), ("bias", w.qkv_bias, w.kv_bias)):
            q, k, v = (state[f"{attention}{p}_proj.{suffix}"] for p in "qkv")
            assert torch.equal(qkv[i], torch.cat([q, k, v])) and torch.equal(kv[i], torch.cat([k, v]))
        gate, up = (state[f"layers.{i}.mlp.{p}_proj.weight"] for p in ("gate", "up"))
        assert torch.equal(w.gate_up_weight[i], torch.cat([gate, up]))
        for stacked, name in (
            (w.o_weight, "self_attn.o_proj.weight"),
            (w.o_bias, "self_attn.o_proj.bias"),
            (w.q_norm, "self_attn.q_norm.weight"),
            (w.k_norm, "self_attn.k_norm.weight"),
            (w.input_norm, "input_layernorm.weight"),
            (w.post_norm, "post_attention_layernorm.weight"),
            (w.down_weight, "mlp.down_proj.weight"),
        ):
            assert torch.equal(stacked[i], state[f"layers.{i}.{name}"])
    assert torch.equal(w.fc_weight, state["fc.weight"]) and torch.equal(w.final_norm, state["norm.weight"])
    assert w.quantized is None
    assert all(t.is_contiguous() for name, t in vars(w).items() if name != "quantized")
    assert w.nbytes == sum(t.nbytes for t in state.values()) + w.kv_weight.nbytes + w.kv_bias.nbytes


def test_shards_prefixes_and_copies_of_the_target(tmp_path: Path, rng: torch.Generator) -> None:
    state = tensors(rng)
    want = load_weights(save(tmp_path / "one", z_lab(), state), parse_config(z_lab()))
    shards = tmp_path / "many"
    save(shards, z_lab(), {})
    (shards / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {f"model.{name}": f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in ("part-0.safetensors", "part-1.safetensors"):
        save_file({n: state[n.removeprefix("model.")] for n, s in weight_map.items() if s == shard}, shards / shard)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    copies = {"embed_tokens.weight": torch.zeros(V, H), "t2d": torch.zeros(V, dtype=torch.bool)}
    spec = save(tmp_path / "spec", speculators(), state | copies)
    for folder in (shards, spec):
        got = load_weights(folder, load_config(folder))
        assert all(a is b or torch.equal(a, b) for a, b in zip(vars(want).values(), vars(got).values(), strict=True))
    (shards / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names part-1.safetensors, which is not in"):
        load_weights(shards, parse_config(z_lab()))
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../part-0.safetensors"}}))
    with pytest.raises(ValueError, match="of the same directory"):
        load_weights(shards, parse_config(z_lab()))


def test_norms_and_biases_follow_the_file(tmp_path: Path, rng: torch.Generator) -> None:
    state = {n: t for n, t in tensors(rng, bias=True).items() if "q_norm" not in n and "o_proj.bias" not in n}
    save(tmp_path, z_lab(attention_bias=True), state)
    w = load_weights(tmp_path, load_config(tmp_path))
    assert w.q_norm is None and w.k_norm is not None and w.o_bias is None and w.qkv_bias is not None


def _drop(state: dict[str, Any]) -> None:
    del state["layers.1.mlp.up_proj.weight"]


def _reshape(state: dict[str, Any]) -> None:
    state["fc.weight"] = torch.zeros(H, 3 * H)


def _integers(state: dict[str, Any]) -> None:
    state["layers.2.self_attn.k_proj.weight"] = torch.zeros(HKV * D, H, dtype=torch.int8)


def _own_embedding(state: dict[str, Any]) -> None:
    state["embed_tokens.weight"] = torch.zeros(V, H)


def _second_generation(state: dict[str, Any]) -> None:
    state["layers.0.attention_conv.base_kernel"] = torch.zeros(2, 2, H)


def _stranger(state: dict[str, Any]) -> None:
    state["layers.3.mlp.up_proj.weight"] = torch.zeros(I, H)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "tensor layers.1.mlp.up_proj.weight must be in the checkpoint, found none"),
        (_reshape, r"model.safetensors: tensor fc.weight must have shape \[48, 96\], got \[48, 144\]"),
        (_integers, "tensor layers.2.self_attn.k_proj.weight must be bf16, fp32 or fp16, got I8"),
        (_own_embedding, "not supported: an embedding of its own .*embed_tokens.weight"),
        (_second_generation, r"grouped convolutions \(DFlash2\)"),
        (_stranger, r"unknown tensors \(1 tensors: layers.3.mlp.up_proj.weight\)"),
    ],
)
def test_checkpoint_errors(
    tmp_path: Path, rng: torch.Generator, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    state = tensors(rng)
    change(state)
    with pytest.raises(ValueError, match=message):
        load_drafter(save(tmp_path, z_lab(), state))


def test_damaged_and_pickled_files(tmp_path: Path, rng: torch.Generator) -> None:
    save(tmp_path, z_lab(), tensors(rng))
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"model.safetensors must be a whole safetensors file, got {length} bytes"):
            load_drafter(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="must hold model.safetensors or model.safetensors.index.json, found neither"):
        load_drafter(tmp_path)
    torch.save(tensors(rng), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: pickled checkpoints can run code and are refused"):
        load_drafter(tmp_path)


# -- dtypes and shards ----------------------------------------------------------------------------------------------


def test_dtypes(tmp_path: Path, rng: torch.Generator) -> None:
    for stored, wanted, got in (
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (torch.float16, None, torch.bfloat16),  # never fp16
        (torch.bfloat16, torch.float32, torch.float32),
    ):
        save(tmp_path, z_lab(), tensors(rng, dtype=stored))
        assert load_drafter(tmp_path, dtype=wanted).dtype == got
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16 on cpu, got float16"):
        load_drafter(tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype must be bfloat16 on cuda, got float32"):
        load_drafter(tmp_path, device="cuda", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"max_positions must be in 1..512 \(the drafter's\), got 513"):
        load_drafter(tmp_path, max_positions=513)


@pytest.mark.parametrize("world", [1, 2, 6])
def test_shards_add_up_to_the_whole(tmp_path: Path, rng: torch.Generator, world: int) -> None:
    """Sharded attention inputs and MLP give partial outputs whose sum is the whole's; KV heads may be shared."""
    changes = {"attention_bias": True, "intermediate_size": 60, "vocab_size": 96}
    state = tensors(rng, bias=True)
    state |= {n: t[:60] for n, t in state.items() if "gate_proj" in n or "up_proj" in n}
    state |= {n: t[:, :60].contiguous() for n, t in state.items() if "down_proj" in n}
    whole = load_drafter(save(tmp_path, z_lab(**changes), state))
    parts = [Drafter(*shard_weights(whole.config, whole.weights, rank, world)) for rank in range(world)]
    x = torch.randn(5, H, generator=rng)

    def layer(drafter: Drafter, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        c, w = drafter.config, drafter.weights
        q, k, v = (x @ w.qkv_weight[i].T + w.qkv_bias[i]).split([c.num_heads * D] + 2 * [c.num_kv_heads * D], dim=1)
        assert torch.equal(torch.cat([k, v], 1), x @ w.kv_weight[i].T + w.kv_bias[i])
        heads = q.view(5, c.num_kv_heads, -1, D) * k.view(5, c.num_kv_heads, 1, D) + v.view(5, c.num_kv_heads, 1, D)
        out = heads.reshape(5, -1) @ w.o_weight[i].T + (0 if w.o_bias is None else w.o_bias[i])
        gate, up = (x @ w.gate_up_weight[i].T).chunk(2, dim=1)
        return out, (torch.nn.functional.silu(gate) * up) @ w.down_weight[i].T

    for i in range(L):
        want, got = layer(whole, i), [layer(part, i) for part in parts]
        for j in range(2):
            torch.testing.assert_close(sum(g[j] for g in got), want[j], atol=1e-3, rtol=1e-4)


def test_shards_that_are_too_many(tmp_path: Path, rng: torch.Generator) -> None:
    drafter = load_drafter(save(tmp_path, z_lab(), tensors(rng)))
    for rank, world, message in (
        (0, 7, r"num_attention_heads must be at least the number of ranks \(7\), got 6"),
        (2, 2, r"rank must be in 0..1 \(world 2\), got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            shard_weights(drafter.config, drafter.weights, rank, world)

"""Quantised weights: codes, scales, files, loading, shards, the command and the text that comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_model import D, L, V, save, speculators, tensors, z_lab

from dflash_kernels import cli, ops
from dflash_kernels.formats import (
    E2M1_VALUES,
    INT4_VALUES,
    QuantizedWeight,
    WeightFormat,
    concatenate,
    join_nibbles,
    plain_scales,
    quantization_config,
    scale_blocks,
    split_nibbles,
)
from dflash_kernels.model.checkpoint import load_weights
from dflash_kernels.model.config import load_config, parse_config
from dflash_kernels.model.drafter import Drafter, load_drafter
from dflash_kernels.model.quantize import quantize, quantize_drafter
from dflash_kernels.model.weights import shard_weights
from dflash_kernels.reference import formats as reference
from dflash_kernels.tiles import pack_weight

ALL = ["fp8", "int4-g64", "int4-g128", "e2m1-g64", "e2m1-g128", "nvfp4"]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}


def wide_tensors(generator: torch.Generator, prefix: str = "") -> dict[str, torch.Tensor]:
    """Random bf16 tensors of a drafter whose projections groups of 128 divide (8/2 heads of 32)."""
    hidden, inner, q, kv = 128, 256, 8 * D, 2 * D
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, 2 * hidden), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,)
    }  # fmt: skip
    for i in range(L):
        a, m = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
        shapes |= {f"{a}{p}_proj.weight": (n, hidden) for p, n in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {a + "o_proj.weight": (hidden, q), m + "down_proj.weight": (hidden, inner)}
        shapes |= {f"{m}{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes |= {f"{a}{p}_norm.weight": (D,) for p in "qk"}
        shapes |= {f"layers.{i}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    return {prefix + n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}


def real_scale(weight: QuantizedWeight) -> torch.Tensor:
    """What codes are multiplied by, float32 ``[.., N, groups]``."""
    return weight.scale.float() if weight.global_scale is None else weight.scale.float() / weight.global_scale


@pytest.fixture
def bf16(tmp_path: Path) -> Path:
    return save(tmp_path / "bf16", z_lab(**WIDE), wide_tensors(torch.Generator().manual_seed(1)))


# -- codes ----------------------------------------------------------------------------------------------------------


def test_every_code_means_what_its_format_says() -> None:
    fp8 = torch.arange(256, dtype=torch.uint8)
    want = torch.tensor([reference.decode_e4m3(code) for code in range(256)])
    assert torch.equal(fp8.view(torch.float8_e4m3fn).float().nan_to_num(7e7), want.nan_to_num(7e7))
    assert [reference.decode_int4(code) for code in range(16)] == list(INT4_VALUES)
    assert [reference.decode_e2m1(code) for code in range(16)] == list(E2M1_VALUES)


@pytest.mark.parametrize("name", ALL)
def test_values_of_a_format_are_kept(name: str) -> None:
    """What is code times scale already comes back exactly: the largest code of each group fixes the scale."""
    f, generator = WeightFormat.parse(name), torch.Generator().manual_seed(2)
    rows, columns = 6, 384 if f.kind == "fp8" else 3 * int(f.group_size or 0)
    if f.kind == "fp8":
        codes = torch.randint(256, (rows, columns), generator=generator, dtype=torch.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0
        codes[:, 0] = 0x7E  # 448
        values = codes.view(torch.float8_e4m3fn).float()
    else:
        table = torch.tensor(INT4_VALUES if f.kind == "int4" else E2M1_VALUES)
        values = table[torch.randint(1, 16, (rows, columns), generator=generator)]
        values[:, :: f.group_size] = table.max()
    scale = 2.0 ** torch.randint(-9, 3, (rows, f.scale_columns(columns)), generator=generator)
    weight = (values.view(rows, scale.shape[1], -1) * scale[..., None]).view(rows, columns)
    assert torch.equal(quantize(weight, f).dequantize(), weight + 0.0)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.integers(-20, 20))
def test_rounding_is_to_the_nearest_code(name: str, seed: int, spread: int) -> None:
    """No other code of the table comes closer to a weight, with the scale that was chosen."""
    f = WeightFormat.parse(name)
    weight = (torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) * 2.0**spread).bfloat16()
    made = quantize(weight, f)
    decode = {"fp8": reference.decode_e4m3, "int4": reference.decode_int4}.get(f.kind, reference.decode_e2m1)
    table = torch.tensor([decode(code) for code in range(1 << f.bits)]).nan_to_num(0.0)
    scale = real_scale(made).repeat_interleave(256 // made.scale.shape[-1], dim=-1)
    error = (made.dequantize() - weight.float()).abs()
    best = (table * scale[..., None] - weight.float()[..., None]).abs().amin(-1)
    assert (error <= best * (1 + 1e-5) + 1e-6 * scale).all()


def test_four_bit_scales_beat_the_plain_ones() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    groups = weight.view(64, -1, 64)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round() * scale - groups).square().sum()
    ours = (quantize(weight, WeightFormat("int4", 64)).dequantize() - weight).square().sum()
    assert ours < 0.97 * plain


@pytest.mark.parametrize("name", ALL)
def test_zeros_tiny_and_huge_weights(name: str) -> None:
    f = WeightFormat.parse(name)
    weight = torch.zeros(3, 128)
    weight[1] = 1e-38
    weight[2, ::2] = 3e38
    back = quantize(weight, f).dequantize()
    assert torch.isfinite(back).all() and (back[0] == 0).all() and (back[1].abs() < 1e-20).all()
    assert ((back[2] - weight[2]).abs() <= 0.13 * 3e38).all()


@pytest.mark.parametrize("name", ALL)
def test_dequantised_products_are_those_of_the_oracle(name: str) -> None:
    f, generator = WeightFormat.parse(name), torch.Generator().manual_seed(4)
    made = quantize(torch.randn(32, 256, generator=generator), f)
    x = torch.randn(5, 256, generator=generator).bfloat16()
    codes = made.codes if f.kind == "fp8" else split_nibbles(made.codes)
    want = reference.linear(x, codes, real_scale(made), f.kind)
    torch.testing.assert_close(x.float() @ made.dequantize().T, want, rtol=1e-5, atol=1e-4)
    assert torch.equal(made.values(), made.values().bfloat16().float())  # codes are exact in bf16


def test_nvfp4_scales_are_a_part_in_e4m3_and_one_a_tensor() -> None:
    """The tensor's takes the largest weight to the largest scale, and rows of another tensor keep theirs."""
    f, generator = WeightFormat.parse("nvfp4"), torch.Generator().manual_seed(5)
    one, two = (torch.randn(8, 64, generator=generator) * size for size in (1.0, 1e-4))
    made = quantize(one, f)
    assert made.global_scale is not None and (made.global_scale == 2688 / one.abs().max()).all()
    assert made.scale.float().max() >= 0.7 * 448  # the best of seven
    assert made.nbytes == 8 * (32 + 4 + 4)
    both = concatenate([made, quantize(two, f)])
    assert torch.equal(both.dequantize()[8:], quantize(two, f).dequantize())
    for weight in (one, two):
        error = (quantize(weight, f).dequantize() - weight).norm() / weight.norm()
        assert 0.05 < error < 0.1
    with pytest.raises(ValueError, match="nvfp4: global_scale must be a tensor"):
        QuantizedWeight(f, made.codes, made.scale)
    with pytest.raises(ValueError, match=r"nvfp4: global_scale must be float32 \[8, 1\], got float32 \[1, 1\]"):
        replace(made, global_scale=made.global_scale[:1])
    with pytest.raises(ValueError, match="fp8: global_scale must be None"):
        replace(quantize(one, WeightFormat("fp8")), global_scale=made.global_scale)
    with pytest.raises(ValueError, match="nvfp4: group_size must be 16, got 32"):
        WeightFormat("nvfp4", 32)
    with pytest.raises(ValueError, match="must have a format that streams, got nvfp4"):
        pack_weight(made)


@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (300, 160), (8, 16)])
def test_scale_blocks_are_in_the_order_of_the_tensor_cores(rows: int, columns: int) -> None:
    scale = torch.randint(1, 255, (2, rows, columns // 16), dtype=torch.uint8)
    for gated in (False, True):
        blocks = scale_blocks(scale, gated)
        unit = 64 if gated else 128
        assert list(blocks.shape) == [2, -(-rows // (2 if gated else 1) // unit), -(-columns // 64), 512]
        assert torch.equal(plain_scales(blocks, rows, columns // 16, gated), scale)
        left = blocks.clone()
        for r in range(rows):
            at, second = (r % (rows // 2), r // (rows // 2)) if gated else (r, 0)
            block, row = at // unit, at % unit + second * 64
            for g in range(columns // 16):
                place = (slice(None), block, g // 4, 16 * (row % 32) + 4 * (row // 32) + g % 4)
                assert torch.equal(left[place], scale[:, r, g])
                left[place] = 0
        assert (left == 0).all()


def test_nibbles_lie_from_the_low_half_up() -> None:
    codes = torch.randint(16, (3, 8), dtype=torch.uint8)
    packed = join_nibbles(codes)
    assert torch.equal(packed, codes[:, 0::2] + 16 * codes[:, 1::2]) and torch.equal(split_nibbles(packed), codes)


@pytest.mark.parametrize(
    ("weight", "name", "message"),
    [
        (torch.ones(4, 100), "int4-g64", r"columns must be a multiple of the group size 64, got 100$"),
        (torch.ones(4, 192), "int4-g128", r"got 192 \(groups of 64 fit\)"),
        (torch.ones(4, 64, dtype=torch.int8), "fp8", "must be a float tensor"),
        (torch.ones(64), "fp8", "at least 2 dimensions"),
        (torch.full((2, 64), torch.inf), "fp8", "must be finite"),
    ],
)
def test_what_cannot_be_quantised(weight: torch.Tensor, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight, WeightFormat.parse(name))


def test_formats_have_names() -> None:
    assert [str(WeightFormat.parse(name)) for name in ALL] == ALL
    for bad in ("w4", "int4", "int4-g32", "fp8-g64", "int4-gx"):
        with pytest.raises(ValueError, match=r"must be|got"):
            WeightFormat.parse(bad)
    with pytest.raises(ValueError, match="scale must be bfloat16, got float32"):
        QuantizedWeight(WeightFormat("int4", 64), torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"scale must have shape \[2, 1\], got \[1, 1\]"):
        QuantizedWeight(WeightFormat("fp8"), torch.zeros(2, 64, dtype=torch.uint8), torch.ones(1, 1))


# -- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layout", ["z-lab", "speculators"])
def test_a_packed_drafter_is_read_back_exactly(tmp_path: Path, name: str, layout: str) -> None:
    f = WeightFormat.parse(name)
    config = z_lab(**WIDE)
    if layout == "speculators":
        config = speculators()
        config["transformer_layer_config"] |= WIDE
    state = wide_tensors(torch.Generator().manual_seed(5), "model." if layout == "speculators" else "")
    report = quantize_drafter(save(tmp_path / "in", config, state), tmp_path / "out", f)
    assert (report.tensors, report.kept) == (7 * L, 3 + 4 * L)
    assert report.bytes_after < report.bytes_before and 0 < report.error < (0.04 if name == "fp8" else 0.13)
    read = load_config(tmp_path / "out")
    assert read.weight_format == f
    weights = load_weights(tmp_path / "out", read, torch.float32)
    plain = load_weights(tmp_path / "in", load_config(tmp_path / "in"), torch.float32)
    assert weights.quantized and weights.weight_format == f and plain.weight_format is plain.quantized is None
    for field in ("qkv_weight", "o_weight", "gate_up_weight", "down_weight"):
        rows = {"qkv_weight": [8 * D, 2 * D, 2 * D], "gate_up_weight": [256, 256]}.get(field, [128])
        want = concatenate([quantize(part, f) for part in getattr(plain, field).split(rows, 1)])
        got = weights.quantized[field]
        assert torch.equal(want.codes, got.codes) and torch.equal(want.scale, got.scale)
        assert f.kind != "nvfp4" or torch.equal(want.global_scale, got.global_scale)
        assert torch.equal(getattr(weights, field), want.dequantize())
    assert torch.equal(weights.kv_weight, weights.qkv_weight[:, 8 * D :])
    for field in ("fc_weight", "hidden_norm", "input_norm", "q_norm", "k_norm", "post_norm", "final_norm"):
        assert torch.equal(getattr(weights, field), getattr(plain, field))


def test_names_and_dtypes_in_the_file(bf16: Path, tmp_path: Path) -> None:
    stem = "layers.0.mlp.down_proj.weight"
    expected: dict[str, dict[str, tuple[torch.dtype, list[int]]]] = {
        "fp8": {"": (torch.float8_e4m3fn, [128, 256]), "_scale": (torch.float32, [128, 1])},
        "int4-g64": {
            "_packed": (torch.int32, [128, 32]), "_scale": (torch.bfloat16, [128, 4]), "_shape": (torch.int64, [2])
        },
        "e2m1-g128": {"_packed": (torch.uint8, [128, 128]), "_scale": (torch.bfloat16, [128, 2])},
        "nvfp4": {
            "_packed": (torch.uint8, [128, 128]), "_scale": (torch.float8_e4m3fn, [128, 16]),
            "_global_scale": (torch.float32, [1]),
        },
    }  # fmt: skip
    for name, ends in expected.items():
        quantize_drafter(bf16, tmp_path / name, WeightFormat.parse(name))
        state = load_file(tmp_path / name / "model.safetensors")
        found = {n.removeprefix(stem): (t.dtype, list(t.shape)) for n, t in state.items() if n.startswith(stem)}
        assert found == ends
        assert {t.dtype for n, t in state.items() if "proj" not in n} == {torch.bfloat16}
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "compressed-tensors" and config["ignore"] == ["fc"]
    # An int32 holds eight columns from the low bits up, each with 8 added.
    state = load_file(tmp_path / "int4-g64" / "model.safetensors")
    words = state[stem + "_packed"]
    unpacked = torch.stack([(words >> (4 * i) & 15) - 8 for i in range(8)], dim=-1).view(128, 256)
    scale = state[stem + "_scale"].float().repeat_interleave(64, dim=1)
    original = load_file(bf16 / "model.safetensors")[stem].float()
    assert ((unpacked * scale - original).abs() <= 2.2 * scale).all()


def test_a_drafter_computes_with_its_dequantised_weights(bf16: Path, tmp_path: Path) -> None:
    """Loading in bf16 and moving to float32 loses nothing, and moving to bf16 rounds once."""
    f = WeightFormat("int4", 64)
    quantize_drafter(bf16, tmp_path / "out", f)
    exact = load_drafter(tmp_path / "out", dtype=torch.float32)
    assert exact.weights.quantized
    moved = load_drafter(tmp_path / "out")
    assert moved.dtype == torch.bfloat16 and torch.equal(moved.weights.o_weight, exact.weights.o_weight.bfloat16())
    moved.to("cpu", torch.float32)
    for name, value in vars(exact.weights).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(moved.weights, name)), name
    assert exact.weights.nbytes == exact.weights.dense().nbytes + sum(
        w.codes.numel() + 2 * w.scale.numel() for w in exact.weights.quantized.values()
    )


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_a_chain_of_codes_takes_the_codes(bf16: Path, tmp_path: Path, name: str, rng: torch.Generator) -> None:
    """What a drafter on a GPU with such products does with rows that do not stream; here the CPU is made to do it."""
    quantize_drafter(bf16, tmp_path / "out", WeightFormat.parse(name))
    drafter = load_drafter(tmp_path / "out", max_positions=64)
    assert drafter.dtype == torch.bfloat16 and not drafter._fp8_chain and drafter._nvfp4_chain is None
    head = torch.nn.Linear(drafter.hidden_size, drafter.vocab_size, bias=False, dtype=torch.bfloat16)
    target = type("Target", (), {"get_input_embeddings": lambda _: head, "get_output_embeddings": lambda _: head})()
    drafter.bind(target)
    block, shape = drafter.block_size, (64, drafter.num_kv_heads, drafter.head_dim)
    caches = [torch.randn(2, *shape, generator=rng).bfloat16() for _ in range(drafter.num_layers)]
    arguments = {
        "block_ids": torch.randint(drafter.vocab_size, (2, block), generator=rng),
        "positions": (20 + torch.arange(block)).repeat(2, 1),
        "prefix_lens": torch.tensor([20, 20]),
        "req_pool_indices": torch.tensor([0, 0]),
        "req_to_token": torch.arange(64)[None],
        "k_caches": [cache[0] for cache in caches],
        "v_caches": [cache[1] for cache in caches],
    }
    dense = drafter.forward(**arguments, slots=arguments["positions"]).clone()
    drafter.multiply_codes()
    coded = drafter.forward(**arguments, slots=arguments["positions"])
    assert drafter.weights.quantized is not None
    w, codes = drafter.weights, drafter.weights.quantized
    matrices = {n: codes[f"{n}_weight"] for n in ("qkv", "o", "gate_up", "down")}
    named: dict[str, Any] = {f"{n}_weight": matrix.codes for n, matrix in matrices.items()}
    op: Any = ops.draft_forward_fp8
    if name == "nvfp4":
        op = ops.draft_forward_nvfp4
        named["blocks"] = [scale_blocks(m.scale, gated=n == "gate_up") for n, m in matrices.items()]
    named |= {f"{n}_scale": m.scale if m.global_scale is None else 1 / m.global_scale for n, m in matrices.items()}
    names = ("input_norm", "qkv_bias", "q_norm", "k_norm", "o_bias", "post_norm", "final_norm")
    want = op(
        **arguments,
        **named,
        **{name: getattr(w, name) for name in names},
        embed_weight=head.weight.detach(),
        cos_sin=drafter.cos_sin,
        windows=list(drafter.config.windows),
        causal=[int(c) for c in drafter.config.causal],
        eps=drafter.config.rms_norm_eps,
    )
    assert torch.equal(coded, want)
    # Random weights of size 1: attention is all but an argmax.
    assert 0 < (coded - dense).norm() < (0.25 if name == "fp8" else 0.7) * dense.norm()


def test_only_fp8_weights_multiply_as_codes(bf16: Path, tmp_path: Path) -> None:
    quantize_drafter(bf16, tmp_path / "out", WeightFormat("int4", 64))
    with pytest.raises(ValueError, match="fp8 or nvfp4 weights .* got int4-g64"):
        load_drafter(tmp_path / "out").multiply_codes()
    with pytest.raises(ValueError, match="fp8 or nvfp4 weights .* got bf16"):
        load_drafter(bf16).multiply_codes()


@pytest.mark.gpu
def test_without_a_kernel_the_weights_are_bf16_and_it_is_said(bf16: Path, tmp_path: Path) -> None:
    assert D == 32  # a head size that the kernel over codes is not made for
    quantize_drafter(bf16, tmp_path / "out", WeightFormat("fp8"))
    with pytest.warns(UserWarning, match=r"weights in format fp8 \(head size 32 is neither 64 nor 128\)"):
        drafter = load_drafter(tmp_path / "out", device="cuda")
    assert drafter.dtype == torch.bfloat16 and not drafter.weights.quantized
    on_cpu = load_drafter(tmp_path / "out")
    assert torch.equal(drafter.weights.down_weight.cpu(), on_cpu.weights.down_weight)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp8", "int4-g64", "e2m1-g64"])
def test_few_rows_read_the_codes_on_cuda(tmp_path: Path, name: str, rng: torch.Generator) -> None:
    """One kernel over the codes and the chain of kernels over the dequantised weights round alike."""
    quantize_drafter(cli.DEMO_DRAFTER, tmp_path / "out", WeightFormat.parse(name))
    drafter = load_drafter(tmp_path / "out", device="cuda", max_positions=64)
    plain = load_drafter(tmp_path / "out", device="cuda", max_positions=64)
    assert drafter.weights.quantized and drafter.why_not_one_kernel(drafter.block_size) is None
    plain.why_not_one_kernel = lambda rows: "asked not to"  # type: ignore[method-assign]
    plain._fp8_chain = False
    head = torch.nn.Linear(drafter.hidden_size, drafter.vocab_size, bias=False)
    target = type("Target", (), {"get_input_embeddings": lambda _: head, "get_output_embeddings": lambda _: head})()
    head = head.to("cuda", torch.bfloat16)
    block = drafter.block_size
    ids = torch.randint(drafter.vocab_size, (1, block), generator=rng).cuda()
    shape = (64, drafter.num_kv_heads, drafter.head_dim)
    caches = [torch.randn(2, *shape, generator=rng).bfloat16().cuda() for _ in range(drafter.num_layers)]
    position = 20 + torch.arange(block, device="cuda")[None]
    index = [torch.tensor([20], device="cuda"), torch.tensor([0], device="cuda")]
    table = torch.arange(64, device="cuda")[None]
    k, v = [cache[0] for cache in caches], [cache[1] for cache in caches]
    results = []
    for one in (drafter, plain):
        one.bind(target)
        results.append(one.forward(ids, position, position, *index, table, k, v).float().cpu())
    packed = drafter._pack_layers()
    assert packed is not None and str(packed.weight_format) == name and plain._packed is None
    head.to("cpu", torch.float32)
    exact = load_drafter(tmp_path / "out", dtype=torch.float32, max_positions=64).bind(target)
    floats = [[cache.float().cpu() for cache in of_layers] for of_layers in (k, v)]
    integers = [tensor.cpu() for tensor in (ids, position, position, *index, table)]
    reference = exact.forward(*integers, *floats)
    of_codes, of_chain = (float((result - reference).norm() / reference.norm()) for result in results)
    assert 0 < of_codes < 0.05 and of_codes < 1.5 * of_chain


@pytest.mark.parametrize("name", ["fp8", "int4-g64", "e2m1-g64", "nvfp4"])
def test_shards_are_parts_of_codes_and_scales(bf16: Path, tmp_path: Path, name: str) -> None:
    quantize_drafter(bf16, tmp_path / "out", WeightFormat.parse(name))
    config = load_config(tmp_path / "out")
    weights = load_weights(tmp_path / "out", config, torch.float32)
    for rank in range(4):
        _, part = shard_weights(config, weights, rank, 4)
        assert part.quantized and weights.quantized
        assert set(part.quantized) == set(weights.quantized)
        for field, quantized in part.quantized.items():
            assert torch.equal(quantized.dequantize(), getattr(part, field)), field


def test_shards_end_between_groups(bf16: Path, tmp_path: Path) -> None:
    quantize_drafter(bf16, tmp_path / "out", WeightFormat("int4", 128))
    config = load_config(tmp_path / "out")
    with pytest.raises(ValueError, match="edge of a part: columns must be a multiple of the group size 128, got 64"):
        shard_weights(config, load_weights(tmp_path / "out", config), 0, 4)


# -- refusals -------------------------------------------------------------------------------------------------------


def change(config: dict[str, Any], **weights: Any) -> dict[str, Any]:
    config["config_groups"]["group_0"]["weights"] |= weights
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantised weights \(gptq; compressed-tensors is read\)"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"\(fp8; compressed-tensors is read\)"),
        (change(quantization_config(WeightFormat("int4", 64), []), group_size=32), "group_size 32"),
        (change(quantization_config(WeightFormat("int4", 64), []), num_bits=8), "num_bits 8, type int"),
        (change(quantization_config(WeightFormat("int4", 64), []), symmetric=False), "symmetric = True, got False"),
        (change(quantization_config(WeightFormat("int4", 64), []), actorder="group"), "another order"),
        (quantization_config(WeightFormat("fp8"), []) | {"format": "int-quantized"}, "stored as float-quantized"),
        (quantization_config(WeightFormat("fp8"), []) | {"kv_cache_scheme": {"num_bits": 8}}, "a quantised KV cache"),
        (quantization_config(WeightFormat("fp8"), []) | {"config_groups": {}}, "one config group"),
    ],
)
def test_other_quantisations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(z_lab(quantization_config=config))


def test_dynamic_activations_are_left_as_they_are() -> None:
    config = quantization_config(WeightFormat("fp8"), ["fc"])
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True}
    assert parse_config(z_lab(quantization_config=config)).weight_format == WeightFormat("fp8")
    config["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    with pytest.raises(ValueError, match="input_activations with scales of their own"):
        parse_config(z_lab(quantization_config=config))


STEM = "layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("int4-g64", lambda s: s.pop(STEM + "_scale"), f"tensor {STEM}_scale must be in the checkpoint, found none"),
        (
            "int4-g64",
            lambda s: s.update({STEM + "_scale": torch.ones(128, 4)}),
            "must be BF16 in format int4-g64, got F32",
        ),
        ("int4-g64", lambda s: s[STEM + "_shape"].fill_(7), r"_shape must say \[128, 256\], got \[7, 7\]"),
        ("fp8", lambda s: s.update({STEM: torch.ones(128, 256)}), "must be F8_E4M3 in format fp8, got F32"),
        ("fp8", lambda s: s.update({STEM + "_scale": torch.ones(128)}), r"must have shape \[128, 1\], got \[128\]"),
        ("fp8", lambda s: s[STEM].view(torch.uint8)[3].fill_(0x7F), "must have finite codes and scales"),
        ("fp8", lambda s: s[STEM + "_scale"].fill_(torch.inf), "must have finite codes and scales"),
    ],
)
def test_damaged_files_are_named(bf16: Path, tmp_path: Path, name: str, edit: Any, message: str) -> None:
    out = tmp_path / "out"
    quantize_drafter(bf16, out, WeightFormat.parse(name))
    state = load_file(out / "model.safetensors")
    edit(state)
    save_file(state, out / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_drafter(out)


def test_codes_without_a_config_are_refused(bf16: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_drafter(bf16, out, WeightFormat("fp8"))
    (out / "config.json").write_text((bf16 / "config.json").read_text())
    with pytest.raises(ValueError, match=r"must be bf16, fp32 or fp16, got F8_E4M3"):
        load_drafter(out)


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--format", "fp8"], "fp8"),
        (["--format", "w4"], "int4-g128"),
        (["--format", "w4", "--group-size", "64", "--codes", "e2m1"], "e2m1-g64"),
        (["--format", "nvfp4"], "nvfp4"),
    ],
)
def test_pack(bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], name: str) -> None:
    assert cli.main(["pack", str(bf16), str(tmp_path / "out"), *options]) == 0
    said = capsys.readouterr().out
    assert f"21 projections in {name}, 15 tensors as they were" in said and "rounding error" in said
    assert str(load_config(tmp_path / "out").weight_format) == name
    assert isinstance(load_drafter(tmp_path / "out"), Drafter)
    # A second time: there is something now, and it is quantised already.
    assert cli.main(["pack", str(bf16), str(tmp_path / "out"), *options]) == 2
    assert "must be a new or an empty directory" in capsys.readouterr().err
    assert cli.main(["pack", str(tmp_path / "out"), str(tmp_path / "again"), *options]) == 2
    assert f"must be bf16, fp16 or fp32 to be quantised, got {name}" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_pack_says_what_is_wrong(bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    small = save(tmp_path / "small", z_lab(), tensors(torch.Generator().manual_seed(0)))
    pickle = tmp_path / "pickle"
    pickle.mkdir()
    (pickle / "config.json").write_text(json.dumps(z_lab()))
    (pickle / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for argv, message in (
        ([str(bf16), out, "--format", "fp8", "--codes", "int4"], "belong to --format w4: fp8 has one scale"),
        ([str(bf16), out, "--format", "nvfp4", "--group-size", "64"], "belong to --format w4: nvfp4 is e2m1"),
        (
            [str(small), out, "--format", "w4"],
            "columns must be a multiple of the group size 128, got 64 (groups of 64 fit)",
        ),
        ([str(tmp_path / "none"), out, "--format", "fp8"], "must hold config.json"),
        ([str(pickle), out, "--format", "fp8"], "can run code and are refused"),
    ):
        assert cli.main(["pack", *argv]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not Path(out).exists()


@pytest.mark.parametrize("name", ["fp8", "e2m1-g64", "nvfp4"])
def test_the_text_is_the_targets_in_any_format(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    from dflash_kernels.engine import Engine, SamplingParams

    torch.manual_seed(6)
    target = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V, hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    ).eval()  # fmt: skip
    folder = save(tmp_path / "in", z_lab(**WIDE), wide_tensors(torch.Generator().manual_seed(7)))
    quantize_drafter(folder, tmp_path / "out", WeightFormat.parse(name))
    drafter = load_drafter(tmp_path / "out")
    engine = Engine(target, drafter, max_batch=2, max_len=64)
    assert drafter.dtype == torch.float32 and drafter.weights.weight_format == WeightFormat.parse(name)
    prompts = [[1, 2, 3], [7, 8, 9, 10, 11]]
    params = SamplingParams(max_new_tokens=20)
    ours, plain = engine.generate(prompts, params), engine.decode_plain(prompts, params)
    assert [r.token_ids for r in ours] == [r.token_ids for r in plain]

"""draft_forward_packed against the oracle; its schedule, interpreted in Python; the packed layout."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_draft import Case, Inputs, make_inputs

from dflash_kernels.draft_stream import (
    Kind,
    PackedDraft,
    default_blocks,
    draft_schedule,
    has_fp8_chain,
    has_nvfp4_chain,
    pack_draft,
    why_not_packed,
)
from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.model.quantize import quantize
from dflash_kernels.ops import draft_forward_packed, draft_forward_packed_workspace
from dflash_kernels.reference import draft as reference
from dflash_kernels.stream import UNIT_FIELDS
from dflash_kernels.tiles import Weight, tile_columns, unpack_weight

FORMATS = ("fp8", "int4-g64", "int4-g128", "e2m1-g64", "e2m1-g128")
MATRICES = ("qkv_weight", "o_weight", "gate_up_weight", "down_weight")


def pack(inputs: Inputs, blocks: int, weight_format: WeightFormat | None = None) -> PackedDraft:
    _, kv_heads, head_dim = inputs["k_caches"][0].shape
    matrices = [inputs[name] if weight_format is None else quantize(inputs[name], weight_format) for name in MATRICES]
    return pack_draft(*matrices, num_kv_heads=kv_heads, head_dim=head_dim, blocks=blocks)


def dequantized(inputs: Inputs, weight_format: WeightFormat) -> Inputs:
    """The same with the matrices that `pack` packs, in float32."""
    return {**inputs, **{name: quantize(inputs[name], weight_format).dequantize() for name in MATRICES}}


def arguments(inputs: Inputs, packed: PackedDraft) -> dict[str, Any]:
    return {**{name: value for name, value in inputs.items() if name not in MATRICES}, "packed": packed}


def outputs(inputs: Inputs, packed: PackedDraft) -> dict[str, torch.Tensor]:
    """A poisoned output and a poisoned workspace of exactly the size asked for."""
    batch, block = inputs["block_ids"].shape
    size = draft_forward_packed_workspace(batch, block, packed)
    out = inputs["embed_weight"].new_full((batch * block, packed.hidden_size), float("nan"))
    return {"out": out, "workspace": torch.full((size,), 255, dtype=torch.uint8, device=out.device)}


def multiprocessors(device: str) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device == "cuda" else 4


def check(inputs: Inputs, packed: PackedDraft, launches: int = 2) -> None:
    """Several launches on the same counters, each by the rule for bf16, all equal."""
    exact = reference.draft_forward(**inputs, dtype=torch.float32)
    rounding = (reference.draft_forward(**inputs, dtype=torch.bfloat16).float() - exact).abs().max().item()
    first = None
    for _ in range(launches):
        out = draft_forward_packed(**arguments(inputs, packed), **outputs(inputs, packed))
        error = (out.float() - exact).abs().max().item()
        assert error <= 2 * rounding + 4e-3, f"error {error}, rounding alone {rounding}"
        assert first is None or torch.equal(out, first)
        first = out


CASES = [
    Case(),
    Case(contexts=(5,), T=7, index=torch.int32),
    Case(contexts=(64, 63, 65, 128), T=8, heads=(8, 2), D=128),
    Case(contexts=(150,), T=16, heads=(9, 1), H=72, I=40, windows=(5, 0), causal=(0, 1), rotary=32, scale=0.3),
    Case(contexts=(300, 2), T=32, H=320, I=136, heads=(4, 2), D=128, biases=True, qk_norm=False),
    Case(contexts=(70, 9), T=10, heads=(8, 1), windows=(33,), causal=(1,)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("blocks", [None, 1], ids=["all", "one block"])
def test_packed_matches_reference(case: Case, blocks: int | None, device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(case, rng, device, torch.bfloat16)
    check(inputs, pack(inputs, blocks or multiprocessors(device)))


GPU_CASES = [
    Case(contexts=(1024,), H=4096, I=12288, heads=(32, 8), D=128),
    Case(contexts=(1024,), H=4096, I=1536, heads=(4, 1), D=128),
    Case(contexts=(900, 0, 33, 1024), H=4096, I=1536, heads=(32, 8), D=128, windows=(512, 0), causal=(1, 0)),
    Case(contexts=(5000, 3), T=8, H=2880, I=7680, heads=(64, 8), D=64, biases=True, qk_norm=False, windows=(128, 0)),
    Case(contexts=(40000,), heads=(4, 1), D=128),
    Case(contexts=tuple(range(64)), T=1, H=512, I=512, heads=(8, 8), D=64),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_large_cases_on_cuda(case: Case, rng: torch.Generator) -> None:
    inputs = make_inputs(case, rng, "cuda", torch.bfloat16)
    check(inputs, pack(inputs, multiprocessors("cuda")), launches=5)


@pytest.mark.gpu
def test_graph_replay_equals_eager(rng: torch.Generator) -> None:
    """Counters go on from launch to launch, captured or not."""
    inputs = make_inputs(Case(contexts=(300, 1, 64), D=128), rng, "cuda", torch.bfloat16)
    packed = pack(inputs, multiprocessors("cuda"))
    held = outputs(inputs, packed)
    expected = draft_forward_packed(**arguments(inputs, packed), **held).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draft_forward_packed(**arguments(inputs, packed), **held)
    for _ in range(3):
        held["out"].fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(held["out"], expected)
        assert torch.equal(draft_forward_packed(**arguments(inputs, packed)), expected)


FORMAT_CASES = [
    Case(contexts=(5,), T=7, H=256, I=192, index=torch.int32),
    Case(contexts=(64, 63), T=16, H=384, I=320, heads=(6, 2)),  # tiles that are not filled
    Case(contexts=(70, 9, 0, 3), T=16, H=128, I=128, heads=(4, 1), D=128, biases=True),
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", FORMAT_CASES, ids=str)
def test_quantized_matches_reference(case: Case, name: str, device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(case, rng, device, torch.bfloat16)
    weight_format = fitting(WeightFormat.parse(name), case)
    packed = pack(inputs, multiprocessors(device), weight_format)
    check(dequantized(inputs, weight_format), packed)


def fitting(weight_format: WeightFormat, case: Case) -> WeightFormat:
    """Groups of 64 where 128 do not divide the columns."""
    widths = (case.H, case.I, case.heads[0] * case.D)
    if weight_format.group_size == 128 and any(width % 128 for width in widths):
        return WeightFormat(weight_format.kind, 64)
    return weight_format


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", GPU_CASES[1:3], ids=str)
def test_large_quantized_cases_on_cuda(case: Case, name: str, rng: torch.Generator) -> None:
    inputs, weight_format = make_inputs(case, rng, "cuda", torch.bfloat16), WeightFormat.parse(name)
    check(dequantized(inputs, weight_format), pack(inputs, multiprocessors("cuda"), weight_format), launches=5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packing_loses_nothing(case: Case, rng: torch.Generator) -> None:
    inputs = make_inputs(case, rng, "cpu", torch.bfloat16)
    for name, weight in zip(MATRICES, pack(inputs, 3).unpack(), strict=True):
        assert isinstance(weight, torch.Tensor) and torch.equal(weight, inputs[name]), name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", FORMAT_CASES, ids=str)
def test_packing_codes_loses_nothing(case: Case, name: str, rng: torch.Generator) -> None:
    inputs = make_inputs(case, rng, "cpu", torch.bfloat16)
    weight_format = fitting(WeightFormat.parse(name), case)
    for name, weight in zip(MATRICES, pack(inputs, 3, weight_format).unpack(), strict=True):
        expected = quantize(inputs[name], weight_format)
        assert isinstance(weight, QuantizedWeight) and weight.format == weight_format
        assert torch.equal(weight.codes, expected.codes) and torch.equal(weight.scale, expected.scale), name


def test_formats_are_not_mixed(rng: torch.Generator) -> None:
    inputs = make_inputs(FORMAT_CASES[0], rng, "cpu", torch.bfloat16)
    inputs["o_weight"] = quantize(inputs["o_weight"], WeightFormat("fp8"))
    with pytest.raises(ValueError, match="pack_draft: weights must have one format, got bf16, fp8"):
        pack(inputs, 3)


def test_empty_batch(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=()), rng, device, torch.bfloat16)
    assert draft_forward_packed(**arguments(inputs, pack(inputs, 4))).shape == (0, 128)


def test_opcheck(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=(5, 12), T=7, H=64), rng, device, torch.bfloat16)
    packed = pack(inputs, 2)
    values = arguments(inputs, packed)
    tensors = {
        "weights": packed.weights,
        "weight_format": "bf16",
        "units": packed.units,
        "counters": packed.counters,
        "slots": packed.slots,
    }
    tensors |= {"num_q_heads": packed.num_q_heads, "intermediate_size": packed.intermediate_size}
    flat: list[Any] = []
    for name, value in values.items():
        if name == "windows":  # the packed weights come before it
            flat += tensors.values()
        if name != "packed":
            flat.append(value)
    # One launch at a time, and the counters are written on CUDA only: what opcheck compares must be the CPU's.
    tests = ["test_schema", "test_faketensor"]
    if device == "cpu":
        tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.dflash.draft_forward_packed.default, tuple(flat), test_utils=tests)
    torch.library.opcheck(
        torch.ops.dflash.draft_forward_packed.out, tuple(flat), outputs(inputs, packed), test_utils=tests
    )


def test_errors(device: str, rng: torch.Generator) -> None:
    inputs = make_inputs(Case(contexts=(5, 12), T=7), rng, device, torch.bfloat16)
    packed = pack(inputs, 2)
    held = outputs(inputs, packed)
    good = arguments(inputs, packed)

    def with_packed(**changes: Any) -> dict[str, Any]:
        return {**good, "packed": PackedDraft(**{**packed.__dict__, **changes})}

    for bad, match in [
        (with_packed(weights=packed.weights[1:]), r"weights must have shape \[\d+, 8192\]"),
        (with_packed(weights=packed.weights.float()), "weights must have dtype"),
        (with_packed(units=packed.units[..., :8]), r"units must have shape \[\*, \*, 16\]"),
        (with_packed(units=packed.units.long()), "units must have dtype"),
        (with_packed(counters=packed.counters.float()), "counters must have dtype"),
        (with_packed(num_q_heads=3), r"num_q_heads must be a multiple of Hkv = 2, got 3"),
        (with_packed(intermediate_size=60), r"intermediate_size must be a multiple of 8, got 60"),
        ({**good, "block_ids": inputs["block_ids"][:, :3]}, r"positions must have shape \[2, 3\], got \[2, 7\]"),
        ({**good, "post_norm": inputs["post_norm"][:1]}, "post_norm must have shape"),
    ]:
        with pytest.raises(ValueError, match=f"^dflash::draft_forward_packed: {match}"):
            draft_forward_packed(**bad, **held)
    many = make_inputs(Case(contexts=(1,) * 5, T=13), rng, device, torch.bfloat16)
    with pytest.raises(
        ValueError, match="^dflash::draft_forward_packed: block_ids must have at most 64 elements, got 65"
    ):
        draft_forward_packed(**arguments(many, packed))
    wide = make_inputs(Case(contexts=(1,), D=32), rng, device, torch.bfloat16)
    with pytest.raises(ValueError, match="pack_draft: head size 32 is neither 64 nor 128"):
        pack(wide, 2)
    assert held["out"].isnan().all()


def test_reasons() -> None:
    good = {"tokens": 32, "num_layers": 64, "head_dim": 128, "dtype": torch.bfloat16}
    assert why_not_packed(**good) is None
    for change, match in [
        ({"tokens": 33}, "33 rows are more than 32"),
        ({"tokens": 65, "weight_format": WeightFormat("fp8")}, "65 rows are more than 64"),
        ({"num_layers": 65}, "65 layers"),
        ({"head_dim": 96}, "head size 96"),
        ({"dtype": torch.float32}, "float32"),
    ]:
        reason = why_not_packed(**{**good, **change})
        assert reason is not None and match in reason
    coded = {**good, "tokens": 64, "weight_format": WeightFormat("fp8")}
    assert why_not_packed(**coded) is None
    assert why_not_packed(**coded, fp8_chain=True) == "64 rows are more than 32"
    four_bits = {**coded, "weight_format": WeightFormat("int4", 64)}
    assert why_not_packed(**four_bits) is None


def coded(columns: int, device: str = "cuda", name: str = "fp8") -> Weight:
    """Of a device that may not be there."""
    weight = quantize(torch.ones(1, 16, columns), WeightFormat.parse(name))
    codes: Any = SimpleNamespace(dtype=torch.uint8, shape=weight.codes.shape, device=torch.device(device))
    return replace(weight, codes=codes)


def test_which_weights_have_an_nvfp4_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of nvfp4, which no kernel streams."""
    monkeypatch.setattr("dflash_kernels.ops.gemm.gemm_nvfp4_supported", lambda device: True)
    assert has_nvfp4_chain([coded(64, name="nvfp4")] * 4)
    assert not has_nvfp4_chain([coded(64, "cpu", "nvfp4")] * 4)
    for other in (coded(48, name="nvfp4"), coded(32800, name="nvfp4"), coded(64), torch.ones(1, 16, 64)):
        assert not has_nvfp4_chain([coded(64, name="nvfp4")] * 3 + [other])
    monkeypatch.setattr("dflash_kernels.ops.gemm.gemm_nvfp4_supported", lambda device: False)
    assert not has_nvfp4_chain([coded(64, name="nvfp4")] * 4)
    sizes: dict[str, Any] = {"tokens": 1, "num_layers": 1, "head_dim": 64, "dtype": torch.bfloat16}
    reason = why_not_packed(**sizes, weight_format=WeightFormat.parse("nvfp4"))
    assert reason == "weights are nvfp4, which no kernel streams"


def test_which_weights_have_an_fp8_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of fp8 alone, of columns that its products take, on a GPU that has them; never on the CPU."""
    monkeypatch.setattr("dflash_kernels.ops.draft.draft_forward_fp8_supported", lambda device: True)
    assert has_fp8_chain([coded(64)] * 4) and has_fp8_chain([coded(64)] * 3 + [coded(32768)])
    assert not has_fp8_chain([coded(64, "cpu")] * 4)
    for other in (coded(72), coded(32784), coded(64, name="int4-g64"), torch.ones(1, 16, 64)):
        assert not has_fp8_chain([coded(64)] * 3 + [other])
    monkeypatch.setattr("dflash_kernels.ops.draft.draft_forward_fp8_supported", lambda device: False)
    assert not has_fp8_chain([coded(64)] * 4)


# ---- the schedule, interpreted ---------------------------------------------------------------------------------------


class Interpreter:
    """Runs a schedule's units in float32, blocks in random order, and poisons what has not been written yet."""

    def __init__(self, inputs: Inputs, packed: PackedDraft) -> None:
        self.inputs, self.packed = inputs, packed
        batch, self.block = inputs["block_ids"].shape
        self.tokens = batch * self.block
        qkv_width, hidden = packed.shapes()[0]
        nan = float("nan")
        self.x = torch.full((self.tokens, hidden), nan)
        self.qkv = torch.full((self.tokens, qkv_width), nan)
        self.attended = torch.full((self.tokens, packed.num_q_heads, packed.head_dim), nan)
        self.activated = torch.full((self.tokens, packed.intermediate_size), nan)
        self.out = torch.full((self.tokens, hidden), nan)
        self.counters = [0] * packed.counters.numel()
        self.slots: dict[int, torch.Tensor] = {}
        self.read = torch.zeros(packed.weights.shape[0], dtype=torch.int64)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.inputs["eps"]) * weight.float()

    def source(self, kind: Kind, layer: int) -> torch.Tensor:
        if kind == Kind.QKV:
            return self.norm(self.x, self.inputs["input_norm"][layer])
        if kind == Kind.GATE_UP:
            return self.norm(self.x, self.inputs["post_norm"][layer])
        return self.attended.flatten(1) if kind == Kind.OUT else self.activated

    def finish(self, kind: Kind, layer: int, row_tile: int, block: torch.Tensor) -> None:
        """`block [128, tokens]`, a whole row tile."""
        rows = slice(128 * row_tile, 128 * (row_tile + 1))
        if kind == Kind.QKV:
            target = self.qkv[:, rows]
            target.copy_(block.T[:, : target.shape[1]])
            if self.inputs["qkv_bias"] is not None:
                target += self.inputs["qkv_bias"][layer, rows].float()
        elif kind == Kind.GATE_UP:
            target = self.activated[:, 64 * row_tile : 64 * (row_tile + 1)]
            target.copy_((torch.nn.functional.silu(block[:64]) * block[64:]).T[:, : target.shape[1]])
        else:
            target = self.x[:, rows]
            target += block.T[:, : target.shape[1]]
            if kind == Kind.OUT and self.inputs["o_bias"] is not None:
                target += self.inputs["o_bias"][layer, rows].float()

    def attend(self, layer: int, item: int) -> None:
        p, i = self.packed, self.inputs
        token, head = divmod(item, p.num_q_heads)
        b, kv = token // self.block, p.num_q_heads + head // (p.num_q_heads // p.num_kv_heads)
        own = self.qkv[b * self.block : (b + 1) * self.block].view(self.block, -1, p.head_dim)
        positions, prefix = i["positions"][b].long(), int(i["prefix_lens"][b])

        def turned(heads: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
            heads = heads if weight is None else self.norm(heads, weight[layer])
            return reference._rope(heads[:, None], positions, i["cos_sin"])[:, 0]

        mask = reference.visible_keys(positions, prefix, i["windows"][layer], bool(i["causal"][layer]))
        slots = i["req_to_token"][int(i["req_pool_indices"][b]), :prefix].long()
        cached = [
            caches[layer][slots, kv - p.num_q_heads].float().nan_to_num() for caches in (i["k_caches"], i["v_caches"])
        ]
        keys = torch.cat((cached[0], turned(own[:, kv], i["k_norm"])))
        values = torch.cat((cached[1], own[:, kv + p.num_kv_heads]))
        scale = p.head_dim**-0.5 if i["softmax_scale"] is None else i["softmax_scale"]
        t = token % self.block
        scores = (turned(own[:, head], i["q_norm"])[t] @ keys.T * scale).masked_fill(~mask[t], float("-inf"))
        self.attended[token, head] = scores.softmax(-1) @ values

    def job(self, kind: Kind, layer: int, index: tuple[int, int]) -> None:
        first, step = index
        if kind == Kind.EMBED:
            rows = range(first, self.tokens, step)
            self.x[rows] = self.inputs["embed_weight"][self.inputs["block_ids"].flatten().long()[rows]].float()
        elif kind == Kind.FINAL:
            rows = range(first, self.tokens, step)
            self.out[rows] = self.norm(self.x[rows], self.inputs["final_norm"])
        elif kind == Kind.ATTEND:
            for item in range(first, self.tokens * self.packed.num_q_heads, self.packed.blocks):
                self.attend(layer, item)

    def is_ready(self, unit: dict[str, int]) -> bool:
        wanted = [unit["wait"]] if unit["wait"] >= 0 else []
        if unit["tiles"] > 0 and wanted:
            last = unit["k_tile"] + unit["tiles"] - 1
            wanted = [unit["wait"] + (k >> unit["wait_shift"]) for k in range(unit["k_tile"], last + 1)]
        parts = range(1, unit["contributors"] if unit["rank"] == 0 else 1)
        return all(self.counters[counter] >= unit["wait_target"] for counter in wanted) and all(
            unit["slot"] + rank in self.slots for rank in parts
        )

    def perform(self, unit: dict[str, int]) -> None:
        layer, kind = divmod(unit["stage"], len(Kind))
        kind = Kind(kind)
        if unit["tiles"] == 0:
            self.job(kind, layer, (unit["index0"], unit["index1"]))
        else:
            width = tile_columns(self.packed.weight_format)
            columns = slice(width * unit["k_tile"], width * (unit["k_tile"] + unit["tiles"]))
            tiles = slice(unit["weight_tile"], unit["weight_tile"] + unit["tiles"])
            self.read[tiles] += 1
            packed = unpack_weight(
                self.packed.weights[tiles][None], 128, width * unit["tiles"], self.packed.weight_format
            )
            weight = packed.dequantize() if isinstance(packed, QuantizedWeight) else packed.float()
            x = self.source(kind, layer)[:, columns]
            block = weight[:, : x.shape[1]] @ x.T
            if unit["contributors"] > 1:
                if unit["rank"] > 0:
                    assert unit["slot"] + unit["rank"] not in self.slots, "a part is overwritten"
                    self.slots[unit["slot"] + unit["rank"]] = block
                    return
                parts = [self.slots.pop(unit["slot"] + rank) for rank in range(1, unit["contributors"])]
                block = torch.stack((block, *parts)).sum(0)
            self.finish(kind, layer, unit["row_tile"], block)
        if unit["signal"] >= 0:
            self.counters[unit["signal"]] += 1

    def run(self, rng: torch.Generator) -> torch.Tensor:
        queues = [
            [dict(zip(UNIT_FIELDS, unit, strict=True)) for unit in units if unit[2] >= 0]
            for units in self.packed.units.tolist()
        ]
        while any(queues):
            ready = [block for block, queue in enumerate(queues) if queue and self.is_ready(queue[0])]
            assert ready, "all blocks wait"
            self.perform(queues[ready[int(torch.randint(len(ready), (), generator=rng))]].pop(0))
        assert not self.slots and bool((self.read == 1).all()), "every tile is read once, every part is added once"
        return self.out


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("blocks", [1, 7, 132, 148])
def test_schedule_computes_the_pass(case: Case, blocks: int, rng: torch.Generator) -> None:
    """Whatever block runs first: nothing is read before it is written, everything once, and the result is right."""
    inputs = make_inputs(case, rng, "cpu", torch.bfloat16)
    out = Interpreter(inputs, pack(inputs, blocks)).run(rng)
    torch.testing.assert_close(out, reference.draft_forward(**inputs, dtype=torch.float32), atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["fp8", "int4-g64"])
@pytest.mark.parametrize("blocks", [7, 132])
def test_schedule_of_codes_computes_the_pass(name: str, blocks: int, rng: torch.Generator) -> None:
    """Tiles of 128 and of 256 columns, not all of them filled."""
    inputs, weight_format = make_inputs(FORMAT_CASES[1], rng, "cpu", torch.bfloat16), WeightFormat.parse(name)
    out = Interpreter(inputs, pack(inputs, blocks, weight_format)).run(rng)
    exact = reference.draft_forward(**dequantized(inputs, weight_format), dtype=torch.float32)
    torch.testing.assert_close(out, exact, atol=2e-4, rtol=0)


@pytest.mark.parametrize("blocks", [132, 148])
@pytest.mark.parametrize(("hidden", "inter", "heads", "layers"), [(4096, 12288, (32, 8), 5), (4096, 1536, (4, 1), 6)])
def test_blocks_read_alike(hidden: int, inter: int, heads: tuple[int, int], layers: int, blocks: int) -> None:
    """Over the whole pass no block reads more than a tile beyond the mean, and slots stay few."""
    none = torch.empty(0)
    shapes = PackedDraft(none, none, none, 0, hidden, inter, *heads, 128, layers).shapes()
    schedule = draft_schedule(shapes, layers, blocks)
    tiles = schedule.units()[:, :, 2].clamp_min(0).sum(1)
    assert int(tiles.sum()) == layers * sum(-(-rows // 128) * -(-k // 64) for rows, k in shapes)
    assert int(tiles.max() - tiles.min()) <= 1
    assert schedule.slots <= 2 * blocks + 2 * -(-inter // 64)


@pytest.mark.parametrize(("major", "columns", "expected"), [(9, 1024, 66), (9, 4096, 132), (10, 1024, 132)])
def test_small_layers_take_half_of_the_multiprocessors(
    monkeypatch: pytest.MonkeyPatch, major: int, columns: int, expected: int
) -> None:
    properties = SimpleNamespace(major=major, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    # 16 and 64 MB a layer
    matrices = [torch.empty(2, 2048, columns, dtype=torch.bfloat16, device="meta") for _ in range(4)]
    assert default_blocks(matrices, torch.device("cuda")) == expected
    assert default_blocks(matrices, torch.device("cpu")) == 1

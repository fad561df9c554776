"""The CUDA kernels of csrc, run on the CPU by python_tests/emulator, pass tests that are written for a GPU.

Each check is a test of another module with `torch.ops.dflash` replaced by `torch.ops.dflash_emulated`: the same schemas
and checks, the CUDA side's launch code and the kernels' own source. Every check runs with threads and CTAs in three
orders, so that a barrier that is missing shows, and the last tests take barriers and bounds away to see that it does.

The emulated device says which compute capability it has: 12.0 has neither wgmma nor tcgen05, and all of csrc/smxx
serves it; 9.0 (csrc/sm90) and 10.0 (csrc/sm100) get the checks with many rows. What an emulator cannot show is listed
in CONTRIBUTING.md.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_alloc
import test_dflash2
import test_draft
import test_draft_fp8
import test_draft_layer
import test_draft_nvfp4
import test_draft_packed
import test_draft_sharded
import test_gemm_fp8
import test_gemm_nvfp4
import test_head
import test_head_fp8
import test_head_packed
import test_inject
import test_lm_head
import test_quantize
import test_verify
import test_verify_sampled
import torch
from emulator.build import ROOT, build, missing
from test_draft import Case

if reason := missing():
    pytest.skip(f"the kernels cannot be built for the CPU: {reason}", allow_module_level=True)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FOLDER = ROOT / "build" / "emulator"
LIBRARY = "DFLASH_EMULATED_LIBRARY"  # of the mutation checks: the library to test

# Order of threads and CTAs (emulator.h), multiprocessors: with few, launches take the paths of a full GPU.
ORDERS = {"forward": (0, 132), "reversed": (1, 148), "random": (2, 4)}

# Compute capability, and what multiplies many rows there: mma.sync, wgmma, tcgen05 (Product in emulator.h).
MULTIPLIERS = {12: 0, 9: 1, 10: 2}


class Emulator:
    def __init__(self, library: ctypes.CDLL, order: str):
        self.library, self.order = library, order
        library.emulator_products.restype = ctypes.c_uint64
        self.configure(12)

    def configure(self, major: int, multiprocessors: int | None = None) -> None:
        order, usual = ORDERS[self.order]
        self.library.emulator_configure(order, ctypes.c_uint64(1234), multiprocessors or usual, major)
        self.multipliers()

    def multipliers(self) -> set[int]:
        """What has multiplied since the last call."""
        return {kind for kind in MULTIPLIERS.values() if self.library.emulator_products(kind) > 0}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    path = os.environ.get(LIBRARY) or str(build(FOLDER))
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


@pytest.fixture(params=ORDERS)
def emulated(request: pytest.FixtureRequest, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    monkeypatch.setattr(torch.ops, "dflash", torch.ops.dflash_emulated)
    return Emulator(library, request.param)


def calls(function: Callable[..., None], *arguments: dict[str, Any]) -> list[Any]:
    """Parameters of a check: `function` with each of `arguments`."""
    name = f"{function.__module__.removeprefix('test_')}-{function.__name__.removeprefix('test_')}"
    return [pytest.param(function, given, id=f"{name}-{i}") for i, given in enumerate(arguments or ({},))]


def blocks(batch: int, block_size: int, vocab: int, dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    return {"batch": batch, "block_size": block_size, "vocab": vocab, "dtype": dtype, **more}


def heads(rows: int, hidden_size: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {"rows": rows, "hidden_size": hidden_size, "vocab": vocab, **more}


def gemms(m: int, n: int, k: int, **more: Any) -> dict[str, Any]:
    return {"m": m, "n": n, "k": k, **more}


def drafts(*contexts: int, layers: int = 1, **more: Any) -> dict[str, Any]:
    values = {"H": 64, "I": 32, "windows": (0,) * layers, "causal": (0,) * layers, **more}
    return {"case": Case(contexts=contexts, **values)}


CHECKS = [
    *calls(
        test_verify.test_top1_matches_reference,
        {"batch": 3, "block_size": 7, "index": torch.int32},
        {"batch": 64, "block_size": 32, "index": torch.int64},
        {"batch": 5, "block_size": 1, "index": torch.int64},
    ),
    *calls(
        test_verify.test_logits_match_reference,
        *(blocks(1, 16, 4099, dtype, lazy=lazy) for dtype in (BF16, FP16, FP32) for lazy in (0, 1)),
        blocks(1, 1, 20000, FP32, lazy=0),  # many spans a row
        blocks(3, 7, 5, BF16, lazy=-1),
        blocks(2, 8, 1, FP16, lazy=1),
        blocks(2, 32, 2049, BF16, lazy=1),
        blocks(12, 16, 83, BF16, lazy=-1),
        blocks(5, 12, 20001, BF16, lazy=1),  # several slices a row, rows of any alignment
        blocks(3, 32, 9000, FP32, lazy=1),
        blocks(257, 3, 301, FP16, lazy=1),  # more requests than a warp looks at
        *(blocks(400, 2, 9, BF16, lazy=lazy) for lazy in (0, 1)),  # several rounds of the warps of a CTA
    ),
    *calls(test_verify.test_ties_across_the_parts_of_a_row, *({"dtype": BF16, "lazy": lazy} for lazy in (0, 1))),
    *calls(test_verify.test_every_place_to_stop, *({"block_size": size, "lazy": 1} for size in (1, 2, 32))),
    *calls(
        test_verify.test_long_rows_of_any_alignment,
        *({"dtype": dtype, "lazy": lazy} for dtype in (FP16, FP32) for lazy in (0, 1)),
    ),
    *calls(test_verify.test_rows_of_millions, {"lazy": 0}),
    *calls(test_verify.test_as_many_requests_as_a_lazy_block_hears_of_and_more, {"batch": 8192}, {"batch": 8193}),
    *calls(test_verify.test_empty_batch),
    *calls(test_verify.test_many_units_match_reference, *({"dtype": t, "lazy": 1} for t in (BF16, FP32))),
    *calls(
        test_verify.test_row_strides_and_alignment,
        *({"dtype": dtype, "lazy": lazy} for dtype in (BF16, FP32) for lazy in (0, 1)),
    ),
    *calls(test_verify.test_nan_infinities_and_zeros, *({"dtype": t, "lazy": 1} for t in (BF16, FP16, FP32))),
    *calls(test_verify.test_poison_past_the_mismatch_is_harmless),
    *calls(test_verify.test_guesses_outside_the_vocabulary, *({"lazy": lazy} for lazy in (0, 1))),
    *calls(test_verify.test_sharded_equals_unsharded, {"dtype": BF16, "shards": 4}),
    *calls(test_verify.test_shard_values_are_the_logits),
    *calls(
        test_verify_sampled.test_matches_reference,
        *(blocks(8, 9, 301, BF16, sparse=True, rule=rule) for rule in ("token", "block")),
        blocks(4, 16, 83, FP32, sparse=True, rule="token"),
        blocks(3, 32, 61, FP16, sparse=False, rule="block"),
        blocks(7, 1, 50, FP32, sparse=False, rule="token"),
    ),
    *calls(test_verify_sampled.test_mask_and_bias, {"index": torch.int32, "rule": "block"}),
    *calls(test_verify_sampled.test_nan_and_infinities),
    *calls(
        test_verify_sampled.test_few_tokens_of_many,
        *({"vocab": 5003, "dtype": dtype, "rule": rule} for dtype, rule in ((BF16, "token"), (FP32, "block"))),
        {"vocab": 20000, "dtype": FP16, "rule": "token"},
    ),
    *calls(test_verify_sampled.test_few_tokens_masked_and_biased, {"rule": "token"}, {"rule": "block"}),
    *calls(test_verify_sampled.test_flat_rows_among_others),
    *calls(test_verify_sampled.test_one_workspace_for_all),
    *calls(test_alloc.test_prepare_block, {"batch": 7, "block": 5, "index": torch.int32, "table_dtype": torch.int64}),
    *calls(
        test_alloc.test_random_schedule_equals_the_oracle,
        {"page_size": 1, "index": torch.int64},
        {"page_size": 16, "index": torch.int32},
    ),
    *calls(test_alloc.test_batch_sizes, *({"batch": batch, "page_size": 16} for batch in (33, 513, 1025))),
    *calls(test_alloc.test_fused_equals_reserve_then_prepare, {"page_size": 3}),
    *calls(test_alloc.test_block_reaches_past_the_pages),
    *calls(test_alloc.test_long_row),
    *calls(test_alloc.test_strided_table_and_expanded_lengths),
    *calls(test_alloc.test_padding_rows_take_no_part),
    *calls(
        test_draft.test_bf16_matches_reference,
        drafts(5, T=7, layers=2),
        drafts(70, 3, T=10, heads=(3, 1), index=torch.int32),
        drafts(64, 65, T=8, heads=(8, 2), D=128),
        drafts(150, T=16, heads=(9, 1), H=72),
        drafts(33, T=32, heads=(6, 2), D=96, causal=(1,)),
        drafts(100, T=16, D=256),
        drafts(40, T=16, D=32, rotary=0, scale=0.3),
        drafts(150, 40, T=16, windows=(5, 33), causal=(0, 1), rotary=32),
        drafts(128, 20, T=8, qk_norm=False, biases=True, windows=(64,), heads=(16, 2)),
        drafts(700, T=16, heads=(4, 1), windows=(300,)),  # keys in several parts
        drafts(70, 3, T=5, D=96, rotary=20, qk_norm=False),  # partners that do not lie 16 bytes apart
        drafts(9, T=4, H=4104, heads=(2, 1)),  # norm: rows in twice as many registers
        drafts(4, T=2, H=8200, heads=(1, 1)),  # norm: rows that are read twice
        drafts(30, T=8, H=1024, I=1024, heads=(2, 1)),  # K of the products in two parts
        drafts(30, T=8, I=8192, heads=(2, 1)),  # 16 rows, wide tiles
        drafts(9, 2, 5, 3, T=12, I=5120, heads=(2, 1)),  # 64 rows, wide tiles; K in eight parts
        drafts(*range(20), T=7, I=2560, heads=(2, 1)),  # 128 rows
    ),
    *calls(
        test_draft_layer.bf16_matches_reference,
        {**drafts(40, 3, T=7, heads=(9, 3), I=48, layers=2), "world": 4},
        {**drafts(70, T=16, heads=(4, 1), D=128, windows=(33,), biases=True), "world": 1},
    ),
    *calls(test_draft_layer.test_out_may_be_x),
    *calls(
        test_draft.test_uniform_attention_shows_the_visible_keys,
        *({"context": context, "causal": 1, "window": window} for context, window in ((0, 4), (64, 0), (129, 70))),
    ),
    *calls(
        test_draft_packed.test_packed_matches_reference,
        *({"case": case, "blocks": None} for case in test_draft_packed.CASES),
        {**drafts(40, T=16), "blocks": 1},
    ),
    *calls(
        test_draft_packed.test_quantized_matches_reference,
        *({"case": test_draft_packed.FORMAT_CASES[1], "name": name} for name in test_draft_packed.FORMATS),
        *({"case": test_draft_packed.FORMAT_CASES[0], "name": name} for name in ("fp8", "int4-g64")),
        *({"case": test_draft_packed.FORMAT_CASES[2], "name": name} for name in ("fp8", "e2m1-g128")),
    ),
    *calls(
        test_draft_sharded.test_ranks_give_the_whole,
        *({"case": case, "world": 2, "on": "cpu"} for case in test_draft_sharded.CASES),
        {"case": test_draft_sharded.CASES[1], "world": 3, "on": "cpu"},
        {"case": test_draft_sharded.CASES[2], "world": 4, "on": "cpu"},
    ),
    *calls(test_draft_sharded.test_ranks_of_codes_give_the_whole, {"name": "fp8", "on": "cpu"}),
    *calls(test_draft_sharded.test_ids_outside_the_vocabulary, {"on": "cpu"}),
    *calls(test_draft_sharded.test_one_rank_is_the_packed_pass),
    *calls(test_draft_sharded.test_sharded_drafter_is_one_kernel, {"on": "cpu"}),
    *calls(test_draft_sharded.test_a_rank_that_never_comes),
    *calls(test_draft_sharded.test_ranks_find_the_best, *({"world": world, "on": "cpu"} for world in (2, 3))),
    *calls(test_draft_sharded.test_merge_of_one_rank),
    *calls(
        test_inject.test_matches_reference,
        *({"shape": shape, "index": torch.int32} for shape in ({}, {"block": 16, "hidden": 96, "dim": 64})),
        {"shape": {"batch": 9, "dim": 64, "heads": 3}, "index": torch.int64},  # gathered, and whole heads
        {"shape": {"batch": 14, "block": 7, "dim": 128, "heads": 1, "norm": False}, "index": torch.int32},
        {"shape": {"batch": 70, "block": 1, "dim": 256, "heads": 1, "num_taps": 1}, "index": torch.int64},
    ),
    *calls(
        test_inject.test_options_match_reference,
        {"shape": {}, "options": test_inject.OPTIONS[3]},
        {"shape": {"batch": 11, "dim": 64}, "options": test_inject.OPTIONS[0]},
        {"shape": {"batch": 11, "dim": 64}, "options": test_inject.OPTIONS[3]},
        {"shape": {"batch": 2, "block": 3, "dim": 256, "heads": 1, "num_taps": 1}, "options": test_inject.OPTIONS[4]},
    ),
    *calls(test_inject.test_options_pass_a_plan_by),
    *calls(test_inject.test_codes_of_every_bf16_value),
    *calls(
        test_inject.test_shards_equal_the_whole,
        {"shape": {"hidden": 128, "heads": 4}, "ranks": 4},
        {"shape": {"batch": 11, "hidden": 64, "heads": 2, "dim": 64, "tap_norm": True, "fp8": "scales"}, "ranks": 8},
        {"shape": {"batch": 11, "hidden": 64, "heads": 2, "layers": 1}, "ranks": 1},
    ),
    *calls(test_inject.test_rounding_is_exact_where_every_product_is),
    *calls(test_inject.test_dead_rows_are_not_read),
    *calls(
        test_inject.test_a_small_workspace_means_chunks_not_other_results,
        *({"times": times, "workspace_taps": taps} for times, taps in ((1, 0), (3, 0), (3, 3))),
    ),
    *calls(test_inject.test_many_requests, {"batch": 12, "block": 8}, {"batch": 2070, "block": 1}),
    *calls(test_inject.test_strided_caches, {"dim": 64, "offset": 0}, {"dim": 64, "offset": 1}),
    *calls(
        test_inject.test_plan_matches_reference,
        *(
            {"shape": shape, "blocks": blocks, "index": torch.int32}
            for shape, blocks in (
                ({"batch": 1, "block": 16, "hidden": 256, "dim": 128, "layers": 1}, 3),
                ({"batch": 2, "block": 16, "hidden": 136, "num_taps": 2, "dim": 64, "heads": 3, "rotary_dim": 16}, 4),
                ({"batch": 4, "block": 16, "hidden": 64, "num_taps": 2, "dim": 128, "heads": 1}, 3),
                ({"batch": 5, "block": 7, "hidden": 72, "num_taps": 5, "heads": 3, "dim": 18, "rotary_dim": 6}, 4),
                ({"batch": 1, "block": 1, "num_taps": 1, "layers": 1, "heads": 1, "dim": 2, "hidden": 8}, 1),
            )
        ),
    ),
    *calls(test_inject.test_plan_rows_do_not_depend_on_their_company, {"blocks": 3}),
    *calls(test_inject.test_plan_dead_rows_are_not_read),
    *calls(test_inject.test_plan_takes_no_part_beyond_64_rows),
    *calls(
        test_head.test_exact_where_sums_are,
        heads(1, 8, 1, with_bias=False),
        heads(7, 288, 1000, with_bias=True),
        heads(17, 64, 128, with_bias=False),
        heads(64, 192, 257, with_bias=True),
        heads(65, 40, 1025, with_bias=False),
    ),
    *calls(test_head.test_topk_sizes, *({"k": k} for k in (2, 33, 64))),
    *calls(test_head.test_topk_of_one_crowded_tile),
    *calls(test_head.test_order_of_special_values, {"rows": 3}),
    *calls(
        test_head_packed.test_exact_where_sums_are,
        *(heads(*shape, with_bias=i % 2 == 0) for i, shape in enumerate(test_head_packed.SHAPES)),
    ),
    *calls(
        test_head_packed.test_exact_on_codes,
        *({"name": name, "rows": 16, "groups": 5, "vocab": 900} for name in test_head_packed.FORMATS),
        *({"name": name, "rows": 40, "groups": 2, "vocab": 200} for name in ("fp8", "int4-g128")),
    ),
    *calls(test_head_packed.test_some_tokens, {"blocks": 3}),
    *calls(test_head_packed.test_order_of_special_values, {"rows": 3}),
    *calls(
        test_dflash2.test_walk_equals_reference_on_exact_sums,
        *(
            {"batch": batch, "slots": slots, "top_k": top_k, "rank": rank, "temperature": True, "index": torch.int64}
            for batch, slots, top_k, rank in ((3, 15, 16, 256), (2, 32, 32, 256), (5, 1, 1, 8), (4, 5, 7, 72))
        ),
    ),
    *calls(test_dflash2.test_conv_other_taps_and_groups, {"taps": 3, "group_size": 8}, {"taps": 2, "group_size": 24}),
    *calls(test_dflash2.test_conv_looks_back_inside_its_block_only),
    *calls(test_dflash2.test_conv_strided_and_unaligned),
    *calls(
        test_quantize.test_codes_are_torchs,
        *({"shape": shape} for shape in ((3, 72), (5, 2056), (2, 6152), (1, 16392))),
    ),
    *calls(test_quantize.test_every_bf16_value),
    *calls(test_quantize.test_zeros_tiny_rows_nan_and_infinities),
    *calls(
        test_quantize.test_norm_that_quantises_is_norm_then_quantise,
        *({"shape": shape} for shape in ((5, 64), (2, 4104))),
    ),
    *calls(
        test_quantize.test_nvfp4_is_the_nearest,
        *({"shape": shape} for shape in ((3, 96), (130, 64), (2, 2080), (1, 6176))),
    ),
    *calls(test_quantize.test_nvfp4_ties_go_to_even),
    *calls(test_quantize.test_nvfp4_zeros_tiny_rows_nan_and_infinities),
]


@pytest.mark.parametrize(("function", "arguments"), CHECKS)
def test_kernels_pass(
    function: Callable[..., None],
    arguments: dict[str, Any],
    emulated: Emulator,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(function, arguments, {"device": "cpu", "rng": rng, "monkeypatch": monkeypatch})
    assert emulated.multipliers() <= {MULTIPLIERS[12]}


def run(function: Callable[..., None], arguments: dict[str, Any], fixtures: dict[str, Any]) -> None:
    wanted = inspect.signature(function).parameters
    function(**arguments, **{name: value for name, value in fixtures.items() if name in wanted})


# Tiles of 128, 160, 192 and 256 columns, single ones and pairs that share W, K whole and cut in two and four, sources
# of A that end inside a step, gated and plain, dead rows; a few multiprocessors take several tiles each.
MANY_ROWS = [
    *calls(
        test_inject.test_matches_reference,
        *(
            {"shape": shape, "index": torch.int32}
            for shape in (
                {"batch": 13, "block": 5, "num_taps": 1, "heads": 1, "dim": 32},
                {"batch": 127, "block": 1, "hidden": 72, "heads": 3, "dim": 24, "layers": 3},  # sources end early
                {"batch": 16, "block": 8, "hidden": 1024, "num_taps": 2, "heads": 1, "dim": 128, "layers": 1},
                {"batch": 20, "block": 10, "hidden": 512, "num_taps": 3, "heads": 3, "dim": 64},
                {"batch": 40, "block": 8, "hidden": 320, "heads": 4, "dim": 128},
                {"batch": 34, "block": 8, "hidden": 576, "num_taps": 1, "heads": 3, "dim": 64, "layers": 4},
                {"batch": 30, "block": 10, "hidden": 72, "heads": 3, "dim": 18, "layers": 3},  # width not of eights
                # clusters of four: two row tiles, K in two parts
                {"batch": 34, "block": 8, "hidden": 1280, "num_taps": 1, "heads": 8, "dim": 32, "layers": 4},
            )
        ),
    ),
    *calls(
        test_inject.test_options_match_reference,
        {"shape": {"batch": 11, "dim": 64, "hidden": 96}, "options": test_inject.OPTIONS[3]},
        {"shape": {"batch": 11, "dim": 128, "heads": 1}, "options": test_inject.OPTIONS[4]},
    ),
    *calls(
        test_inject.test_shards_equal_the_whole,
        {"shape": {"batch": 11, "hidden": 64, "heads": 2, "dim": 64, "tap_norm": True}, "ranks": 4},
    ),
    *calls(test_inject.test_many_requests, {"batch": 12, "block": 8}),
    *calls(
        test_draft.test_bf16_matches_reference,
        drafts(*(b % 5 for b in range(18)), T=7, H=72, I=88, heads=(2, 1)),
        drafts(*(b % 5 for b in range(9)), T=15, H=576, I=384, heads=(9, 3), biases=True),
        drafts(*(b % 5 for b in range(34)), T=8, H=256, I=512, heads=(4, 2)),
    ),
    *calls(
        test_head.test_exact_where_sums_are,
        heads(129, 72, 300, with_bias=True),
        heads(300, 264, 1025, with_bias=False),
    ),
    *calls(test_head.test_verify, {"batch": 13, "block": 16, "index": torch.int32}),
    # The same in e4m3, from one row on.
    *calls(
        test_gemm_fp8.test_exact_where_sums_are,
        *(gemms(*shape, bias=i % 2 == 0, residual=i % 3 == 0) for i, shape in enumerate(test_gemm_fp8.SHAPES)),
        gemms(300, 512, 2320, bias=True, residual=True),  # clusters of four
    ),
    *calls(
        test_gemm_fp8.test_matches_reference,
        gemms(33, 192, 2880, bias=1, residual=0, gated=1),
        gemms(130, 576, 576, bias=1, residual=1, gated=0),
        gemms(130, 1152, 576, bias=1, residual=0, gated=1),
        gemms(520, 256, 272, bias=0, residual=0, gated=1),
    ),
    *calls(test_gemm_fp8.test_every_code),
    *calls(test_gemm_fp8.test_scales_belong_to_their_rows),
    *calls(test_gemm_fp8.test_rows_do_not_depend_on_their_company),
    *calls(test_gemm_fp8.test_strided_rows),
    *calls(test_gemm_fp8.test_out_may_be_the_residual),
    *calls(
        test_head_fp8.test_exact_where_sums_are,
        *(heads(*shape, bias=i % 2 == 0) for i, shape in enumerate(test_head_fp8.SHAPES)),
    ),
    *calls(test_head_fp8.test_random_floats, heads(130, 576, 300)),
    *calls(test_head_fp8.test_special_values),
    *calls(test_head_fp8.test_strided_rows),
    *calls(test_lm_head.test_the_vocabulary_need_not_fill_tiles),
]


@pytest.mark.parametrize("major", [9, 10])
@pytest.mark.parametrize(("function", "arguments"), MANY_ROWS)
def test_kernels_of_many_rows_pass(
    function: Callable[..., None], arguments: dict[str, Any], major: int, emulated: Emulator, rng: torch.Generator
) -> None:
    for multiprocessors in (4, None):
        emulated.configure(major, multiprocessors)
        run(function, arguments, {"device": "cpu", "rng": rng})
        # mma.sync still does what has few rows, and attention.
        assert emulated.multipliers() - {MULTIPLIERS[12]} == {MULTIPLIERS[major]}


# In nvfp4, from one row on, on 10.x only.
NVFP4 = [
    *calls(
        test_gemm_nvfp4.test_exact_where_sums_are,
        *(gemms(*shape, bias=i % 2 == 0, residual=i % 3 == 0) for i, shape in enumerate(test_gemm_nvfp4.SHAPES)),
        gemms(300, 512, 4384, bias=True, residual=True),  # clusters of four
    ),
    *calls(
        test_gemm_nvfp4.test_matches_reference,
        gemms(33, 192, 2880, bias=1, residual=0, gated=1),
        gemms(130, 576, 576, bias=1, residual=1, gated=0),
        gemms(130, 1168, 576, bias=1, residual=0, gated=1),
        gemms(520, 256, 288, bias=0, residual=0, gated=1),
    ),
    *calls(test_gemm_nvfp4.test_every_code_and_every_scale),
    *calls(test_gemm_nvfp4.test_scales_belong_to_their_rows),
    *calls(test_gemm_nvfp4.test_nan_scales_spoil_their_row_only),
    *calls(test_gemm_nvfp4.test_rows_do_not_depend_on_their_company),
    *calls(test_gemm_nvfp4.test_strided_rows),
    *calls(test_gemm_nvfp4.test_out_may_be_the_residual),
    *calls(test_gemm_nvfp4.test_a_quantised_layer),
]
NVFP4_CHAIN = [
    *calls(
        test_draft_nvfp4.test_matches_reference,
        drafts(5, T=7, layers=2),
        drafts(*(b % 5 for b in range(18)), T=8, H=96, I=96, heads=(2, 1), D=128, biases=True, qk_norm=False),
    ),
    *calls(test_draft_nvfp4.test_empty_batch),
]


@pytest.mark.parametrize(("function", "arguments"), NVFP4)
def test_nvfp4_passes(
    function: Callable[..., None], arguments: dict[str, Any], emulated: Emulator, rng: torch.Generator
) -> None:
    for multiprocessors in (4, None):
        emulated.configure(10, multiprocessors)
        run(function, arguments, {"device": "cpu", "rng": rng})
        assert emulated.multipliers() == {MULTIPLIERS[10]}


@pytest.mark.parametrize(("function", "arguments"), NVFP4_CHAIN)
def test_chain_of_nvfp4_passes(
    function: Callable[..., None], arguments: dict[str, Any], emulated: Emulator, rng: torch.Generator
) -> None:
    emulated.configure(10)
    run(function, arguments, {"device": "cpu", "rng": rng})


def test_nvfp4_needs_its_tensor_cores(emulated: Emulator, rng: torch.Generator) -> None:
    """9.x and 12.x have no kernel, which is said; 10.x launches nothing for no rows."""
    inputs = test_gemm_nvfp4.random_inputs(rng, "cpu", 33, 64, 160)
    for major in (9, 12):
        emulated.configure(major)
        with pytest.raises(ValueError, match="gemm_nvfp4: a must be on a device whose .*of compute capability 10.x"):
            test_gemm_nvfp4.run(inputs)
    emulated.configure(10)
    test_gemm_nvfp4.test_no_rows(160, True, "cpu", rng)
    assert emulated.multipliers() == set()


# Few rows and many, gated, with biases and residuals; norms that quantise, and one of rows too wide for that.
FP8_CHAIN = [
    *calls(
        test_draft_fp8.test_matches_reference,
        drafts(5, T=7, layers=2),
        drafts(70, 3, T=10, heads=(3, 1), index=torch.int32),
        drafts(*(b % 5 for b in range(18)), T=8, H=80, I=48, heads=(2, 1), D=128, biases=True, qk_norm=False),
        drafts(*(b % 5 for b in range(34)), T=8, H=256, I=512, heads=(4, 2)),
        drafts(3, T=2, H=8208, I=16, heads=(1, 1)),
    ),
    *calls(test_draft_fp8.test_each_scale_is_of_its_row, {"half": "attention"}, {"half": "mlp"}),
    *calls(test_draft_fp8.test_empty_batch),
]


@pytest.mark.parametrize("major", [9, 10])
@pytest.mark.parametrize(("function", "arguments"), FP8_CHAIN)
def test_chain_of_fp8_passes(
    function: Callable[..., None], arguments: dict[str, Any], major: int, emulated: Emulator, rng: torch.Generator
) -> None:
    for multiprocessors in (4, None):
        emulated.configure(major, multiprocessors)
        run(function, arguments, {"device": "cpu", "rng": rng})


def test_chain_of_fp8_needs_a_device_that_multiplies_it(emulated: Emulator, rng: torch.Generator) -> None:
    """12.x has no kernel for it, whatever the batch."""
    for contexts in ((), (5,)):
        inputs = test_draft_fp8.make_codes(Case(contexts=contexts), rng, "cpu")
        with pytest.raises(
            ValueError, match="draft_forward_fp8: block_ids must be on a device of compute capability 9.0"
        ):
            test_draft_fp8.run(inputs)


# Rows up to which mma.sync multiplies: of a GEMM, of the LM head.
FEW_ROWS = {12: (120, 192), 9: (32, 128), 10: (32, 32)}


@pytest.mark.parametrize("major", MULTIPLIERS)
def test_the_device_decides_what_multiplies_many_rows(major: int, emulated: Emulator, rng: torch.Generator) -> None:
    """wgmma on 9.x, tcgen05 on 10.x; on 12.x, which has neither, and for few rows, mma.sync."""
    emulated.configure(major)
    of_gemm, of_head = FEW_ROWS[major]
    for rows, expected in ((of_gemm, MULTIPLIERS[12]), (of_gemm + 8, MULTIPLIERS[major])):
        test_inject.check_against_reference(test_inject.make(rng, "cpu", batch=rows // 8, block=8))
        assert emulated.multipliers() == {expected}
    for rows, expected in ((of_head, MULTIPLIERS[12]), (of_head + 1, MULTIPLIERS[major])):
        hidden, weight = test_head.integers(rng, rows, 64), test_head.integers(rng, 200, 64)
        test_head.run_argmax(hidden, weight)
        assert emulated.multipliers() == {expected}


def test_fp8_needs_its_tensor_cores(emulated: Emulator, rng: torch.Generator) -> None:
    """12.x has no kernel, which is said; 9.x and 10.x launch nothing for no rows."""
    inputs = test_gemm_fp8.random_inputs(rng, "cpu", 33, 64, 144)
    with pytest.raises(ValueError, match="gemm_fp8: a must be on a device whose kernel was built"):
        test_gemm_fp8.run(inputs)
    for major in (9, 10):
        emulated.configure(major)
        test_gemm_fp8.test_no_rows(144, True, "cpu", rng)
    assert emulated.multipliers() == set()


# ---- the checks above can fail ------------------------------------------------------------------------------------

# File, text, replacement; checks of which one must fail.
MUTATIONS = [
    pytest.param(
        "smxx/inject/gather.cu",
        "if (b < p.batch) first_of[b] = at;",
        "if (b < p.batch) first_of[b] = through - sum;",
        "inject-many_requests",
        id="live tokens of earlier warps are forgotten",
    ),
    pytest.param(
        "smxx/norm/rmsnorm.cu",
        "column / part_columns * p.part_stride",
        "column / part_columns * p.x_stride",
        "inject-shards_equal",
        id="parts of a row lie side by side",
    ),
    pytest.param(
        "smxx/verify/row_argmax.cuh",
        "min(lane + 32 * i, count - 1)",
        "min(lane + 32 * i, 32 * kVectors - 1)",
        "verify-logits_match or verify-long_rows or verify-many_units",
        id="verify_block takes what follows a short slice for a part of it",
    ),
    pytest.param(
        "smxx/verify/row_argmax.cuh",
        "best = better ? (second ? i + 1 : i) : best;",
        "best = better ? i : best;",
        "verify-logits_match or verify-long_rows",
        id="verify_block takes the wrong vector of two",
    ),
    pytest.param(
        "smxx/verify/verify_block.cu",
        "if (high > bar_high && others <= bar_high) on_first();",
        "if (high >= bar_high && others <= bar_high) on_first();",
        "verify-many_units or verify-every_place or verify-logits_match",
        id="verify_block, lazy, takes the guess itself for proof of a mismatch",
    ),
    pytest.param(
        "smxx/verify/verify_block.cu",
        "== block_size;",
        "== 1;",
        "verify-logits_match",
        id="verify_block accepts before all rows are there",
    ),
    pytest.param(
        "smxx/verify/verify_block.cu",
        "p.workspace.words[i] = 0;",
        ";",
        "verify-logits_match",
        id="verify_block, lazy, leaves words behind",
    ),
    pytest.param(
        "smxx/verify/verify_block.cu",
        "- 1)) == slices.per_row.value;",
        "- 1)) == min(2u, slices.per_row.value);",
        "verify-many_units or verify-logits_match",
        id="verify_block takes two slices for the whole row",
    ),
    pytest.param(
        "smxx/verify/verify_block.cu",
        "static_cast<unsigned>(__ffs(needed)) - 1;",
        "static_cast<unsigned>(__ffs(needed));",
        "verify-many_units or verify-every_place or verify-logits_match",
        id="verify_block, lazy, leaves out a needed slice behind dead ones",
    ),
    pytest.param(
        "smxx/verify/verify_block.cu",
        "if (mine > others) low += others",
        "if (false) low += others",
        "verify-logits_match or verify-many_units",
        id="verify_block forgets what a larger key wiped out",
    ),
    pytest.param(
        "smxx/verify/verify_block.cu",
        "return (static_cast<unsigned>(state) & up_to_end) == up_to_end;",
        "return true;",
        "verify-many_units or verify-logits_match or verify-every_place",
        id="verify_block, lazy, decides before the rows ahead are complete",
    ),
    pytest.param(
        "smxx/verify/verify_block_sampled.cu",
        "cluster.sync();  // all CTAs have read left_count",
        "// all CTAs have read left_count",
        "verify_sampled-matches",
        id="verify_block_sampled leaves its cluster early",
    ),
    pytest.param(
        "smxx/verify/verify_sampled_topk.cu",
        "return min(prefix | ((1u << (32 - kBoundBits)) - 1), kOut - 1);",
        "return min(prefix, kOut - 1);",
        "verify_sampled-few_tokens",
        id="a bound within which there are too few tokens",
    ),
    pytest.param(
        "smxx/verify/verify_sampled_topk.cu",
        "most * (1.0 + 1.0 / (1 << 18))",
        "most * 0.01",
        "verify_sampled-few_tokens or verify_sampled-matches",
        id="a draft token is taken for rejected that may be accepted",
    ),
    pytest.param(
        "smxx/verify/verify_sampled_topk.cu",
        "atomicMax(&next, from + unneeded)",
        "atomicMax(&next, from + unneeded + 1)",
        "verify_sampled-few_tokens or verify_sampled-matches",
        id="a needed tile behind those of rejected rows is left out",
    ),
    pytest.param(
        "smxx/verify/verify_block_sampled.cu",
        "reinterpret_cast<uint4*>(p.workspace.keys)[i] = make_uint4(0, 0, 0, 0);",
        "",
        "verify_sampled-matches or verify_sampled-few_tokens",
        id="keys are left from one call to the next",
    ),
    pytest.param(
        "smxx/verify/verify_block_sampled.cu",
        "p.workspace.progress(0)[i] = 0;",
        "",
        "verify_sampled-matches",
        id="the front of the workspace is not cleared",
    ),
    pytest.param(
        "smxx/alloc/alloc.cu", "  cluster_wait();\n", "", "alloc-batch_sizes", id="the allocator does not wait"
    ),
    pytest.param(
        "smxx/gemm/gemm_bf16.cu",
        "  cluster.sync();\n#pragma",
        "#pragma",
        "draft-bf16_matches",
        id="the GEMM adds up before all have written",
    ),
    pytest.param(
        "smxx/quantize/rows.cuh",
        "largest = fmaxf(largest, partial[w]);",
        "largest = fmaxf(largest, partial[0]);",
        "quantize-codes_are",
        id="the scale is that of the columns of the first warp",
    ),
    pytest.param(
        "smxx/draft/stream.cuh",
        "copy_async_wait<0>()",
        "copy_async_wait<1>()",
        "draft_packed-packed_matches",
        id="the persistent pass does not wait for Q",
    ),
    pytest.param(
        "smxx/draft/stream.cuh",
        "} while (!whole);",
        "} while (false && !whole);",
        "draft_sharded-ranks_give",
        id="parts of ranks are added before they are there",
    ),
    pytest.param(
        "smxx/draft/stream.cuh",
        "if (from != rank) store_relaxed_system(own + from * step + piece, nothing);",
        "",
        "draft_sharded-ranks_give",
        id="a rank takes the words of the last pass",
    ),
    pytest.param(
        "smxx/head/stream.cu",
        "    wait();\n    if (u.stage == kPublish)",
        "    if (u.stage == kPublish)",
        "head_packed-exact_where",
        id="the head's first block does not wait for the others' keys",
    ),
    pytest.param(
        "smxx/stream/stream.cuh",
        "            if (tile + n == tiles - 1) {\n              float scale",
        "            if (tile + n == 0) {\n              float scale",
        "head_packed-exact_on_codes",
        id="scales of rows count only for the first tile",
    ),
    pytest.param(
        "smxx/attention/block_attention.cu",
        "copy_async_wait<kAhead - 1>();",
        "copy_async_wait<kAhead>();",
        "draft-bf16_matches",
        id="attention does not wait for its copies",
    ),
    pytest.param(
        "smxx/stream/stream.cuh",
        "} while (!whole);",
        "} while (false && !whole);",
        "inject-plan_matches",
        id="parts of sums are added before they are there",
    ),
    pytest.param(
        "smxx/inject/stream.cu",
        "u.row_tile * kMaxTokens + token] = sum",
        "u.row_tile * kMaxTokens + token] = u.contributors == 1 ? sum : 0.0f",
        "inject-plan_matches",
        id="a tile's squares count only if one block reads it all",
    ),
]


MUTATIONS += [
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "  barrier_wait(memory.full(), memory.parity());\n",
        "",
        "many_rows and head-exact",
        id="tiles are taken before their products are done",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "  barrier_wait(memory.empty(), memory.parity() ^ 1);\n",
        "",
        "many_rows and head-exact",
        id="accumulators are written over before they are taken",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "tcgen05_commit_pair(barrier, static_cast<uint16_t>(0b11u << pair.first));",
        "tcgen05_commit_pair(barrier, static_cast<uint16_t>(0b11u));",
        "many_rows and inject-matches",
        id="the wrong pair of the cluster is told of an empty stage",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "load(to, map, k, pair.index == 0 ? row0 : row1, full, pair);",
        "load(to, map, k, pair.index == 0 ? row1 : row0, full, pair);",
        "many_rows and head-exact",
        id="blocks of a pair keep each other's half of W",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "      barrier_arrive_at(memory.empty(), pair.first);",
        "      barrier_arrive(memory.empty());",
        "many_rows and head-exact",
        id="the second block of a pair gives its accumulator back to itself",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "k > 0 || step > 0);",
        "true);",
        "many_rows and head-exact",
        id="a tile's first product is added to what was there",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "w + 2 * step, kInstruction",
        "w + 4 * step, kInstruction",
        "many_rows and head-exact",
        id="products step too far along K in W",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "return 32 * (warp % 4) + 16 * (warp / 4);",
        "return 16 * warp;",
        "many_rows and head-exact",
        id="warps take rows that they do not reach",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "  tmem_wait_loads();\n",
        "",
        "many_rows and head-exact",
        id="rows are used before tensor memory has given them",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "  pin_registers(acc);\n  tcgen05_fence_before_signal();\n",
        "  pin_registers(acc);\n",
        "many_rows and head-exact",
        id="an accumulator is given back without a fence",
    ),
    pytest.param(
        "sm90/gemm/mainloop.cuh",
        "    wgmma_wait<1>();\n",
        "",
        "many_rows and inject-matches",
        id="stages are given back while wgmma reads them",
    ),
    pytest.param(
        "sm90/gemm/mainloop.cuh",
        "wgmma<C::kElementBytes>(",
        "wgmma<2>(",
        "many_rows and gemm_fp8",
        id="wgmma takes bytes for bf16",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "instruction<C::kElementBytes,",
        "instruction<2,",
        "many_rows and gemm_fp8",
        id="tcgen05 is told of bf16 where there are bytes",
    ),
    pytest.param(
        "smxx/many_rows/store.cuh",
        "p_.w_scale + width + column",
        "p_.w_scale + column",
        "many_rows and gemm_fp8",
        id="up is scaled as gate is",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "    if constexpr (C::kBlockScaled) copy_scales(pipe, state.stage, memory);\n",
        "    if constexpr (C::kBlockScaled) copy_scales(pipe, 0, memory);\n",
        "nvfp4 and gemm_nvfp4-exact",
        id="products of all stages but the first find no scales",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "w + step * many_rows::kScaleBlock / 16);",
        "w);",
        "nvfp4 and gemm_nvfp4-exact",
        id="all products of a stage take the scales of the first in W",
    ),
    pytest.param(
        "sm100/gemm/mainloop.cuh",
        "scales, scales + kBlockColumns, kInstruction,",
        "scales, scales, kInstruction,",
        "nvfp4 and gemm_nvfp4-exact",
        id="W has A's scales",
    ),
    pytest.param(
        "smxx/quantize/quantize_rows_nvfp4.cu",
        "lane / 2 % 4 * 8;",
        "lane / 2 % 4 * 4;",
        "quantize-nvfp4_is",
        id="scales of neighbouring groups overlap",
    ),
    pytest.param(
        "smxx/head/many_rows.cuh",
        "p.gemm.w_scale[column0 + column]",
        "p.gemm.w_scale[column]",
        "many_rows and head_fp8",
        id="vocabulary rows are scaled as those of the first tile are",
    ),
]


MUTATED = ("test_kernels_pass", "test_kernels_of_many_rows_pass", "test_nvfp4_passes")


@pytest.mark.parametrize(("file", "text", "replacement", "checks"), MUTATIONS)
def test_mutations_are_found(file: str, text: str, replacement: str, checks: str) -> None:
    library = build(FOLDER, {file: (text, replacement)})
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", checks]
    command += [f"{Path(__file__)}::{name}" for name in MUTATED]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, LIBRARY: str(library)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "\n1 failed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]

"""The predictions: the model recovers what made its rows and is judged by rows that it has not seen."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command_line
from bench import model, predict
from bench.cards import CARDS, PUBLISHED_STEPS, Card, Rates, card_of, rates
from bench.model import (
    FAMILIES,
    REASONS,
    Fit,
    Need,
    draft_handoffs,
    fit_all,
    left_out,
    need_of,
    not_modelled,
    superseded,
)
from bench.results import RESULTS
from bench.shapes import QWEN3_8B
from dflash_kernels.draft_stream import DENSE_TOKENS, FP8_TOKENS, MAX_TOKENS

H100 = CARDS["h100"]
HERE = Rates(H100, 3e12, 3e12, 8e14, "made up")


@pytest.fixture(scope="module")
def predictor() -> predict.Predictor:
    return predict.Predictor()


@pytest.fixture(scope="module", params=list(CARDS))
def card(request: pytest.FixtureRequest) -> Card:
    return CARDS[request.param]


def row(op: str, shape: str, dtype: str = "bf16", nbytes: float = 1e9, flops: float = 0.0) -> dict[str, Any]:
    return {"suite": "x", "op": op, "shape": shape, "dtype": dtype, "bytes": nbytes, "flops": flops, "stream": "read"}


TRUE = {
    "verify": {"fixed": 3.0, "read": 1.25},
    "stream": {
        "fixed": 6.0, "handoff": 2.0, "handoff of 64 tokens": 3.0, "read": 1.1, "sm": 1 / 700, "code": 0.03,
    },
}  # fmt: skip


def made_by(family: str, need: Need) -> float:
    return Fit(family, TRUE[family], 0).us(need, HERE)


def stream_needs() -> list[Need]:
    needs = []
    for handoffs in (1, 30):
        for tokens in (16, 64):
            for weights, codes in ((1e9, 0.0), (5e8, 1e9), (2e8, 8e8), (5e7, 0.0)):
                serial = {"fixed": 1.0, "handoff": handoffs, "handoff of 64 tokens": handoffs * (tokens - 16) / 48}
                flops = 2 * tokens * max(weights / 2, codes)
                needs.append(Need("stream", serial, weights, flops, flops, codes=codes))
    return needs


def test_a_fit_recovers_what_made_its_rows() -> None:
    needs = [Need("verify", {"fixed": 1}, bytes=size) for size in (5e6, 4e7, 2e8)]
    rows = [(need, made_by("verify", need)) for need in needs]
    rows += [(need, made_by("stream", need)) for need in stream_needs()]
    fits = fit_all(rows, HERE)
    for family, true in TRUE.items():
        assert not fits[family].idle
        for name, value in true.items():
            assert fits[family].values[name] == pytest.approx(value, rel=0.05), (family, name)
    unseen = list(left_out(rows, HERE, fits))
    for (_, us), guess in zip(rows, unseen, strict=True):
        assert guess == pytest.approx(us, rel=0.1)


def test_one_odd_row_does_not_drag_the_others() -> None:
    rows = [(need, made_by("stream", need)) for need in stream_needs()]
    odd = (rows[0][0], 3 * rows[0][1])
    fits = fit_all([odd, *rows[1:]], HERE)
    for need, us in rows[1:]:
        assert fits["stream"].us(need, HERE) == pytest.approx(us, rel=0.1)


def test_a_parameter_that_no_row_tells_is_named() -> None:
    """Rows of dense weights say nothing about codes: the first guess stays, and the description says so."""
    rows = [(need, made_by("stream", need)) for need in stream_needs() if not need.codes]
    fit = fit_all(rows, HERE)["stream"]
    assert "code" in fit.idle and fit.values["code"] == FAMILIES["stream"].first_guess()["code"]
    assert any("no row tells" in words for words in fit.describe())


def test_time_scales_with_the_card() -> None:
    fits = fit_all([(need, made_by("stream", need)) for need in stream_needs()], HERE)
    wide = Rates(CARDS["b200"], 6e12, 6e12, 16e14, "made up")
    streaming, waiting, working = stream_needs()[0], Need("stream", {"handoff": 100}, 1e3), stream_needs()[6]
    assert fits["stream"].bound(streaming, HERE) == "bytes" and fits["stream"].bound(working, HERE) == "SMs"
    assert fits["stream"].us(waiting, wide) == pytest.approx(fits["stream"].us(waiting, HERE))
    assert fits["stream"].us(streaming, wide) < 0.6 * fits["stream"].us(streaming, HERE)
    assert fits["stream"].us(working, wide) > 0.85 * fits["stream"].us(working, HERE), "SMs, not bandwidth, decide"


def test_rows_that_stream_are_the_packages() -> None:
    assert (model.FEW_ROWS, model.DENSE_ROWS, model.FP8_ROWS) == (MAX_TOKENS, DENSE_TOKENS, FP8_TOKENS)


def test_needs_come_from_the_shape() -> None:
    dense = need_of(row("draft_forward", "qwen3-8b L5 H4096 I12288 32/8x128 B1 T16 ctx1024", flops=1e9))
    assert dense.family == "stream" and dense.serial["handoff"] == draft_handoffs(QWEN3_8B) > QWEN3_8B.L
    assert dense.codes == 0 and dense.serial["handoff of 64 tokens"] == 0
    coded = need_of(row("draft_forward", "qwen3-8b L5 H4096 I12288 32/8x128 B2 T16 ctx1024", "fp8", flops=1e9))
    assert coded.codes == QWEN3_8B.L * QWEN3_8B.layer_weights and coded.serial["handoff of 64 tokens"] > 0
    many = need_of(row("draft_forward", "qwen3-8b L5 H4096 I12288 32/8x128 B5 T16 ctx1024", flops=1e12))
    assert many.family == "chain" and many.padded_flops > many.flops - many.attention > 0
    for bad in (row("sort", "B1"), row("draft_forward", "other B1 T16 ctx4"), row("lm_head_topk", "qwen3-8b T16")):
        with pytest.raises(ValueError, match="predict: (op|the shape) must"):
            need_of(bad)


def test_nvfp4_is_predicted_where_it_is_multiplied(predictor: predict.Predictor) -> None:
    """A chain for any number of rows, of 4.5 bits a weight at four times bf16's rate; on the B200 alone."""
    found = [r for r in predictor.predict(CARDS["b200"]) if r.dtype == "nvfp4"]
    assert [r.family for r in found] == ["chain"] * 4 and all("nothing of the kind" in r.note for r in found)
    assert all(r.expected_us is not None and r.floor_us is not None and r.floor_us < r.expected_us for r in found)
    need = need_of(predict.nvfp4_rows()[0])
    assert need.nvfp4 and need.serial["kernel"] == 13 * QWEN3_8B.L + 2
    here = rates(CARDS["b200"])
    assert need.gemm_rate(here) == pytest.approx(4 * here.flops)
    assert not [r for r in predictor.predict(CARDS["h200"]) if r.dtype == "nvfp4"]


def test_fp8_of_many_rows_is_multiplied_as_fp8() -> None:
    shape = "qwen3-8b L5 H4096 I12288 32/8x128 B{} T16 ctx1024"
    whole = 2.0 * 64 * QWEN3_8B.L * QWEN3_8B.layer_weights
    chain = need_of(row("draft_forward", shape.format(4), "fp8", flops=1e9))
    dense = need_of(row("draft_forward", shape.format(4), "bf16", flops=whole + chain.attention))
    assert chain.family == "chain" and chain.fp8 and chain.codes == 0 and not dense.fp8
    assert chain.flops == dense.flops == whole + chain.attention, "whatever the row says: operations, not time"
    assert chain.serial["kernel"] == dense.serial["kernel"] + 2 * QWEN3_8B.L
    codes, bf16 = (rate * QWEN3_8B.L * QWEN3_8B.layer_weights for rate in (1 / HERE.fp8_flops, 1 / HERE.flops))
    assert HERE.fp8_flops == pytest.approx(2 * HERE.flops, rel=1e-2)
    assert dense.floors_us(HERE)[1] - chain.floors_us(HERE)[1] == pytest.approx(2e6 * 64 * (bf16 - codes))
    head = need_of(row("lm_head_argmax", "qwen3-8b B32 T16 H4096 V151936", "fp8", flops=1e9))
    assert head.family == "gemm" and head.fp8 and head.flops == 2.0 * 512 * QWEN3_8B.V * QWEN3_8B.H
    assert head.serial == {"quantise": 1}


def test_a_row_of_a_kernel_before_stays_that_kernels(predictor: predict.Predictor) -> None:
    """An fp8 draft of 64 rows from before the chain is a row of the stream, beside the chain's, which has none then."""
    shape = "qwen3-8b L5 H4096 I12288 32/8x128 B{} T16 ctx1024"
    now = row("draft_forward", shape.format(4), "fp8", flops=1e9)
    before = {**now, "date": "2026-11-28T06:13:05+00:00", "ours_us": 983.0}
    assert superseded(before) and need_of(before).family == "stream"
    for other in (now, {**now, "date": model.FP8_CHAIN_SINCE}, {**before, "shape": shape.format(2)}):
        assert not superseded(other)
    assert not superseded({**before, "dtype": "bf16"})
    found = predictor.predict(H100, [before])
    chain, streamed = (r for r in found if (r.shape, r.dtype) == (now["shape"], "fp8"))
    assert (chain.family, streamed.family) == ("chain", "stream") and "streamed" in streamed.note
    assert chain.measured_us is None and streamed.measured_us == 983.0
    assert all("date" in r for r in predict.measured_rows(H100)), "which is how filed rows are told apart"


def test_fp8_drafts_of_many_rows_on_a_card_that_the_fit_has_not_seen(predictor: predict.Predictor) -> None:
    rows = [
        r for r in predictor.predict(CARDS["h200"]) if (r.op, r.dtype, r.family) == ("draft_forward", "fp8", "chain")
    ]
    assert len(rows) == 3
    assert all(r.ratio is not None and abs(r.ratio - 1) < 0.25 for r in rows)


def test_every_bench_row_is_predicted(predictor: predict.Predictor, card: Card) -> None:
    """No row takes less than its floor, but for what beats the measured ceiling a little."""
    found = predictor.predict(card)
    assert {r.suite for r in found} >= set(predict.SUITES)
    for r in found:
        if r.expected_us is None:
            assert r.note and r.floor_us is None
            assert r.suite not in ("head", "inject", "draft", "dflash2"), f"the model has to learn {r.op}: {r.note}"
        else:
            assert r.floor_us is not None and 0 <= 0.97 * r.floor_us <= r.expected_us < math.inf
            assert r.family in REASONS and r.bound in ("latency", "bytes", "SMs", "tensor")


def test_the_model_is_judged_by_rows_that_it_has_not_seen(predictor: predict.Predictor) -> None:
    rows = predictor.predict(H100)
    judged = [r for r in rows if r.judged is not None]
    assert len(judged) >= len(predictor.rows) > 3 * predictor.parameters
    assert sum(r.unseen is not None for r in judged) > 0.9 * len(judged)
    result = predict.report(H100, predictor)
    assert result["middle_error"] < 0.15
    text = "\n".join(predict.lines(result))
    off = [r for r in rows if r.off]
    assert {(r.op, r.shape, r.dtype) for r in off} == {(r.op, r.shape, r.dtype) for r in result["off"]}
    for r in off:
        assert f"  {r.op} {r.shape} {r.dtype}: measured / expected {r.judged:.2f}" in text
        assert f"{r.family}: {REASONS[r.family]}" in text
    assert f"{predictor.parameters} parameters, fitted to {len(predictor.rows)} rows" in text


def test_efficiencies_are_those_of_the_files(predictor: predict.Predictor, tmp_path: Path) -> None:
    """With every time in the files twice as long, so is every expected time of ops that were measured."""
    shutil.copytree(RESULTS, tmp_path / "results")
    for path in (tmp_path / "results" / H100.folder).glob("*.json"):
        run = json.loads(path.read_text())
        if isinstance(run, dict) and "suites" in run and "rows" in run:
            for one in run["rows"]:
                one["ours_us"] *= 2
            path.write_text(json.dumps(run))
    after = predict.Predictor(tmp_path / "results").predict(CARDS["b200"])
    for was, now in zip(predictor.predict(CARDS["b200"]), after, strict=True):
        if was.expected_us and now.expected_us and not was.note and predictor.fits[was.family].idle <= {"quantise"}:
            assert 1.4 < now.expected_us / was.expected_us < 2.6, was
    with pytest.raises(ValueError, match="must hold"):
        predict.Predictor(tmp_path)


def test_rates_are_measured_where_the_card_was_there() -> None:
    for key in ("h100", "h200"):
        here = rates(CARDS[key])
        assert "measured on it" in here.origin and 0.8 < here.read_bw / CARDS[key].datasheet_bw < 1
    b200 = rates(CARDS["b200"])
    assert b200.read_bw == CARDS["b200"].read_bw and b200.flops < CARDS["b200"].bf16
    assert card_of("NVIDIA H100 80GB HBM3") is H100 and card_of("Some Card") is None


def test_steps_and_publications(predictor: predict.Predictor) -> None:
    result = predict.report(CARDS["b200"], predictor)
    text = "\n".join(predict.lines(result))
    assert "no code of this package has run on a B200" in text
    assert "nothing of this package ran" in text and "No row was measured on a B200" in text
    kinds = {(s["concurrency"], s["engine"]) for s in result["steps"]}
    assert {(1, "stock"), (1, "all")} <= kinds and set(result["sharded"]) == {1, 32}
    for step in result["steps"]:
        for part in step["parts"]:
            assert part.floor_us <= part.low_us * 1.03 and part.low_us <= part.high_us and part.measured_us is None
    single = next(p for p in PUBLISHED_STEPS if p.tp == 1 and p.concurrency == 1)
    assert single.step_us(6.4) == pytest.approx(6.4 / single.tokens_per_s * 1e6)
    for found in result["published"]:
        assert 0 < found["share"][0] <= found["share"][1] < 0.5
        assert 0.8 < found["gain"][0] <= found["gain"][1] < 1.5
    same = predict.single_card_steps(predictor, H100)
    assert all(part.measured_us is not None for step in same for part in step["parts"])


def test_a_card_that_the_fit_has_not_seen(predictor: predict.Predictor) -> None:
    checks = predict.other_card_checks(predictor)
    assert checks and all(0.5 < check["ratio"] < 2 for check in checks)


def test_what_is_not_modelled_says_why(predictor: predict.Predictor) -> None:
    rows = [r for r in predictor.predict(H100) if r.expected_us is None]
    assert rows and all(r.note for r in rows)
    assert "must be one of the benches'" in str(not_modelled(row("sort", "B1")))
    assert not_modelled(row("prepare_block", "")) is None


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b200.json"
    assert command_line.main(["predict", "--card", "b200", "--json", str(path)]) == 0
    assert "Predicted for a B200" in capsys.readouterr().out
    stored = json.loads(path.read_text())
    assert stored["card"]["key"] == "b200" and stored["rows"] and stored["fitted_on"]["card"] == "H100"
    assert command_line.main(["predict", "--card", "b200", "--json", str(tmp_path / "no" / "file.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        command_line.main(["predict", "--card", "h300"])
    assert left.value.code == 2

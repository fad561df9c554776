"""The SGLang benches without SGLang: comparison, summaries, the trace's reduction, a child with a fake engine."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as bench_main
from bench import bench_sglang, engine_trace, sglang_engine, sglang_tokens
from dflash_kernels.cli import DEMO_DRAFTER
from dflash_kernels.integrations.sglang.plugin import SEAMS
from dflash_kernels.model.config import load_config
from dflash_kernels.model.drafter import load_drafter
from tools.sglang_models import divide_heads
from tools.sglang_recipe import main as recipe_tool

# Counts in base `width`: a text depends on its prompt and, where asked, on the seams.
FAKE = """
import asyncio, gzip, json, os, pathlib, time, types
__version__ = "0.0"
def seams():
    switch = pathlib.Path(os.environ["DFLASH_KERNELS_SEAMS_FILE"])
    return switch.read_text() if switch.is_file() else os.environ["DFLASH_KERNELS_SEAMS"]
class Engine:
    profile = None
    def __init__(self, **arguments):
        self.speculative = "speculative_algorithm" in arguments
        self.loop, self.aborted = asyncio.new_event_loop(), set()
        self.tokenizer_manager = types.SimpleNamespace(abort_request=self.aborted.add)
        if "max_total_tokens" in arguments:
            print("KV cache pool is full. Retract requests.", flush=True)
        print("  inject  active", flush=True)
        if os.environ["DFLASH_KERNELS_SEAMS"] == os.environ.get("FAKE_BREAKS"):
            raise SystemExit("refused")
    def start_profile(self, output_dir, num_steps, activities):
        self.profile = output_dir
    def generate(self, input_ids, sampling_params, return_logprob=False, top_logprobs_num=0):
        if self.profile and os.environ.get("FAKE_TRACE"):
            with gzip.open(self.profile + "/t.trace.json.gz", "wt") as file:
                file.write(pathlib.Path(os.environ["FAKE_TRACE"]).read_text())
        n = sampling_params["max_new_tokens"]
        time.sleep(float(os.environ.get("FAKE_SLEEPS", 0)))
        shift = seams() == os.environ.get("FAKE_DIFFERS")
        out = []
        for ids in input_ids:
            tokens = [(ids[0] + i) % 50 for i in range(n)]
            if shift and ids[0] == 3:
                tokens[-1] += 1
            meta = {"spec_verify_ct": (n - 1) // 2} if self.speculative else {}
            if return_logprob:
                pairs = [(-0.5, sum(ids) % 50, None), (-0.75, len(ids), None)]
                meta["output_top_logprobs"] = [pairs[:top_logprobs_num]]
            out.append({"output_ids": tokens, "meta_info": meta})
        return out
    async def async_generate(self, input_ids, sampling_params, rid):
        for _ in range(20):
            await asyncio.sleep(0.002)
            if rid in self.aborted:
                return {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}}}
        return {**self.generate([input_ids], sampling_params)[0]}
    def shutdown(self): pass
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `sglang` whose engine counts, on the child's path."""
    package = tmp_path / "fake" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "prompts.json").write_text(json.dumps({"a": [[1], [3]], "b": [[5], [7], [9]]}))
    return tmp_path


def tokens(where: Path, *more: str) -> tuple[int, dict[str, Any]]:
    report = where / "report.json"
    prompts = ["--prompts", str(where / "prompts.json"), "--new-tokens", "9", "--count", "5"]
    code = sglang_tokens.main([str(where), *prompts, "--json", str(report), "--work", str(where / "work"), *more])
    return code, json.loads(report.read_text())


def test_same_tokens(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = tokens(fake, "--engines", "stock/all/plain")
    assert code == 0 and report["fine"]
    expected = {f"{c}/{p}" for c in (1, 8, 32) for p in (0, 1)} | {"8/rotated", "32/rotated"}
    assert set(report["engines"]["stock"]["passes"]) == expected
    row = report["engines"]["all"]["passes"]["8/0"]
    assert row["against_stock"] == row["against_plain"] == {"identical": 5, "prompts": 5, "differences": {}}
    assert row["acceptance"] == (5 * 9 - 5) / (5 * 4)
    assert report["engines"]["all"]["table"] == ["  inject  active"]
    assert "5/5" in capsys.readouterr().out


def test_nothing_compared_is_not_fine(fake: Path) -> None:
    code, report = tokens(fake, "--engines", "all")
    assert code == 1 and not report["fine"] and "against_stock" not in report["engines"]["all"]["passes"]["1/0"]
    code, report = tokens(fake, "--engines", "stock")
    assert code == 0 and report["fine"] and report["engines"]["all"]["passes"]["1/0"]["against_stock"]["identical"] == 5


def test_different_tokens_are_found_and_a_later_run_continues(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DIFFERS", "accept")
    code, _ = tokens(fake, "--engines", "stock")
    assert code == 0
    started = (fake / "work" / "stock" / "stock.log").stat().st_mtime_ns
    code, report = tokens(fake, "--engines", "stock/accept/inject")
    assert code == 1 and not report["fine"]
    assert (fake / "work" / "stock" / "stock.log").stat().st_mtime_ns == started  # not run again
    # Prompts are taken from the sets in turn: [1], [5], [3], ..
    found = report["engines"]["accept"]["passes"]["1/0"]["against_stock"]["differences"]
    assert found == {"2": {"position": 8, "ours": 12, "theirs": 11}}
    assert report["engines"]["inject"]["passes"]["1/0"]["against_stock"]["identical"] == 5
    # An engine without speculation says how close the two likeliest tokens are there: prompt [3], tokens 3..10.
    code, report = tokens(fake, "--engines", "plain")
    found = report["engines"]["accept"]["passes"]["8/0"]["against_stock"]["differences"]
    assert found["2"] == {"position": 8, "ours": 12, "theirs": 11, "likeliest": [5, 9], "gap": 0.25}
    assert code == 1


def test_one_engine_runs_its_seams_one_at_a_time(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DIFFERS", "accept")
    code, report = tokens(fake, "--engines", "stock/switched", "--concurrency", "1,8", "--repeat", "2")
    assert code == 1
    alone = [seam.name for seam in SEAMS if seam.switchable]
    assert set(report["engines"]) == {"stock", "switched", *alone}
    for seam in alone:
        passes = report["engines"][seam]["passes"]
        assert set(passes) == {"1/0", "1/1", "8/0", "8/1"}
        assert all(row["against_stock"]["identical"] == (4 if seam == "accept" else 5) for row in passes.values())


def test_faults_are_counted_and_completed_texts_compared(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five prompts one is other than stock's; a tenth of the requests are aborted, in time or not."""
    monkeypatch.setattr(sglang_tokens, "FAULT_IDLE", 0.0)
    more = ["--fault-seconds", "2", "--fault-rate", "100"]
    code, report = tokens(fake, "--engines", "stock/faults", *more)
    entry = report["engines"]["faults"]
    assert code == 0 and entry["retractions"] == 1
    counts = entry["faults"]
    assert counts["arrivals"] == counts["completed"] + counts["aborted"] > 50 and counts["aborted"] > 0
    assert entry["texts"] == {"identical": counts["completed"], "texts": counts["completed"]}
    assert sglang_tokens.against_one([(0, [1]), (1, [2]), (0, [3])], [[1], [9]]) == {"identical": 1, "texts": 3}
    assert sglang_tokens.against_one([(0, [1]), (0, [1]), (0, [3])], None) == {"identical": 2, "texts": 3}


def test_engines_at_once_report_what_they_report_alone(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DIFFERS", "accept")
    monkeypatch.setattr(sglang_tokens, "FAULT_IDLE", 0.0)
    more = ["--fault-seconds", "0.5", "--fault-rate", "100", "--concurrency", "8,1", "--faults"]
    code, alone = tokens(fake, *more)
    assert code == 1
    (fake / "report.json").unlink()
    code, found = tokens(fake, *more, "--at-once", "4", "--switched", "3")
    assert code == 1 and not found["fine"] and found["at_once"] == 4

    def passes(report: dict[str, Any]) -> dict[str, Any]:
        kept = {name: entry["passes"] for name, entry in report["engines"].items() if entry["passes"]}
        for rows in kept.values():
            for row in rows.values():
                del row["tokens_per_s"]
        return kept

    assert passes(found) == passes(alone) and found["gaps"] == alone["gaps"] != {}
    parts = ["switched:inject,accept", "switched:logits,prepare", "switched:metadata,reserve"]
    assert [name for name in found["engines"] if name.startswith("switched")] == parts
    assert all(entry["code"] == 0 for entry in found["engines"].values())
    assert list(found["engines"])[0] == "stock" and list(found["engines"])[-2:] == ["plain", "faults"]
    faults = found["engines"]["faults"]
    assert faults["texts"] == {"identical": faults["faults"]["completed"], "texts": faults["faults"]["completed"]}


def test_engines_at_once_start_when_the_first_is_up(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: dict[str, list[float]] = {}
    arguments: dict[str, dict[str, Any]] = {}
    run_engine = sglang_tokens.run_engine

    def noted(seams: str, given: dict[str, Any], *rest: Any) -> Any:
        arguments[seams] = given
        spans[seams] = [time.monotonic()]
        for result in run_engine(seams, given, *rest):
            if result["task"] in ("start", "exit"):
                spans[seams].append(time.monotonic())
            yield result

    monkeypatch.setattr(sglang_tokens, "run_engine", noted)
    code, _ = tokens(fake, "--engines", "stock/all/inject", "--at-once", "2", "--concurrency", "1")
    assert code == 0
    first, second, third = sorted(spans.values())
    assert first is spans["stock"] and first[1] < second[0] and third[0] > min(first[2], second[2])
    assert len({given["nccl_port"] for given in arguments.values()}) == 3
    assert {given["max_total_tokens"] for given in arguments.values()} == {2048}


def test_the_first_engine_at_once_may_refuse(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BREAKS", "all")
    code, report = tokens(fake, "--engines", "all/stock/accept", "--at-once", "3", "--concurrency", "1")
    assert code == 1 and report["engines"]["all"]["code"] == 1
    assert report["engines"]["accept"]["passes"]["1/0"]["against_stock"]["identical"] == 5


def test_texts_that_the_time_limit_cuts_off_are_not_compared(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow engine ends in time by itself, with the prompts it got through."""
    engines = ["--concurrency", "8,1", "--start-seconds", "1"]
    assert tokens(fake, "--engines", "stock", *engines)[0] == 0
    monkeypatch.setenv("FAKE_SLEEPS", "1.0")
    monkeypatch.setattr(sglang_tokens, "END_SECONDS", 2.0)
    code, report = tokens(fake, "--engines", "all", *engines, "--time-limit", "7")
    entry = report["engines"]["all"]
    assert code == 1 and entry["code"] == 0 and entry["cut"] == ["1/0"]
    assert entry["passes"]["8/0"]["against_stock"]["prompts"] == 5
    assert entry["passes"].get("1/0", {"against_stock": {"prompts": 1}})["against_stock"]["prompts"] < 5
    monkeypatch.delenv("FAKE_SLEEPS")
    code, report = tokens(fake, "--engines", "all", *engines)  # cut off is missing
    assert code == 0 and report["engines"]["all"]["passes"]["1/0"]["against_stock"]["prompts"] == 5


def test_one_seam_alone_may_take_fewer_prompts_one_by_one(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DIFFERS", "inject")
    code, report = tokens(fake, "--engines", "stock/all/inject", "--single-count", "4", "--concurrency", "1,8")
    counts = {name: [row["against_stock"]["prompts"] for key, row in entry["passes"].items() if key in ("1/0", "8/0")]
              for name, entry in report["engines"].items() if name != "stock"}  # fmt: skip
    assert code == 1 and counts == {"all": [5, 5], "inject": [4, 5]}
    row = report["engines"]["inject"]["passes"]["1/0"]
    assert row["against_stock"]["identical"] == 3 and row["acceptance"] == (4 * 9 - 4) / (4 * 4)


def test_a_smaller_share_of_differences_is_fine() -> None:
    def row(identical: int, prompts: int) -> dict[str, Any]:
        return {"against_stock": {"identical": identical, "prompts": prompts}}

    assert sglang_tokens.differing_share(row(0, 0)) == 1  # nothing compared
    for ours, fine in ((row(9, 10), False), (row(18, 20), False), (row(19, 20), True), (row(20, 20), True)):
        engines = {"stock": {"passes": {"1/1": row(38, 40)}}, "all": {"passes": {"1/0": ours}}}
        assert sglang_tokens.summarise({"engines": engines}, {}) == fine


def test_a_run_without_engines_or_prompts_is_refused(fake: Path) -> None:
    for option in ("--at-once", "--switched", "--count", "--single-count"):
        with pytest.raises(SystemExit) as refused:
            tokens(fake, option, "0")
        assert refused.value.code == 2


def test_an_engine_that_refuses_is_reported(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BREAKS", "all")
    code, report = tokens(fake, "--engines", "stock/all")
    assert code == 1
    assert report["engines"]["all"]["code"] == 1 and "refused" in report["engines"]["all"]["log"]


def test_no_engine_starts_without_time(fake: Path) -> None:
    code, report = tokens(fake, "--engines", "stock", "--time-limit", "10", "--start-seconds", "20")
    assert code == 1 and report["engines"] == {}


def test_step_times(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = fake / "step.json"
    arguments = ["--concurrency", "1,4", "--repeats", "2", "--json", str(report), "--work", str(fake / "work")]
    assert bench_sglang.main([str(fake), *arguments, "--seams", "accept"]) == 0
    found = json.loads(report.read_text())
    assert [engine["seams"] for engine in found["engines"]] == ["stock", "all", "all", "stock", "accept"]
    kinds = {(row["concurrency"], row["seams"]): row for row in found["summary"]}
    assert set(kinds) == {(c, s) for c in (1, 4) for s in ("stock", "all", "accept")}
    assert kinds[1, "all"]["samples"] == 4 and "over_stock" in kinds[1, "all"] and "over_stock" not in kinds[1, "stock"]
    assert kinds[4, "stock"]["tokens_per_step"] == pytest.approx(2.0, rel=0.02)
    assert "over stock" in capsys.readouterr().out


def test_engines_on_several_gpus(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--tp reaches every engine and the report, and engines on other numbers of GPUs are not compared."""
    given: list[dict[str, Any]] = []
    for module in (bench_sglang, sglang_tokens):
        start = module.run_engine  # type: ignore[attr-defined]
        monkeypatch.setattr(module, "run_engine", lambda *a, start=start: (given.append(a[1]), start(*a))[1])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    report = fake / "step.json"
    arguments = [str(fake), "--concurrency", "1", "--repeats", "1", "--json", str(report), "--work", str(fake / "work")]
    assert bench_sglang.main([*arguments, "--ab", "--tp", "2"]) == 0
    found = json.loads(report.read_text())
    assert found["tp"] == 2 and [engine["seams"] for engine in found["engines"]] == ["stock", "all"]
    assert [arguments["tp_size"] for arguments in given] == [2, 2]
    assert found["collectives"]["NCCL_NVLS_ENABLE"] == "0" and found["collectives"]["NCCL_SOCKET_IFNAME"] == "eth7"
    assert bench_sglang.main([*arguments, "--order", "all", "--append"]) == 2
    assert "has another tp: 2, not 1" in capsys.readouterr().err
    code, found = tokens(fake, "--engines", "stock/all", "--tp", "2", "--concurrency", "1")
    assert code == 0 and found["tp"] == 2 and [one["tp_size"] for one in given[2:]] == [2, 2]
    with pytest.raises(SystemExit, match="has engines on 2 GPUs, not 1"):
        tokens(fake, "--engines", "stock/all/inject", "--concurrency", "1")
    one, two = (sglang_engine.environment("all", fake / "work", None, gpus) for gpus in (1, 2))
    assert "NCCL_NVLS_ENABLE" not in one or "NCCL_NVLS_ENABLE" in os.environ
    assert two["NCCL_NVLS_ENABLE"] == os.environ.get("NCCL_NVLS_ENABLE", "0")
    assert two["NCCL_SOCKET_IFNAME"] == "eth7" and two["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"


def test_heads_of_zeros_change_nothing(tmp_path: Path) -> None:
    """The drafter of the demo pair for two GPUs gives the same rows, with 12 query and 4 KV heads."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        shutil.copytree(DEMO_DRAFTER, folder)
    divide_heads(cut, 3)
    assert (cut / "config.json").read_text() == (whole / "config.json").read_text()  # they divide
    divide_heads(cut, 2)
    config = load_config(cut)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (12, 4, 64)
    rows = []
    ids = torch.arange(16)[None]
    for folder in (whole, cut):
        drafter = load_drafter(folder, dtype=torch.float32)
        drafter.embed_weight = torch.randn(100, drafter.hidden_size, generator=torch.Generator().manual_seed(1))
        caches = [torch.zeros(16, drafter.num_kv_heads, drafter.head_dim) for _ in range(2 * drafter.num_layers)]
        none, table = torch.tensor([0]), torch.arange(16)[None]
        halves = (caches[: drafter.num_layers], caches[drafter.num_layers :])
        rows.append(drafter.forward(ids, ids, ids, none, none, table, *halves).clone())
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-4, atol=1e-4)


def test_later_engines_join_a_report_of_the_same_conditions(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = fake / "step.json"
    arguments = [str(fake), "--concurrency", "1", "--repeats", "1", "--json", str(report), "--work", str(fake / "work")]
    assert bench_sglang.main([*arguments, "--order", "stock"]) == 0
    assert bench_sglang.main([*arguments, "--order", "all:fp8", "--append"]) == 0
    found = json.loads(report.read_text())
    assert [row["seams"] for row in found["summary"]] == ["all:fp8", "stock"]
    assert "over_stock" in found["summary"][0] and found["command"].count("bench_sglang") == 2
    before = report.read_text()
    assert bench_sglang.main([*arguments, "--order", "all", "--append", "--forced", "3"]) == 2
    assert "another forced_tokens_per_step: 6.5, not 3.0" in capsys.readouterr().err
    (fake / "draft/config.json").write_text('{"num_hidden_layers": 1}')
    assert bench_sglang.main([*arguments, "--order", "all", "--append"]) == 2
    assert "another recipe" in capsys.readouterr().err and report.read_text() == before


@pytest.mark.parametrize(
    ("model", "layers", "taps", "parameters"),
    [
        # Parameters of the published models, in billions; of the drafters by their shapes.
        ("qwen3-4b", 36, (1, 9, 17, 25, 33), (4.02, 0.54)),
        ("qwen3-8b", 36, (1, 9, 17, 25, 33), (8.19, 1.05)),
        ("qwen3-30b-a3b", 48, (1, 12, 23, 34, 45), (30.53, 0.474)),
        ("qwen3-30b-a3b", 24, (1, 6, 11, 16, 21), (15.57, 0.474)),
    ],
)
def test_recipes(tmp_path: Path, model: str, layers: int, taps: tuple[int, ...], parameters: tuple[float, ...]) -> None:
    assert recipe_tool([str(tmp_path), "--model", model, "--layers", str(layers)]) == 0
    target = json.loads((tmp_path / "target/config.json").read_text())
    draft = load_config(tmp_path / "draft")
    assert draft.target_layer_ids == taps and draft.block_size == 16 and target["num_hidden_layers"] == layers
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    h, heads, kv, d = (target[name] for name in names)
    assert (draft.hidden_size, draft.num_heads, draft.num_kv_heads, draft.head_dim) == (h, heads, kv, d)
    attention = 2 * h * d * (heads + kv)
    mlp = 3 * h * target["intermediate_size"]
    experts = 3 * h * target.get("moe_intermediate_size", 0) * target.get("num_experts", 0)
    vocabulary = target["vocab_size"] * h * (1 if target["tie_word_embeddings"] else 2)
    found = layers * (attention + (experts or mlp)) + vocabulary, draft.num_layers * (attention + mlp) + 5 * h * h
    assert [n / 1e9 for n in found] == pytest.approx(parameters, rel=0.005)


def test_recipes_that_cannot_be_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layers in ("7", "37"):
        assert recipe_tool([str(tmp_path / "out"), "--model", "qwen3-8b", "--layers", layers]) == 2
        assert f"--layers must be from 8 to 36 for qwen3-8b, got {layers}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_summary_is_the_ratio_of_medians() -> None:
    def rows(*ms: float) -> list[dict[str, float]]:
        return [{"concurrency": 1, "ms_per_step": m, "tokens_per_step": 2.0, "tokens_per_s": 1.0} for m in ms]

    engines = [{"seams": "stock", "rows": rows(8.0, 9.0, 10.0)}, {"seams": "all", "rows": rows(6.0, 5.0, 50.0)}]
    summary = bench_sglang.summarise({"engines": engines})
    assert [row["ms_per_step"] for row in summary] == [6.0, 9.0]
    assert summary[0]["over_stock"] == 1.5


def test_plugin_is_discoverable_from_a_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DFLASH_KERNELS_STRICT", raising=False)
    monkeypatch.setattr(sglang_engine.importlib.metadata, "entry_points", lambda group: [])
    environment = sglang_engine.environment("inject,accept", tmp_path, 6.5)
    assert environment["DFLASH_KERNELS_SEAMS"] == "inject,accept" and environment["DFLASH_KERNELS_STRICT"] == "1"
    assert environment["DFLASH_FORCE_ACC_LEN"] == "6.5"
    assert sglang_engine.environment("stock", tmp_path)["DFLASH_KERNELS_SEAMS"] == "none"
    quantised = sglang_engine.environment("all:fp8", tmp_path)
    assert (quantised["DFLASH_KERNELS_SEAMS"], quantised["DFLASH_KERNELS_WEIGHTS"]) == ("all", "fp8")
    code = "from importlib.metadata import entry_points as e; print([p.value for p in e(group='sglang.srt.plugins')])"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "dflash_kernels.integrations.sglang:activate" in out


def trace_events() -> list[dict[str, Any]]:
    """Ten steps of 100 us in two graphs and three launches, one of each kind of part."""
    events: list[dict[str, Any]] = []

    def add(cat: str, name: str, at: float, dur: float, correlation: int) -> None:
        args = {"correlation": correlation}
        events.append({"cat": cat, "name": name, "ts": at, "dur": dur, "pid": 1, "tid": 7, "args": args})

    for step in range(10):
        at, number = 100.0 * step, 100 * step
        add("kernel", "nvjet_inject_gemm", at + 1, 4, number + 1)
        add("kernel", "prepare_block_kernel", at + 6, 1, number + 2)
        add("kernel", "nvjet_layer", at + 10, 10, number + 3)
        add("kernel", "FusedAddRMSNormKernel", at + 20, 2, number + 3)
        add("kernel", "nvjet_head", at + 22, 5, number + 3)
        add("kernel", "reduce_kernel", at + 27, 1, number + 3)
        add("kernel", "nvjet_layer", at + 30, 40, number + 4)
        add("kernel", "flash_fwd", at + 60, 20, number + 4)  # 10 us beside the GEMM
        add("gpu_memcpy", "Memcpy DtoD", at + 82, 2, number + 5)
        add("kernel", "x_accept_bonus", at + 98, 2, number + 6)
        for n, name in ((1, "cudaLaunchKernel"), (2, "cuLaunchKernelEx"), (3, "cudaGraphLaunch")):
            add(
                "cuda_driver" if name.startswith("cu") and "Ex" in name else "cuda_runtime",
                name,
                at + n,
                0.5,
                number + n,
            )
        add("cuda_runtime", "cudaGraphLaunch", at + 4, 0.5, number + 4)
        add("cuda_runtime", "cudaMemcpyAsync", at + 5, 0.5, number + 5)
        add("cuda_runtime", "cudaLaunchKernel", at + 6, 0.5, number + 6)
        add("cuda_runtime", "cudaEventSynchronize", at + 50, 30, number + 7)
        add("cpu_op", "aten::sum", at + 8, 3, number + 8)
        add("cpu_op", "aten::fill_", at + 9, 1, number + 9)
    return events


def write_trace(path: Path) -> Path:
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": trace_events()}, file)
    return path


def test_trace_is_reduced_to_a_step(tmp_path: Path) -> None:
    found = engine_trace.reduce_trace(write_trace(tmp_path / "t.json.gz"))
    assert found["steps"] == 5 and found["span_us"] == pytest.approx(100.0)
    parts = {"draft": 12, "head": 6, "verify": 50, "accept": 2, "inject": 4, "other": 3, "idle": 23}
    assert found["parts_us"] == pytest.approx(parts)
    assert found["gpu_operations"] == 10 and found["host_launches"] == 6 and found["graph_launches"] == 2
    assert found["host_us"] == pytest.approx(70.0) and found["launching_us"] == pytest.approx(3.0)
    assert found["operators_us"] == 3 and found["operators"] == [{"name": "aten::sum", "us": 3, "calls": 1}]
    gap = found["gaps"][0]
    assert (gap["after"], gap["before"], gap["us"]) == ("Memcpy DtoD", "x_accept_bonus", pytest.approx(14.0))
    top = found["kernels"][0]
    assert (top["part"], top["name"], top["us"]) == ("verify", "nvjet_layer", pytest.approx(40.0))


def test_traces_that_cannot_be_reduced_say_why(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    for kept, reason in ((30, "3 steps in the trace"), (None, "no kernel of the trace belongs to a graph's launch")):
        events = [e for e in trace_events() if kept is not None or e["cat"] != "cuda_runtime"]
        events = [e for e in events if kept is None or e["ts"] < 300]
        with gzip.open(path, "wt") as file:
            json.dump({"traceEvents": events}, file)
        assert engine_trace.reduce_trace(path) == {"error": reason}


def test_engine_trace_draws_stock_and_plugin(
    fake: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake / "trace.json").write_text(json.dumps({"traceEvents": trace_events()}))
    monkeypatch.setenv("FAKE_TRACE", str(fake / "trace.json"))
    report, plot = fake / "trace_report.json", fake / "trace.png"
    files = ["--json", str(report), "--plot", str(plot), "--work", str(fake / "work")]
    assert bench_main.main(["engine-trace", str(fake), "--concurrency", "1,32", *files]) == 0
    found = json.loads(report.read_text())
    assert [e["seams"] for e in found["engines"]] == ["stock", "all"] and found["environment"]["commit"]
    assert all(len(e["traces"]) == 2 and e["rows"] == [] for e in found["engines"])
    rows = [line.split()[:2] for line in engine_trace.table(found).splitlines()[1:]]
    assert rows == [["1", "stock"], ["1", "all"], ["32", "stock"], ["32", "all"]]
    assert engine_trace.table(found) in capsys.readouterr().out
    assert plot.stat().st_size > 10000
    plot.unlink()
    assert bench_main.main(["engine-trace", "--report", str(report), "--plot", str(plot)]) == 0 and plot.exists()
    assert bench_main.main(["engine-trace"]) == 2


def test_a_profiler_that_writes_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        def start_profile(self, **arguments: Any) -> None: ...

        def generate(self, **arguments: Any) -> None: ...

    monkeypatch.setattr(sglang_engine.time, "sleep", lambda seconds: None)
    write_trace(tmp_path / "older.json.gz")  # of a run before, which must not be taken for this one's
    task = {"concurrency": 1, "prompt": 4, "steps": 2, "folder": str(tmp_path)}
    assert list(sglang_engine._trace(Engine(), task)) == [{"error": "the profiler wrote no trace"}]


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_sglang.main([str(tmp_path)]) == 2
    assert "target/config.json is not there" in capsys.readouterr().err
    assert sglang_tokens.main([str(tmp_path), "--prompts", "p", "--json", str(tmp_path / "r.json")]) == 2
    assert not os.listdir(tmp_path)

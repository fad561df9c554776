"""The SGLang benches without SGLang: comparison, summaries, the trace's reduction, a child with a fake engine."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import bench_sglang, sglang_engine, sglang_tokens

# Counts in base `width`: a text depends on its prompt and, where asked, on the seams.
FAKE = """
import os
__version__ = "0.0"
class Engine:
    def __init__(self, **arguments):
        self.speculative = "speculative_algorithm" in arguments
        print("  inject  active", flush=True)
        if os.environ["DFLASH_KERNELS_SEAMS"] == os.environ.get("FAKE_BREAKS"):
            raise SystemExit("refused")
    def generate(self, input_ids, sampling_params):
        n = sampling_params["max_new_tokens"]
        shift = os.environ["DFLASH_KERNELS_SEAMS"] == os.environ.get("FAKE_DIFFERS")
        out = []
        for ids in input_ids:
            tokens = [(ids[0] + i) % 50 for i in range(n)]
            if shift and ids[0] == 3:
                tokens[-1] += 1
            meta = {"spec_verify_ct": (n - 1) // 2} if self.speculative else {}
            out.append({"output_ids": tokens, "meta_info": meta})
        return out
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
    assert set(report["engines"]["stock"]["passes"]) == {f"{c}/{p}" for c in (1, 8, 32) for p in (0, 1)}
    row = report["engines"]["all"]["passes"]["8/0"]
    assert row["against_stock"] == row["against_plain"] == {"identical": 5, "prompts": 5, "first_difference": {}}
    assert row["acceptance"] == (5 * 9 - 5) / (5 * 4)
    assert report["engines"]["all"]["table"] == ["  inject  active"]
    assert "5/5" in capsys.readouterr().out


def test_different_tokens_are_found_and_a_later_run_continues(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DIFFERS", "accept")
    code, _ = tokens(fake, "--engines", "stock")
    assert code == 0
    started = (fake / "work" / "stock.log").stat().st_mtime_ns
    code, report = tokens(fake, "--engines", "stock/accept/inject")
    assert code == 1 and not report["fine"]
    assert (fake / "work" / "stock.log").stat().st_mtime_ns == started  # not run again
    # Prompts are taken from the sets in turn: [1], [5], [3], ..
    assert report["engines"]["accept"]["passes"]["1/0"]["against_stock"]["first_difference"] == {"2": 8}
    assert report["engines"]["inject"]["passes"]["1/0"]["against_stock"]["identical"] == 5


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
    code = "from importlib.metadata import entry_points as e; print([p.value for p in e(group='sglang.srt.plugins')])"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "dflash_kernels.integrations.sglang:activate" in out


def test_trace_is_reduced_to_a_step(tmp_path: Path) -> None:
    """Ten steps of 100 us: two kernels of 30 us that overlap by 10, a copy of 20, an acceptance of 5; two launches."""
    events: list[dict[str, Any]] = []
    for step in range(10):
        at = 100.0 * step
        gpu = [("my::dflash::gemm", 0, 30), ("flash_fwd", 20, 30), ("Memcpy DtoD", 60, 20), ("x_accept_bonus", 90, 5)]
        cats = {"Memcpy DtoD": "gpu_memcpy"}
        events += [{"name": n, "cat": cats.get(n, "kernel"), "ts": at + t, "dur": float(d)} for n, t, d in gpu]
        host = ("cudaGraphLaunch", "cudaLaunchKernel", "cudaEventRecord")
        events += [{"name": n, "cat": "cuda_runtime", "ts": at + 5, "dur": 1.0} for n in host]
    path = tmp_path / "t.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = sglang_engine.reduce_trace(path)
    assert found["steps"] == 5 and found["span_us"] == pytest.approx(100.0)
    assert found["busy_us"] == pytest.approx(75.0) and found["idle_us"] == pytest.approx(25.0)
    assert found["gpu_operations"] == 4 and found["host_launches"] == 2 and found["graph_launches"] == 1
    assert found["kinds_us"] == pytest.approx({"GEMM": 30, "attention": 30, "copy, fill": 20, "accept, prepare": 5})


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_sglang.main([str(tmp_path)]) == 2
    assert "target/config.json is not there" in capsys.readouterr().err
    assert sglang_tokens.main([str(tmp_path), "--prompts", "p", "--json", str(tmp_path / "r.json")]) == 2
    assert not os.listdir(tmp_path)

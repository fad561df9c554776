"""The bench harness: rows and their file, rotation, geomean, time limit, failing cases, plot, and its command lines."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command_line
from bench import acceptance, harness, results, runner
from bench.ceilings import Ceilings
from bench.harness import Calls, Case, Row, geomean, measure_case, rotation_count
from bench.runner import DeviceLost, Problem, Run

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = Ceilings("Some Card (80 GB)", 2e9, "a reader", 1e9, 1e12, "fp32", 0)
ROW_KEYS = {
    "suite", "op", "shape", "dtype", "regime", "cache", "ours_us", "baseline", "baseline_us", "ratio", "bytes", "flops",
    "gbps", "pct_ceiling", "card", "torch", "commit",
}  # fmt: skip
RUN_KEYS = {
    "command", "card", "torch", "cuda", "driver", "commit", "date", "ceilings", "suites", "geomean", "rows", "errors",
    "skipped",
}  # fmt: skip


def copy_case(suite: str, size: int, make: Callable[[torch.device], Calls] | None = None) -> Case:
    def copy(device: torch.device) -> Calls:
        source, target = torch.randn(size, device=device), torch.empty(size, device=device)
        slow = torch.randn(64 * size, device=device)
        return Calls(
            lambda: target.copy_(source),
            {f"clone {torch.__version__}": lambda: source.clone(), "sort": lambda: slow.sort()},
        )

    return Case(suite, "copy", f"N{size}", "fp32", "latency", 8 * size, size, "copy", make or copy)


def use_suites(monkeypatch: pytest.MonkeyPatch, suites: dict[str, Callable[..., Iterator[Any]]], name: str) -> None:
    """Put modules with the given `cases` or `rows` functions in the place of the suites'."""
    for suite, produce in suites.items():
        module = types.ModuleType(f"bench.bench_{suite}")
        setattr(module, name, produce)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def make_run(tmp_path: Path, **options: Any) -> Run:
    return Run("python -m bench x", torch.device("cpu"), CEILINGS, json_path=tmp_path / "run.json", **options)


def test_geomean() -> None:
    assert geomean([]) is None
    assert geomean([4.0]) == pytest.approx(4.0)
    assert geomean([0.5, 2.0]) == pytest.approx(1.0)
    assert geomean(iter([1.0, 10.0, 100.0])) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("call_bytes", "set_bytes", "expected"),
    [
        (2 << 30, 2 << 30, (1, True)),  # one set outruns the cache: cold and hot are the same
        (125 << 20, 125 << 20, (1, True)),  # exactly 2.5 times
        ((125 << 20) - 1, 125 << 20, (2, True)),
        (10 << 20, 10 << 20, (13, True)),
        (2 << 20, 2 << 20, (63, True)),
        (1 << 20, 1 << 20, (64, False)),  # 64 sets still fit: no cold row
        (40 << 20, 20 << 30, (1, False)),  # touches little but holds much: memory allows no rotation
        (0, 0, (64, False)),
    ],
)
def test_rotation_count(call_bytes: int, set_bytes: int, expected: tuple[int, bool]) -> None:
    l2 = 50 << 20
    count, cold = rotation_count(call_bytes, set_bytes, l2)
    assert (count, cold) == expected
    assert 1 <= count <= harness.MAX_SETS
    assert count == 1 or count * set_bytes <= harness.MAX_SET_BYTES
    assert not cold or count * call_bytes >= harness.COLD_FACTOR * l2
    assert rotation_count(call_bytes, set_bytes, 0) == (1, False)


def test_row_takes_the_fastest_baseline_and_counts_its_floor(device: str) -> None:
    where = torch.device(device)
    (row, *_) = measure_case(copy_case("alloc", 4096), where, CEILINGS, samples=4)
    assert row.baseline.startswith(f"clone {torch.__version__}") and row.cache == "hot"
    assert row.ours_us > 0 and row.baseline_us is not None and row.ratio == row.ours_us / row.baseline_us
    assert row.gbps == pytest.approx(8 * 4096 / row.ours_us * 1e-3)
    floor_us = 8 * 4096 / 1e9 * 1e6  # copy bandwidth 1 GB/s; the operations take less
    assert row.pct_ceiling == pytest.approx(100 * floor_us / row.ours_us)


@pytest.mark.gpu
def test_cold_and_hot_rows_on_the_gpu() -> None:
    """With a cache of 1 MiB the case rotates over sets; a baseline that synchronises is timed eagerly and says so."""
    made = 0

    def make(device: torch.device) -> Calls:
        nonlocal made
        made += 1
        source, target = torch.randn(1 << 16, device=device), torch.empty(1 << 16, device=device)
        return Calls(lambda: target.copy_(source), {"sum on the host": lambda: source.sum().item()})

    ceilings = Ceilings("card", 3e12, "a reader", 3e12, 8e14, "bf16", 1 << 20)
    rows = measure_case(copy_case("alloc", 1 << 16, make), torch.device("cuda"), ceilings, samples=4)
    assert [row.cache for row in rows] == ["cold", "hot"] and made == 5
    assert all(row.baseline == "sum on the host (eager)" and row.ratio is not None for row in rows)
    before = torch.randn(8, device="cuda")
    assert bool((before == before).all())  # the device is fine afterwards


def test_floor_is_the_larger_of_bytes_and_operations() -> None:
    assert CEILINGS.floor_us(2000, 0, "read") == pytest.approx(1.0)
    assert CEILINGS.floor_us(2000, 0, "copy") == pytest.approx(2.0)
    assert CEILINGS.floor_us(2000, 5_000_000, "copy") == pytest.approx(5.0)


def test_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The file follows its schema, is rewritten as rows come, and the printed line shows the same numbers."""
    seen: list[int] = []

    def cases(device: torch.device, quick: bool) -> Iterator[Case]:
        assert device.type == "cpu" and quick
        yield copy_case("alloc", 256)
        seen.append(len(json.loads((tmp_path / "run.json").read_text())["rows"]))
        yield copy_case("alloc", 512)

    use_suites(monkeypatch, {"alloc": cases}, "cases")
    run = make_run(tmp_path, quick=True, commit="abc")
    run.suites(["alloc"])
    assert seen == [1]
    stored = json.loads((tmp_path / "run.json").read_text())
    assert set(stored) == RUN_KEYS and stored == json.loads(json.dumps({**run.as_json(), "date": stored["date"]}))
    assert [set(row) for row in stored["rows"]] == [ROW_KEYS] * 2
    assert stored["suites"] == {"alloc": "done"} and not stored["errors"] and not stored["skipped"]
    ratios = [row["ratio"] for row in stored["rows"]]
    assert stored["geomean"]["alloc"] == pytest.approx(geomean(ratios))
    assert all(row["commit"] == "abc" and row["card"] == CEILINGS.card for row in stored["rows"])
    printed = capsys.readouterr().out
    assert "copy" in printed and f"{ratios[0]:.2f}x" in printed and "geomean" in printed
    assert not list(tmp_path.glob("*.part"))


def test_failing_case_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(device: torch.device) -> Calls:
        raise ValueError("no such\nshape")

    def cases(device: torch.device, quick: bool) -> Iterator[Case]:
        yield copy_case("alloc", 128, broken)
        yield copy_case("alloc", 256)

    def dies(device: torch.device, quick: bool) -> Iterator[Case]:
        yield copy_case("head", 128)
        raise RuntimeError("cannot go on")

    use_suites(monkeypatch, {"alloc": cases, "head": dies}, "cases")
    monkeypatch.setitem(sys.modules, "bench.bench_draft", None)  # its import fails
    run = make_run(tmp_path)
    run.suites(["draft", "alloc", "head"])
    assert [row.op for row in run.rows] == ["copy", "copy"]
    assert [(e.suite, e.reason.split(":")[0]) for e in run.errors] == [
        ("draft", "ModuleNotFoundError"),
        ("alloc", "ValueError"),
        ("head", "RuntimeError"),
    ]
    assert run.state == {"draft": "partial", "alloc": "partial", "head": "partial"}
    assert "ERROR alloc copy N128 fp32: ValueError: no such shape" in capsys.readouterr().out


def test_lost_device_ends_the_run_and_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device) -> Calls:
        raise DeviceLost("illegal address")

    use_suites(
        monkeypatch, {"alloc": lambda d, q: iter([copy_case("alloc", 64), copy_case("alloc", 128, lost)])}, "cases"
    )

    def fail(self: Run, suite: str, case: str, error: Exception) -> None:
        raise DeviceLost(case) from error

    monkeypatch.setattr(Run, "_fail", fail)
    run = make_run(tmp_path)
    with pytest.raises(DeviceLost):
        run.suites(["alloc", "head", "engine"])
    stored = json.loads((tmp_path / "run.json").read_text())
    assert len(stored["rows"]) == 1
    assert results.remaining(stored) == ["head", "engine"]


def test_time_limit_skips_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_suites(monkeypatch, {"alloc": lambda d, q: iter([copy_case("alloc", 64), copy_case("alloc", 128)])}, "cases")
    use_suites(monkeypatch, {"engine": lambda d, q, f, left: iter([Problem("engine", "x", "time limit")])}, "rows")
    run = make_run(tmp_path, budget_seconds=0.0)
    run.suites(["alloc", "engine"])
    assert not run.rows and not run.errors
    assert [(s.suite, s.case) for s in run.skipped] == [
        ("alloc", "alloc copy N64 fp32"),
        ("alloc", "alloc copy N128 fp32"),
        ("engine", "x"),
    ]
    assert run.state == {"alloc": "partial", "engine": "partial"}


def test_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_suites(monkeypatch, {"alloc": lambda d, q: iter([copy_case("alloc", 64), copy_case("alloc", 128)])}, "cases")
    run = make_run(tmp_path, name_filter="N128")
    run.suites(["alloc"])
    assert [row.shape for row in run.rows] == ["N128"]


def engine_row() -> Row:
    return Row(
        "engine", "generate", "pair", "fp32", "latency", "cold", 10.0, "plain", 30.0, 0, 0, None, {"identical": "1/1"}
    )


def test_suite_that_times_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished rows pass through with their further keys; a row without bytes has no bandwidth."""
    items = [engine_row(), Problem("engine", "B8", "went wrong")]
    use_suites(monkeypatch, {"engine": lambda d, q, f, left: iter(items)}, "rows")
    run = make_run(tmp_path)
    run.suites(["engine"])
    (row,) = run.as_json()["rows"]
    assert set(row) == ROW_KEYS | {"identical"} and row["gbps"] is None and row["ratio"] == pytest.approx(1 / 3)
    assert [e.case for e in run.errors] == ["B8"]


def test_engine_suite_on_a_stand_in_pair(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every batch size, lossless, both baselines timed; no time left gives skips, not rows."""
    pytest.importorskip("transformers")
    from bench import bench_engine, stand_in

    where = torch.device(device)

    def pair(dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, Any]:
        return stand_in.tiny_target(device), stand_in.ByteTokenizer(), stand_in.ConstantDrafter(device)

    monkeypatch.setattr(bench_engine, "load_demo_pair", pair)
    monkeypatch.setattr(bench_engine, "PROMPTS", ("abcd", "some more", "x"))
    rows = list(bench_engine.rows(where, True, "fp32", lambda: 1.0))
    assert len(rows) == 2
    for row in rows:
        assert isinstance(row, Row) and row.dtype == "fp32" and row.ratio is not None and row.ours_us > 0
        assert len(row.extra["baselines_us"]) == 2 and row.baseline_us == min(row.extra["baselines_us"].values())
        assert 1.0 <= row.extra["mean_acceptance"] <= 8 and row.extra["ms_per_step"] > 0
        same, of = row.extra["identical"].split("/")
        assert same == of and int(of) >= 2
    skipped = list(bench_engine.rows(where, True, "fp32", lambda: 0.0))
    assert [type(item) for item in skipped] == [Problem, Problem]


def test_suite_over_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import bench_tp

    monkeypatch.setattr(bench_tp, "wanted", (2,))
    cpu = torch.device("cpu")
    found = list(bench_tp.rows(cpu, True, "all_reduce", lambda: float("inf")))
    assert [(row.op, row.shape) for row in found if isinstance(row, Row)] == [("all_reduce", "TP2 16x4096")]
    assert found[0].ours_us > 0 and found[0].extra["what"] == "gloo"  # type: ignore[union-attr]
    late = list(bench_tp.rows(cpu, True, "all_reduce", lambda: -1.0))
    assert [problem.reason for problem in late if isinstance(problem, Problem)] == ["time limit"]


def test_results_are_filed_by_card_and_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_suites(monkeypatch, {s: lambda d, q, s=s: iter([copy_case(s, 64)]) for s in ("alloc", "head")}, "cases")
    run = make_run(tmp_path)
    run.suites(["alloc", "head"])
    written = results.file_run(json.loads((tmp_path / "run.json").read_text()), tmp_path / "results")
    assert [p.relative_to(tmp_path).as_posix() for p in written] == [
        "results/some-card-80-gb/alloc.json",
        "results/some-card-80-gb/head.json",
    ]
    stored = json.loads(written[1].read_text())
    assert set(stored) == RUN_KEYS and [row["suite"] for row in stored["rows"]] == ["head"]
    capsys.readouterr()
    assert results.main(["--show", str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out.count("N64") == 2
    (tmp_path / "bad.json").write_text("[1]")
    assert results.main([str(tmp_path / "bad.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_table_in_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table takes the cold row where there are two, and renewing it twice changes nothing else."""
    run = make_run(tmp_path, commit="abc")
    run.state["engine"] = "done"
    hot = {**engine_row().__dict__, "cache": "hot", "ours_us": 77.0}
    run.rows += [engine_row(), Row(**hot)]
    run.save()
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    results.file_run(run.as_json(), results.RESULTS)
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    assert results.main(["--readme", str(document)]) == 0
    once = document.read_text()
    assert once.startswith("before\n<!-- bench:begin -->\nSome Card (80 GB) (torch") and once.endswith(
        "end -->\nafter\n"
    )
    assert "| generate | fp32 | latency | 1 | 0.33 (0.33 to 0.33) |  |" in once and "old" not in once
    assert results.main(["--markdown", str(results.RESULTS / "some-card-80-gb" / "engine.json")]) == 0
    table = capsys.readouterr().out
    assert "| generate | pair | fp32 | 10.0 | plain | 30.0 | 0.33 |  |" in table
    assert "77.0" not in table and "engine 0.33" in table
    assert results.main(["--readme", str(document)]) == 0
    assert document.read_text() == once
    document.write_text("no marks")
    assert results.main(["--readme", str(document)]) == 2
    assert "bench:begin" in capsys.readouterr().err


def test_plot_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from bench.plot import draw

    use_suites(monkeypatch, {s: lambda d, q, s=s: iter([copy_case(s, 64)]) for s in ("alloc", "head")}, "cases")
    run = make_run(tmp_path)
    run.suites(["alloc", "head"])
    run.rows.append(engine_row())  # has no ceiling: not drawn
    draw(run.as_json(), tmp_path / "plot.png")
    data = (tmp_path / "plot.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tp", "--tp", "two"], "--tp must be numbers of ranks, as 2,4, got two"),
        (["tp", "--tp", "4,1"], "--tp: at least 2 ranks are needed, got 1"),
        (["nothing", "alloc"], "unknown suite nothing; there are: verify, alloc,"),
        (["alloc", "--json", "missing/x.json"], "--json missing/x.json: its directory does not exist"),
        (["alloc", "--plot", "missing/x.png"], "--plot missing/x.png: its directory does not exist"),
        (["alloc", "--device", "cuda"], "--device cuda: torch sees no CUDA device"),
    ],
)
def test_command_line_mistakes_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        command_line.main(argv)
    said = capsys.readouterr()
    assert left.value.code == 2 and said.out == ""
    assert message in said.err and said.err.count("\n") == 1


def test_gpu_round_mistakes_are_one_line() -> None:
    done = subprocess.run(["bash", "tools/gpu_round.sh", "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "gpu_round: unknown argument nothing; stages: tests sanitize bench demo\n"


def test_console_command_runs_the_checkouts_bench() -> None:
    """`dflash-kernels bench` hands its arguments on, from the checkout's root, and returns the exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "dflash_kernels", "bench", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("python -m bench: unknown suite nothing")


def test_commit_comes_from_git_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "0123456789ab", "status": ""}
    monkeypatch.setattr(runner, "_output", lambda command: answers[command[3]])
    assert runner.commit_id() == "0123456789ab"
    answers["status"] = " M bench/plot.py"
    assert runner.commit_id() == "0123456789ab+"
    answers["rev-parse"] = ""
    monkeypatch.setenv("DFLASH_COMMIT", "from-env")
    assert runner.commit_id() == "from-env"
    monkeypatch.delenv("DFLASH_COMMIT")
    assert runner.commit_id() == "unknown"


def result(index: int, tokens: list[int], commits: list[int]) -> Any:
    return types.SimpleNamespace(index=index, token_ids=tokens, stats=types.SimpleNamespace(commit_lens=commits))


def test_acceptance_summary() -> None:
    ours = [result(0, [1, 2, 3, 4], [3]), result(1, [1, 2], [1]), result(2, [9], [])]
    plain = [result(0, [1, 2, 3, 4], [1] * 3), result(1, [1, 5], [1]), result(2, [9], [])]
    summary = acceptance.summarise(ours, plain, 2.0, 4.0)
    assert summary["mean_acceptance"] == 2.0 and summary["steps"] == 2 and summary["tokens"] == 7
    assert summary["commit_histogram"] == {"1": 1, "3": 1}
    assert summary["identical"] == 2 and summary["differing_prompts"] == [1]
    assert summary["tokens_per_s"] == 3.5 and summary["plain_tokens_per_s"] == 1.75
    assert "identical" not in acceptance.summarise(ours, None, 2.0, 0.0)


def test_acceptance_knows_the_formats_of_activations() -> None:
    assert [acceptance.weights_of(name) for name in ("bf16", "int4-g64", "fp8-w8a8", "nvfp4-w4a4")] == [
        "bf16", "int4-g64", "fp8", "nvfp4"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="come as fp8-w8a8 and nvfp4-w4a4, got nvfp4-w8a8"):
        acceptance.weights_of("nvfp4-w8a8")


def test_acceptance_reads_prompts_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"a": ["one", "two"], "b": ["three"]}))
    assert acceptance.read_sets(path, 1) == {"a": ["one"], "b": ["three"]}
    copied = tmp_path / "copy.json"
    assert acceptance.main(["--prompts", str(path), "--limit", "1", "--write-prompts", str(copied)]) == 0
    assert acceptance.read_sets(copied, None) == {"a": ["one"], "b": ["three"]}
    for content in ("[]", '{"a": "text"}', '{"a": [""]}', "{"):
        path.write_text(content)
        capsys.readouterr()
        assert acceptance.main(["--prompts", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert acceptance.main(["--prompts", str(tmp_path / "none.json")]) == 2

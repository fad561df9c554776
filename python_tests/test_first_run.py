"""The first-run kit with fake stages: order, limits, budget, resuming, the report; and what it says without a GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command_line
from bench import first_run
from bench.cards import CARDS, rates
from bench.first_run import Outcome, Stage, chosen_stages, make_stages, read_state, run_stages, why_not, write_report
from bench.model import need_of
from bench.predict import Predictor, bench_rows

H100 = {
    "name": "NVIDIA H100 80GB HBM3", "multiprocessors": 132, "capability": [9, 0], "count": 1, "torch": "2.11.0",
    "cuda": "13.0", "l2_bytes": 50 << 20, "memory_bytes": 80 << 30,
}  # fmt: skip
TWO = {**H100, "name": "NVIDIA H200", "count": 2}
B200 = {**H100, "name": "NVIDIA B200", "multiprocessors": 148, "capability": [10, 0]}


@pytest.fixture(autouse=True)
def no_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def stage(name: str, code: str = "", limit: float = 20.0, **options: Any) -> Stage:
    return Stage(name, f"fake {name}", python(code), limit, **{"least": 0.0, **options})


def appending(path: Path, word: str) -> str:
    return f"open({str(path)!r}, 'a').write({word + ' '!r})"


def test_order_failures_and_resuming(tmp_path: Path) -> None:
    """Stages run in order, whatever becomes of one; a second call runs only what is not done, or is asked for again."""
    ran = tmp_path / "ran"
    stages = [
        stage("first", appending(ran, "first")),
        stage("broken", appending(ran, "broken") + "; raise SystemExit('it is broken')"),
        Stage("absent", "fake", None, 10, missing="nothing to run it with"),
        Stage("nonsense", "fake", ["/no/such/program"], 10, 0.0),
        stage("last", appending(ran, "last")),
    ]
    out = tmp_path / "out"
    found = run_stages(stages, out, H100, commit="abc")
    assert ran.read_text().split() == ["first", "broken", "last"]
    states = {name: outcome.state for name, outcome in found.items()}
    assert states == {"first": "ok", "broken": "failed", "absent": "skipped", "nonsense": "failed", "last": "ok"}
    assert found["broken"].code == 1 and "it is broken" in found["broken"].note
    assert found["absent"].note == "nothing to run it with" and "FileNotFoundError" in found["nonsense"].note
    assert found["first"].commit == "abc" and (out / "first.log").is_file()
    # What is done stays; what was skipped is looked at again.
    stages[2] = stage("absent", appending(ran, "absent"))
    again = run_stages(stages, out, H100, again=["broken"], commit="def")
    assert ran.read_text().split() == ["first", "broken", "last", "broken", "absent"]
    assert again["first"].commit == "abc" and again["absent"].state == "ok" and again["broken"].commit == "def"
    assert read_state(out, H100) == again


def test_a_hanging_stage_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """Its children too, also in a session of their own and deaf to the polite signal; then the next stage runs."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    pid_file = tmp_path / "pid"
    hang = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}], "
        f"start_new_session=True); "
        f"open({str(pid_file)!r}, 'w').write(str(p.pid)); print('waiting', flush=True); time.sleep(60)"
    )
    started = time.monotonic()
    found = run_stages([stage("hang", hang, limit=3.0), stage("next")], tmp_path / "out", H100)
    assert found["hang"].state == "timeout" and found["hang"].code is None and found["next"].state == "ok"
    assert time.monotonic() - started < 30
    assert _ends(int(pid_file.read_text()))


def _ends(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
    except OSError:
        return False
    return state != "Z"


def test_budget(tmp_path: Path) -> None:
    """What it is too short for waits, and what fits still runs; what it ends is cut; both run the next time."""
    stages = [
        stage("needs much", least=50.0),
        stage("short"),
        stage("long", "import time; time.sleep(60)", limit=100.0),
        stage("after", least=1.0),
    ]
    out = tmp_path / "out"
    found = run_stages(stages, out, H100, budget=4.0)
    assert [found[s.name].state for s in stages] == ["waiting", "ok", "cut", "waiting"]
    assert "50 needed" in found["needs much"].note
    stages[2] = stage("long", "print('done now')")
    found = run_stages(stages, out, H100, budget=300.0)
    assert {outcome.state for outcome in found.values()} == {"ok"}


def test_a_bench_that_the_budget_cut_short_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends by itself, before its limit, with exit code 0."""
    monkeypatch.setattr(first_run, "max", lambda *_: 0.1, raising=False)  # its own limit
    bench = stage("bench.x", "import time; time.sleep(0.3)", note=lambda: "3 rows, 2 not reached")
    assert run_stages([bench], tmp_path, H100, budget=10.0)["bench.x"].state == "cut"
    assert run_stages([bench], tmp_path, H100)["bench.x"].state == "ok"


def waiting_for(path: Path) -> str:
    return (
        f"import pathlib, time\nend = time.monotonic() + 15\nwhile not pathlib.Path({str(path)!r}).exists():\n"
        "    assert time.monotonic() < end, 'nothing came'\n    time.sleep(0.02)\n"
    )


def test_two_gpus_two_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not timed runs beside what is, on the last GPU; what takes all of them waits for both."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    ran = tmp_path / "ran"

    def note(word: str) -> str:
        return f"\nimport os\nopen({str(ran)!r}, 'a').write({word!r} + os.environ['CUDA_VISIBLE_DEVICES'] + ' ')\n"

    # Each of the first two waits until the other has begun: one after the other they would fail.
    stages = [
        stage("timed", f"open({str(tmp_path / 't')!r}, 'w')\n" + waiting_for(tmp_path / "u") + note("timed=")),
        stage("all", note("all="), every_gpu=True),
        stage(
            "untimed",
            f"open({str(tmp_path / 'u')!r}, 'w')\n"
            + waiting_for(tmp_path / "t")
            + "time.sleep(0.5)"
            + note("untimed="),
            timed=False,
        ),
        stage("next", "import time; time.sleep(0.2)" + note("next=")),
    ]
    found = run_stages(stages, tmp_path / "out", TWO)
    assert {name: outcome.state for name, outcome in found.items()} == {s.name: "ok" for s in stages}
    assert ran.read_text().split() == ["timed=GPU-a", "next=GPU-a", "untimed=GPU-b", "all=GPU-a,GPU-b"]
    assert read_state(tmp_path / "out", TWO) == found


def test_gpus_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_run.visible_gpus(TWO) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert first_run.visible_gpus(TWO) == ["3", "5"]
    one = [stage("a"), stage("b", timed=False), stage("c", every_gpu=True)]
    assert first_run.lanes(one, first_run.visible_gpus(H100)) == [[(one, {})]], "one GPU: in order, nothing handed down"


def test_budget_of_two_lanes(tmp_path: Path) -> None:
    long = "import time; time.sleep(60)"
    stages = [
        stage("a", long, limit=100.0),
        stage("b", long, limit=100.0, timed=False),
        stage("c", limit=100.0, least=50.0, every_gpu=True),
    ]
    started = time.monotonic()
    found = run_stages(stages, tmp_path, TWO, budget=3.0)
    assert [found[s.name].state for s in stages] == ["cut", "cut", "waiting"] and time.monotonic() - started < 10


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process whose starter ignores SIGINT (a job in the background) ignores it, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_both_lanes(tmp_path: Path) -> None:
    def wait_long(name: str) -> str:
        return f"import os, time; open({str(tmp_path / name)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    stages = [stage("a", wait_long("a"), 600.0), stage("b", wait_long("b"), 600.0, timed=False), stage("c")]

    def interrupt() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not all((tmp_path / name).is_file() for name in "ab"):
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, tmp_path / "out", TWO)
    assert all(_ends(int((tmp_path / name).read_text())) for name in "ab")
    assert {name: outcome.state for name, outcome in read_state(tmp_path / "out", TWO).items()} == {
        "a": "cut",
        "b": "cut",
    }


def test_what_was_cut_goes_on_at_the_same_commit(tmp_path: Path) -> None:
    """With what it kept; anew at another commit, and when it is asked for again."""
    kept, out = tmp_path / "kept", tmp_path / "out"
    step = (
        f"import os, pathlib; kept = pathlib.Path({str(kept)!r}); kept.mkdir(exist_ok=True); "
        "n = len(list(kept.iterdir())); "
        f"(kept / str(n)).write_text(open({str(out / 'state.json')!r}).read()); raise SystemExit(75 if n < 2 else 0)"
    )
    stages = [stage("tests", step, kept=kept)]

    def states(commits: str, **options: Any) -> list[str]:
        return [run_stages(stages, out, H100, commit=commit, **options)["tests"].state for commit in commits]

    assert states("aaa") == ["cut", "cut", "ok"]
    assert states("a", again=["tests"]) == ["cut"]
    assert states("abbb") == ["cut", "cut", "cut", "ok"]
    assert "this process was killed" in (kept / "0").read_text(), "what the call after a killed one would find"
    # A call without time for it leaves it as it is.
    assert states("a", again=["tests"]) == ["cut"]
    stages = [stage("tests", step, kept=kept, least=50.0)]
    assert states("a", budget=1.0) == ["cut"]
    stages = [stage("tests", step, kept=kept)]
    assert states("aa") == ["cut", "ok"]


PYTEST = """\
#!/usr/bin/env bash
[ "$1" = -c ] && exit 1  # no xdist
module=$(basename "${@: -1}" .py)
echo "$module" >>"$RAN"
sleep "$SLOW"
[ "$module" = test_bad ] && echo "1 failed, 2 passed in 1s" && exit 1
[ "$module" = test_none ] && echo "3 deselected in 1s" && exit 5
echo "4 passed in 1s"
"""


def test_tests_go_on_with_the_modules_that_did_not_end(tmp_path: Path) -> None:
    """What the script says with a pytest that is none."""
    fake, ran, kept = tmp_path / "python", tmp_path / "ran", tmp_path / "kept"
    fake.write_text(PYTEST)
    fake.chmod(0o755)
    environment = {
        **os.environ, "PYTHON": str(fake), "OUT": str(tmp_path), "TESTS_KEPT": str(kept), "RAN": str(ran),
        "TEST_MODULES": "test_a.py test_bad.py test_none.py test_b.py", "TEST_JOBS": "1",
    }  # fmt: skip

    def round_of(limit: int, slow: int) -> tuple[int, list[str], str]:
        ran.write_text("")
        done = subprocess.run(
            ["bash", "tools/gpu_round.sh", "tests"],
            cwd=first_run.ROOT,
            env={**environment, "TESTS_LIMIT": str(limit), "SLOW": str(slow)},
            capture_output=True,
            text=True,
        )
        (tmp_path / "tests.log.all").write_text(done.stdout)
        return done.returncode, ran.read_text().split(), first_run._tests_note(tmp_path / "tests.log.all")

    code, modules, note = round_of(12, 6)  # no module starts with less than 10 s
    assert code == 75 and modules == ["test_a"], note
    assert note == "4 passed in 1 modules with GPU tests, 0 modules not clean, 3 not run to their end (tests.log)"
    code, modules, note = round_of(60, 0)
    assert code == 1 and modules == ["test_bad", "test_none", "test_b"]
    assert note == "10 passed in 3 modules with GPU tests, 1 modules not clean (tests.log)"
    assert round_of(60, 0)[:2] == (1, [])
    assert (tmp_path / "tests.log").read_text().count("4 passed") == 2


def test_modules_with_gpu_tests_are_found() -> None:
    """The script looks for the marker, or the fixture with its type."""
    for path in (first_run.ROOT / "python_tests").glob("test_*.py"):
        for name, arguments in re.findall(r"^def (test_\w+)\((.*?)\) ->", path.read_text(), re.M | re.S):
            assert not re.search(r"\bdevice\b(?!: str)", arguments), f"{path.name}: {name}({arguments})"


def test_limits_reach_the_stage(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['LIMIT'])"
    command = [*python(code), "--time-limit", "{limit}"]
    run_stages([Stage("a", "", command, 100.0, 0.0, environment={"LIMIT": "{limit}"})], tmp_path, H100)
    assert "['--time-limit', '85'] 85" in (tmp_path / "a.log").read_text()
    run_stages([Stage("b", "", command, 100.0, 0.0, environment={"LIMIT": "{limit}"})], tmp_path, H100, budget=60.0)
    assert "'45'] 45" in (tmp_path / "b.log").read_text() or "'44'] 44" in (tmp_path / "b.log").read_text()


def test_files_of_an_earlier_attempt_do_not_count(tmp_path: Path) -> None:
    """A bench that dies at once is not reported with the rows of the attempt before."""
    path = tmp_path / "bench.x.json"
    path.write_text(json.dumps({"rows": [1], "geomean": {}, "errors": [], "skipped": []}))
    dead = stage("bench.x", "raise SystemExit(3)", produces=[path], note=lambda: first_run._bench_note(path))
    found = run_stages([dead], tmp_path, H100)["bench.x"]
    assert found.state == "failed" and "cannot be read" in found.note and not path.exists()
    silent = stage("bench.y", "", note=lambda: first_run._bench_note(path))
    assert run_stages([silent], tmp_path, H100)["bench.y"].state == "failed", "exit code 0 without a file is no success"


def test_what_the_tests_said(tmp_path: Path) -> None:
    log = tmp_path / "tests.log"
    log.write_text(
        "== tests\n\n== gpu_round, commit abc\ntests     FAILED      43s  164 passed in 9 modules\n  test_x ok\n"
    )
    assert first_run._tests_note(log) == "164 passed in 9 modules"
    log.write_text("bash: no\n")
    assert first_run._tests_note(log) == "no summary"


def test_another_machine_needs_another_directory(tmp_path: Path) -> None:
    run_stages([stage("a")], tmp_path, H100)
    with pytest.raises(ValueError, match="another machine .NVIDIA H100"):
        run_stages([stage("a")], tmp_path, B200)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the state of a first run"):
        run_stages([stage("a")], tmp_path, H100)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"torch": "2.13.0+cpu", "cuda": None, "count": 0}, "a CPU build"),
        ({"torch": "2.11.0", "cuda": "13.0", "count": 0}, "CUDA 13.0"),
        ({**H100, "name": "NVIDIA A100", "capability": [8, 0]}, "found NVIDIA A100 .8.0."),
        ({**H100, "name": "RTX 5090", "capability": [12, 0]}, "found RTX 5090 .12.0."),
    ],
)
def test_what_is_needed(facts: dict[str, Any], words: str) -> None:
    reason = why_not(facts)
    assert reason is not None and reason.startswith("a CUDA GPU of compute capability 9.0")
    assert re.search(words, reason)
    assert why_not(H100) is None and why_not(B200) is None


def test_without_a_gpu_the_command_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"torch": "2.13.0+cpu", "cuda": None, "count": 0}
    monkeypatch.setattr(first_run, "device_facts", lambda: facts)
    assert command_line.main(["first-run", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "a CUDA GPU of compute capability 9.0" in said and "bench predict --card" in said
    assert not (tmp_path / "out").exists()
    assert command_line.main(["first-run", "--list", "--out", str(tmp_path / "out")]) == 0
    assert "bench.verify" in capsys.readouterr().out
    assert command_line.main(["first-run", "--stages", "bench,tset"]) == 2
    assert "there is no stage tset" in capsys.readouterr().err


def test_facts_of_this_machine() -> None:
    facts = first_run.device_facts()
    assert facts["torch"] and (facts["count"] == 0 or facts["multiprocessors"] > 0)


def test_stages_are_what_they_should_be(tmp_path: Path) -> None:
    """Every suite, test and tool of the tree has its stage; what is missing is said, not run."""
    stages = {s.name: s for s in make_stages(tmp_path, {**H100, "count": 1}, quick=False, recipe=None)}
    from bench.runner import SUITES

    assert {f"bench.{suite}" for suite in SUITES} <= set(stages)
    inside = {s.name: s for s in make_stages(first_run.ROOT / "build" / "x", H100, quick=True, recipe=None)}
    assert "build/x/bench.draft.json" in inside["bench.draft"].command  # type: ignore[operator]
    assert all(path.is_absolute() for s in inside.values() for path in s.produces)
    order = list(stages)
    assert order[0] == "doctor" and order.index("tests") < order.index("tune") < order.index("bench.verify")
    assert (
        stages["bench.tp"].missing and "installed" in stages["sglang"].missing or "recipe" in stages["sglang"].missing
    )
    for s in stages.values():
        assert s.command and 0 < s.least <= s.limit <= 600, "a machine may be lent for 10 minutes"
        assert s.note is None or callable(s.note)
        assert all(path.parent == tmp_path.resolve() for path in s.produces)
        if s.note is not None:
            with pytest.raises(FileNotFoundError):
                s.note()
        for part in s.command[1:]:
            if part.startswith("tools/"):
                assert (first_run.ROOT / part).is_file()
    assert {s.name for s in stages.values() if not s.timed} == {"tests", "tests.tp", "sanitize"}
    assert {s.name for s in stages.values() if s.every_gpu} == {"tests.tp", "bench.tp"}
    assert {s.name for s in stages.values() if s.kept} == {"tests", "sanitize"}
    two = {s.name: s for s in make_stages(tmp_path, {**H100, "count": 2}, quick=True, recipe=tmp_path)}
    assert not two["bench.tp"].missing and two["bench.tp"].command[-1] == "2"  # type: ignore[index]
    assert "--quick" in two["bench.draft"].command and two["bench.draft"].environment["DFLASH_TUNING"] == "off"  # type: ignore[operator]
    assert [s.name for s in chosen_stages(list(stages.values()), ["bench.head", "doctor"])] == ["doctor", "bench.head"]
    assert len(chosen_stages(list(stages.values()), ["bench"])) == len(SUITES)


def a_run(suite: str, factor: float) -> dict[str, Any]:
    """The file of a bench run whose rows take `factor` times what an H100 is expected to take."""
    predictor, here = Predictor(), rates(CARDS["h100"])
    rows = []
    for row in (r for r in bench_rows() if r["suite"] == suite):
        us = factor * predictor.us(need_of(row), here)
        rows.append({**row, "cache": "cold", "ours_us": us, "baseline": "theirs", "baseline_us": 2 * us, "ratio": 0.5})
    ceilings = {"read_bw": 3.1e12, "copy_bw": 3e12, "flop_rate": 8e14, "flop_dtype": "bf16"}
    return {"rows": rows, "geomean": {suite: 0.5}, "errors": [], "skipped": [], "ceilings": ceilings, "suites": {}}


TUNED = {
    "file": "/some/tuning.json",
    "parameters": {"verify_block": {"lazy_bytes": 1 << 62}},
    "failures": ["RuntimeError: one question failed"],
    "answers": [
        {
            "kind": "draft", "shape": "L5 H4096", "default": 132, "chosen": 0, "gain": 1.25,
            "times": {"132": {"B1": 10.0}, "0": {"B1": 8.0}}, "wrong": {"66": "B1: error 1, allowed 0.1"},
        }
    ],
}  # fmt: skip


def test_report(tmp_path: Path) -> None:
    """Measured beside predicted, off rows marked, stages with their reasons, what is still to do."""
    (tmp_path / "bench.draft.json").write_text(json.dumps(a_run("draft", 1.0)))
    (tmp_path / "bench.head.json").write_text(json.dumps(a_run("head", 1.5)))
    (tmp_path / "tuning.json").write_text(json.dumps(TUNED))
    stages = [stage("tests"), stage("bench.draft"), stage("bench.head"), stage("sanitize"), stage("sglang")]
    outcomes = {
        "tests": Outcome("failed", 12.0, 1, "exit code 1; 3 | 4 passed", commit="abc"),
        "bench.draft": Outcome("ok", 30.0, 0, "15 rows", commit="abc"),
        "sanitize": Outcome("cut", 9.0, None, "", commit="def"),
        "sglang": Outcome("skipped", note="SGLang is not installed"),
    }
    write_report(tmp_path, H100, outcomes, stages, "python -m bench first-run --quick")
    text = (tmp_path / "report.md").read_text()
    assert "# First run on NVIDIA H100 80GB HBM3" in text and "commit abc, def" in text
    assert "| tests | **failed** | 12 | exit code 1; 3 \\| 4 passed |" in text
    assert "| sglang | **skipped** |  | SGLang is not installed |" in text and "| bench.head | not run | | |" in text
    assert "Still to do, by the same command: bench.head, sanitize." in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    compared = summary["compared"]
    drafts = [row for row in compared["rows"] if row["suite"] == "draft"]
    heads = [row for row in compared["rows"] if row["suite"] == "head"]
    assert all(row["ratio"] == pytest.approx(1.0) for row in drafts) and compared["within"] == len(drafts)
    assert all(row["ratio"] == pytest.approx(1.5) for row in heads) and compared["compared"] == len(drafts) + len(heads)
    assert text.count("| **1.50** | 0.50 |") == len(heads) and "What the model leaves out" in text
    assert "| draft | L5 H4096 | 132 | 0 | 1.250 |" in text and "66 wrong: B1: error 1" in text
    assert "skips rows nowhere" in text and "fixed when the library is compiled" in text
    assert "one question failed" in text and not summary["problems"]
    if (tmp_path / "predicted.png").is_file():
        assert "![predicted.png](predicted.png)" in text


def test_rows_that_the_model_does_not_know_are_shown(tmp_path: Path) -> None:
    run = a_run("head", 1.0)
    run["rows"] = [run["rows"][0], {**run["rows"][1], "op": "something new"}]
    (tmp_path / "bench.head.json").write_text(json.dumps(run))
    write_report(tmp_path, H100, {}, [], "x")
    compared = json.loads((tmp_path / "summary.json").read_text())["compared"]
    assert len(compared["rows"]) == 2 and compared["compared"] == compared["within"] == 1
    assert "op must be one of the benches', got 'something new'" in (tmp_path / "report.md").read_text()


def test_report_of_nothing(tmp_path: Path) -> None:
    write_report(tmp_path, B200, {}, [stage("tests")], "x")
    text = (tmp_path / "report.md").read_text()
    assert "No suite has written rows yet." in text and "Still to do, by the same command: tests." in text


def test_a_card_that_the_table_lacks() -> None:
    """Predicted with its own multiprocessors and the ceilings of the run."""
    runs = [{"ceilings": {"read_bw": 7e12, "copy_bw": 6e12, "flop_rate": 2e15}}]
    card, origin = first_run.this_card({**B200, "name": "NVIDIA B300", "multiprocessors": 160}, runs)
    assert (card.sms, card.name, card.folder) == (160, "NVIDIA B300", "") and "measured in this run" in origin
    here = rates(card)
    assert here.read_bw == 7e12 and here.flops == pytest.approx(2e15)
    known, origin = first_run.this_card(B200, runs)
    assert known is CARDS["b200"] and "published" in origin


def test_the_whole_command_on_fakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = [stage("doctor"), stage("bench.x", "raise SystemExit(1)")]
    monkeypatch.setattr(first_run, "device_facts", lambda: H100)
    monkeypatch.setattr(first_run, "make_stages", lambda *_: fakes)
    out = tmp_path / "out"
    assert first_run.main(["--out", str(out)]) == 1
    assert "bench.x: failed" in capsys.readouterr().out and (out / "report.md").is_file()
    fakes[1] = stage("bench.x")
    assert first_run.main(["--out", str(out), "--again", "bench"]) == 0
    assert "doctor: ok already" in capsys.readouterr().out
    monkeypatch.setattr(first_run, "device_facts", lambda: B200)
    assert first_run.main(["--out", str(out)]) == 2
    assert "another machine" in capsys.readouterr().err
    assert os.path.getsize(out / "summary.json") > 0

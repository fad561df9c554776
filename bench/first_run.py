"""`python -m bench first-run`: checks, tests, tunes and measures a new machine, and compares it with the prediction.

Stages, each in a process of its own with a time limit (`--list` shows them): ``doctor`` and ``info`` look at the
install, ``tests`` runs every GPU test, ``tune`` measures what the package leaves to a machine, ``bench.SUITE`` each
suite against its baselines, ``sanitize`` every kernel under compute-sanitizer, ``sglang`` the step of SGLang's DFLASH.
One that fails, hangs or is missing something is reported and does not stop the next. Everything goes into one
directory: logs, JSON, pictures, ``summary.json`` and ``report.md``, which are written anew at the end of every call.

A second call with the same ``--out`` goes on where the first stopped, so a machine may be had in pieces: ``--budget``
ends a call in time, ``--stages`` chooses, ``--again`` repeats. At the same commit ``tests`` and ``sanitize`` go on
inside, too. Benches run without the tuning file, so that their rows are those of other runs; what tuning gains is in
its own table.

Where there are several GPUs, what is not timed runs on the last one beside what is timed on the first, and then, with
nothing beside it, what takes all of them. ``CUDA_VISIBLE_DEVICES`` says which GPUs there are.

Exit codes: 0 every stage asked for is fine, or skipped for a reason; 1 one failed, or did not fit the budget; 2 bad
arguments or no GPU that this package runs on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.cards import CARDS, Card, card_of, rates
from bench.model import REASONS
from bench.results import preferred_rows

__all__ = ["Outcome", "Stage", "device_facts", "main", "make_stages", "run_stages", "write_report"]

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("verify", "alloc", "gemm", "head", "inject", "draft", "dflash2", "engine", "tp")
DONE = ("ok", "failed", "timeout")  # not run again unless asked
UNFINISHED = 75  # exit code of a tool that kept what it did and would go on
NOT_REACHED = "not reached"  # in a bench's note: cases that its time was too short for
GRACE = 5.0  # seconds from the polite signal to the other
TAIL = 4000  # characters of a log that the report may quote from
NEEDS = "a CUDA GPU of compute capability 9.0 (H100, H200) or 10.x (B200, B300) that torch sees"


@dataclass(frozen=True)
class Stage:
    """One step of the run.

    Attributes:
        command: run in the repository's root; None: there is nothing to run, for the reason in `missing`.
        limit: seconds that it may take; least: with fewer left of the budget it is not started.
        missing: why it cannot run here; "" if it can.
        environment: added to the process's.
        produces: files that it writes; those of an earlier attempt are removed first.
        note: after the process has ended, what its output says, for the report; None: nothing.
        kept: a folder by which it goes on where it was cut; emptied before it starts anew.
        timed: it measures times, so that nothing else may run on its GPU.
        every_gpu: it takes all GPUs; nothing runs beside it.
    """

    name: str
    what: str
    command: Sequence[str] | None
    limit: float
    least: float = 20.0
    missing: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    produces: Sequence[Path] = ()
    note: Callable[[], str] | None = None
    kept: Path | None = None
    timed: bool = True
    every_gpu: bool = False


@dataclass
class Outcome:
    """What came of a stage: `state` is ok, failed, timeout, cut (by the budget), skipped or waiting (for budget)."""

    state: str
    seconds: float = 0.0
    code: int | None = None
    note: str = ""
    command: str = ""
    log: str = ""
    date: str = ""
    commit: str = ""


# -- running ----------------------------------------------------------------------------------------------------------


def run_limited(
    command: Sequence[str],
    log: Path,
    limit: float,
    environment: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
) -> tuple[int | None, float]:
    """Exit code (None: ended at the limit or by `stop`, with everything it started) and seconds; output to the log."""
    started = time.monotonic()
    stop = stop or threading.Event()
    with log.open("wb") as out:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() - started < limit and not stop.is_set():
                stop.wait(0.05)
            code = process.poll()
            seconds = time.monotonic() - started
        finally:
            _end(process)
    return code, seconds


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process's own group, which it leads, and its descendants in others: politely, then not."""
    family = _descendants(process.pid) if process.poll() is None else []
    for signal_number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 60.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal_number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    process.wait()


def _descendants(pid: int) -> list[int]:
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children[int(path.read_text().rsplit(") ", 1)[1].split()[1])].append(int(path.parent.name))
    found = children[pid][:]
    for one in found:
        found += children[one]
    return found


def visible_gpus(facts: Mapping[str, Any]) -> list[str]:
    """The GPUs that torch sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    count = int(facts.get("count", 0))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(i) for i in range(count)] if named is None else named.split(",")[:count]


Lane = tuple[Sequence[Stage], Mapping[str, str]]  # stages one after another, and what is added to their environment


def lanes(stages: Sequence[Stage], gpus: Sequence[str]) -> list[list[Lane]]:
    """Lanes that run side by side, in groups that follow one another."""
    if len(gpus) < 2:
        return [[(stages, {})]]
    one = [stage for stage in stages if not stage.every_gpu]
    timed = ([stage for stage in one if stage.timed], {"CUDA_VISIBLE_DEVICES": gpus[0]})
    others = ([stage for stage in one if not stage.timed], {"CUDA_VISIBLE_DEVICES": gpus[-1]})
    return [[timed, others], [([stage for stage in stages if stage.every_gpu], {})]]


def run_stages(
    stages: Sequence[Stage],
    out: Path,
    facts: Mapping[str, Any],
    budget: float | None = None,
    again: Sequence[str] = (),
    commit: str = "unknown",
) -> dict[str, Outcome]:
    """Run what is not done yet, keeping ``state.json`` current; the outcomes of all stages that it knows.

    Raises:
        ValueError: the directory holds the run of another machine.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = float("inf") if budget is None else time.monotonic() + budget
    outcomes = read_state(out, facts)
    lock, stop = threading.Lock(), threading.Event()

    def keep(stage: Stage, outcome: Outcome) -> None:
        with lock:
            outcomes[stage.name] = outcome
            save_state(out, facts, outcomes)

    def run_lane(lane: Lane) -> None:
        for stage in lane[0]:
            if stop.is_set():
                return
            before = outcomes.get(stage.name)
            if before is not None and before.state in DONE and stage.name not in again:
                _say(f"== {stage.name}: {before.state} already ({before.date})")
                continue
            going_on = before is not None and before.state == "cut" and before.commit == commit
            if stage.kept is not None and not going_on:
                shutil.rmtree(stage.kept, ignore_errors=True)
                keep(stage, Outcome("cut", note="this process was killed", commit=commit))  # unless it gets further
            outcome = _run_stage(stage, out, end, commit, lane[1], stop)
            if not (going_on and outcome.state == "waiting"):  # it can still go on the next time
                keep(stage, outcome)
            _say(f"== {stage.name}: {outcome.state} after {outcome.seconds:.0f} s. {outcome.note}".rstrip())

    for group in lanes(stages, visible_gpus(facts)):
        with ThreadPoolExecutor(len(group)) as pool:
            try:
                for lane in as_completed([pool.submit(run_lane, lane) for lane in group]):
                    lane.result()
            except BaseException:  # Ctrl-C, too: both lanes end what they run
                stop.set()
                raise
    return outcomes


def _say(line: str) -> None:
    """In one piece, also beside another lane."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _run_stage(
    stage: Stage, out: Path, end: float, commit: str, environment: Mapping[str, str], stop: threading.Event
) -> Outcome:
    now, left = datetime.now(UTC).isoformat(timespec="seconds"), end - time.monotonic()
    if stage.missing or stage.command is None:
        return Outcome("skipped", note=stage.missing or "nothing to run", date=now, commit=commit)
    if left < stage.least:
        return Outcome("waiting", note=f"{max(left, 0):.0f} s of the budget left, {stage.least:.0f} needed", date=now)
    limit = min(stage.limit, left)
    _say(f"== {stage.name}: {stage.what} (at most {limit:.0f} s)")
    log = out / f"{stage.name}.log"
    own = max(10, limit - 15)
    command = [part.replace("{limit}", f"{own:.0f}") for part in stage.command]
    environment = {**environment, **{k: v.replace("{limit}", f"{own:.0f}") for k, v in stage.environment.items()}}
    for path in stage.produces:
        path.unlink(missing_ok=True)
    try:
        code, seconds = run_limited(command, log, limit, environment, stop)
    except OSError as error:
        return Outcome("failed", 0.0, None, f"{type(error).__name__}: {error}", _quoted(command), "", now, commit)
    state = {0: "ok", None: "timeout"}.get(code, "failed")
    note = ""
    if stage.note is not None:
        try:
            note = stage.note()
        except (OSError, ValueError, KeyError, TypeError) as error:
            lacking = isinstance(error, FileNotFoundError) and error.filename
            what = f"it wrote no {Path(lacking).name}" if lacking else f"{type(error).__name__}: {error}"
            note = f"its output cannot be read: {what}"
            state = "failed" if state == "ok" else state
    # The budget ended it, or it ended itself at the limit that the budget had left it.
    by_budget = limit < stage.limit and (state == "timeout" or (seconds >= own and (code or NOT_REACHED in note)))
    if code == UNFINISHED or by_budget or (code is None and stop.is_set()):
        state = "cut"
    if state == "failed":
        note = "; ".join(filter(None, [f"exit code {code}", note, last_line(log)]))
    return Outcome(state, seconds, code, note, _quoted(command), log.name, now, commit)


def _quoted(command: Sequence[str]) -> str:
    """As one would type it."""
    return shlex.join(["python" if part == sys.executable else part for part in command])


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "")


def read_state(out: Path, facts: Mapping[str, Any]) -> dict[str, Outcome]:
    """Outcomes of earlier calls.

    Raises:
        ValueError: they are of another machine, or the file is broken.
    """
    path = out / "state.json"
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        there = state["facts"]
        outcomes = {name: Outcome(**outcome) for name, outcome in state["stages"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the state of a first run: {type(error).__name__}: {error}") from error
    for key in ("name", "multiprocessors"):
        if there.get(key) != facts.get(key):
            raise ValueError(f"{out} holds the run of another machine ({there.get('name')}): name another directory")
    return outcomes


def save_state(out: Path, facts: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> None:
    """Write ``state.json``, whole or not at all."""
    state = {"facts": dict(facts), "stages": {name: asdict(outcome) for name, outcome in outcomes.items()}}
    partial = out / "state.json.part"
    partial.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    partial.replace(out / "state.json")


# -- the stages -------------------------------------------------------------------------------------------------------


_FACTS = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "count": 0}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    found |= {"count": torch.cuda.device_count(), "name": p.name, "multiprocessors": p.multi_processor_count,
              "capability": [p.major, p.minor], "l2_bytes": p.L2_cache_size, "memory_bytes": p.total_memory}
print(json.dumps(found))
"""


def device_facts() -> dict[str, Any]:
    """Of the GPU, asked in another process: this one never holds a CUDA context.

    Raises:
        RuntimeError: torch does not run.
    """
    done = subprocess.run([sys.executable, "-c", _FACTS], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"torch does not run: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def why_not(facts: Mapping[str, Any]) -> str | None:
    """Why this machine cannot have a first run; None: it can."""
    if not facts.get("count"):
        build = "a CPU build" if facts.get("cuda") is None else f"CUDA {facts['cuda']}"
        return f"{NEEDS} is needed; torch {facts.get('torch')} ({build}) sees none"
    major, minor = facts["capability"]
    if (major, minor) != (9, 0) and major != 10:
        return f"{NEEDS} is needed, found {facts['name']} ({major}.{minor})"
    return None


def make_stages(out: Path, facts: Mapping[str, Any], quick: bool, recipe: Path | None) -> list[Stage]:
    """All stages in order; ``{limit}`` in a command or environment stands for the stage's seconds, less some."""
    python = sys.executable
    out = out.resolve()
    # In commands, which run in the checkout and are quoted in what they write: short where it lies there.
    to = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    checkout = (ROOT / "python_tests").is_dir() and (ROOT / "tools" / "gpu_round.sh").is_file()
    no_checkout = "" if checkout else "the tests and tools are in the source tree only"
    no_tests = no_checkout or ("" if find_spec("pytest") else "pytest is not installed")
    tests = ["bash", "tools/gpu_round.sh", "tests"]
    # `tune` may write its file meanwhile, and a test compares passes that both ask it.
    tests_environment = {"PYTHON": python, "TESTS_LIMIT": "{limit}", "MODULE_LIMIT": "240", "DFLASH_TUNING": "off"}
    count = int(facts.get("count", 0))
    one_gpu = "" if count > 1 else "one GPU: ranks need one each"
    stages = [
        Stage("doctor", "the install", [python, "-m", "dflash_kernels", "doctor"], 120),
        Stage("info", "versions, kernels in the library", [python, "-m", "dflash_kernels", "info"], 120),
        Stage(
            "tests",
            "every test on the device",
            tests,
            560,
            60,
            no_tests,
            {"OUT": str(to / "tests"), "TESTS_KEPT": str(to / "tests" / "modules"), **tests_environment},
            note=lambda: _tests_note(out / "tests.log"),
            kept=out / "tests",
            timed=False,
        ),
        Stage(
            "tests.tp",
            "tests that take several GPUs",
            tests,
            240,
            60,
            no_tests or one_gpu,
            {
                "OUT": str(to / "tests.tp"),
                "TEST_MODULES": "python_tests/test_tensor_parallel.py",
                "TEST_WORKERS": "1",  # ranks wait for each other: nothing beside them
                **tests_environment,
            },
            note=lambda: _tests_note(out / "tests.tp.log"),
            timed=False,
            every_gpu=True,
        ),
        Stage(
            "tune",
            "what is left to the machine",
            _tune_command(python, to, quick),
            240,
            60,
            produces=[out / "tuning.json"],
            note=lambda: _tune_note(out),
        ),
    ]
    for suite in SUITES:
        plot = ["--plot", str(to / f"bench.{suite}.png")] if find_spec("matplotlib") else []
        command = [python, "-m", "bench", suite, "--json", str(to / f"bench.{suite}.json"), *plot]
        command += ["--device", "cuda", "--time-limit", "{limit}", *(["--quick"] if quick else [])]
        missing = ""
        if suite == "engine" and (absent := [n for n in ("transformers", "gguf") if not find_spec(n)]):
            missing = f"{', '.join(absent)} not installed: the demo pair cannot run"
        if suite == "tp":
            missing = one_gpu
            command += ["--tp", ",".join(str(n) for n in (2, 4, 8) if n <= count)]
        stages.append(
            Stage(
                f"bench.{suite}",
                f"suite {suite} against its baselines",
                command,
                240,
                45,
                missing,
                {"DFLASH_TUNING": "off"},
                [out / f"bench.{suite}.json", out / f"bench.{suite}.png"],
                lambda suite=suite: _bench_note(out / f"bench.{suite}.json"),  # type: ignore[misc]
                every_gpu=suite == "tp",
            )
        )
    stages.append(_sanitize_stage(python, out, to, quick, no_checkout))
    stages.append(_sglang_stage(python, out, to, quick, recipe))
    return stages


def _tune_command(python: str, to: Path, quick: bool) -> list[str]:
    command = [python, "-m", "bench.tune", "--json", str(to / "tuning.json"), "--time-limit", "{limit}"]
    return command + (["--quick"] if quick else [])


def _sanitize_stage(python: str, out: Path, to: Path, quick: bool, missing: str) -> Stage:
    if not missing and _sanitizer() is None:
        missing = "compute-sanitizer is neither on the PATH nor under $CUDA_HOME or /usr/local/cuda"
    command = [python, "tools/sanitize.py", "--out", str(to / "sanitize"), "--go-on", "--time-limit", "{limit}"]
    command += ["--tools", "memcheck"] if quick else []
    return Stage(
        "sanitize",
        "every kernel under compute-sanitizer",
        command,
        560,
        90,
        missing,
        {"DFLASH_TUNING": "off"},  # `tune` may write its file meanwhile
        kept=out / "sanitize",
        timed=False,
    )


def _sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    beside = (str(Path(home) / "bin" / "compute-sanitizer") for home in homes if home)
    return shutil.which("compute-sanitizer") or next((path for path in beside if os.access(path, os.X_OK)), None)


def _sglang_stage(python: str, out: Path, to: Path, quick: bool, recipe: Path | None) -> Stage:
    missing, recipe = "", None if recipe is None else recipe.resolve()
    if find_spec("sglang") is None:
        missing = "SGLang is not installed"
    elif recipe is None:
        missing = "no --recipe DIR with target/config.json and draft/config.json; tools/sglang_recipe.py writes one"
    elif lacking := [n for n in ("target", "draft") if not (recipe / n / "config.json").is_file()]:
        missing = f"{recipe / lacking[0] / 'config.json'} is not there"
    command = [python, "-m", "bench.bench_sglang", str(recipe), "--ab", "--json", str(to / "sglang.json")]
    command += ["--work", str(to / "sglang"), "--time-limit", "{limit}", "--trace", "1,32"]
    command += ["--concurrency", "1,32" if quick else "1,8,32", "--repeats", "2" if quick else "3"]
    return Stage(
        "sglang",
        "the step of SGLang's DFLASH",
        command,
        595,
        240,
        missing,
        {},
        [out / "sglang.json"],
        lambda: _sglang_note(out),
    )


def _tests_note(log: Path) -> str:
    """Tests passed over all modules, from the log of this stage."""
    text = log.read_text(errors="replace")
    found = re.findall(r"^tests .*$", text, re.MULTILINE)
    return " ".join(found[-1].split()[3:]) if found else "no summary"


def _bench_note(path: Path) -> str:
    run = json.loads(path.read_text(encoding="utf-8"))
    parts = [f"{len(run['rows'])} rows"]
    parts += [f"ours / best baseline {mean:.2f}" for mean in run["geomean"].values() if mean is not None]
    parts += [
        f"{len(run[kind])} {word}" for kind, word in (("errors", "failed"), ("skipped", NOT_REACHED)) if run[kind]
    ]
    return ", ".join(parts)


def _tune_note(out: Path) -> str:
    report = json.loads((out / "tuning.json").read_text(encoding="utf-8"))
    answers = report["answers"]
    changed = sum(one["chosen"] != one["default"] for one in answers if one["kind"] != "verify_block")
    failed = f", {len(report['failures'])} failed or not asked" if report["failures"] else ""
    return f"{len(answers)} questions, {changed} defaults changed{failed}; file: {report['file'] or 'none written'}"


def _sglang_note(out: Path) -> str:
    report = json.loads((out / "sglang.json").read_text(encoding="utf-8"))
    rows = [row for row in report.get("summary", []) if "over_stock" in row]
    return ", ".join(f"c{row['concurrency']} {row['over_stock']:.3f} of stock's speed" for row in rows) or "no rows"


def chosen_stages(stages: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """Those of the names; ``bench`` stands for every ``bench.*``.

    Raises:
        ValueError: there is no such stage.
    """
    for name in names:
        if not any(stage.name == name or stage.name.startswith(name + ".") for stage in stages):
            raise ValueError(f"there is no stage {name}; there are: {', '.join(stage.name for stage in stages)}")
    return [s for s in stages if any(s.name == name or s.name.startswith(name + ".") for name in names)]


# -- the report -------------------------------------------------------------------------------------------------------


def bench_files(out: Path) -> list[dict[str, Any]]:
    """The runs of all suites that wrote a file."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("bench.*.json"))]


def this_card(facts: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> tuple[Card, str]:
    """The card to predict for, and where its figures are from: published, or measured here where the table lacks it."""
    known = card_of(str(facts.get("name", "")))
    if known is not None and known.sms == facts.get("multiprocessors"):
        return known, f"published figures: {known.source}"
    likest = known or (CARDS["b200"] if list(facts.get("capability", [0]))[0] == 10 else CARDS["h100"])
    card = replace(likest, key="this", name=str(facts["name"]), folder="", sms=int(facts["multiprocessors"]))
    card = replace(card, l2_bytes=int(facts.get("l2_bytes") or card.l2_bytes))
    origin = f"as {likest.name}, with this card's multiprocessors"
    if runs:
        base = rates(CARDS["h100"])
        ceilings = runs[0]["ceilings"]
        share = base.flops / CARDS["h100"].bf16
        bf16 = ceilings["flop_rate"] / share
        card = replace(card, read_bw=ceilings["read_bw"], bf16=bf16, fp8=card.fp8 * bf16 / card.bf16)
        origin += " and the ceilings measured in this run"
    return card, origin


def compare(facts: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every measured row beside what was expected of it before the run."""
    from bench.predict import TOLERANCE, Predictor, predict_row

    rows = [row for run in runs for row in preferred_rows(run["rows"])]
    card, origin = this_card(facts, runs)
    predictor = Predictor()
    found = []
    for row in rows:
        one = predict_row(predictor, card, row)
        found.append({**asdict(one), "baseline": row["baseline"], "baseline_us": row["baseline_us"]})
    ratios = [row["ratio"] for row in found if row["ratio"] is not None]
    here = rates(card)
    return {
        "card": card.name,
        "figures": origin,
        "fitted_on": f"{len(predictor.rows)} rows measured on an H100, {predictor.parameters} parameters",
        "expected_rates": {"read_bw": here.read_bw, "copy_bw": here.copy_bw, "flop_rate": here.flops},
        "rows": found,
        "within": sum(abs(ratio - 1) <= TOLERANCE for ratio in ratios),
        "compared": len(ratios),
        "tolerance": TOLERANCE,
    }


def write_report(
    out: Path, facts: Mapping[str, Any], outcomes: Mapping[str, Outcome], stages: Sequence[Stage], command: str
) -> None:
    """``summary.json``, ``predicted.png`` and ``report.md`` from whatever is there."""
    runs = bench_files(out)
    summary: dict[str, Any] = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": dict(facts),
        "stages": {name: asdict(outcome) for name, outcome in outcomes.items()},
        "ceilings": runs[0]["ceilings"] if runs else None,
        "compared": None,
        "tuning": _read(out / "tuning.json"),
        "sglang": (_read(out / "sglang.json") or {}).get("summary"),
        "problems": [],
    }
    if runs:
        try:
            summary["compared"] = compare(facts, runs)
        except Exception as error:  # the report of what was measured must not hang on the prediction
            summary["problems"].append(f"not compared with the prediction: {type(error).__name__}: {error}")
    if summary["compared"] and find_spec("matplotlib"):
        from bench.plot import draw_predicted

        try:
            draw_predicted(summary["compared"], out / "predicted.png")
        except Exception as error:
            summary["problems"].append(f"no picture: {type(error).__name__}: {error}")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text("\n".join(_report(out, summary, stages)) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _report(out: Path, summary: Mapping[str, Any], stages: Sequence[Stage]) -> list[str]:
    machine, outcomes = summary["machine"], summary["stages"]
    commits = sorted({outcome["commit"] for outcome in outcomes.values() if outcome["commit"]})
    lines = [
        f"# First run on {machine.get('name')}",
        "",
        f"{machine.get('multiprocessors')} multiprocessors, torch {machine.get('torch')} (CUDA {machine.get('cuda')}), "
        f"{machine.get('count')} GPU(s); commit {', '.join(commits) or 'unknown'}; {summary['date']}.",
        f"Written by `{summary['command']}`; everything here is in `summary.json` too.",
        "",
        "## Stages",
        "",
        "| stage | | seconds | |",
        "|---|---|---:|---|",
    ]
    for stage in stages:
        outcome = outcomes.get(stage.name)
        if outcome is None:
            lines.append(f"| {stage.name} | not run | | |")
        else:
            seconds = f"{outcome['seconds']:.0f}" if outcome["seconds"] else ""
            lines.append(f"| {stage.name} | **{outcome['state']}** | {seconds} | {_cell(outcome['note'])} |")
    open_stages = [s.name for s in stages if outcomes.get(s.name, {}).get("state") not in (*DONE, "skipped")]
    if open_stages:
        lines += ["", f"Still to do, by the same command: {', '.join(open_stages)}."]
    lines += [f"\nProblem: {problem}" for problem in summary["problems"]]
    lines += _compared_lines(summary)
    lines += _tuning_lines(summary["tuning"])
    if summary["sglang"]:
        lines += [
            "",
            "## SGLang's step",
            "",
            "| concurrency | seams | ms a step | speed over stock |",
            "|---:|---|---:|---:|",
        ]
        for row in summary["sglang"]:
            over = f"{row['over_stock']:.3f}" if "over_stock" in row else ""
            lines.append(f"| {row['concurrency']} | {row['seams']} | {row['ms_per_step']:.3f} | {over} |")
    pictures = sorted(path.name for path in out.glob("*.png"))
    if pictures:
        lines += ["", "## Pictures", "", *(f"![{name}]({name})" for name in pictures)]
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _compared_lines(summary: Mapping[str, Any]) -> list[str]:
    compared = summary["compared"]
    if not compared:
        return ["", "## Measured and predicted", "", "No suite has written rows yet."]
    ceilings, expected = summary["ceilings"], compared["expected_rates"]
    units = {"read_bw": (1e12, "TB/s read"), "copy_bw": (1e12, "TB/s copied"), "flop_rate": (1e12, "TFLOP/s bf16")}
    rate_words = [
        f"{ceilings[key] / unit:.4g} {word} measured, {expected[key] / unit:.4g} expected"
        for key, (unit, word) in units.items()
    ]
    lines = [
        "",
        "## Measured and predicted",
        "",
        f"Predicted from {compared['fitted_on']}, for {compared['card']} ({compared['figures']}).",
        f"{'; '.join(rate_words)}.",
        f"{compared['within']} of {compared['compared']} rows are within {compared['tolerance']:.0%}. The floor is "
        "bytes over bandwidth or operations over the rate, at the expected rates.",
        "",
        "| op | shape | dtype | floor us | expected us | measured us | measured / expected | ours / best baseline |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    off = []
    for row in compared["rows"]:
        ratio = f"{row['measured_us'] / row['baseline_us']:.2f}" if row["baseline_us"] else ""
        cells = [row["op"], row["shape"], row["dtype"]]
        if row["expected_us"] is None:
            cells += ["", "", f"{row['measured_us']:.2f}", row["note"], ratio]
        else:
            is_off = abs(row["ratio"] - 1) > compared["tolerance"]
            off += [row] if is_off else []
            cells += [f"{row['floor_us']:.2f}", f"{row['expected_us']:.2f}", f"{row['measured_us']:.2f}"]
            cells += [f"{'**' if is_off else ''}{row['ratio']:.2f}{'**' if is_off else ''}", ratio]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    if off:
        lines += ["", "What the model leaves out where rows are off:", ""]
        lines += [f"* {family}: {REASONS[family]}" for family in dict.fromkeys(row["family"] for row in off)]
    return lines


def _tuning_lines(report: Mapping[str, Any] | None) -> list[str]:
    if report is None:
        return []
    lines = [
        "",
        "## Tuned",
        "",
        f"File: {report['file'] or 'none written'}. Tuned are numbers of blocks, the chain or the stream for a",
        "drafter, and the bytes from which greedy verification skips rows.",
        "Depth of the rings, tile sizes and warps are fixed when the library is compiled.",
        "",
        "| kind | shape | default | chosen | default / chosen | us |",
        "|---|---|---:|---:|---:|---|",
    ]
    for one in report["answers"]:
        times = "; ".join(
            f"{value}: {' / '.join(f'{us:.1f}' for us in t.values())}" for value, t in one["times"].items()
        )
        wrong = "".join(f"; {value} wrong: {reason}" for value, reason in one["wrong"].items())
        cells = [
            one["kind"],
            one["shape"],
            str(one["default"]),
            str(one["chosen"]),
            f"{one['gain']:.3f}",
            times + wrong,
        ]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    lazy = report["parameters"].get("verify_block", {}).get("lazy_bytes")
    if lazy is not None:
        said = "nowhere" if lazy >= 1 << 60 else f"from {lazy / 1e6:.0f} MB of logits on"
        lines += ["", f"Greedy verification skips rows {said}."]
    lines += [f"\nProblem: {problem}" for problem in report["failures"]]
    return lines


# -- the command ------------------------------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    """A comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m bench first-run", description="Check, test, tune and measure everything on a new machine."
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: first-run-CARD in this directory")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and samples, memcheck alone")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end this call by then; the next goes on")
    parser.add_argument("--stages", type=names, metavar="A,B", help="only these; bench stands for every suite")
    parser.add_argument("--again", type=names, default=[], metavar="A,B", help="run these though they are done")
    parser.add_argument("--recipe", type=Path, metavar="DIR", help="target and draft configs for the SGLang step")
    parser.add_argument("--list", action="store_true", help="show the stages and their commands; needs no GPU")
    args = parser.parse_args(argv)
    from bench.runner import commit_id

    def refuse(message: object) -> int:
        print(f"python -m bench first-run: {message}", file=sys.stderr)
        return 2

    try:
        facts = device_facts()
    except (RuntimeError, ValueError, IndexError, subprocess.SubprocessError) as error:
        return refuse(error)
    out = args.out or Path("first-run-" + re.sub(r"[^a-z0-9]+", "-", str(facts.get("name", "none")).lower()).strip("-"))
    stages = make_stages(out, facts, args.quick, args.recipe)
    try:
        wanted = chosen_stages(stages, args.stages) if args.stages is not None else stages
        again = [stage.name for stage in chosen_stages(stages, args.again)]
    except ValueError as error:
        return refuse(error)
    if args.list:
        for stage in wanted:
            skipped = f": SKIPPED: {stage.missing}" if stage.missing else ""
            print(f"{stage.name:<14} {stage.limit:>4.0f} s  {stage.what}{skipped}")
            print(f"{'':<14} {shlex.join(stage.command or [])}")
        return 0
    if (reason := why_not(facts)) is not None:
        return refuse(f"{reason}. Without one: python -m bench predict --card {'|'.join(CARDS)}")
    print(
        f"# {facts['name']}, {facts['multiprocessors']} multiprocessors; torch {facts['torch']}; into {out}", flush=True
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is ended
    try:
        outcomes = run_stages(wanted, out, facts, args.budget, again, commit_id())
    except (ValueError, OSError) as error:
        return refuse(error)
    write_report(out, facts, outcomes, stages, shlex.join(["python", "-m", "bench", "first-run", *argv]))
    print(f"# {out / 'report.md'}")
    fine = all(outcomes[stage.name].state in ("ok", "skipped") for stage in wanted)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

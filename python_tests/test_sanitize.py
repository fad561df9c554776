"""tools/sanitize.py: its calls are in step with the ops, and it reads the sanitizer's words."""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "sanitize.py"


@pytest.fixture(scope="module")
def sanitize() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sanitize", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sanitize"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("group", ["alloc", "verify", "head", "inject", "draft", "dflash2"])
def test_calls_are_accepted(group: str, sanitize: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    failed = sanitize.make_calls([group], "cpu")
    text = capsys.readouterr().out
    assert failed == 0, text
    report = sanitize.parse_log(text, [group]).groups[group]
    assert report.clean and report.calls > 0


def test_every_group_is_here(sanitize: ModuleType) -> None:
    assert list(sanitize.GROUPS) == ["alloc", "verify", "head", "inject", "draft", "dflash2"]


LOG = """\
========= COMPUTE-SANITIZER
@@sanitize begin alloc
@@sanitize end alloc 3 0.5
@@sanitize begin head
========= Invalid __global__ read of size 16 bytes
=========     at dflash::head::argmax_kernel+0x1230
=========     by thread (0,0,0) in block (1,0,0)
=========     Access to 0x7f is out of bounds
=========
========= Error: Race reported between Write access at dflash::head::x+0x10
=========     and Read access at dflash::head::x+0x20 [4 hazards]
=========
@@sanitize error head RuntimeError: unspecified launch failure
@@sanitize end head 4 1.0
@@sanitize begin draft
"""


def test_findings_go_to_the_group_they_were_found_in(sanitize: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    log = LOG + "========= ERROR SUMMARY: 2 errors\n"
    report = sanitize.parse_log(log, ["alloc", "head", "draft", "dflash2"])
    assert report.total == 2 and not report.outside
    assert report.groups["alloc"].clean
    first, second = report.groups["head"].findings
    assert first.startswith("Invalid __global__ read of size 16 bytes | at dflash::head::argmax_kernel+0x1230 | by")
    assert second.endswith("and Read access at dflash::head::x+0x20 [4 hazards]")
    assert report.groups["head"].error == "RuntimeError: unspecified launch failure"
    assert not sanitize.print_report("memcheck", report, timed_out=True, exit_code=-9)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:4] for line in lines if not line.startswith(" ")] == [
        ["alloc", "ok", "3"],
        ["head", "2", "FINDINGS"],
        ["draft", "OUT", "OF"],
        ["dflash2", "OUT", "OF"],
    ]


@pytest.mark.parametrize(
    ("summary", "clean"),
    [
        ("========= ERROR SUMMARY: 0 errors", True),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", False),
        ("", False),
    ],
)
def test_clean_needs_the_tools_own_word(summary: str, clean: bool, sanitize: ModuleType) -> None:
    log = f"========= COMPUTE-SANITIZER\n@@sanitize begin alloc\n@@sanitize end alloc 3 0.5\n{summary}\n"
    assert sanitize.print_report("racecheck", sanitize.parse_log(log, ["alloc"]), False, 0) is clean


FAKE = """\
#!/usr/bin/env bash
# A sanitizer that runs nothing: --tool NAME ... --groups GROUP
tool=$2 group=${@: -1}
echo "$tool.$group" >>"$RAN"
echo "@@sanitize begin $group"
[ "$group" = draft ] && sleep "$SLOW"
[ "$tool.$group" = racecheck.head ] && [ -n "$RACE" ] && echo "========= Error: Race reported" && errors=1
echo "@@sanitize end $group 3 0.5"
echo "========= ERROR SUMMARY: ${errors:-0} errors"
"""


@pytest.fixture
def fake(tmp_path: Path, sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that says what ran."""
    tool, ran = tmp_path / "compute-sanitizer", tmp_path / "ran"
    tool.write_text(FAKE)
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: str(tool))
    for name, value in (("RAN", str(ran)), ("SLOW", "0"), ("RACE", "")):
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    yield ran
    signal.signal(signal.SIGTERM, before)


def ran_since(path: Path) -> list[str]:
    lines = sorted(path.read_text().split()) if path.is_file() else []
    path.unlink(missing_ok=True)
    return lines


def test_processes_run_side_by_side(
    tmp_path: Path,
    fake: Path,
    sanitize: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLOW", "1")
    started = time.monotonic()
    assert sanitize.main(["--out", str(tmp_path / "out"), "--groups", "alloc,draft", "--jobs", "6"]) == 0
    assert time.monotonic() - started < 2.5, "three that take a second each"
    everything = [f"{tool}.{group}" for tool in sanitize.TOOLS for group in ("alloc", "draft")]
    assert ran_since(fake) == everything
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == everything
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "sanitize: clean" and len(said) == 7 and all(" ok " in line for line in said[:-1])
    ports = [sanitize.tool_command("x", tool, group)[4] for tool in sanitize.TOOLS for group in sanitize.GROUPS]
    assert len(set(ports)) == len(ports) == 18 and all(49152 <= int(port) < 65000 for port in ports)


def test_what_is_clean_is_not_run_again(
    tmp_path: Path,
    fake: Path,
    sanitize: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLOW", "60")
    monkeypatch.setenv("RACE", "1")
    command = ["--out", str(tmp_path), "--groups", "alloc,head,draft", "--tools", "racecheck", "--jobs", "2"]
    assert sanitize.main([*command, "--time-limit", "2"]) == sanitize.UNFINISHED == 75
    said = capsys.readouterr().out
    assert "head     1 FINDINGS" in said and "draft    OUT OF TIME" in said
    assert said.endswith("sanitize: NOT CLEAN, as far as the time went\n")
    assert ran_since(fake) == ["racecheck.alloc", "racecheck.draft", "racecheck.head"]
    monkeypatch.setenv("SLOW", "0")
    assert sanitize.main([*command, "--go-on"]) == 1
    assert ran_since(fake) == ["racecheck.draft", "racecheck.head"]
    monkeypatch.setenv("RACE", "")
    assert sanitize.main([*command, "--go-on"]) == 0 and ran_since(fake) == ["racecheck.head"]
    assert sanitize.main([*command, "--go-on"]) == 0 and ran_since(fake) == []
    assert capsys.readouterr().out.count("alloc    ok") == 3, "what is kept is in the table, too"
    assert sanitize.main(command) == 0 and len(ran_since(fake)) == 3


def test_a_group_that_hangs_is_a_failure(
    tmp_path: Path,
    fake: Path,
    sanitize: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLOW", "60")
    monkeypatch.setattr(sanitize, "GROUP_LIMIT", 1.0)
    assert sanitize.main(["--out", str(tmp_path), "--groups", "draft,alloc", "--tools", "memcheck", "--jobs", "1"]) == 1
    said = capsys.readouterr().out
    assert "draft    OUT OF TIME" in said and "alloc    ok" in said and said.endswith("sanitize: NOT CLEAN\n")


def test_bad_names_are_refused(sanitize: ModuleType) -> None:
    with pytest.raises(SystemExit) as stopped:
        sanitize.main(["--groups", "nothing"])
    assert stopped.value.code == 2

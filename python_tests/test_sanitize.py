"""tools/sanitize.py: its calls are in step with the ops, and it reads the sanitizer's words."""

from __future__ import annotations

import importlib.util
import sys
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


def test_bad_names_are_refused(sanitize: ModuleType) -> None:
    with pytest.raises(SystemExit) as stopped:
        sanitize.main(["--groups", "nothing"])
    assert stopped.value.code == 2

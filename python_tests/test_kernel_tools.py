"""Tools that look at kernels one by one: the choice of tiles against its sweep, and a row's time kernel by kernel."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from statistics import mean
from types import ModuleType

import pytest

from bench.kernel_times import added_times

ROOT = Path(__file__).resolve().parent.parent


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_chosen_tiles_are_near_the_fastest() -> None:
    """The constants of plan.h are fitted to this sweep: a change of them that chooses badly is seen."""
    tool = _tool("plan_regret")
    found = tool.choices(json.loads(tool.SWEEP.read_text(encoding="utf-8")))
    assert len(found) > 40 and min(c.regret for c in found) == 1
    assert mean(c.regret for c in found) < 1.04 and max(c.regret for c in found) < 1.2


def test_a_kernel_counts_from_the_end_of_the_one_before() -> None:
    """Two calls a graph, two graphs; b starts early, inside a."""
    events, at = [], 0.0
    for _replay in range(2):
        for _call in range(2):
            events += [(at, at + 5, "void dflash::a<1>(int)"), (at + 1, at + 8, "b"), (at + 8, at + 10, "dflash::a<1>")]
            at += 10
        at += 100  # between graphs
    assert added_times(events[::-1], replays=2, calls=2) == [("a<1>", 2, 7.0), ("b", 1, 3.0)]
    for wrong in (events[:-1], []):
        with pytest.raises(SystemExit, match="must be a multiple of 4 calls"):
            added_times(wrong, replays=2, calls=2)

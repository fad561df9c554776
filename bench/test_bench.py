"""pytest-benchmark entries: each suite's smallest case, ours and each baseline, on the CPU and where there is one a GPU.

`python -m pytest bench/test_bench.py`. For a trend over commits on one machine; the tables come from `python -m bench`.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from bench.harness import Case  # noqa: E402
from bench.runner import SUITES  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


def smallest(suite: str, device: torch.device) -> Case:
    """The suite's quick case that moves the fewest bytes."""
    module = pytest.importorskip(f"bench.bench_{suite}")
    return min(module.cases(device, True), key=lambda case: case.bytes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("suite", [name for name in SUITES if name != "engine"])
def test_op(benchmark: Any, suite: str, device: str) -> None:
    where = torch.device(device)
    case = smallest(suite, where)
    calls = case.make(where)
    benchmark.extra_info.update(op=case.op, shape=case.shape, bytes=case.bytes, flops=case.flops)
    for run in calls.baselines.values():
        run()

    def ours() -> None:
        calls.ours()
        if device == "cuda":
            torch.cuda.synchronize()

    ours()
    benchmark.pedantic(ours, rounds=20, iterations=1, warmup_rounds=2)


@pytest.mark.parametrize("device", DEVICES)
def test_engine(benchmark: Any, device: str) -> None:
    """Eight steps of the engine on a tiny random target with a drafter that is always wrong: the loop's own cost."""
    transformers = pytest.importorskip("transformers")
    stand_in = importlib.import_module("bench.stand_in")
    engine = stand_in.tiny_engine(transformers, torch.device(device))
    run = stand_in.eight_steps(engine)
    run()
    benchmark.pedantic(run, rounds=5, iterations=1, warmup_rounds=1)
    engine.close()

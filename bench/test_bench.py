"""pytest-benchmark entries: each suite's smallest case, on the CPU and, where there is one, on a GPU.

`python -m pytest bench/test_bench.py`. For a trend over commits on one machine; the tables come from `python -m bench`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from bench.harness import Case  # noqa: E402
from bench.runner import SUITES  # noqa: E402

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def smallest(suite: str, device: torch.device) -> Case:
    """The suite's quick case that moves the fewest bytes."""
    module = pytest.importorskip(f"bench.bench_{suite}")
    return min(module.cases(device, True), key=lambda case: case.bytes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("suite", [name for name in SUITES if name not in ("engine", "tp")])
def test_op(benchmark: Any, suite: str, device: str) -> None:
    where = torch.device(device)
    case = smallest(suite, where)
    calls = case.make(where)
    benchmark.extra_info.update(op=case.op, shape=case.shape, bytes=case.bytes, flops=case.flops)

    def ours() -> None:
        calls.ours()
        if device == "cuda":
            torch.cuda.synchronize()

    ours()
    benchmark.pedantic(ours, rounds=20, iterations=1, warmup_rounds=2)


@pytest.mark.parametrize("device", DEVICES)
def test_engine(benchmark: Any, device: str) -> None:
    """The loop's own cost: a tiny target, and a drafter whose proposals are never right."""
    pytest.importorskip("transformers")
    from bench.stand_in import ConstantDrafter, tiny_target
    from dflash_kernels.engine import Engine, SamplingParams

    where = torch.device(device)
    engine = Engine(tiny_target(where), ConstantDrafter(where), max_batch=4, max_len=128)
    prompts = [[b + 2] * 8 for b in range(4)]
    params = SamplingParams(max_new_tokens=16)
    engine.generate(prompts, params)
    benchmark.pedantic(lambda: engine.generate(prompts, params), rounds=5, iterations=1, warmup_rounds=1)
    engine.close()

"""pytest-benchmark entries: each suite's smallest case, on the CPU and, where there is one, on a GPU.

`python -m pytest bench/test_bench.py`. For a trend over commits on one machine; the tables come from `python -m bench`.
"""

from __future__ import annotations

from collections.abc import Sequence
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
@pytest.mark.parametrize("suite", [name for name in SUITES if name != "engine"])
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


class ConstantDrafter:
    """Proposes token 0 always and keeps no context: what is left to time is the engine's loop around a tiny target."""

    block_size, mask_token_id = 8, 1
    target_layer_ids: Sequence[int] = (0,)
    num_layers = num_kv_heads = 1
    head_dim, hidden_size, vocab_size, max_positions = 8, 64, 256, 4096

    def __init__(self, device: torch.device) -> None:
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.lm_head_weight = torch.zeros(self.vocab_size, self.hidden_size, dtype=self.dtype, device=device)

    def forward(self, block_ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.lm_head_weight.new_zeros(block_ids.numel(), self.hidden_size)

    def inject(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("device", DEVICES)
def test_engine(benchmark: Any, device: str) -> None:
    transformers = pytest.importorskip("transformers")
    from dflash_kernels.engine import Engine, SamplingParams

    where = torch.device(device)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    target = transformers.LlamaForCausalLM(config).to(where)
    engine = Engine(target, ConstantDrafter(where), max_batch=4, max_len=128)
    prompts = [[b + 2] * 8 for b in range(4)]
    params = SamplingParams(max_new_tokens=16, stop_token_ids=())
    engine.generate(prompts, params)
    benchmark.pedantic(lambda: engine.generate(prompts, params), rounds=5, iterations=1, warmup_rounds=1)
    engine.close()

"""torch's own product in fp8, `torch._scaled_mm` with a scale for each row of both operands: the baselines of fp8 rows.

Activations are quantised row by row in plain torch, so that torch.compile fuses it with what makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

__all__ = ["compiled", "linear", "quantize_rows", "that_runs"]

Codes = tuple[torch.Tensor, torch.Tensor]


def quantize_rows(x: torch.Tensor) -> Codes:
    """``x [M, N]`` as e4m3 [M, N] and a scale [M, 1], float32; `ops.quantize_rows`, but for last bits of quotients."""
    largest = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-30)
    return (x.float() * (448 / largest)).to(torch.float8_e4m3fn), largest / 448


def linear(x: Codes, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """bf16 ``[M, N]`` of quantised rows and a weight's codes, uint8 [N, K], with scale [N, 1]."""
    values, x_scale = x
    weight = codes.view(torch.float8_e4m3fn).t()
    return torch._scaled_mm(
        values, weight, scale_a=x_scale, scale_b=scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


@cache
def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """For one set of shapes."""
    return torch.compile(function, dynamic=False)


@cache
def _say(line: str) -> None:
    print(line, flush=True)


def that_runs(name: str, call: Callable[[], object], device: torch.device) -> dict[str, Callable[[], object]]:
    """The baseline if one call of it runs here, outside of any capture; else nothing, and why is printed once."""
    try:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # a CPU, GPU or torch without such products, a Triton without a host compiler
        _say(f"# {name} left out: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return {}
    return {name: call}

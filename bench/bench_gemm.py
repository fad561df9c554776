"""gemm_fp8 at the sizes of drafter layers, against torch's own product of the same codes with scales of rows.

The baseline is `bench.torch_fp8.linear` and, for the residual and the gate, a kernel of torch.compile's behind it;
torch's version is in its name. Activations are codes already, for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from bench import torch_fp8
from bench.harness import Calls, Case
from bench.shapes import DEMO, QWEN3_8B, TINY, DrafterShape, random_codes
from dflash_kernels import ops
from dflash_kernels.formats import WeightFormat

SUITE = "gemm"
FP8 = WeightFormat("fp8")


def _add(c: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return c + residual


def _gate(c: torch.Tensor) -> torch.Tensor:
    gate, up = c.chunk(2, dim=-1)
    return F.silu(gate) * up


def _case(shape: DrafterShape, which: str, rows: int) -> Case:
    q, kv = shape.Hq * shape.D, shape.Hkv * shape.D
    n, k, epilogue = {
        "qkv": (q + 2 * kv, shape.H, "plain"),
        "o": (shape.H, q, "residual"),
        "gate_up": (2 * shape.I, shape.H, "gated"),
        "down": (shape.H, shape.I, "residual"),
    }[which]
    gated, with_residual = epilogue == "gated", epilogue == "residual"
    width = n // 2 if gated else n

    def make(device: torch.device) -> Calls:
        a, a_scale = ops.quantize_rows(torch.randn(rows, k, device=device).bfloat16())
        weight = random_codes(FP8, (n, k), device)
        codes, scale = weight.codes, weight.scale
        residual = torch.randn(rows, n, device=device).bfloat16() if with_residual else None
        out = torch.empty(rows, width, device=device, dtype=torch.bfloat16)
        values = a.view(torch.float8_e4m3fn)
        behind = _gate if gated else _add
        after: Callable[..., object] = torch_fp8.compiled(behind) if device.type == "cuda" else behind
        more = () if residual is None else (residual,)

        def theirs() -> object:
            c = torch_fp8.linear((values, a_scale), codes, scale)
            return c if epilogue == "plain" else after(c, *more)

        name = f"torch {torch.__version__} _scaled_mm" + ("" if epilogue == "plain" else f" + {epilogue}")
        return Calls(
            lambda: ops.gemm_fp8(a, a_scale, codes, scale, None, residual, gated, out=out),
            torch_fp8.that_runs(name, theirs, device),
        )

    return Case(
        suite=SUITE,
        op="gemm_fp8",
        shape=f"{shape.name} {which} M{rows} N{n} K{k} {epilogue}",
        dtype="fp8",
        regime="latency" if rows <= 64 else "throughput",
        bytes=(rows + n) * (k + 4) + 2 * rows * (width + n * with_residual),
        flops=rows * n * k,  # of bf16's rate: an fp8 product takes the tensor cores half the time
        stream="read",
        make=make,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The four products of a layer: of Qwen3-8B's drafter, and of the demo's odd sizes; small ones on the CPU."""
    on_cuda = device.type == "cuda"
    sizes = [(QWEN3_8B, (64, 512) if quick else (64, 128, 512)), (DEMO, (64,))] if on_cuda else [(TINY, (16,))]
    for shape, all_rows in sizes:
        for rows in all_rows:
            for which in ("qkv", "o", "gate_up", "down"):
                yield _case(shape, which, rows)

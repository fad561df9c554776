"""Oracle of the GEMM in e4m3: codes to values one by one, sums in float64, rounded where the formula says so."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dflash_kernels.reference.formats import decode_e4m3


def gemm_fp8(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """float64 ``[M, N]`` (gated: ``[M, N / 2]``), after every step rounded to ``dtype``."""
    table = torch.tensor([decode_e4m3(code) for code in range(256)], dtype=torch.float64, device=a.device)
    c = (table[a.long()] @ table[w.long()].T) * a_scale.double() * w_scale.double().T
    if bias is not None:
        c = c + bias.double()
    c = c.to(dtype).double()
    if residual is not None:
        c = (c + residual.double()).to(dtype).double()
    if not gated:
        return c
    gate, up = c.chunk(2, dim=1)
    return (F.silu(gate) * up).to(dtype).double()

"""Oracles of GEMMs in e4m3 and nvfp4: codes to values one by one, sums in float64, rounded where the formula says."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dflash_kernels.reference.formats import decode_e2m1, decode_e4m3


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
    return _finished(c, bias, residual, gated, dtype)


def gemm_nvfp4(
    a: torch.Tensor,
    a_groups: torch.Tensor,
    a_scale: torch.Tensor,
    w: torch.Tensor,
    w_groups: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """The same with codes of e2m1, uint8 ``[rows, K]``, one a byte, and of their groups' scales, ``[rows, K / 16]``."""
    table = torch.tensor([decode_e2m1(code) for code in range(16)], dtype=torch.float64, device=a.device)
    scales = torch.tensor([decode_e4m3(code) for code in range(256)], dtype=torch.float64, device=a.device)
    c = torch.zeros(a.shape[0], w.shape[0], dtype=torch.float64, device=a.device)
    for g in range(a_groups.shape[1]):
        part = slice(16 * g, 16 * g + 16)
        sums = table[a[:, part].long()] @ table[w[:, part].long()].T
        c += sums * scales[a_groups[:, g].long()][:, None] * scales[w_groups[:, g].long()]
    return _finished(c * a_scale.double() * w_scale.double().T, bias, residual, gated, dtype)


def _finished(
    c: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, gated: bool, dtype: torch.dtype
) -> torch.Tensor:
    if bias is not None:
        c = c + bias.double()
    c = c.to(dtype).double()
    if residual is not None:
        c = (c + residual.double()).to(dtype).double()
    if not gated:
        return c
    gate, up = c.chunk(2, dim=1)
    return (F.silu(gate) * up).to(dtype).double()

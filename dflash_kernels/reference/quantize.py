"""Oracles of rows in e4m3, torch's own conversion of quotients taken row by row, and in nvfp4, by the nearest value."""

from __future__ import annotations

import torch

from dflash_kernels.reference.formats import decode_e2m1

__all__ = ["quantize_rows", "quantize_rows_nvfp4"]


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[M, N]`` uint8 and scales ``[M, 1]`` float32 of ``x [M, N]``, any float dtype."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(x.shape[0], 1, device=x.device)
    most = torch.tensor(448.0, device=x.device)  # torch takes the reciprocal of what divides a Python number
    for r, row in enumerate(x.float()):
        numbers = row[~row.isnan()].abs()
        largest = torch.cat((numbers, numbers.new_tensor([1e-30]))).max()
        scale[r] = largest / most
        codes[r] = (row * (most / largest)).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, scale


def quantize_rows_nvfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes ``[M, N]`` uint8, one a byte; scales of groups ``[M, N / 16]`` float8_e4m3fn; scales of rows ``[M, 1]``."""
    values = torch.tensor([decode_e2m1(code) for code in range(8)], dtype=torch.float64)
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    groups = torch.empty(x.shape[0], x.shape[1] // 16, dtype=torch.float8_e4m3fn)
    scale = torch.empty(x.shape[0], 1)
    one, most, all_together = torch.tensor(1.0), torch.tensor(448.0), torch.tensor(2688.0)
    for r, row in enumerate(x.float().cpu()):
        numbers = row[~row.isnan()].abs()
        largest = torch.cat((numbers, numbers.new_tensor([1e-30]))).max()
        scale[r] = largest / all_together
        for g, group in enumerate(row.split(16)):
            wanted = group.abs().max() * (most / largest)  # NaN where the group has one
            groups[r, g] = wanted.clamp(max=448.0).to(torch.float8_e4m3fn)
            step = groups[r, g].float()
            if step.isnan() or step == 0:
                continue
            scaled = group * (one / (step * scale[r]))
            distance = (scaled.abs().double()[:, None] - values).abs()
            nearest = distance.min(1, keepdim=True).values == distance
            even = torch.tensor([code % 2 == 0 for code in range(8)])
            tie = nearest.sum(1, keepdim=True) > 1
            code = torch.where(tie, nearest & even, nearest).int().argmax(1)
            codes[r, 16 * g : 16 * g + 16] = code.to(torch.uint8) | scaled.signbit().to(torch.uint8) << 3
    groups.view(torch.uint8).bitwise_and_(0x7F)  # a NaN has no sign
    return codes.to(x.device), groups.to(x.device), scale.to(x.device)

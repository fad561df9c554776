"""Oracle of quantised weights, written from the number formats: codes to values one by one, products group by group."""

from __future__ import annotations

import torch

__all__ = ["decode_e2m1", "decode_e4m3", "decode_int4", "linear"]


def decode_e4m3(code: int) -> float:
    """Sign, 4 exponent bits with bias 7, 3 mantissa bits; no infinities, 0x7f and 0xff are NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return sign * magnitude


def decode_e2m1(code: int) -> float:
    """Sign, 2 exponent bits with bias 1, 1 mantissa bit."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def decode_int4(code: int) -> float:
    """Four bits that hold the value plus 8."""
    return float(code - 8)


def linear(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """``x [M, K]`` times the weights' transpose, float32 ``[M, N]``: what a kernel computes before it rounds.

    Activations are rounded to bf16. Each group's products with the bare codes are summed in float32 and scaled once.

    Args:
        codes: uint8 [N, K], one code each; scale: [N, groups], any float dtype; kind: "fp8", "int4", "e2m1" or "nvfp4".
    """
    decode = {"fp8": decode_e4m3, "int4": decode_int4, "e2m1": decode_e2m1, "nvfp4": decode_e2m1}[kind]
    table = torch.tensor([decode(code) for code in range(256 if kind == "fp8" else 16)], device=codes.device)
    values = table[codes.long()]
    width = codes.shape[1] // scale.shape[1]
    x = x.bfloat16().float()
    out = torch.zeros(x.shape[0], codes.shape[0], device=x.device)
    for group in range(scale.shape[1]):
        part = slice(group * width, (group + 1) * width)
        out += (x[:, part] @ values[:, part].T) * scale[:, group].float()
    return out

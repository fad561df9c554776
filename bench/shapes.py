"""Drafter shapes the benches run: published configs, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dflash_kernels.formats import QuantizedWeight, WeightFormat


@dataclass(frozen=True)
class DrafterShape:
    """Sizes of one drafter and of the target it taps; the letters are those of the ops' docstrings."""

    name: str
    L: int  # drafter layers
    K: int  # tapped target layers
    H: int
    I: int  # noqa: E741 - the project's letter for the MLP size
    Hq: int
    Hkv: int
    D: int
    T: int
    V: int

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's four GEMM weights."""
        q, kv = self.Hq * self.D, self.Hkv * self.D
        return self.H * (q + 2 * kv) + q * self.H + 3 * self.H * self.I

    @property
    def inject_weights(self) -> int:
        """Elements of `fc` and of the stacked KV projection."""
        return self.K * self.H * self.H + self.L * 2 * self.Hkv * self.D * self.H

    @property
    def kv_token(self) -> int:
        """Elements of K and V of one token over all drafter layers."""
        return self.L * 2 * self.Hkv * self.D

    def sizes(self) -> str:
        """The part of a row's shape column that names the model."""
        return f"{self.name} L{self.L} H{self.H} I{self.I} {self.Hq}/{self.Hkv}x{self.D}"


QWEN3_8B = DrafterShape("qwen3-8b", L=5, K=5, H=4096, I=12288, Hq=32, Hkv=8, D=128, T=16, V=151936)
# One of 8 tensor-parallel shards of a Qwen3.5-397B drafter.
QWEN35_397B_TP8 = DrafterShape("qwen3.5-397b/8", L=6, K=8, H=4096, I=1536, Hq=4, Hkv=1, D=128, T=16, V=31040)
# The demo target's sizes (SmolLM2-135M) with a drafter of the same width.
DEMO = DrafterShape("demo", L=5, K=5, H=576, I=1536, Hq=9, Hkv=3, D=64, T=16, V=49152)
# DFlash2 at 27B: T 8, conv taps 2 in groups of 16, selector rank 256 over 16 candidates.
DFLASH2_27B = DrafterShape("dflash2-27b", L=5, K=5, H=5120, I=17408, Hq=32, Hkv=8, D=128, T=8, V=248320)
# Small enough for a CPU, same structure.
TINY = DrafterShape("tiny", L=2, K=3, H=128, I=256, Hq=4, Hkv=2, D=32, T=8, V=2048)


def random_codes(weight_format: WeightFormat, shape: tuple[int, ...], device: torch.device) -> QuantizedWeight:
    """A quantised weight ``[..., N, K]`` of small random values."""
    f, (*rows, columns) = weight_format, shape
    codes = torch.randint(0, 256, (*rows, f.code_columns(columns)), dtype=torch.uint8, device=device)
    if f.kind == "fp8":
        codes &= 0xB7  # below 2: no NaN
    return QuantizedWeight(
        f, codes, torch.full((*rows, f.scale_columns(columns)), 0.02, dtype=f.scale_dtype, device=device)
    )

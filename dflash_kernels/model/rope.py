"""Rotary frequencies and the table of cosines and sines that the kernels read.

The frequencies are those of Hugging Face transformers' rope types "default", "linear", "yarn" and "llama3", computed in
float32 as there, because a drafter sees the positions it was trained with only if they round alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

ROPE_TYPES = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one drafter.

    Attributes:
        rope_type: one of ``ROPE_TYPES``.
        theta: base of the frequencies.
        rotary_dim: leading elements of a head that rotate, in pairs (i, i + rotary_dim / 2); the rest pass through.
        factor: context extension of linear, yarn and llama3; 1 for default.
        original_positions: context before the extension (yarn, llama3); 0 otherwise.
        attention_factor: yarn's scale of cosines and sines; 1 for the others.
        beta_fast, beta_slow, truncate: yarn's ramp, in rotations over the original context.
        low_freq_factor, high_freq_factor: llama3's ramp.
    """

    theta: float
    rotary_dim: int
    rope_type: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def inverse_frequencies(self) -> torch.Tensor:
        """Radians per position of each pair, ``[rotary_dim / 2]`` float32, fastest first."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.int64).float() / self.rotary_dim
        if self.rope_type == "yarn":
            return self._yarn(self.theta**exponents)
        frequencies = 1.0 / (self.theta**exponents)
        if self.rope_type == "linear":
            return frequencies / self.factor
        if self.rope_type == "llama3":
            return self._llama3(frequencies)
        return frequencies

    def cos_sin_table(self, positions: int) -> torch.Tensor:
        """``[positions, rotary_dim]`` float32: cosines of all pairs, then their sines, both times attention_factor."""
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), self.inverse_frequencies())
        table = torch.empty(positions, self.rotary_dim)
        half = self.rotary_dim // 2
        torch.cos(angles, out=table[:, :half]).mul_(self.attention_factor)
        torch.sin(angles, out=table[:, half:]).mul_(self.attention_factor)
        return table

    def _yarn(self, periods: torch.Tensor) -> torch.Tensor:
        """Fast pairs keep their frequency, slow ones are stretched by the factor, a linear ramp lies between."""

        def pair_of(rotations: float) -> float:
            """The (fractional) pair that turns this often over the original context."""
            wavelength = self.original_positions / (rotations * 2 * math.pi)
            return self.rotary_dim * math.log(wavelength) / (2 * math.log(self.theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(self.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        kept = 1 - ramp
        return 1.0 / (self.factor * periods) * (1 - kept) + 1.0 / periods * kept

    def _llama3(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Wavelengths beyond the original context are stretched, those well inside it kept, a ramp lies between."""
        wavelengths = 2 * math.pi / frequencies
        low, high = self.low_freq_factor, self.high_freq_factor
        smooth = (self.original_positions / wavelengths - low) / (high - low)
        blended = (1 - smooth) * frequencies / self.factor + smooth * frequencies
        scaled = torch.where(wavelengths > self.original_positions / low, frequencies / self.factor, blended)
        return torch.where(wavelengths < self.original_positions / high, frequencies, scaled)


def parse_rope(
    parameters: dict[str, Any],
    *,
    theta: float,
    head_dim: int,
    partial_rotary_factor: float,
    max_positions: int,
    source: str,
) -> RopeConfig:
    """Read ``rope_parameters`` (or ``rope_scaling``) of a config.

    An explicit ``rope_dim`` is the trained rotary width and overrules a partial factor copied from the target.

    Raises:
        ValueError: an unknown rope type, a missing or impossible value.
    """
    rope_type = str(parameters.get("rope_type") or parameters.get("type") or "default")
    # Multi-axis rope is plain rope for the one axis of text.
    rope_type = "default" if rope_type == "mrope" else rope_type
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"{source}: rope type must be one of {', '.join(ROPE_TYPES)}, got {rope_type}")
    rotary_dim = int(parameters.get("rope_dim") or head_dim * partial_rotary_factor)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(f"{source}: rotary width must be even and in 2..{head_dim} (head_dim), got {rotary_dim}")
    if not theta > 1:
        raise ValueError(f"{source}: rope_theta must be greater than 1, got {theta}")
    if rope_type == "default":
        return RopeConfig(theta, rotary_dim)

    def number(key: str, default: float | None = None) -> float:
        value = parameters.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{source}: {key} of rope type {rope_type} must be a positive number, got {value!r}")
        return float(value)

    if rope_type == "linear":
        return RopeConfig(theta, rotary_dim, rope_type, number("factor"))
    original = int(number("original_max_position_embeddings", max_positions))
    if rope_type == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        return RopeConfig(
            theta, rotary_dim, rope_type, number("factor"), original, low_freq_factor=low, high_freq_factor=high
        )
    factor = number("factor", max_positions / original)
    return RopeConfig(
        theta,
        rotary_dim,
        rope_type,
        factor,
        original,
        attention_factor=_yarn_attention_factor(parameters, factor),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=bool(parameters.get("truncate", True)),
    )


def _yarn_attention_factor(parameters: dict[str, Any], factor: float) -> float:
    """An explicit ``attention_factor``, else 0.1 * mscale * ln(factor) + 1, over that of ``mscale_all_dim``."""
    explicit = parameters.get("attention_factor")
    if explicit is not None:
        return float(explicit)

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return magnitude(float(over)) / magnitude(float(under)) if over and under else magnitude(1.0)

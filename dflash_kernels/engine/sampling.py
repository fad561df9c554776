"""What a request asks for, and the per-row tensors that carry it to the device."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping of one request.

    Attributes:
        max_new_tokens: tokens to emit at most (>= 1).
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: nucleus mass in (0, 1]; 1 is off.
        top_k: keep the k largest; 0 is off.
        min_p: drop tokens below min_p times the largest probability; 0 is off.
        seed: Philox key of the request, None draws a fresh one. The same request with the same seed gives the same
            text, whatever else runs in the batch.
        stop_token_ids: ids that end the text (they are kept as its last token); None takes the engine's default.

    Raises:
        ValueError: a field is out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"SamplingParams: max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"SamplingParams: temperature must be a finite number >= 0, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"SamplingParams: top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"SamplingParams: top_k must be in 0..2**31 - 1 (0 is off), got {self.top_k}")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"SamplingParams: min_p must be in [0, 1], got {self.min_p}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"SamplingParams: seed must fit in 64 bits, got {self.seed}")
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", tuple(int(t) for t in self.stop_token_ids))

    @property
    def greedy(self) -> bool:
        """Whether the request takes the most likely token at every position."""
        return self.temperature == 0.0

    def resolved(self, default_stops: tuple[int, ...]) -> SamplingParams:
        """The same parameters with seed and stop tokens filled in."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        stops = default_stops if self.stop_token_ids is None else self.stop_token_ids
        return replace(self, seed=seed, stop_token_ids=stops)


@dataclass
class SamplingRows:
    """Per-row sampling parameters on the device, at fixed addresses so that captured graphs read them in place.

    ``temperature``, ``top_p``, ``min_p``: [R] float32; ``top_k``: [R] int32; ``seeds``: [R] int64.
    """

    rows: int
    device: torch.device
    temperature: torch.Tensor = field(init=False)
    top_p: torch.Tensor = field(init=False)
    min_p: torch.Tensor = field(init=False)
    top_k: torch.Tensor = field(init=False)
    seeds: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        def full(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((self.rows,), value, dtype=dtype, device=self.device)

        self.temperature, self.top_p, self.min_p = (full(v, torch.float32) for v in (0.0, 1.0, 0.0))
        self.top_k, self.seeds = full(0, torch.int32), full(0, torch.int64)

    def set_row(self, row: int, params: SamplingParams) -> None:
        """Write one request's (resolved) parameters into ``row``; scalar fills, no host sync."""
        self.temperature[row] = params.temperature
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.top_k[row] = params.top_k
        self.seeds[row] = params.seed or 0

    def move_row(self, src: int, dst: int) -> None:
        """Copy row ``src`` over row ``dst``."""
        for tensor in (self.temperature, self.top_p, self.min_p, self.top_k, self.seeds):
            tensor[dst].copy_(tensor[src])

    def clear_row(self, row: int) -> None:
        """Make ``row`` greedy, so that a padding row costs the sampled op nothing."""
        self.temperature[row] = 0.0

"""Counts a run keeps: tokens committed at every step, times, passes over the models."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class RequestStats:
    """One request's account.

    ``commit_lens[i]`` is the number of tokens that decode step i added to the text, bonus included and cut at a stop
    token or the token limit; the first token comes from the prompt pass, so ``1 + sum(commit_lens)`` is the length of
    the text. Times are seconds on ``time.perf_counter``'s clock.
    """

    prompt_tokens: int = 0
    commit_lens: list[int] = field(default_factory=list)
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0

    @property
    def new_tokens(self) -> int:
        """Length of the text in tokens."""
        return (1 if self.first_token else 0) + sum(self.commit_lens)

    @property
    def mean_commit(self) -> float:
        """Mean acceptance length: tokens per decode step, bonus included (0 when no step ran)."""
        return sum(self.commit_lens) / len(self.commit_lens) if self.commit_lens else 0.0

    @property
    def decode_seconds(self) -> float:
        """Time from the first token to the last."""
        return max(self.finished - self.first_token, 0.0)


@dataclass
class EngineStats:
    """Totals of one ``generate`` or ``stream`` call."""

    mode: str = "dflash"
    started: float = field(default_factory=time.perf_counter)
    finished: float = 0.0
    prefill_passes: int = 0
    steps: int = 0
    graph_replays: int = 0
    graph_captures: int = 0
    row_steps: int = 0
    overrun_rows: int = 0
    new_tokens: int = 0

    @property
    def seconds(self) -> float:
        """Wall time of the call, prompts included."""
        return (self.finished or time.perf_counter()) - self.started

    @property
    def tokens_per_second(self) -> float:
        """Tokens emitted per second of the call, prompts included."""
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

"""What is published about the cards, and about whole engines on them: one table each, with sources.

Nothing here was measured by this project. Ceilings that it did measure are in `results/<card>/*.json`, and
:func:`rates` prefers them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.results import RESULTS

__all__ = ["CARDS", "PUBLISHED_STEPS", "Card", "PublishedStep", "Rates", "card_of", "rates"]


@dataclass(frozen=True)
class Card:
    """Published figures of one card, per GPU, dense (no sparsity).

    Attributes:
        key, name: as on the command line; a part of the name that the driver gives.
        folder: of `results`, where this project has run on one; "" if it never has.
        sms, clock: multiprocessors, highest clock in Hz; l2_bytes; datasheet_bw: bytes/s.
        read_bw: bytes/s that others measured for reads; None: take this project's own.
        bf16, fp8, fp4: datasheet FLOP/s; fp4 0 where the tensor cores have none.
        source: of all of it.
    """

    key: str
    name: str
    folder: str
    sms: int
    clock: float
    l2_bytes: int
    datasheet_bw: float
    read_bw: float | None
    bf16: float
    fp8: float
    fp4: float
    source: str


CARDS: Mapping[str, Card] = {
    card.key: card
    for card in (
        Card(
            "h100", "H100", "nvidia-h100-80gb-hbm3", 132, 1.98e9, 50 << 20, 3.35e12, None, 989e12, 1979e12, 0.0,
            "NVIDIA H100 SXM5 datasheet and architecture paper (HBM3, 80 GB)",
        ),
        Card(
            "h200", "H200", "nvidia-h200", 132, 1.98e9, 50 << 20, 4.8e12, None, 989e12, 1979e12, 0.0,
            "NVIDIA H200 SXM datasheet (the H100's chip, HBM3e)",
        ),
        Card(
            "b200", "B200", "", 148, 1.965e9, 126 << 20, 8.0e12, 7.26e12, 2250e12, 4500e12, 9000e12,
            "NVIDIA HGX B200 datasheet (1000 W); reads: 7.26 TB/s measured by others by TMA with 64 KB and more under "
            "way on each SM (32 KB: 5.4 to 5.9), 7.67 by the driver's clocks",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Attainable rates of a card: bytes/s, bf16's FLOP/s, SM-cycles/s; `origin` says where each comes from."""

    card: Card
    read_bw: float
    copy_bw: float
    flops: float
    origin: str

    @property
    def fp8_flops(self) -> float:
        """FLOP/s of products of two fp8 operands: bf16's, times the datasheet's ratio."""
        return self.flops * self.card.fp8 / self.card.bf16

    @property
    def fp4_flops(self) -> float:
        """The same of two nvfp4 operands."""
        return self.flops * self.card.fp4 / self.card.bf16

    @property
    def sm_cycles(self) -> float:
        return self.card.sms * self.card.clock

    def bandwidth(self, stream: str) -> float:
        return self.read_bw if stream == "read" else self.copy_bw


def card_of(name: str) -> Card | None:
    """The card that the driver calls `name` ("NVIDIA H100 80GB HBM3"), None where the table has none."""
    return next((card for card in CARDS.values() if card.name in name), None)


def measured_ceilings(card: Card, root: Path = RESULTS) -> list[dict[str, Any]]:
    """The ceilings of this project's runs on the card, one for each filed run."""
    if not card.folder:
        return []
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((root / card.folder).glob("*.json"))]
    found = [run["ceilings"] for run in runs if isinstance(run, dict) and "ceilings" in run and "rows" in run]
    return [c for c in found if c["flop_dtype"] == "bf16"]


def rates(card: Card, root: Path = RESULTS) -> Rates:
    """Medians of the card's own measured ceilings; else published reads, and the H100's share of datasheet FLOP/s.

    Raises:
        ValueError: there is neither a run on that card nor one on the H100 to compare it with.
    """

    def middle(ceilings: Sequence[dict[str, Any]], key: str) -> float:
        return median(c[key] for c in ceilings)

    if own := measured_ceilings(card, root):
        values = (middle(own, "read_bw"), middle(own, "copy_bw"), middle(own, "flop_rate"))
        return Rates(card, *values, f"ceilings measured on it, medians of {len(own)} runs in results/{card.folder}")
    base = CARDS["h100"]
    found = measured_ceilings(base, root)
    if not found:
        raise ValueError(f"predict: results/{base.folder} must hold a run's JSON, got none")
    read = card.read_bw or card.datasheet_bw * middle(found, "read_bw") / base.datasheet_bw
    copy = read * middle(found, "copy_bw") / middle(found, "read_bw")
    share = middle(found, "flop_rate") / base.bf16
    what = "reads measured by others" if card.read_bw else "the datasheet's bandwidth at the H100's share"
    origin = f"{what}; copies at the H100's ratio to reads; bf16 at the H100's share of its datasheet ({share:.0%})"
    return Rates(card, read, copy, card.bf16 * share, origin)


@dataclass(frozen=True)
class PublishedStep:
    """Tokens a second of an engine with a DFlash drafter, as others published them.

    Attributes:
        model, cards, tp: what ran where; concurrency: requests at a time; block: T.
        tokens_per_s: of all requests together; plain_tokens_per_s: without speculation, None if not published.
        committed: tokens committed a step, where published.
    """

    model: str
    cards: str
    tp: int
    concurrency: int
    block: int
    tokens_per_s: float
    plain_tokens_per_s: float | None
    committed: float | None
    source: str

    def step_us(self, committed: float) -> float:
        """A step's time if it commits so many tokens for each request."""
        return self.concurrency * committed / self.tokens_per_s * 1e6


_LMSYS = "LMSYS, 2026-06-15: SGLang, bf16, greedy, thinking on, HumanEval, up to 4096 tokens (second-hand)"
_PR = "sgl-project/sglang#23000: Spec V2 with overlap"
PUBLISHED_STEPS: Sequence[PublishedStep] = (
    PublishedStep("Qwen3-8B", "1x B200", 1, 1, 16, 1162.0, None, 6.4, _PR),
    PublishedStep("Qwen3-8B", "1x B200", 1, 32, 16, 15300.0, None, 6.4, _PR),
    PublishedStep("Qwen3.5-397B-A17B", "8x B200", 8, 1, 16, 874.6, 202.9, None, _LMSYS),
    PublishedStep("Qwen3.5-397B-A17B", "8x B200", 8, 32, 16, 6783.7, 2452.7, None, _LMSYS),
    PublishedStep("Qwen3.5-397B-A17B", "8x B200", 8, 32, 8, 6666.0, 2452.7, None, _LMSYS),
)

"""How much a target's own rounding decides: the same text scored in blocks and token by token.

Speculative decoding reads the target's choice from a pass over T tokens, plain decoding from a pass over one. The sums
behind the two round differently, and where two tokens are nearly tied the choice may flip. That has nothing to do with
the drafter, so it is measured on the target alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dflash_kernels.engine.target import TargetRunner


@dataclass(frozen=True)
class RoundingReport:
    """Outcome of :func:`measure_rounding`.

    Attributes:
        positions: positions scored both ways.
        flips: positions (offsets into the text) where the two passes prefer different tokens.
        max_abs_diff: largest difference of any logit between the passes.
    """

    positions: int
    flips: tuple[int, ...]
    max_abs_diff: float

    def __str__(self) -> str:
        rate = f"{100 * len(self.flips) / self.positions:.2f} %" if self.positions else "n/a"
        return (
            f"block-shaped and single-token passes prefer different tokens at {len(self.flips)} of "
            f"{self.positions} positions ({rate}); largest logit difference {self.max_abs_diff:.3g}"
        )


@torch.inference_mode()
def score(runner: TargetRunner, prompt: Sequence[int], text: Sequence[int], block_size: int) -> torch.Tensor:
    """Logits [len(text), V] float32 on the CPU: row i scores text[i] given the prompt and text[:i].

    The prompt's pass gives row 0; then passes of ``block_size`` tokens over the given text. Uses cache row 0.
    """
    device = runner.device
    ids = torch.tensor([[*prompt, *text]], dtype=torch.int64, device=device)
    positions = torch.arange(ids.shape[1], dtype=torch.int64, device=device)[None]
    count = len(prompt)
    first = runner.forward(ids[:, :count], positions[:, :count], count, start=0, taps=False, last_only=True)
    rows = [runner.whole_logits(first.logits)[0]]
    for start in range(count, ids.shape[1] - 1, block_size):
        stop = min(start + block_size, ids.shape[1] - 1)
        # The last block is padded to full width with copies of its last token: only full blocks round like a block.
        pad = block_size - (stop - start) if start + block_size <= runner.max_positions else 0
        block = torch.nn.functional.pad(ids[:, start:stop], (0, pad), mode="constant", value=int(ids[0, stop - 1]))
        where = torch.arange(start, start + block.shape[1], dtype=torch.int64, device=device)[None]
        output = runner.forward(block, where, int(start + block.shape[1]), start=start, taps=False)
        rows.append(runner.whole_logits(output.logits)[0, : stop - start])
    return torch.cat(rows).float().cpu()


def measure_rounding(
    runner: TargetRunner, prompt: Sequence[int], text: Sequence[int], block_size: int
) -> RoundingReport:
    """Score ``text`` in blocks and token by token with the same target, and count where the choice flips."""
    blocks, singles = score(runner, prompt, text, block_size), score(runner, prompt, text, 1)
    flips = (blocks.argmax(-1) != singles.argmax(-1)).nonzero()[:, 0].tolist()
    return RoundingReport(len(text), tuple(flips), float((blocks - singles).abs().max()))


def near_tie(
    runner: TargetRunner, prompt: Sequence[int], ours: Sequence[int], plain: Sequence[int], max_abs_diff: float
) -> tuple[int, float, bool]:
    """Where two continuations first differ: ``(offset, logit gap of the two tokens, gap within rounding)``."""
    offset = next((i for i, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), min(len(ours), len(plain)))
    if offset >= min(len(ours), len(plain)):
        return offset, float("inf"), False  # one is longer: no two tokens to compare
    row = score(runner, prompt, plain[: offset + 1], 1)[offset]
    gap = float((row[plain[offset]] - row[ours[offset]]).abs())
    return offset, gap, gap <= 2 * max_abs_diff

"""Which heads, MLP features and vocabulary rows a tensor-parallel rank holds: one rule for drafter and target.

* Nothing is padded. What does not divide is cut unevenly, the first ranks getting one more.
* MLP features are cut in runs of 8 (what the kernels ask for), the vocabulary in rows.
* With at least as many KV heads as ranks, a rank takes whole KV heads with their query heads. With fewer, the query
  heads are cut, and ranks that share a KV head each hold it (its K and V are computed and cached on each of them).
* Kernels want as many query heads to each KV head. Where a rank's cut leaves groups of different sizes, it holds a KV
  head more than once: its query heads are taken in groups of the greatest common divisor.

So 9 query and 3 KV heads (the demo pair) give 2 ranks 6 and 3 query heads with 2 and 1 KV heads, 3 ranks a group each,
and 4 ranks 3, 2, 2 and 2 query heads with 1, 1, 2 and 1 KV heads: the third rank's two belong to different groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["HeadShard", "check_rank", "shard_heads", "shard_range"]


def check_rank(rank: int, world: int) -> None:
    """Check that a rank exists.

    Raises:
        ValueError: it does not.
    """
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"shard: rank must be in 0..{world - 1} (world {world}), got {rank}")


def shard_range(size: int, rank: int, world: int, what: str, unit: int = 1) -> tuple[int, int]:
    """Bounds of this rank's part of ``size`` things in runs of ``unit``; the first ranks get a run more.

    A size that is no multiple of ``unit`` is cut in single things.

    Raises:
        ValueError: fewer runs than ranks, or the rank is out of range.
    """
    check_rank(rank, world)
    if size % unit:
        unit = 1
    runs = size // unit
    if runs < world:
        of = "" if unit == 1 else f" {unit} times"
        raise ValueError(f"shard: {what} must be at least{of} the number of ranks ({world}), got {size}")
    each, more = divmod(runs, world)
    start = rank * each + min(rank, more)
    return start * unit, (start + each + (rank < more)) * unit


@dataclass(frozen=True)
class HeadShard:
    """A rank's query heads ``q0 .. q1`` of the whole, and the KV head of each of its groups, in their order."""

    q0: int
    q1: int
    kv_heads: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        """Query heads of the rank."""
        return self.q1 - self.q0


def shard_heads(num_heads: int, num_kv_heads: int, rank: int, world: int) -> HeadShard:
    """This rank's heads, by the rule above.

    Raises:
        ValueError: fewer query heads than ranks, or the rank is out of range.
    """
    group = num_heads // num_kv_heads
    if num_kv_heads >= world:
        k0, k1 = shard_range(num_kv_heads, rank, world, "num_key_value_heads")
        return HeadShard(k0 * group, k1 * group, tuple(range(k0, k1)))
    q0, q1 = shard_range(num_heads, rank, world, "num_attention_heads")
    pieces = [(k, min(q1, (k + 1) * group) - max(q0, k * group)) for k in range(q0 // group, (q1 - 1) // group + 1)]
    size = math.gcd(*(count for _, count in pieces))
    return HeadShard(q0, q1, tuple(k for k, count in pieces for _ in range(count // size)))

"""A packed LM head and the schedule of `lm_head_argmax_packed` (csrc/smxx/head/stream.cu)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.stream import TILE_ROWS, Schedule
from dflash_kernels.tiles import Weight, format_of, pack_weight, tile_columns, unpack_weight

__all__ = ["MAX_ROWS", "PackedHead", "Stage", "head_schedule", "pack_head"]

MAX_ROWS = 64


class Stage(IntEnum):
    """Of a unit (csrc/smxx/head/stream.h)."""

    SCORE = 0
    PUBLISH = 1
    CHOOSE = 2


@dataclass(frozen=True)
class PackedHead:
    """An LM head as `lm_head_argmax_packed` streams it, and its schedule.

    One launch at a time may use it: the counters are its state.

    Attributes:
        weights: [tiles, elements of a tile] (:func:`dflash_kernels.tiles.pack_weight`).
        units: [blocks, most units of a block + 1, 16] int32; counters: [n] int32, see
            :meth:`dflash_kernels.stream.Schedule.state`; slots: of the partial sums behind the counters.
        vocab_size, hidden_size: of the weights, V and H.
        bias: [V] bf16 or None; token_ids: [V] int64, ascending, what each row stands for; None: row v is token v.
        weight_format: of the weights; None: bf16.
    """

    weights: torch.Tensor
    units: torch.Tensor
    counters: torch.Tensor
    slots: int
    vocab_size: int
    hidden_size: int
    bias: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    weight_format: WeightFormat | None = None

    @property
    def blocks(self) -> int:
        """Blocks of threads of a launch, all resident at once."""
        return self.units.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.weights, self.units, self.counters, self.bias, self.token_ids)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def unpack(self) -> Weight:
        """The weights ``[V, H]``, as :func:`pack_head` took them or chose their rows."""
        tiles = self.weights.view(-(-self.vocab_size // TILE_ROWS), -1, self.weights.shape[1])
        return unpack_weight(tiles, self.vocab_size, self.hidden_size, self.weight_format)


def head_schedule(
    vocab_size: int, hidden_size: int, blocks: int, weight_format: WeightFormat | None = None
) -> Schedule:
    """Whole row tiles, as many for every block, then those left over: whole too where that costs a block at most two K
    tiles more than an even split, else cut along K.
    """
    row_tiles, k_tiles = -(-vocab_size // TILE_ROWS), -(-hidden_size // tile_columns(weight_format))
    schedule = Schedule(blocks)
    whole = row_tiles // blocks * blocks
    if k_tiles - -(-(row_tiles - whole) * k_tiles // blocks) <= 2:
        whole = row_tiles
    schedule.add_whole_rows(Stage.SCORE, whole, k_tiles)
    schedule.add_product(Stage.SCORE, row_tiles - whole, k_tiles, whole * k_tiles, row_tile=whole)
    done = schedule.new_counters()
    for block in range(blocks):
        schedule.add_job(Stage.PUBLISH, block, (block, 0, 0), signal=done)
    schedule.add_job(Stage.CHOOSE, 0, wait=(done, blocks))
    return schedule


def pack_head(
    weight: Weight,
    *,
    blocks: int,
    bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
) -> PackedHead:
    """Pack an LM head ``[V, H]``, bf16 or quantised, for `blocks` blocks of threads.

    `blocks` is the number of multiprocessors of the device that will run it: all must be resident at once.

    Args:
        bias: [V] bf16 or None.
        token_ids: int [n]: keep only these rows, for a draft head over the tokens that are frequent. Sorted here, so
            that of equal logits the smallest token wins in any case.

    Raises:
        ValueError: a weight that is neither bf16 nor quantised, H no multiple of 8, a bias that does not fit, ids that
            are empty, repeated or no rows of the weight.
    """
    if isinstance(weight, torch.Tensor) and weight.dtype != torch.bfloat16:
        raise ValueError(f"pack_head: weight must be bfloat16 or quantised, got {weight.dtype}")
    if len(weight.shape) != 2 or weight.shape[0] < 1 or weight.shape[1] % 8 or weight.shape[1] < 8:
        raise ValueError(f"pack_head: weight must have shape [V, H] with H a multiple of 8, got {list(weight.shape)}")
    vocab, hidden = weight.shape
    if bias is not None and (list(bias.shape) != [vocab] or bias.dtype != torch.bfloat16):
        raise ValueError(f"pack_head: bias must be bfloat16 [{vocab}], got {bias.dtype} {list(bias.shape)}")
    if token_ids is not None:
        ids = token_ids.flatten().long().sort().values.to(weight_device(weight))
        if ids.numel() == 0 or ids[0] < 0 or ids[-1] >= vocab or (ids[1:] == ids[:-1]).any():
            raise ValueError(f"pack_head: token_ids must be different rows of the {vocab} there are, got others")
        token_ids, vocab = ids, ids.numel()
        bias = None if bias is None else bias[ids]
        weight = weight[ids]
    weights, weight_format = pack_weight(weight).flatten(0, 1), format_of(weight)
    schedule = head_schedule(vocab, hidden, blocks, weight_format)
    device = weights.device
    counters = schedule.state(device)
    units = schedule.units().to(device)
    return PackedHead(weights, units, counters, schedule.slots, vocab, hidden, bias, token_ids, weight_format)


def weight_device(weight: Weight) -> torch.device:
    """Where its tensors are."""
    return weight.codes.device if isinstance(weight, QuantizedWeight) else weight.device

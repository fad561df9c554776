"""Packed weights and schedules of the streaming kernels (csrc/smxx/stream): what they read, and in which order.

A streaming kernel computes products ``W [rows, K] @ X.T`` of several stages. W comes in tiles of 128 rows and 16 KB,
stored in the order of the tensor cores' registers (:func:`pack_tiles`); a :class:`Schedule` splits each stage's tiles
over the blocks and names the counters by which blocks wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

__all__ = ["FIRST_COUNTER", "TILE_K", "TILE_ROWS", "UNIT_FIELDS", "Schedule", "pack_tiles", "unpack_tiles"]

TILE_ROWS = 128
TILE_K = 64  # columns of a tile of bf16
TILE_ELEMENTS = TILE_ROWS * TILE_K

# A unit's 16 int32 (csrc/smxx/stream/schedule.h). The last four are a job's own.
UNIT_FIELDS = (
    "stage", "weight_tile", "tiles", "row_tile", "k_tile", "contributors", "rank", "slot",
    "wait", "wait_shift", "wait_target", "signal", "index0", "index1", "index2", "index3",
)  # fmt: skip
SLOT_FLOATS = 64 * TILE_ROWS  # a part of a sum, of 64 tokens
FIRST_COUNTER = 2  # the two before count the blocks that ever started
ONE_COUNTER = 31  # wait_shift: all tiles of K wait for the same counter


def pack_tiles(weight: torch.Tensor) -> torch.Tensor:
    """``weight [rows, K]``, 16-bit, in tiles: ``[row tiles, K tiles, 8192]``; edges are filled with zeros.

    Within a tile: ``[m16 8][half of 32 columns 2][k16 step 2][lane 32][register 4][2]``. Lane ``4 g + q`` holds, of
    rows g and g + 8 of the 16, columns ``8 q + 4 step + 2 pair + {0, 1}`` of the 32; registers go pair first, then row.
    """
    rows, k = weight.shape
    row_tiles, k_tiles = -(-rows // TILE_ROWS), -(-k // TILE_K)
    if (rows, k) != (row_tiles * TILE_ROWS, k_tiles * TILE_K):
        padded = weight.new_zeros(row_tiles * TILE_ROWS, k_tiles * TILE_K)
        padded[:rows, :k] = weight
        weight = padded
    #                        tile       m16 row8 g  tile     half q step pair element
    parts = weight.reshape(row_tiles, 8, 2, 8, k_tiles, 2, 4, 2, 2, 2)
    return parts.permute(0, 4, 1, 5, 7, 3, 6, 8, 2, 9).reshape(row_tiles, k_tiles, TILE_ELEMENTS)


def unpack_tiles(tiles: torch.Tensor, rows: int, k: int) -> torch.Tensor:
    """The inverse of :func:`pack_tiles`: ``[rows, K]``."""
    row_tiles, k_tiles, _ = tiles.shape
    parts = tiles.reshape(row_tiles, k_tiles, 8, 2, 2, 8, 4, 2, 2, 2)
    whole = parts.permute(0, 2, 8, 5, 1, 3, 6, 4, 7, 9).reshape(row_tiles * TILE_ROWS, k_tiles * TILE_K)
    return whole[:rows, :k].contiguous()


@dataclass
class Schedule:
    """Units of every block, built stage by stage.

    Attributes:
        blocks: persistent blocks, at most the multiprocessors of the device.
        counters: how many were given out, the first two included.
        slots: how many slots of partial sums are in use.
    """

    blocks: int
    counters: int = FIRST_COUNTER
    slots: int = 0
    _tiles: int = 0  # of all stages so far
    _units: list[list[list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"Schedule: blocks must be at least 1, got {self.blocks}")
        self._units = [[] for _ in range(self.blocks)]

    def new_counters(self, count: int = 1) -> int:
        """The first of `count` counters."""
        first = self.counters
        self.counters += count
        return first

    def add_product(
        self,
        stage: int,
        row_tiles: int,
        k_tiles: int,
        weight_tile: int,
        wait: tuple[int, int, int] = (-1, ONE_COUNTER, 0),
        signal: int = -1,
        signal_each: bool = False,
        slot: int | None = None,
        row_tile: int = 0,
    ) -> None:
        """Split a stage's tiles evenly: over all stages together, blocks differ by one tile at most.

        Args:
            row_tile: number of the first of the row tiles.
            weight_tile: where the stage's ``row_tiles * k_tiles`` tiles begin.
            wait: counter, shift and target: K tile k needs ``counter + (k >> shift)`` signalled `target` times.
            signal: counter to which a finished row tile adds 1; with `signal_each`, row tile r has counter signal + r.
            slot: first slot of partial sums; default: slots that no other stage uses.
        """
        total = row_tiles * k_tiles
        bounds = [0]
        for block in range(1, self.blocks + 1):
            here = (self._tiles + total) * block // self.blocks - self._tiles * block // self.blocks
            bounds.append(min(max(here, bounds[-1]), total))
        self._tiles += total
        pieces: list[list[tuple[int, int, int]]] = [[] for _ in range(row_tiles)]  # of each row tile: block, from, to
        for block in range(self.blocks):
            start, stop = bounds[block], bounds[block + 1]
            while start < stop:
                row = start // k_tiles
                end = min(stop, (row + 1) * k_tiles)
                pieces[row].append((block, start - row * k_tiles, end - row * k_tiles))
                start = end
        first_slot = self.slots if slot is None else slot
        next_slot = first_slot
        for row, parts in enumerate(pieces):
            split = len(parts) > 1
            for rank, (block, start, stop) in enumerate(parts):
                unit = [
                    stage,
                    weight_tile + row * k_tiles + start,
                    stop - start,
                    row_tile + row,
                    start,
                    len(parts),
                    rank,
                ]
                unit += [next_slot if split else 0, *wait]
                unit += [signal + row if signal_each and signal >= 0 else signal, 0, 0, 0, 0]
                self._units[block].append(unit)
            next_slot += len(parts) if split else 0
        self.slots = max(self.slots, next_slot)

    def add_whole_rows(self, stage: int, row_tiles: int, k_tiles: int) -> None:
        """Deal out whole row tiles, the first of the packed weights, in runs: blocks differ by one at most."""
        for block in range(self.blocks):
            for row in range(row_tiles * block // self.blocks, row_tiles * (block + 1) // self.blocks):
                unit = [stage, row * k_tiles, k_tiles, row, 0, 1, 0, 0, -1, ONE_COUNTER, 0, -1, 0, 0, 0, 0]
                self._units[block].append(unit)
        self._tiles += row_tiles * k_tiles

    def add_job(
        self,
        stage: int,
        block: int,
        index: tuple[int, int, int] = (0, 0, 0),
        wait: tuple[int, int] = (-1, 0),
        signal: int = -1,
    ) -> None:
        """Append a unit without weights to one block: it waits for ``wait = counter, target``, runs and signals."""
        self._units[block].append([stage, 0, 0, 0, 0, 1, 0, 0, wait[0], ONE_COUNTER, wait[1], signal, *index, 0])

    def state(self, device: torch.device, slots: int | None = None) -> torch.Tensor:
        """int32: the counters, filled up to a multiple of 4, and behind them the slots (default: those in use), empty.

        Kept from launch to launch: counters only grow, slots are empty again when a launch ends.
        """
        counters = torch.zeros(-(-self.counters // 4) * 4, dtype=torch.int32, device=device)
        parts = counters.new_full(((self.slots if slots is None else slots) * SLOT_FLOATS,), -1)
        return torch.cat((counters, parts))

    def units(self) -> torch.Tensor:
        """``[blocks, most units of a block + 1, 16]`` int32, what the kernel reads; every list has an end."""
        most = 1 + max(len(units) for units in self._units)
        end = [0, 0, -1] + [0] * (len(UNIT_FIELDS) - 3)
        return torch.tensor([units + [end] * (most - len(units)) for units in self._units], dtype=torch.int32)

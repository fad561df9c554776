"""The engine's tensor-parallel ranks, as the seams of one of them need the others.

Every rank builds its own worker with its own seams, at the same time. A seam whose replacement waits for other ranks
must run on all of them or on none: so all ranks ask each other (:meth:`Ranks.gather`) after every phase of the start,
and nothing that differs between ranks decides later on. What is summed goes through the engine's group as the engine's
own layers send it, or from kernel to kernel.

Source: ``distributed/parallel_state.py`` GroupCoordinator (world_size, rank_in_group, cpu_group of gloo, all_reduce).
"""

from __future__ import annotations

import platform
import warnings
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dflash_kernels.draft_stream import MAX_RANKS, Exchange
from dflash_kernels.integrations.sglang.settings import Settings
from dflash_kernels.tensor_parallel import MAX_MERGED_ROWS, ProcessGroup

Value = TypeVar("Value")

# Seconds for which a kernel waits for another rank's before it ends the engine: as long as SGLang's own watchdog, and
# in a trial at the start, where all ranks have just met.
PATIENCE, TRIAL_PATIENCE = 300.0, 30.0


class Ranks:
    """This rank among those of the engine's group; without a group it is alone."""

    def __init__(self, group: Any = None) -> None:
        several = group is not None and int(group.world_size) > 1
        self.group = group if several else None
        self.world, self.rank = (int(group.world_size), int(group.rank_in_group)) if several else (1, 0)

    def gather(self, value: Value) -> list[Value]:
        """The value of every rank, in their order. All ranks must ask."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.world
        with torch.inference_mode(False):  # gloo writes to tensors that it makes here
            dist.all_gather_object(found, value, group=self.group.cpu_group)
        return found

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' parts, in ``part`` or elsewhere.

        As RowParallelLinear makes it; in a captured graph ``part`` has to be allocated there, as that layer's is.
        """
        return part if self.group is None else self.group.all_reduce(part)

    def exchange(self, words: int, device: torch.device) -> tuple[Exchange | None, str]:
        """Memory for kernels of the ranks, or None and why not. All ranks must ask; all have it, or none."""
        if self.group is None:
            return None, "one rank"
        if device.type != "cuda":
            return None, f"no peer memory on {device.type}"
        if len(set(self.gather(platform.node()))) > 1:
            return None, "ranks on several hosts"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = ProcessGroup(self.group.cpu_group).exchange(words, device)
        if found is not None:
            return found, ""
        return None, str(said[-1].message) if said else "no peer memory"


class Merge:
    """The best token of the whole vocabulary from the ranks' best of their parts, the smallest id on ties.

    Two gathers by the engine's ``group`` and a kernel, or (:meth:`meet`) one kernel over peer memory. Buffers for up to
    ``rows`` at fixed addresses.
    """

    def __init__(self, group: Any, rows: int, device: torch.device) -> None:
        self.group, self.device, self.world = group, device, int(group.world_size)
        self.exchange: Exchange | None = None
        self._ids = torch.empty(self.world * rows, dtype=torch.int64, device=device)
        self._values = torch.empty(self.world * rows, dtype=torch.float32, device=device)

    def meet(self, ranks: Ranks, settings: Settings) -> str:
        """Make the exchange where that can be, after it has been seen to find each rank's token. All ranks must.

        Returns:
            A note for the table.
        """
        from dflash_kernels.ops import merge_exchange_words, merge_vocab_ranks

        if self.group is not ranks.group or settings.peers == "0" or self.world > MAX_RANKS:
            return "gathered by the engine"
        exchange, reason = ranks.exchange(merge_exchange_words(self.world), self.device)
        if exchange is None:
            return f"gathered by the engine: {reason}"
        row = torch.arange(self.world, device=self.device)
        best = (row == ranks.rank).to(torch.float32)
        try:
            ids, _ = merge_vocab_ranks(torch.full_like(row, ranks.rank), best, exchange, patience=TRIAL_PATIENCE)
            fine = torch.equal(ids, row)
        except Exception:
            fine = False
        if not all(ranks.gather(fine)):
            return "gathered by the engine: a merge over peer memory was wrong"
        self.exchange = exchange
        return "merged over peer memory"

    def __call__(self, ids: torch.Tensor, values: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        """``ids [N]`` int64 and ``values [N]`` float32 of this rank's best; ``out``: those of the best of all."""
        from dflash_kernels.ops import merge_vocab_ranks, merge_vocab_shards

        rows = ids.numel()
        if self.exchange is not None and rows <= MAX_MERGED_ROWS:
            merge_vocab_ranks(ids, values, self.exchange, patience=PATIENCE, out=out)
            return
        all_ids, all_values = self._ids[: self.world * rows], self._values[: self.world * rows]
        self.group.all_gather_into_tensor(all_values, values)
        self.group.all_gather_into_tensor(all_ids, ids)
        merge_vocab_shards(all_ids.view(self.world, rows), all_values.view(self.world, rows), out=out)


def ranks_of(worker_module: Any, worker: Any) -> Ranks | None:
    """The ranks of the worker's group; None: there are several, and where they meet is not known."""
    if hasattr(worker_module, "get_tp_group"):
        return Ranks(worker_module.get_tp_group())
    if hasattr(worker_module, "get_parallel"):
        return Ranks(worker_module.get_parallel().tp_group)
    return Ranks() if int(getattr(getattr(worker, "server_args", None), "tp_size", 1)) == 1 else None

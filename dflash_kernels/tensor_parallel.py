"""Tensor parallelism: how ranks talk, what they share of the vocabulary, and how they are started.

A rank runs the same program on the same prompts as all others, with its part of every matrix
(:mod:`dflash_kernels.model.shard`). Two sums a layer make the residual stream whole again, one more the embedding; LM
heads, of the drafter and of the target, give each rank the best token of its rows, and 12 bytes a row from each rank
settle the best of all. The stream, and with it every token, is the same on all ranks, so their host code goes the same
way without talking.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from dflash_kernels import ops
from dflash_kernels.draft_stream import MAX_RANKS, Exchange
from dflash_kernels.model.shard import check_rank, shard_range

__all__ = [
    "Communicator",
    "PeerMemory",
    "ProcessGroup",
    "Ranks",
    "ShardedTable",
    "VocabShards",
    "process_group",
    "quiet_environment",
    "run_simulated",
    "start_ranks",
]

Result = TypeVar("Result")
MAX_MERGED_ROWS = 1024  # of `merge_vocab_ranks`
_HOST = "127.0.0.1"
# Renamed in torch 2.13.
_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Communicator(Protocol):
    """What a rank needs of the others. On CUDA every call can be captured in a graph."""

    rank: int
    world: int

    def part_like(self, x: torch.Tensor) -> torch.Tensor:
        """Where to put this rank's part of the next ``x``, for :meth:`sum_parts`: may be ``x`` itself."""

    def sum_parts(self, part: torch.Tensor, x: torch.Tensor) -> None:
        """``x`` = the sum of the ranks' parts, the same bits on all of them."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place; returns ``x``."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[world, *x.shape]``, the ranks' tensors in their order. All have the same shape."""

    def exchange(self, words: int, device: torch.device) -> Exchange | None:
        """Memory through which kernels of the ranks, running at the same time, hand each other words.

        Every rank must ask; None, on all of them: there is none.
        """


class ProcessGroup:
    """A rank of a ``torch.distributed`` group: NCCL between GPUs, gloo between CPU processes."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def part_like(self, x: torch.Tensor) -> torch.Tensor:
        """``x``: the sum is made in place."""
        return x

    def sum_parts(self, part: torch.Tensor, x: torch.Tensor) -> None:
        """In place, so ``part`` must be ``x``."""
        assert part is x
        self.all_reduce(x)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """``[world, *x.shape]``."""
        out = x.new_empty(self.world, *x.shape)
        _gather(out.view(-1), x.contiguous().view(-1), group=self._group)
        return out

    def exchange(self, words: int, device: torch.device) -> Exchange | None:
        """Peer memory of the GPUs of one host, lent by torch's symmetric memory."""
        if device.type != "cuda" or self.world > MAX_RANKS:
            return None
        found, reason = None, ""
        try:
            found = self._symmetric_words(words, device)
        except Exception as error:  # of torch's symmetric memory, of many kinds
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        torch.cuda.synchronize(device)
        # All ranks' words are filled, or there is no exchange for any of them.
        meeting_place = "cpu" if dist.get_backend(self._group) == "gloo" else device
        missing = int(self.all_reduce(torch.tensor([float(found is None)], device=meeting_place)).item())
        if missing == 0:
            return found
        warnings.warn(f"no peer memory for the drafter's sums on {missing} ranks: {reason or 'not here'}", stacklevel=2)
        return None

    def _symmetric_words(self, words: int, device: torch.device) -> Exchange:
        from torch.distributed import _symmetric_memory as symmetric_memory

        group: Any = self._group or dist.group.WORLD
        own = symmetric_memory.empty(words, dtype=torch.int32, device=device)
        handle = symmetric_memory.rendezvous(own, group)
        begin = own.data_ptr() - handle.buffer_ptrs[self.rank]  # alike on all ranks, which allocate alike
        if not 0 <= begin <= handle.buffer_size - own.nbytes:
            raise RuntimeError("the tensor is not in its symmetric memory")
        own.fill_(-1)
        return Exchange(own, tuple(pointer + begin for pointer in handle.buffer_ptrs), self.rank, keep=handle)


class PeerMemory(ProcessGroup):
    """A rank of GPUs of one host whose parts are summed by one kernel that reads the others' memory, without NCCL.

    For parts of up to ``elements`` elements of ``dtype``; larger ones, and all else, take NCCL. torch's symmetric
    memory lends the buffer and the kernel, one read of every rank's part by every rank (no NVLink multicast).
    """

    def __init__(
        self, elements: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory

        super().__init__(group)
        world: Any = group or dist.group.WORLD
        self._group_name = world.group_name
        self._buffer = symmetric_memory.empty(elements, dtype=dtype, device=device)
        symmetric_memory.rendezvous(self._buffer, world)

    def part_like(self, x: torch.Tensor) -> torch.Tensor:
        """A view of the shared buffer, or ``x`` where that does not hold it."""
        if x.dtype != self._buffer.dtype or x.numel() > self._buffer.numel():
            return x
        return self._buffer[: x.numel()].view_as(x)

    def sum_parts(self, part: torch.Tensor, x: torch.Tensor) -> None:
        """From the shared buffer, which all ranks have read when the kernel ends."""
        if part is x:
            self.all_reduce(x)
        else:
            torch.ops.symm_mem.one_shot_all_reduce_out(part, "sum", self._group_name, x)


# -- simulated ranks: threads of one process, on one device ---------------------------------------------------------


class _Meeting:
    """Where the threads of one simulated group hand over their tensors."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.slots: list[Any] = [None] * world


class _Simulated:
    """A rank that is a thread. All use the device's current stream, so no more than the host's order is needed."""

    def __init__(self, meeting: _Meeting, rank: int, world: int) -> None:
        self._meeting, self.rank, self.world = meeting, rank, world

    def part_like(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def sum_parts(self, part: torch.Tensor, x: torch.Tensor) -> None:
        self.all_reduce(x)

    def _exchange(self, x: torch.Tensor, combine: Callable[[Sequence[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        meeting = self._meeting
        meeting.slots[self.rank] = x
        meeting.barrier.wait()
        result = combine(meeting.slots)
        meeting.barrier.wait()
        return result

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        def add(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            total = parts[0].clone()
            for part in parts[1:]:
                total += part
            return total

        return x.copy_(self._exchange(x, add))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange(x, lambda parts: torch.stack(list(parts)))

    def exchange(self, words: int, device: torch.device) -> Exchange | None:
        """None: on one stream the second rank's kernel would start after the end of the first's."""
        return None


def run_simulated(world: int, function: Callable[[Communicator], Result]) -> list[Result]:
    """Run ``function`` as ``world`` ranks in threads of this process; returns their results in order.

    For tests and for machines with fewer devices than ranks; on CUDA without graphs, whose capture no other thread may
    disturb.

    Raises:
        Exception: the first one that a rank raised.
    """
    meeting = _Meeting(world)
    results: list[Any] = [None] * world
    errors: list[BaseException | None] = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = function(_Simulated(meeting, rank, world))
        except BaseException as error:
            errors[rank] = error
            meeting.barrier.abort()  # or the others would wait for ever

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised = [error for error in errors if error is not None]
    for error in raised:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if raised:
        raise raised[0]
    return results


# -- the vocabulary -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VocabShards:
    """This rank's rows ``start .. stop`` of a vocabulary of ``size``."""

    communicator: Communicator
    size: int
    start: int
    stop: int
    exchange: Exchange | None = None  # of the merges, where the ranks have peer memory

    def on(self, device: torch.device) -> VocabShards:
        """The same with an exchange for merges on `device`, where there is peer memory. Every rank must call it."""
        if self.exchange is not None or device.type != "cuda" or self.communicator.world > MAX_RANKS:
            return self
        words = ops.merge_exchange_words(self.communicator.world)
        return replace(self, exchange=self.communicator.exchange(words, device))

    @staticmethod
    def of(communicator: Communicator, size: int) -> VocabShards:
        """The rank's share.

        Raises:
            ValueError: more ranks than tokens.
        """
        start, stop = shard_range(size, communicator.rank, communicator.world, "vocab_size")
        return VocabShards(communicator, size, start, stop)

    def merge(self, ids: torch.Tensor, values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Best ids ``[N]`` int64 of the whole vocabulary, from every rank's best ``ids`` int64 and ``values`` fp32 [N].

        One gather of 12 bytes a row, or one kernel over peer memory.
        """
        rows, world = ids.numel(), self.communicator.world
        if self.exchange is not None and rows <= MAX_MERGED_ROWS:
            ids, values = ids.reshape(-1), values.reshape(-1)
            if out is None:
                return ops.merge_vocab_ranks(ids, values, self.exchange)[0]
            ops.merge_vocab_ranks(ids, values, self.exchange, out=(out, torch.empty_like(values)))
            return out
        both = torch.cat([ids.view(-1).view(torch.int32), values.view(-1).view(torch.int32)])
        gathered = self.communicator.all_gather(both)
        all_ids = gathered[:, : 2 * rows].contiguous().view(torch.int64).view(world, rows)
        all_values = gathered[:, 2 * rows :].contiguous().view(torch.float32)
        if out is None:
            return ops.merge_vocab_shards(all_ids, all_values)[0]
        ops.merge_vocab_shards(all_ids, all_values, out=(out, torch.empty_like(all_values[0])))
        return out

    def best(self, logits: torch.Tensor) -> torch.Tensor:
        """``[B, T]`` int64: the best id of each row of the ranks' ``logits`` [B, T, stop - start]."""
        batch, block, _ = logits.shape
        ids, values = ops.argmax_logits(logits.reshape(batch * block, -1), self.start)
        return self.merge(ids, values).view(batch, block)

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """Whole logits ``[B, T, V]``: for sampling, which needs the distribution."""
        world = self.communicator.world
        ranges = [shard_range(self.size, rank, world, "vocab_size") for rank in range(world)]
        widest = max(stop - start for start, stop in ranges)
        padded = torch.nn.functional.pad(logits, (0, widest - logits.shape[-1]))
        parts = self.communicator.all_gather(padded)
        return torch.cat([part[..., : stop - start] for part, (start, stop) in zip(parts, ranges, strict=True)], dim=-1)


class ShardedTable:
    """A rank's rows of an embedding: a lookup gives zeros for the others' tokens, and a sum over the ranks the rest.

    Args:
        weight: ``[V, H]``, the whole table; only this rank's rows are kept, with a row of zeros after them.
    """

    def __init__(self, weight: torch.Tensor, shards: VocabShards) -> None:
        own = weight[shards.start : shards.stop]
        self.rows = torch.cat([own, own.new_zeros(1, own.shape[1])])
        ids = torch.arange(shards.size, device=weight.device) - shards.start
        others = (ids < 0) | (ids >= len(own))
        self._row_of = torch.where(others, len(own), ids)
        self._communicator = shards.communicator

    def lookup(self, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``[N, H]`` for ids of N elements."""
        x = torch.index_select(self.rows, 0, self._row_of[ids.reshape(-1)], out=out)
        return self._communicator.all_reduce(x)


# -- processes ------------------------------------------------------------------------------------------------------


def quiet_environment() -> None:
    """Settings of the collectives' libraries that are wanted unless the user says otherwise: no NVLink multicast."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


@contextmanager
def process_group(rank: int, world: int, device: torch.device, port: int | None = None) -> Iterator[ProcessGroup]:
    """This process as a rank: NCCL for a CUDA device, which becomes the current one, gloo otherwise.

    CUDA graphs that hold its sums must be gone when it ends: close the engines.

    Args:
        port: of the store on this host that :func:`start_ranks` opened; None: as the environment of ``torchrun`` says.
    """
    check_rank(rank, world)
    quiet_environment()
    given: dict[str, Any] = {"rank": rank, "world_size": world}
    if port is not None:
        given["store"] = dist.TCPStore(_HOST, port, is_master=False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **given)
    else:
        dist.init_process_group("gloo", **given)
    try:
        yield ProcessGroup()
    except BaseException:
        # NCCL waits for the end of every graph that holds one of its calls, and what was raised may still hold one.
        if device.type != "cuda":
            dist.destroy_process_group()
        raise
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
    dist.destroy_process_group()


class Ranks:
    """Processes of this host that :func:`start_ranks` started, and the store over which they find each other."""

    def __init__(self, store: Any, processes: list[Any]) -> None:
        self._store, self._processes = store, processes  # the store must stay open
        self.port: int = store.port

    def failed(self) -> list[int]:
        """Exit codes other than 0 of those that have ended."""
        return [process.exitcode for process in self._processes if process.exitcode not in (None, 0)]

    def end(self, seconds: float = 20.0) -> None:
        """Wait for their end; after ``seconds`` it is made."""
        for process in self._processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()
                process.join()


def start_ranks(ranks: range, world: int, function: Callable[..., None], *args: Any) -> Ranks:
    """Start ``function(rank, world, port, *args)`` in a process of its own for each of ``ranks``.

    ``function`` belongs to a module, and opens :func:`process_group` with that port. The processes end with this one.
    """
    quiet_environment()
    # Both libraries look for an interface to other hosts; there are none to reach.
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_run_rank, args=(function, rank, world, store.port, *args), daemon=True)
        for rank in ranks
    ]
    for process in processes:
        process.start()
    return Ranks(store, list(processes))


def _run_rank(function: Callable[..., None], rank: int, world: int, port: int, *args: Any) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    function(rank, world, port, *args)

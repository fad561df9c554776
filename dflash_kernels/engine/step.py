"""One decode step over a padded batch: device state, the calls in order, CUDA graphs, and the readback.

A *speculative* step runs ``reserve_and_prepare_block``, ``draft_forward``, ``lm_head_argmax``, the target's verify
pass, ``verify_block`` (or ``verify_block_sampled``) and ``inject_kv``. A *plain* step is the same without a drafter: a
block of one token, whose verification yields just the bonus token. Both leave the next anchor and the new lengths on
the device, so the next step needs nothing from the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from dflash_kernels import ops
from dflash_kernels.engine.draft import DrafterLike
from dflash_kernels.engine.kv_pool import DrafterKvPool
from dflash_kernels.engine.sampling import SamplingParams, SamplingRows
from dflash_kernels.engine.target import TargetRunner

Mode = Literal["dflash", "plain"]


def round_rows(rows: int, limit: int) -> int:
    """Batch bucket: the next power of two, at most ``limit``."""
    return min(1 << max(rows - 1, 0).bit_length(), limit)


def round_keys(keys: int, limit: int) -> int:
    """Context bucket: 256, 512, 768, 1024, 1536, 2048, 3072, ... at most ``limit``; few graphs, little excess."""
    bucket = 256
    while bucket < keys:
        half_up = bucket + bucket // 2
        if bucket >= 512 and half_up >= keys:
            bucket = half_up
            break
        bucket *= 2
    return min(bucket, limit)


@dataclass
class Ticket:
    """A readback under way: the host buffer and the event after which it may be read (None: already there)."""

    buffer: torch.Tensor
    event: Any = None

    def rows(self) -> list[list[int]]:
        """Wait for the copy and return the rows as Python ints."""
        if self.event is not None:
            self.event.synchronize()
        return self.buffer.tolist()


class Readback:
    """Device-to-host copies through pinned buffers that are used again; on the CPU, no copy at all."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._free: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def start(self, values: torch.Tensor) -> Ticket:
        """Begin the copy of ``values``; later work on the stream may overwrite them."""
        if not self._cuda:
            return Ticket(values)
        free = self._free.setdefault(tuple(values.shape), [])
        buffer = free.pop() if free else torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        buffer.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Ticket(buffer, event)

    def finish(self, ticket: Ticket) -> list[list[int]]:
        """Wait for a ticket, return its rows, and take the buffer back."""
        rows = ticket.rows()
        if self._cuda:
            self._free[tuple(ticket.buffer.shape)].append(ticket.buffer)
        return rows


class StepRunner:
    """Device state of up to ``rows`` running requests and the step over them.

    State tensors have ``rows`` entries at fixed addresses. Row i < n belongs to the i-th running request; the rows
    after them are padding: inactive, length 0, with a pool row of their own that never owns a page.

    Args:
        use_graphs: capture each (mode, batch bucket, context bucket, sampled) once it was seen, replay it afterwards.
    """

    def __init__(
        self,
        target: TargetRunner,
        drafter: DrafterLike | None,
        pool: DrafterKvPool | None,
        *,
        rows: int,
        use_graphs: bool,
    ) -> None:
        device = target.device
        self.target, self.drafter, self.pool, self.rows, self.device = target, drafter, pool, rows, device
        self.block_size = drafter.block_size if drafter is not None else 1
        self.anchor_ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.prefix_lens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active = torch.zeros(rows, dtype=torch.int64, device=device)
        self.pool_rows = torch.arange(rows, 2 * rows, dtype=torch.int64, device=device)
        self.sampling = SamplingRows(rows, device)
        self.readback = Readback(device)
        self.replays = self.captures = 0
        self._use_graphs = use_graphs and device.type == "cuda"
        self._graphs: dict[tuple[Any, ...], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._seen: set[tuple[Any, ...]] = set()
        self._graph_pool: Any = None
        # Outputs and workspaces of the ops, at fixed addresses; steps follow each other in stream order.
        tokens = rows * self.block_size
        self._draft_ids = torch.empty(tokens, dtype=torch.int64, device=device)
        self._draft_values = torch.empty(tokens, dtype=torch.float32, device=device)
        self._head_workspace = ops.lm_head_workspace(tokens, device)
        self._verified = {size: ops.Verified.empty(rows, size, device) for size in {1, self.block_size}}
        self._verify_workspace = ops.verify_workspace(rows, self.block_size, device, target.vocab_size)

    def close(self) -> None:
        """Drop the captured graphs."""
        self._graphs.clear()
        self._seen.clear()

    # -- rows ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(
        self, row: int, pool_row: int | None, prompt: list[int], params: SamplingParams, chunk: int, mode: Mode
    ) -> Ticket:
        """Run a prompt into ``row``, inject its context, and take the first token, which becomes the row's anchor.

        Returns the ticket of that token, ``[1, 1]``.
        """
        ids = torch.tensor([prompt], dtype=torch.int64, device=self.device)
        positions = torch.arange(len(prompt), dtype=torch.int64, device=self.device)[None]
        speculative = mode == "dflash"
        if speculative:
            assert self.pool is not None and pool_row is not None
            self.pool.reserve_row(pool_row, len(prompt))
        for start in range(0, len(prompt), chunk):
            stop = min(start + chunk, len(prompt))
            output = self.target.forward(
                ids[:, start:stop],
                positions[:, start:stop],
                stop,
                first_row=row,
                start=start,
                taps=speculative,
                last_only=True,
            )
            if speculative:
                assert self.pool is not None and pool_row is not None
                slots = self.pool.slots_of(pool_row, start, stop)
                self._inject(output.taps, positions[0, start:stop], slots, None)
        self.sampling.set_row(row, params)
        self.active[row] = 1
        self.pool_rows[row] = self.rows + row if pool_row is None else pool_row
        self.prefix_lens[row] = len(prompt) - 1
        one = slice(row, row + 1)
        _, _, bonus, _, new_lens = self._verify(one, ids[:, -1:], output.logits, not params.greedy)
        self.anchor_ids[one] = bonus
        self.prefix_lens[one] = new_lens
        return self.readback.start(bonus[:, None])

    @torch.inference_mode()
    def remove(self, row: int, last: int, last_len: int) -> None:
        """Take ``row`` out of the batch; row ``last``, of ``last_len`` cached positions, moves into its place."""
        if row != last:
            self.target.move_row(last, row, min(last_len, self.target.max_positions))
            for state in (self.anchor_ids, self.prefix_lens, self.active, self.pool_rows):
                state[row].copy_(state[last])
            self.sampling.move_row(last, row)
        self.anchor_ids[last] = 0
        self.prefix_lens[last] = 0
        self.active[last] = 0
        self.pool_rows[last] = self.rows + last
        self.sampling.clear_row(last)

    # -- the step -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, mode: Mode, count: int, longest: int, sampled: bool) -> Ticket:
        """Run one step over the first ``count`` rows and start its readback.

        ``longest`` is a host bound on the rows' lengths before the step. The ticket's rows are ``[T + 1]``: the
        committed tokens (the first ``commit`` of T), then ``commit``.
        """
        keys = longest + (self.block_size if mode == "dflash" else 1)
        if not self._use_graphs:
            return self.readback.start(self._step(mode, count, min(keys, self.target.max_positions), sampled))
        key = (mode, round_rows(count, self.rows), round_keys(keys, self.target.max_positions), sampled)
        if key in self._graphs:
            graph, packed = self._graphs[key]
        elif key not in self._seen:
            # The first step of a shape runs eagerly: it is real work, and warms up what a capture must not set up.
            self._seen.add(key)
            return self.readback.start(self._step(*key)[:count])
        else:
            graph = torch.cuda.CUDAGraph()
            if self._graph_pool is None:
                self._graph_pool = torch.cuda.graph_pool_handle()
            # Only this thread's calls matter: NCCL's watchdog looks at events of its own meanwhile.
            with torch.cuda.graph(graph, pool=self._graph_pool, capture_error_mode="thread_local"):
                packed = self._step(*key)
            self._graphs[key] = (graph, packed)
            self.captures += 1
        graph.replay()
        self.replays += 1
        return self.readback.start(packed[:count])

    def _step(self, mode: Mode, rows: int, kv_len: int, sampled: bool) -> torch.Tensor:
        """The device work of a step over ``rows`` rows; returns ``[rows, T + 1]`` int64 and updates the state."""
        batch = slice(0, rows)
        anchors, lens, active = self.anchor_ids[batch], self.prefix_lens[batch], self.active[batch]
        if mode == "plain":
            candidates, positions = anchors[:, None], lens[:, None]
            output = self.target.forward(candidates, positions, kv_len, taps=False)
        else:
            assert self.pool is not None and self.drafter is not None
            pool_rows = self.pool_rows[batch]
            block_ids, positions, slots = self.pool.reserve_block(
                anchors, lens, pool_rows, active, self.block_size, self.drafter.mask_token_id
            )
            candidates = self._draft(block_ids, positions, slots, lens, pool_rows)
            output = self.target.forward(candidates, positions, kv_len)
        out = ops.Verified(*(tensor[:rows] for tensor in self._verified[candidates.shape[1]]))
        _, commit_lens, bonus, out_tokens, new_lens = self._verify(batch, candidates, output.logits, sampled, out)
        if mode == "dflash":
            live = commit_lens * active.to(commit_lens.dtype)
            self._inject(output.taps, positions.reshape(-1), slots.reshape(-1), live)
        packed = torch.cat([out_tokens, commit_lens[:, None].to(torch.int64)], dim=1)
        anchors.copy_(bonus * active)
        lens.copy_(new_lens * active)
        return packed

    def _draft(
        self,
        block_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        prefix_lens: torch.Tensor,
        pool_rows: torch.Tensor,
    ) -> torch.Tensor:
        """Drafter forward and LM head: each row's anchor and the T - 1 proposed tokens, [B, T] int64."""
        assert self.pool is not None and self.drafter is not None
        rows, block = block_ids.shape
        hidden = self.drafter.forward(
            block_ids,
            positions,
            slots,
            prefix_lens,
            pool_rows,
            self.pool.req_to_token,
            self.pool.k_caches,
            self.pool.v_caches,
        )
        # The anchors' rows go along: leaving them out would cost a copy and save nothing in a tile of T rows.
        out = (self._draft_ids[: rows * block], self._draft_values[: rows * block])
        shards = self.target.shards
        ids, values = ops.lm_head_argmax(
            hidden,
            self.drafter.lm_head_weight,
            vocab_start=0 if shards is None else shards.start,
            out=out,
            workspace=self._head_workspace,
        )
        if shards is not None:
            shards.merge(ids, values, out=ids)
        candidates = ids.view(rows, block)
        candidates[:, 0].copy_(block_ids[:, 0])
        return candidates

    def _inject(
        self, taps: list[torch.Tensor], positions: torch.Tensor, slots: torch.Tensor, commit_lens: torch.Tensor | None
    ) -> None:
        """Write the context K and V of all drafter layers for the committed rows."""
        assert self.pool is not None and self.drafter is not None
        self.drafter.inject(taps, positions, slots, commit_lens, self.pool.k_caches, self.pool.v_caches)

    def _verify(
        self,
        batch: slice,
        candidates: torch.Tensor,
        logits: torch.Tensor,
        sampled: bool,
        out: ops.Verified | None = None,
    ) -> ops.Verified:
        """Accept step, into ``out`` or new tensors, from the target's logits, or this rank's part of them.

        Ranks exchange the best of their rows when all requests are greedy, and whole logits otherwise.
        Sampling draws from Philox at (seed, counter = the row's length): no state beyond the length.
        """
        lens = self.prefix_lens[batch]
        workspace = None if out is None else self._verify_workspace
        if not sampled:
            shards = self.target.shards
            top = logits if shards is None else shards.best(logits)
            return ops.verify_block(candidates, top, lens, out=out, workspace=workspace)
        rows = self.sampling
        return ops.verify_block_sampled(
            candidates,
            self.target.whole_logits(logits),
            lens,
            rows.temperature[batch],
            rows.top_k[batch],
            rows.top_p[batch],
            rows.min_p[batch],
            rows.seeds[batch],
            lens,
            out=out,
            workspace=workspace,
        )

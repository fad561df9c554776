"""The embedded runner: DFlash generation of a batch of prompts with a Hugging Face target.

The host keeps a list of running requests and hands whole steps to the device. On CUDA it runs one step ahead: the
tokens of step i are looked at while step i + 1 computes, so the device never waits. A request that turns out to have
ended in step i has then run once too often; what that step wrote lies beyond its text, is ignored, and its pages go
back in stream order. On the CPU every step is looked at before the next.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dflash_kernels.engine.draft import Bindable, DrafterLike
from dflash_kernels.engine.kv_pool import DrafterKvPool
from dflash_kernels.engine.sampling import SamplingParams
from dflash_kernels.engine.stats import EngineStats, RequestStats
from dflash_kernels.engine.step import Mode, StepRunner, Ticket
from dflash_kernels.engine.target import TargetRunner, default_stop_ids
from dflash_kernels.engine.text import StreamDecoder, encode_prompt
from dflash_kernels.model.drafter import Drafter
from dflash_kernels.model.sharded_drafter import ShardedDrafter
from dflash_kernels.tensor_parallel import Communicator

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of one request.

    Attributes:
        index: the prompt's place in the call.
        tokens: ids added to the text, cut at a stop token or the token limit (empty only when aborted).
        text: their text, or "" without a tokenizer or while a character is incomplete.
        commit_len: tokens this decode step added; None for the first token, which comes from the prompt.
        finish_reason: "stop", "length" or "abort" on the last event of a request, else None.
    """

    index: int
    tokens: tuple[int, ...]
    text: str
    commit_len: int | None
    finish_reason: str | None


@dataclass
class GenerationResult:
    """One request's text; ``stats.commit_lens`` and ``stats.mean_commit`` say how it was accepted."""

    index: int
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    stats: RequestStats = field(default_factory=RequestStats)


@dataclass(eq=False)
class _Request:
    """A request while it waits or runs."""

    result: GenerationResult
    params: SamplingParams
    decoder: StreamDecoder | None
    pool_row: int | None = None
    length: int = 0  # committed positions the host knows of
    in_flight: int = 0  # steps launched and not yet looked at
    max_new: int = 0
    done: bool = False

    @property
    def worst_emitted(self) -> int:
        """Tokens it will have at least once all launched steps are read."""
        return max(len(self.result.token_ids), 1) + self.in_flight


class GenerationStream:
    """Iterator over a call's :class:`TokenEvent`; ``results`` fill up while it runs, in the prompts' order."""

    def __init__(self, events: Iterator[TokenEvent], results: list[GenerationResult], aborted: set[int]) -> None:
        self.results = results
        self._events, self._aborted = events, aborted

    def __iter__(self) -> Iterator[TokenEvent]:
        return self

    def __next__(self) -> TokenEvent:
        return next(self._events)

    def abort(self, index: int) -> None:
        """End request ``index`` before the next step; its last event has the reason "abort"."""
        self._aborted.add(index)

    def close(self) -> None:
        """End all requests and free what they hold."""
        self._events.close()  # type: ignore[attr-defined]


class Engine:
    """DFlash generation for one target model and, optionally, a drafter that fits it.

    Args:
        target: transformers causal LM on its device.
        drafter: a drafter (:class:`DrafterLike`), bound to that target here if it is not yet; None allows only plain
            decoding.
        tokenizer: transformers tokenizer; needed for string prompts and for text in the results.
        max_batch: requests that run at the same time; more prompts wait.
        max_len: longest text, prompt included, in tokens.
        page_size: tokens per page of the drafter's KV pool, 1..64.
        device: where to run; the target must be there. None takes the target's.
        num_pages: size of the drafter's pool in pages; None holds max_batch full-length requests. Requests wait until
            the pool can hold their longest possible text.
        prefill_chunk: prompt tokens per pass.
        use_graphs: replay steps as CUDA graphs (CUDA only).
        run_ahead: steps launched before the last one's tokens are looked at, 0 or 1; None: 1 on CUDA, 0 elsewhere.
        communicator: of a tensor-parallel rank (:mod:`dflash_kernels.tensor_parallel`): the target is cut to the rank's
            part, in place, and the drafter's part is taken. Every rank makes the same calls, and gets the same results.

    Raises:
        ValueError: the drafter does not fit the target, a size is out of range, or there are too many ranks.
    """

    def __init__(
        self,
        target: nn.Module,
        drafter: DrafterLike | None = None,
        tokenizer: Any = None,
        *,
        max_batch: int = 8,
        max_len: int = 2048,
        page_size: int = 16,
        device: torch.device | str | None = None,
        num_pages: int | None = None,
        prefill_chunk: int = 1024,
        use_graphs: bool = True,
        run_ahead: int | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"Engine: max_batch must be >= 1, got {max_batch}")
        if max_len < 2:
            raise ValueError(f"Engine: max_len must be >= 2, got {max_len}")
        if prefill_chunk < 1:
            raise ValueError(f"Engine: prefill_chunk must be >= 1, got {prefill_chunk}")
        if run_ahead not in (None, 0, 1):
            raise ValueError(f"Engine: run_ahead must be 0 or 1, got {run_ahead}")
        self.max_batch, self.max_len, self.prefill_chunk = max_batch, max_len, prefill_chunk
        self.tokenizer, self.drafter = tokenizer, drafter
        self.block_size = int(drafter.block_size) if drafter is not None else 1
        # A block may reach past the last token of the text, and one overrun step past that.
        max_positions = max_len + 2 * self.block_size
        if drafter is not None:
            check_fit(target, drafter, max_positions)
            if isinstance(drafter, Bindable):
                if not drafter.bound:
                    drafter.bind(target)
                where: torch.device = target.get_input_embeddings().weight.device  # type: ignore[operator]
                if drafter.device != where:
                    raise ValueError(f"Engine: drafter must be on its target's device {where}, got {drafter.device}")
            if communicator is not None:
                drafter = self.drafter = _shard(drafter, communicator)
            if isinstance(drafter, Bindable):
                drafter.reserve(max_batch, max(prefill_chunk, max_batch * self.block_size))
        taps = drafter.target_layer_ids if drafter is not None else ()
        self.target = TargetRunner(target, taps, rows=max_batch, max_positions=max_positions, communicator=communicator)
        self.device = self.target.device
        if device is not None and torch.device(device).type != self.device.type:
            raise ValueError(f"Engine: target must be on {torch.device(device)}, got {self.device}")
        self.pool: DrafterKvPool | None = None
        if drafter is not None:
            self.pool = DrafterKvPool(
                num_layers=drafter.num_layers,
                num_kv_heads=drafter.num_kv_heads,
                head_dim=drafter.head_dim,
                dtype=drafter.dtype,
                device=self.device,
                rows=max_batch,
                max_positions=max_positions,
                page_size=page_size,
                num_pages=num_pages,
            )
        self.steps = StepRunner(self.target, drafter, self.pool, rows=max_batch, use_graphs=use_graphs)
        self.stop_token_ids = default_stop_ids(target, tokenizer)
        self.last_stats = EngineStats()
        self._depth = int(self.device.type == "cuda") if run_ahead is None else run_ahead
        self._busy = False

    # -- public calls -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        mode: Mode | None = None,
    ) -> list[GenerationResult]:
        """Generate for a batch of prompts (strings or token id lists); results in the prompts' order.

        ``params``: one for all, or one each. ``mode``: "dflash" (default with a drafter) or "plain".

        Raises:
            ValueError: an empty or over-long prompt, an id out of the vocabulary, a string without a tokenizer.
        """
        stream = self.stream(prompts, params, mode=mode)
        for _ in stream:
            pass
        return stream.results

    def decode_plain(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[GenerationResult]:
        """Token-by-token decoding by the same target runner: the baseline that generation is compared with."""
        return self.generate(prompts, params, mode="plain")

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        mode: Mode | None = None,
    ) -> GenerationStream:
        """Like :meth:`generate`, yielding a :class:`TokenEvent` per request and step as the tokens become known.

        Inputs are checked at the call. Closing the iterator ends all its requests and frees what they hold.
        """
        requests = self._make_requests(prompts, params)
        aborted: set[int] = set()
        events = self._run(requests, self._mode(mode), aborted)
        return GenerationStream(events, [request.result for request in requests], aborted)

    def encode(self, text: str, chat: bool = True) -> list[int]:
        """Token ids of a prompt; with ``chat`` and a chat template, as a user's message waiting for its answer."""
        if self.tokenizer is None:
            raise ValueError("Engine: a string prompt needs a tokenizer; pass token ids or a tokenizer")
        return encode_prompt(self.tokenizer, text, chat)

    def close(self) -> None:
        """Remove the hooks from the target model, drop its cache and the captured graphs."""
        self.steps.close()
        self.target.close()

    # -- requests -----------------------------------------------------------------------------------------------

    def _mode(self, mode: Mode | None) -> Mode:
        if mode is None:
            return "dflash" if self.drafter is not None else "plain"
        if mode not in ("dflash", "plain"):
            raise ValueError(f"Engine: mode must be 'dflash' or 'plain', got {mode!r}")
        if mode == "dflash" and self.drafter is None:
            raise ValueError("Engine: mode 'dflash' needs a drafter, got none")
        return mode

    def _make_requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[_Request]:
        listed = _as_prompt_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(listed)
        else:
            each = list(params)
        if len(each) != len(listed):
            raise ValueError(f"Engine: params must be one for all prompts or one each ({len(listed)}), got {len(each)}")
        requests = []
        for index, (prompt, wanted) in enumerate(zip(listed, each, strict=True)):
            ids = self.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
            if not ids:
                raise ValueError(f"Engine: prompt {index} must have at least one token, got none")
            if len(ids) >= self.max_len:
                raise ValueError(
                    f"Engine: prompt {index} must be shorter than max_len ({self.max_len} tokens), got {len(ids)}"
                )
            bad = next((t for t in ids if not 0 <= t < self.target.vocab_size), None)
            if bad is not None:
                raise ValueError(f"Engine: prompt {index} must hold ids in 0..{self.target.vocab_size - 1}, got {bad}")
            resolved = wanted.resolved(self.stop_token_ids)
            request = _Request(
                GenerationResult(index, ids),
                resolved,
                StreamDecoder(self.tokenizer) if self.tokenizer is not None else None,
                length=len(ids),
                max_new=min(resolved.max_new_tokens, self.max_len - len(ids)),
            )
            if self.pool is not None and not self.pool.fits(self._worst_len(request)):
                raise ValueError(
                    f"Engine: prompt {index} may need {self._worst_len(request)} tokens of drafter KV, "
                    f"the pool has {(self.pool.num_pages - 1) * self.pool.page_size}"
                )
            request.result.stats.prompt_tokens = len(ids)
            requests.append(request)
        return requests

    def _worst_len(self, request: _Request) -> int:
        return len(request.result.prompt_ids) + request.max_new + 2 * self.block_size

    # -- the loop -----------------------------------------------------------------------------------------------

    def _run(self, requests: list[_Request], mode: Mode, aborted: set[int]) -> Iterator[TokenEvent]:
        if self._busy:
            raise RuntimeError("Engine: another stream of this engine is still open; finish or close it first")
        self._busy = True
        stats = self.last_stats = EngineStats(mode=mode)
        replays, captures = self.steps.replays, self.steps.captures
        waiting = deque(requests)
        running: list[_Request] = []
        pending: deque[tuple[Ticket, list[_Request], bool]] = deque()
        try:
            while waiting or running or pending:
                yield from self._abort_marked(aborted, waiting, running)
                while waiting and len(running) < self.max_batch and self._admit(waiting[0], mode):
                    request = waiting.popleft()
                    running.append(request)  # first, so that it is retired if the pass over its prompt fails
                    pending.append((self._prefill(request, len(running) - 1, mode), [request], True))
                    stats.prefill_passes += 1
                while pending and self._depth == 0:
                    yield from self._absorb(*pending.popleft(), running, stats)
                # A step is worth running while some request may still want a token after those under way.
                worth = any(r.worst_emitted < r.max_new for r in running)
                if worth:
                    pending.append((self._launch(running, mode), list(running), False))
                    stats.steps += 1
                    stats.row_steps += len(running)
                while len(pending) > (self._depth if worth else 0):
                    yield from self._absorb(*pending.popleft(), running, stats)
        finally:
            for request in list(running):
                self._retire(request, running)
            self._busy = False
            stats.finished = time.perf_counter()
            stats.new_tokens = sum(len(r.result.token_ids) for r in requests)
            stats.graph_replays = self.steps.replays - replays
            stats.graph_captures = self.steps.captures - captures

    def _admit(self, request: _Request, mode: Mode) -> bool:
        if mode == "plain":
            return True
        assert self.pool is not None
        request.pool_row = self.pool.admit(self._worst_len(request))
        return request.pool_row is not None

    def _prefill(self, request: _Request, row: int, mode: Mode) -> Ticket:
        request.result.stats.started = time.perf_counter()
        return self.steps.prefill(
            row, request.pool_row, request.result.prompt_ids, request.params, self.prefill_chunk, mode
        )

    def _launch(self, running: list[_Request], mode: Mode) -> Ticket:
        span = self.block_size if mode == "dflash" else 1
        longest = max(r.length + r.in_flight * span for r in running)
        sampled = not all(r.params.greedy for r in running)
        ticket = self.steps.run(mode, len(running), longest, sampled)
        for request in running:
            request.in_flight += 1
        return ticket

    def _absorb(
        self, ticket: Ticket, snapshot: list[_Request], first: bool, running: list[_Request], stats: EngineStats
    ) -> Iterator[TokenEvent]:
        """Read a ticket: append tokens, find stops, retire what ended, and yield the events."""
        rows = self.steps.readback.finish(ticket)
        now = time.perf_counter()
        for request, row in zip(snapshot, rows, strict=True):
            tokens = row if first else row[: row[-1]]
            if not first:
                request.in_flight -= 1
                request.length += len(tokens)
            if request.done:
                stats.overrun_rows += 1
                continue
            yield self._accept(request, tokens, first, now, running)

    def _accept(
        self, request: _Request, tokens: list[int], first: bool, now: float, running: list[_Request]
    ) -> TokenEvent:
        result, stops = request.result, request.params.stop_token_ids or ()
        kept: list[int] = []
        reason = None
        for token in tokens[: request.max_new - len(result.token_ids)]:
            kept.append(token)
            if token in stops:
                reason = "stop"
                break
        result.token_ids += kept
        if reason is None and len(result.token_ids) >= request.max_new:
            reason = "length"
        if first:
            result.stats.first_token = now
        else:
            result.stats.commit_lens.append(len(kept))
        result.stats.finished = now
        text = request.decoder.push(kept, final=reason is not None) if request.decoder is not None else ""
        result.text += text
        if reason is not None:
            result.finish_reason = reason
            self._retire(request, running)
        return TokenEvent(result.index, tuple(kept), text, None if first else len(kept), reason)

    def _retire(self, request: _Request, running: list[_Request]) -> None:
        """Take a request out of the batch and give its pages back; steps under way may still name it."""
        request.done = True
        row, last = running.index(request), len(running) - 1
        tail = running[last]
        self.steps.remove(row, last, tail.length + tail.in_flight * self.block_size)
        running[row] = tail
        running.pop()
        if self.pool is not None and request.pool_row is not None:
            self.pool.release(request.pool_row)
            request.pool_row = None

    def _abort_marked(
        self, aborted: set[int], waiting: deque[_Request], running: list[_Request]
    ) -> Iterator[TokenEvent]:
        if not aborted:
            return
        for request in [r for r in (*waiting, *running) if r.result.index in aborted]:
            request.result.finish_reason = "abort"
            if request in running:
                self._retire(request, running)
            else:
                request.done = True
                waiting.remove(request)
            yield TokenEvent(request.result.index, (), "", None, "abort")
        aborted.clear()


def _shard(drafter: DrafterLike, communicator: Communicator) -> ShardedDrafter:
    if not isinstance(drafter, Drafter):
        raise ValueError(f"Engine: a drafter for several ranks must be a Drafter, got {type(drafter).__name__}")
    return ShardedDrafter(drafter, communicator)


def check_fit(target: nn.Module, drafter: DrafterLike, max_positions: int) -> None:
    """Check that a drafter belongs to a target: hidden size, vocabulary, tapped layers, rope table.

    Raises:
        ValueError: naming the first thing that does not fit, expected and got.
    """
    weight = target.get_output_embeddings().weight  # type: ignore[operator]
    vocab, hidden = weight.shape
    if drafter.hidden_size != hidden:
        raise ValueError(f"drafter does not fit the target: hidden_size must be {hidden}, got {drafter.hidden_size}")
    if drafter.vocab_size != vocab:
        raise ValueError(f"drafter does not fit the target: vocab_size must be {vocab}, got {drafter.vocab_size}")
    if not 0 <= drafter.mask_token_id < vocab:
        raise ValueError(
            f"drafter does not fit the target: mask_token_id must be in 0..{vocab - 1}, got {drafter.mask_token_id}"
        )
    if max_positions > drafter.max_positions:
        raise ValueError(
            f"max_len is too long for the drafter's rope table: {max_positions} positions are needed "
            f"(max_len + 2 blocks), the table has {drafter.max_positions}"
        )


def _as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(p, int) for p in listed):
        return [[int(p) for p in listed if isinstance(p, int)]]  # one prompt given as ids
    return [p for p in listed if not isinstance(p, int)]

"""Whole steps of SGLang's DFLASH worker on the CPU, with and without the plugin, under a small scheduler.

The worker's forward_batch_generation, slot reservation, sampler and drafter are SGLang's own code, of 0.5.16 the
logits and the attention metadata, too, for the seams that only run there; the graph runners replay plain functions on
static buffers, padded to their batch sizes. Requests come, end inside a block, are aborted and retracted, and the
pool runs full. The target's next token depends on the last token and its position alone and is exact in bfloat16, so
every text is known beforehand, ties included.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sglang_source import Source, make_module, unpack_wheel
from test_sglang import (
    ACCEPT,
    APPEND,
    INFO_MODULE,
    PREPARE,
    Algorithm,
    H,
    K,
    T,
    V,
    VocabParallelEmbedding,
    build_pool,
    parts,
    table,
    worker_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from dflash_kernels.integrations.sglang import plugin
from dflash_kernels.integrations.sglang.logits import PROCESSOR_MODULE, GreedyLogits
from dflash_kernels.integrations.sglang.metadata import BACKEND_MODULE
from dflash_kernels.integrations.sglang.seam import WORKER_MODULE

ROWS, WIDTH, SLOTS, END = 6, 40, 84, 7  # requests (row 0 pads), tokens of one, KV slots, the token that ends a text
BATCHES = (1, 2, 4)


@pytest.fixture(scope="module")
def old_source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(unpack_wheel("0.5.16", tmp_path_factory.mktemp("sglang")), "0.5.16")


class Mode:
    def __init__(self, name: str) -> None:
        self.name = name

    def is_extend(self) -> bool:
        return self.name == "EXTEND"

    def is_decode_or_idle(self) -> bool:
        return self.name in ("DECODE", "IDLE")

    def is_draft_extend_v2(self) -> bool:
        return False

    def is_idle(self) -> bool:
        return self.name == "IDLE"

    def is_target_verify(self) -> bool:
        return self.name == "TARGET_VERIFY"


MODES = types.SimpleNamespace(**{name: Mode(name) for name in ("EXTEND", "IDLE", "DECODE", "TARGET_VERIFY")})


class Lengths(torch.Tensor):
    """A tensor of the overlap scheduler, which is recorded on a stream."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def record_stream(self, stream: Any) -> None: ...


class Launches(TorchDispatchMode):
    """Operations that a GPU would get from the host one by one. What `one_launch` wraps is one, whatever it does."""

    current: Launches | None = None

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = 0

    def __enter__(self) -> Any:
        Launches.current = self
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        Launches.current = None
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema, name = func._schema, str(func)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        same = name == "aten.copy_.default" and _same_view(args[0], args[1])
        if not self.inside and not view and not same and not name.startswith(("aten.empty", "aten.detach")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def one_launch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function counted as ``name``; "" counts nothing, as of what only a test does."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        counter = Launches.current
        if counter is None:
            return function(*args, **kwargs)
        if name and not counter.inside:
            counter.names.append(name)
        counter.inside += 1
        try:
            return function(*args, **kwargs)
        finally:
            counter.inside -= 1

    return run


# -- the target: tables of -1, 0 and 1, so that all sums are whole numbers that bfloat16 holds -------------------------


class PlainLogits(torch.nn.Module):
    """The target's logits, in float32, where no seam touches them."""

    def _get_logits(self, hidden: torch.Tensor, lm_head: Any, metadata: Any) -> torch.Tensor:
        return hidden.float() @ lm_head.weight[:V].float().T


def build_logits(source: Source) -> Any:
    if source.version != "0.5.16":
        return PlainLogits()
    members = (
        "_get_logits",
        "_compute_lm_head",
        "_copy_logits_to_buffer",
        "_gather_dp_attn_hidden_states",
        "_scatter_dp_attn_logits",
    )
    space: dict[str, Any] = {"torch": torch, "nn": torch.nn, "_is_npu": False, "_is_cpu": True}
    space["should_apply_lm_head_quant_method"] = lambda head, method: False
    space["use_intel_amx_backend"] = lambda head: False
    processor = source.compile(PROCESSOR_MODULE, {"LogitsProcessor": members}, space)["LogitsProcessor"]()
    for name in ("do_tensor_parallel_all_gather", "do_tensor_parallel_all_gather_dp_attn", "use_fp32_lm_head"):
        setattr(processor, name, False)
    for name in ("logit_scale", "final_logit_softcapping", "rl_on_policy_target"):
        setattr(processor, name, None)
    processor.vocab_size = V
    return processor


class Target(torch.nn.Module):
    def __init__(self, source: Source) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)

        def ternary(*shape: int) -> torch.Tensor:
            return torch.randint(-1, 2, shape, generator=draw).to(torch.bfloat16)

        self.tokens, self.positions = ternary(V, H), ternary(WIDTH + T, H)
        self.taps = torch.randn(K, H, generator=draw).to(torch.bfloat16)
        shard = types.SimpleNamespace(num_added_elements=0, num_org_elements=V, org_vocab_start_index=0)
        self.lm_head = types.SimpleNamespace(weight=ternary(V + 6, H), shard_indices=shard)
        embed = VocabParallelEmbedding(V, H).to(torch.bfloat16).requires_grad_(False)
        self.embeddings_looked_up = 0

        def look_up(ids: torch.Tensor) -> torch.Tensor:
            self.embeddings_looked_up += 1
            return F.embedding(ids, embed.weight)

        embed.forward = look_up
        self.get_input_embeddings = lambda: embed
        self.logits_processor = build_logits(source)
        every = (self.tokens + self.positions[:, None]).float()  # [position, token, H]
        self.following = torch.argmax(every @ self.lm_head.weight[:V].float().T, dim=-1).tolist()

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.tokens[ids] + self.positions[positions]

    def tapped(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden[:, None] * self.taps).flatten(1)

    def next_token(self, token: int, position: int) -> int:
        return self.following[position][token]

    def text(self, prompt: list[int], count: int) -> list[int]:
        """The greedy continuation: up to ``count`` tokens, ended by END."""
        out: list[int] = []
        while len(out) < count and (not out or out[-1] != END):
            tokens = prompt + out
            out.append(self.next_token(tokens[-1], len(tokens) - 1))
        return out


# -- graph runners: static buffers that drafter and target share, padded batches ---------------------------------------


def shared_buffers() -> types.SimpleNamespace:
    most = max(BATCHES)
    longs = {name: torch.zeros(most * T, dtype=torch.int64) for name in ("input_ids", "positions", "out_cache_loc")}
    requests = {name: torch.zeros(most, dtype=torch.int64) for name in ("req_pool_indices", "seq_lens")}
    embeds = torch.full((most * T, H), float("nan"), dtype=torch.bfloat16)
    return types.SimpleNamespace(**longs, **requests, input_embeds=embeds)


class FlashAttentionBackend:
    """0.5.16's own code that fills lengths and pages from the buffers of a graph; the page table's kernel in torch."""

    needs_cpu_seq_lens, use_sliding_window_kv_pool, topk = False, False, 0
    speculative_num_draft_tokens, page_size = T, 1

    def bind(self, table: torch.Tensor) -> None:
        self.req_to_token, self.fills = table, 0
        self.target_verify_metadata = {
            batch: types.SimpleNamespace(
                cache_seqlens_int32=torch.zeros(batch, dtype=torch.int32),
                cu_seqlens_k=torch.zeros(batch + 1, dtype=torch.int32),
                page_table=torch.zeros(batch, WIDTH, dtype=torch.int32),
                swa_page_table=None,
            )
            for batch in BATCHES
        }

    def _bind_metadata_buffers(self, *args: Any) -> None: ...

    def check(self, view: Any) -> None:
        """What a replay of the target's graph must find."""
        metadata = self.target_verify_metadata[view.batch_size]
        lengths = view.seq_lens + T
        assert torch.equal(metadata.cache_seqlens_int32, lengths.int())
        assert torch.equal(metadata.cu_seqlens_k, F.pad(lengths.cumsum(0), (1, 0)).int())
        for pages, row, length in zip(metadata.page_table, view.req_pool_indices, lengths, strict=True):
            assert torch.equal(pages[:length], self.req_to_token[row, :length])


class PlainBackend:
    """An attention backend whose metadata no seam touches and nothing reads."""

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None: ...

    def check(self, view: Any) -> None: ...


def build_backend(source: Source, table: torch.Tensor) -> Any:
    if source.version != "0.5.16":
        return PlainBackend()

    def build_trtllm_mha_page_table(
        req_to_token: Any, req_pool_indices: Any, cache_seqlens: Any, page_table: Any, **_: Any
    ) -> None:
        backend.fills += 1
        for pages, row, length in zip(page_table, req_pool_indices, cache_seqlens.tolist(), strict=True):
            pages[:length] = req_to_token[row, :length]

    members = (
        "init_forward_metadata_out_graph",
        "_init_full_cg_decode_metadata",
        "_apply_cuda_graph_metadata",
        "_maybe_update_local_attn_metadata_for_replay",
    )
    space: dict[str, Any] = {"torch": torch, "AttentionBackend": object}
    space["build_trtllm_mha_page_table"] = one_launch("page table", build_trtllm_mha_page_table)
    source.compile(BACKEND_MODULE, {"FlashAttentionBackend": members}, space)
    own = {name: value for name, value in vars(FlashAttentionBackend).items() if not name.startswith("__")}
    backend = type("FlashAttentionBackend", (space["FlashAttentionBackend"],), own)()
    backend.bind(table)
    return backend


class Runner:
    """DecodeCudaGraphRunner as far as a step needs it: load_batch, then `replay` on the buffers."""

    capture_bs, max_bs = list(BATCHES), max(BATCHES)

    def __init__(self, source: Source, buffers: Any, replay: Any, extra: dict[str, Any]) -> None:
        self.buffers, self.replay, self.extra = buffers, one_launch("graph", replay), extra
        self.attn_backend = build_backend(source, extra["req_to_token"])
        self.loaded: Any = None

    def view(self, batch: int) -> Any:
        b = self.buffers
        view = types.SimpleNamespace(batch_size=batch, forward_mode=MODES.TARGET_VERIFY, spec_info=None, **self.extra)
        view.encoder_lens = view.seq_lens_sum = view.seq_lens_cpu = None
        for name in ("input_ids", "positions", "out_cache_loc"):
            setattr(view, name, getattr(b, name)[: batch * T])
        view.seq_lens, view.req_pool_indices = b.seq_lens[:batch], b.req_pool_indices[:batch]
        return view

    def capture(self) -> None:
        for batch in reversed(BATCHES):
            self.attn_backend.init_forward_metadata_out_graph(self.view(batch), in_capture=True)
            self.replay(self.view(batch))

    def load_batch(self, given: Any) -> None:
        raw, b = given.batch_size, self.buffers
        padded = next(size for size in BATCHES if size >= raw)
        if raw < padded:
            for name in ("positions", "out_cache_loc"):
                getattr(b, name)[raw * T : padded * T].zero_()
            b.req_pool_indices[raw:padded].zero_()
            b.seq_lens[raw:padded].fill_(1)
        pairs = [(getattr(b, n)[: raw * T], getattr(given, n)) for n in ("input_ids", "positions", "out_cache_loc")]
        pairs += [(getattr(b, n)[:raw], getattr(given, n)) for n in ("req_pool_indices", "seq_lens")]
        torch._foreach_copy_([dst for dst, _ in pairs], [src for _, src in pairs])
        if getattr(given, "input_embeds", None) is not None:
            b.input_embeds[: raw * T].copy_(given.input_embeds)
        self.attn_backend.init_forward_metadata_out_graph(self.view(padded))
        self.loaded = (raw, padded)

    def execute(self, given: Any) -> Any:
        if self.loaded is None:
            self.load_batch(given)
        else:  # planned before
            self.buffers.input_ids[: given.batch_size * T].copy_(given.input_ids)
            self.buffers.positions[: given.batch_size * T].copy_(given.positions)
        (raw, padded), self.loaded = self.loaded, None
        out = self.replay(self.view(padded))
        return types.SimpleNamespace(
            next_token_logits=None if out.next_token_logits is None else out.next_token_logits[: raw * T],
            hidden_states=out.hidden_states[: raw * T],
        )


# -- one worker with its pools, drafter and target ---------------------------------------------------------------------


class Plan:
    """Slots that are the same in both pools."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def bind(self, forward_batch: Any, translator: Any) -> None: ...

    def write_ids(self, translator: Any) -> torch.Tensor:
        return self.ids


class Translator:
    def plan(self, *, write_virtual: torch.Tensor, **_: Any) -> Plan:
        return Plan(write_virtual)


class Slots:
    """The allocator and the prefix cache in one: a free list, first in, first out."""

    page_size = 1

    def __init__(self) -> None:
        self.free = list(range(1, SLOTS))
        self.token_to_kv_pool_allocator = self

    def take(self, count: int) -> torch.Tensor:
        if count > len(self.free):
            raise RuntimeError("out of KV slots")
        taken, self.free = self.free[:count], self.free[count:]
        return torch.tensor(taken, dtype=torch.int32)


class Request:
    def __init__(self, number: int, prompt: list[int], count: int) -> None:
        self.number, self.prompt, self.count = number, prompt, count
        self.out: list[int] = []
        self.row = 0
        self.kv = types.SimpleNamespace(kv_committed_len=0, kv_allocated_len=0)
        self.decode_batch_idx = 0
        self.sampling_params = types.SimpleNamespace(top_k=1)

    @property
    def kv_committed_len(self) -> int:
        return int(self.kv.kv_committed_len)

    @property
    def done(self) -> bool:
        return len(self.out) >= self.count or (bool(self.out) and self.out[-1] == END)


class Engine:
    """Worker, target and a scheduler that admits, steps, and drops requests as it is told."""

    def __init__(self, source: Source, module: types.ModuleType, ours: bool, accuracy: float) -> None:
        torch.manual_seed(3)
        self.target = Target(source)
        given = parts(source, torch.bfloat16)
        pool = build_pool(source, torch.bfloat16)
        pool.k_buffer = [torch.full((SLOTS, *b.shape[1:]), -7.0, dtype=b.dtype) for b in pool.k_buffer]
        pool.v_buffer = [b.clone() for b in pool.k_buffer]
        self.pool, self.slots, self.accuracy = pool, Slots(), accuracy
        self.table = torch.zeros(ROWS, WIDTH, dtype=torch.int32)
        tables = types.SimpleNamespace(req_to_token=self.table)
        runner, draft = given["model_runner"], given["draft_model_runner"]
        runner.model, runner.req_to_token_pool = self.target, tables
        runner.server_args = types.SimpleNamespace(attention_backend="fa3")
        draft.req_to_token_pool, draft.token_to_kv_pool = tables, pool
        self.floats = torch.zeros(max(BATCHES) * T, V)
        buffers = shared_buffers()
        extra = {"req_to_token": self.table, "pool": pool}
        runner.decode_cuda_graph_runner = Runner(source, buffers, self._verify, extra)
        draft.decode_cuda_graph_runner = Runner(source, buffers, self._draft, extra)
        draft.forward = self._draft_forward
        self.drafter = given["draft_model"]
        given["_target_worker"] = target_worker = types.SimpleNamespace(model_runner=runner)
        target_worker.forward_batch_generation = self._target_forward
        given.update(speculative_num_draft_tokens=T, _mask_token_id=1, model_runner=runner)
        given.update(_use_triton_prepare_block=True, _use_triton_accept_bonus=True, use_compact_draft_cache=False)
        given.update(_need_mamba_verify_commit=False, _draft_block_spec_info=None, _warned_sampling_fallback=False)
        given.update(_full_embed_gpu=None, _noise_embed_scale=1.0, _selector_sample=None, _target_logits_processor=None)
        given.update(
            _tp_sync=types.SimpleNamespace(sync=lambda *args: None), _wait_for_fused_hicache_load=lambda batch: None
        )
        if source.version != "0.5.16":
            runner.kv_index_translator = draft.kv_index_translator = Translator()
            runner.prefill_attention_backend_str = "fa3"
        for name in ("ids", "positions", "tokens", "end"):
            given[f"_draft_block_{name}_buf"] = None
        given["_draft_verify_out_cache_loc_buf"] = given["_draft_seq_lens_cpu_buf"] = None
        cls = module.DFlashWorkerV2
        if ours:
            cls = plugin.create_worker(lambda algorithm, args: module.DFlashWorkerV2, Algorithm(), None)
        self.worker = cls(given)
        runner.decode_cuda_graph_runner.capture()  # SGLang captures the target's graphs first
        self.worker.init_cuda_graphs()
        self.module, self.running, self.bonus = module, [], {}
        self.steps = 0
        self.launches: Launches | None = None
        self.sampling: Any = None

    # What the graphs and the eager passes compute.

    def _draft(self, view: Any) -> Any:
        seams = getattr(self.worker, "_dflash_seams", None)
        if seams is None or not seams["forward"].active:  # an attention that reads pages
            self.worker.draft_model_runner.decode_cuda_graph_runner.attn_backend.check(view)
        embeds = view_embeds(self.worker.draft_model_runner.decode_cuda_graph_runner, view.batch_size)
        out = self.drafter.forward(view.input_ids, view.positions, view, embeds)
        self.worker._draft_sampler(out.hidden_states, view.input_ids)
        # The tokens of an untrained drafter are never right, so some are replaced by the target's.
        for row in range(view.batch_size):
            rng = random.Random(f"{view.seq_lens[row]} {view.input_ids[row * T]}")
            token, position = int(view.input_ids[row * T]), int(view.positions[row * T])
            for j in range(T - 1):
                if position + j >= WIDTH or rng.random() > self.accuracy:
                    break
                token = self.target.next_token(token, position + j)
                self.worker._draft_sampler.out[row * (T - 1) + j] = token
        return types.SimpleNamespace(next_token_logits=None, hidden_states=out.hidden_states)

    def _draft_forward(self, forward_batch: Any) -> Any:
        output = self.worker.draft_model_runner.decode_cuda_graph_runner.execute(forward_batch)
        return types.SimpleNamespace(logits_output=output, can_run_graph=True)

    def _verify(self, view: Any) -> Any:
        self.worker.model_runner.decode_cuda_graph_runner.attn_backend.check(view)
        hidden = self.target.hidden(view.input_ids, view.positions)
        metadata = types.SimpleNamespace(
            next_token_logits_buffer=self.floats[: len(hidden)], forward_mode=MODES.TARGET_VERIFY
        )
        logits = self.target.logits_processor._get_logits(hidden, self.target.lm_head, metadata)
        return types.SimpleNamespace(next_token_logits=logits, hidden_states=self.target.tapped(hidden))

    def _target_forward(self, batch: Any, forward_batch: Any = None, is_verify: bool = False, **_: Any) -> Any:
        if is_verify:
            output = self.worker.model_runner.decode_cuda_graph_runner.execute(forward_batch)
            return types.SimpleNamespace(
                logits_output=output, can_run_cuda_graph=True, routed_experts_output=None, indexer_topk_output=None
            )
        hidden = self.target.hidden(batch.input_ids, batch.positions)
        last = torch.tensor(batch.extend_lens).cumsum(0) - 1
        metadata = types.SimpleNamespace(next_token_logits_buffer=None, forward_mode=MODES.EXTEND)
        logits = self.target.logits_processor._get_logits(hidden[last], self.target.lm_head, metadata)
        output = types.SimpleNamespace(next_token_logits=logits, hidden_states=self.target.tapped(hidden))
        plan = Plan(batch.out_cache_loc)
        return types.SimpleNamespace(
            logits_output=output, next_token_ids=torch.argmax(logits, dim=-1), kv_loc_plan=plan
        )

    # The scheduler.

    def batch(self, requests: list[Request], mode: Mode) -> Any:
        return types.SimpleNamespace(
            device=torch.device("cpu"), reqs=requests, batch_size=lambda: len(requests), forward_mode=mode,
            is_extend_in_batch=False, return_logprob=False, has_grammar=False, sampling_info=self.sampling,
            token_to_kv_pool_allocator=self.slots, tree_cache=self.slots,
            req_to_token_pool=types.SimpleNamespace(req_to_token=self.table),
            req_pool_indices=torch.tensor([r.row for r in requests]), spec_info=None,
            seq_lens=torch.tensor([r.kv_committed_len for r in requests]).as_subclass(Lengths),
            seq_lens_cpu=None, seq_lens_sum=None, can_run_decode_cuda_graph=True, maybe_evict_swa=lambda: None,
            hisparse_coordinator=None,
        )  # fmt: skip

    def admit(self, request: Request) -> None:
        """Its prompt, and after a retraction the tokens that it had, are prefilled."""
        request.row = min(set(range(1, ROWS)) - {r.row for r in self.running})
        tokens = request.prompt + request.out
        slots = self.slots.take(len(tokens))
        self.table[request.row] = 0
        self.table[request.row, : len(tokens)] = slots
        request.kv.kv_committed_len = request.kv.kv_allocated_len = len(tokens)
        batch = self.batch([request], MODES.EXTEND)
        batch.input_ids, batch.positions = torch.tensor(tokens), torch.arange(len(tokens))
        batch.extend_lens, batch.prefix_lens, batch.out_cache_loc = [len(tokens)], [0], slots.long()
        result = self.worker.forward_batch_generation(batch)
        token = int(result.next_token_ids[0])
        request.out.append(token)
        self.bonus[request.number] = token
        self.running.append(request)

    def step(self) -> int:
        """One step of all; returns how many texts ended inside their block."""
        batch = self.batch(self.running, MODES.DECODE)
        bonus = torch.tensor([self.bonus[r.number] for r in self.running])
        make = self.module.make_draft_input_v2
        batch.spec_info = make(bonus_tokens=bonus, new_seq_lens=torch.Tensor(batch.seq_lens).long())
        batch.spec_info.prepare_for_decode(batch)
        batch.seq_lens_cpu = batch.seq_lens_sum = None  # no backend asks for them
        published: list[torch.Tensor] = []
        publish = one_launch("", lambda lens: published.append(lens.clone()))
        with self.launches or contextlib.nullcontext():
            result = self.worker.forward_batch_generation(batch, on_publish=publish)
        tokens = result.next_token_ids.view(-1, T)
        assert torch.equal(published[0], result.new_seq_lens)
        inside = 0
        for i, request in enumerate(self.running):
            commit = int(result.accept_lens[i])
            assert int(result.new_seq_lens[i]) == request.kv_committed_len + commit
            request.kv.kv_committed_len += commit
            self.bonus[request.number] = int(result.next_draft_input.bonus_tokens[i])
            for token in tokens[i, :commit].tolist():
                inside += request.done
                if not request.done:  # what follows the end inside a block is dropped
                    request.out.append(token)
        self.steps += 1
        return inside

    def drop(self, request: Request) -> None:
        """Finished, aborted or retracted: row and slots are free again."""
        held = self.table[request.row, : request.kv.kv_allocated_len].tolist()
        assert 0 not in held
        self.slots.free += held
        self.table[request.row] = 0
        self.running.remove(request)

    def context(self, request: Request) -> list[torch.Tensor]:
        """The drafter's K and V of the committed tokens."""
        slots = self.table[request.row, : request.kv_committed_len].long()
        return [buffer[slots] for buffer in (*self.pool.k_buffer, *self.pool.v_buffer)]


def view_embeds(runner: Runner, batch: int) -> torch.Tensor:
    return runner.buffers.input_embeds[: batch * T]


def step_module(source: Source) -> types.ModuleType:
    module = worker_module(source, more=(
        "_ensure_draft_block_buffers", "_validate_phase1_sampling_support", "_make_next_draft_input_prefill",
        "_make_next_draft_input_decode", "target_worker", "_draft_write_ids",
    ))  # fmt: skip
    cls = module.DFlashWorkerV2
    setattr(cls, APPEND, one_launch("inject", getattr(cls, APPEND)))
    for name in (ACCEPT, PREPARE):
        setattr(module, name, one_launch(name, getattr(module, name)))
    cls.target_worker = property(lambda self: self._target_worker)

    class Verify:
        def __init__(self, **given: Any) -> None:
            self.__dict__.update(given)

        def prepare_for_verify(self, batch: Any, target_worker: Any, **_: Any) -> tuple[Any, bool]:
            forward_batch = types.SimpleNamespace(
                batch_size=len(batch.seq_lens), input_ids=self.draft_token, positions=self.positions,
                out_cache_loc=batch.out_cache_loc, req_pool_indices=batch.req_pool_indices,
                seq_lens=torch.Tensor(batch.seq_lens).long(), forward_mode=MODES.TARGET_VERIFY,
            )  # fmt: skip
            target_worker.model_runner.decode_cuda_graph_runner.load_batch(forward_batch)
            return forward_batch, True

    space = module.__dict__
    space.update(
        ForwardBatch=types.SimpleNamespace, ForwardMode=MODES, DFlashVerifyInput=Verify,
        GenerationBatchResult=types.SimpleNamespace, CaptureHiddenMode=types.SimpleNamespace(NULL=0, FULL=2),
        SpeculativeAlgorithm=types.SimpleNamespace(DFLASH="DFLASH"), is_dflash_sampling_verify_available=lambda: False,
        compute_position=lambda backend, prefix, lens, total: (torch.arange(total), None), Any=Any,
    )  # fmt: skip
    if source.version != "0.5.16":
        space.update(
            enable_num_token_non_padded=lambda: False, SIMULATE_ACC_LEN=0, KVLocPlan=Plan,
            SpecTpSyncSite=types.SimpleNamespace(DFLASH_TARGET=0, DFLASH_ACCEPT_GREEDY=1),
            SpeculativeSamplingMaskCapture=types.SimpleNamespace(from_logits=lambda *args, **kwargs: None),
            async_h2d=lambda values, dtype, device: torch.tensor(values, dtype=dtype),
        )  # fmt: skip
        source.compile(WORKER_MODULE, {"_resolve_dflash_embedding_module": None, "_is_all_greedy": None}, space)
    source.compile("sglang.srt.speculative.dflash_utils", {"apply_dflash_verify_logits_adjustments": None}, space)
    source.compile("sglang.srt.speculative.draft_worker_common", {"make_draft_input_v2": None}, space)
    stock_init = cls.init_cuda_graphs

    def init_cuda_graphs(self: Any) -> None:
        stock_init(self)
        if self._draft_sampler is None:
            raise AssertionError("no sampler")
        for batch in reversed(BATCHES):
            runner = self.draft_model_runner.decode_cuda_graph_runner
            view = runner.view(batch)
            self.draft_model.forward(view.input_ids, view.positions, view, view_embeds(runner, batch))

    cls.init_cuda_graphs = init_cuda_graphs
    return module


@pytest.fixture
def steps(old_source: Source, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes engines of 0.5.16 or another version, stock or ours."""
    for variable in ("SEAMS", "STRICT", "PACK", "SEAMS_FILE"):
        monkeypatch.delenv(f"DFLASH_KERNELS_{variable}", raising=False)
    monkeypatch.setenv("DFLASH_KERNELS_STRICT", "1")
    processor = "sglang.srt.layers.logits_processor"
    monkeypatch.setitem(
        sys.modules, processor, make_module(processor, {"LogitsProcessorOutput": types.SimpleNamespace})
    )

    def capture(run: Any, device: Any, memory: Any) -> Any:
        return types.SimpleNamespace(replay=one_launch("graph", run))

    monkeypatch.setattr("dflash_kernels.integrations.sglang.metadata.capture", capture)

    def make(ours: bool, accuracy: float = 0.8, source: Source = old_source) -> Engine:
        monkeypatch.delitem(sys.modules, INFO_MODULE, raising=False)
        module = step_module(source)
        monkeypatch.setitem(sys.modules, WORKER_MODULE, module)
        return Engine(source, module, ours, accuracy)

    yield make
    GreedyLogits.seam = None


def requests(rng: random.Random, count: int) -> list[Request]:
    return [
        Request(i, [rng.randrange(8, V) for _ in range(rng.randrange(1, 7))], rng.randrange(1, 22))
        for i in range(count)
    ]


def same_context(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-5, atol=2**-5)


def run_with_faults(engine: Engine, queue: list[Request], rng: random.Random) -> tuple[Counter[str], list[Any]]:
    """All requests of the queue; what happened, and after every step the requests with their lengths and contexts."""
    seen: Counter[str] = Counter()
    trail: list[Any] = []
    finished = []
    while queue or engine.running:
        while queue and len(engine.running) < max(BATCHES) and rng.random() < 0.7:
            if len(engine.slots.free) < WIDTH // 2:
                break
            engine.admit(queue.pop(0))
        for request in list(engine.running):
            if request.done:
                finished.append(request)
                engine.drop(request)
            elif rng.random() < 0.06:
                seen["aborts"] += 1
                engine.drop(request)
            elif rng.random() < 0.06:
                seen["retractions"] += 1
                engine.drop(request)
                queue.append(request)
        # A step reserves up to two blocks beyond what is committed: the youngest goes where the pool is too full.
        while engine.running and len(engine.running) * 2 * T > len(engine.slots.free):
            seen["full pool"] += 1
            youngest = engine.running[-1]
            engine.drop(youngest)
            queue.insert(0, youngest)
        if engine.running:
            seen["inside a block"] += engine.step()
            trail.append([(r.number, r.kv_committed_len, engine.context(r)) for r in engine.running])
    assert sorted(engine.slots.free) == list(range(1, SLOTS))  # no slot is lost or given twice
    for request in finished:
        assert request.out == engine.target.text(request.prompt, request.count)
    seen["finished"] = len(finished)
    return seen, trail


ONLY_OLD = {"logits", "inputs", "metadata"}


@pytest.mark.parametrize("pack", ["0", "1"], ids=["chain", "packed"])
def test_random_arrivals_ends_aborts_and_retractions(
    steps: Any, source: Source, monkeypatch: pytest.MonkeyPatch, pack: str
) -> None:
    """Both engines see the same requests and faults: every text is the target's, and the drafter's contexts agree."""
    monkeypatch.setenv("DFLASH_KERNELS_PACK", pack)
    wanted = [seam.name for seam in plugin.SEAMS if source.version == "0.5.16" or seam.name not in ONLY_OLD]
    monkeypatch.setenv("DFLASH_KERNELS_SEAMS", ",".join(wanted))
    results = []
    for ours in (True, False):
        engine = steps(ours=ours, source=source)
        if ours:
            assert {n for n, s in table(engine.worker).items() if s.startswith("active")} == set(wanted)
        results.append(run_with_faults(engine, requests(random.Random(11), 28), random.Random(12)))
    (seen, mine), (others_seen, others) = results
    assert seen == others_seen
    assert seen["finished"] > 18
    assert min(seen[what] for what in ("aborts", "retractions", "full pool", "inside a block")) > 0, seen
    assert len(mine) == len(others) > 30
    for a, b in zip(mine, others, strict=True):
        assert [x[:2] for x in a] == [x[:2] for x in b]
        for (*_, context), (*_, other) in zip(a, b, strict=True):
            same_context(context, other)


def test_metadata_follows_a_backend_that_captured_again(steps: Any) -> None:
    engine = steps(ours=True)
    request = Request(0, [8, 9], 20)
    engine.admit(request)
    backend = engine.worker.model_runner.decode_cuda_graph_runner.attn_backend
    fills = []
    for turn in range(8):
        if turn == 4:
            backend.bind(engine.table)  # other tensors; the stand-in checks what a replay finds in them
        backend.fills = 0
        engine.step()
        fills.append(backend.fills)
    graphs = engine.worker._dflash_seams["metadata"].graphs
    assert len(graphs) == 1 and request.out == engine.target.text(request.prompt, request.count)[: len(request.out)]
    # A page table a step, whoever launches it; where the graph is made, its own run and its first replay, too.
    assert fills == [1, 2, 1, 1, 1, 2, 1, 1]


def test_metadata_that_a_graph_gets_wrong_stays_stock(steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_KERNELS_STRICT", "0")
    nothing = types.SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr("dflash_kernels.integrations.sglang.metadata.capture", lambda run, device, memory: nothing)
    engine = steps(ours=True)
    request = Request(0, [8, 9], 20)
    engine.admit(request)
    while not request.done:
        engine.step()
    assert table(engine.worker)["metadata"] == "stock failed: captured attention metadata differs"
    assert request.out == engine.target.text(request.prompt, request.count)


@pytest.mark.parametrize("seam", [seam.name for seam in plugin.SEAMS])
def test_each_seam_alone(steps: Any, monkeypatch: pytest.MonkeyPatch, seam: str) -> None:
    """No seam needs another one; the contexts are stock's."""
    monkeypatch.setenv("DFLASH_KERNELS_SEAMS", seam)
    contexts = []
    for ours in (True, False):
        engine = steps(ours=ours)
        for request in requests(random.Random(2), 3):
            engine.admit(request)
        for _ in range(4):
            for request in [r for r in engine.running if r.done]:
                engine.drop(request)
            if engine.running:
                engine.step()
        if ours:
            assert {n for n, s in table(engine.worker).items() if s.startswith("active")} == {seam}
        for request in engine.running:
            assert request.out == engine.target.text(request.prompt, request.count)[: len(request.out)]
        contexts.append([tensor for request in engine.running for tensor in engine.context(request)])
    assert contexts[0]
    same_context(*contexts)


class Sampling:
    """SamplingBatchInfo of greedy requests that all have the same adjustments."""

    is_all_greedy, has_custom_logit_processor, penalizer_orchestrator, vocab_mask = True, False, None, None
    acc_linear_penalties: torch.Tensor | None = None

    def __init__(self, engine: Engine, bias: torch.Tensor | None) -> None:
        self.engine, self.bias = engine, bias

    def __len__(self) -> int:
        return len(self.engine.running)

    @property
    def logit_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.expand(len(self), V)


def test_adjusted_logits_are_float32_and_stocks(steps: Any) -> None:
    """A logit bias: the step gets the float32 copy and chooses what stock chooses; without one it is bfloat16."""
    texts, kinds = [], []
    bias = torch.zeros(V)
    bias[9] = 40.0
    for ours in (True, False):
        engine = steps(ours=ours)
        stock = engine.worker._target_worker.forward_batch_generation

        def watch(*args: Any, stock: Any = stock, **kwargs: Any) -> Any:
            result = stock(*args, **kwargs)
            if kwargs.get("is_verify"):
                kinds.append(
                    (
                        type(result.logits_output.next_token_logits).__name__,
                        result.logits_output.next_token_logits.dtype,
                    )
                )
            return result

        engine.worker._target_worker.forward_batch_generation = watch
        engine.admit(Request(0, [8, 9], 12))
        for given in (None, bias, None):
            engine.sampling = Sampling(engine, given)
            engine.step()
        texts.append(engine.running[0].out)
    assert texts[0] == texts[1] and 9 in texts[0]
    assert kinds[:3] == [("GreedyLogits", torch.bfloat16), ("Tensor", torch.float32), ("GreedyLogits", torch.bfloat16)]
    assert set(kinds[3:]) == {("Tensor", torch.float32)}


def test_seams_are_switched_in_a_running_engine(steps: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each seam that no graph holds on its own, and none, one after the other within texts."""
    switch = tmp_path / "seams"
    monkeypatch.setenv("DFLASH_KERNELS_SEAMS_FILE", str(switch))
    engine = steps(ours=True)
    names = [seam.name for seam in plugin.SEAMS if seam.switchable]
    assert "metadata" in names
    queue = requests(random.Random(4), 14)
    for i, request in enumerate(queue):
        engine.admit(request)
        while not request.done:
            switch.write_text(["", *names][i % (len(names) + 1)])
            os.utime(switch, ns=(1, engine.steps + 1))
            engine.step()
        active = {name for name, state in table(engine.worker).items() if state.startswith("active")}
        if len(request.out) > 1:
            assert active == {*switch.read_text().split(), "inputs", "head", "forward"}
        assert request.out == engine.target.text(request.prompt, request.count)
        engine.drop(request)


def test_launches_of_a_step(steps: Any) -> None:
    """What the host launches one by one in forward_batch_generation: a third of stock's is left."""
    counts = {}
    for ours in (True, False):
        engine = steps(ours=ours)
        for number in range(4):
            engine.admit(Request(number, [8 + number], 20))
        engine.step()  # the second step of a batch size captures the metadata
        engine.step()
        engine.launches = Launches()
        engine.step()
        counts[ours] = Counter(engine.launches.names)
    mine, others = counts[True], counts[False]
    # Injection is nine launches of stock's on a GPU, and one here whatever it does on the CPU.
    assert others["graph"] == 2 and mine["graph"] == 3 and others["inject"] == 1
    assert mine["dflash.inject_kv.default"] == 1
    assert others.total() + 8 == 33, others
    assert mine.total() == 11, mine

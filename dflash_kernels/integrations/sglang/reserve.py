"""Seam `reserve`: the host's reservation of the next block's KV slots, with lists instead of one tensor item at a time.

Replaces ``dflash_info_v2.py`` DFlashDraftInputV2.prepare_for_decode, which runs on the host before every step: per
request it stores three lengths into tensors and reads one back (``mem_cache/allocation.py`` alloc_for_spec_decode), and
that loop grows with the batch. Who gets which slots is decided where it was (alloc_for_spec_decode), from the same
lengths.

What the method does besides has no signature to go by, so it is recognised by the names that its code reads and calls;
any other set of names is a change that this module does not know.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

import torch

from dflash_kernels.integrations.sglang.seam import Declined, Seam, Target, find, require

INFO_MODULE = "sglang.srt.speculative.dflash_info_v2"
INFO_CLASS = "DFlashDraftInputV2"

_COMMON = frozenset(
    "_get_overlap_plan_stream device batch_size _ensure_prepare_length_buffers _prepare_batch_seq_lens_cpu_buf "
    "_prepare_cur_kv_lens_cpu_buf _prepare_nxt_kv_lens_cpu_buf _prepare_cur_kv_lens_gpu_buf "
    "_prepare_nxt_kv_lens_gpu_buf int speculative_num_draft_tokens ValueError token_to_kv_pool_allocator page_size "
    "enumerate reqs kv_committed_len kv sampling_params top_k max max_top_k uniform_top_k_value torch "
    "get_device_module current_stream wait_stream copy_ alloc_for_spec_decode tree_cache req_to_token_pool "
    "req_pool_indices seq_lens_cpu seq_lens_sum".split()
)


@dataclass(frozen=True)
class Variant:
    """One way in which prepare_for_decode is written."""

    names: frozenset[str]
    whole_pages: bool  # reserves whole pages, finds committed lengths in ``req.kv``, evicts windows, counts steps
    result: str  # attribute that takes the reserved lengths, with ``_cpu`` and ``_sum``


VARIANTS = (
    Variant(
        _COMMON | {"get_server_args", "kv_allocated_len", "reserved_seq_lens_cpu", "reserved_seq_lens_sum"},
        False,
        "reserved_seq_lens",
    ),
    Variant(
        _COMMON
        | {
            "get_spec",
            "maybe_evict_swa",
            "page_aligned_decode_alloc_lens",
            "zip",
            "decode_batch_idx",
            "nxt_kv_lens_cpu",
            "nxt_kv_lens_sum",
        },
        True,
        "nxt_kv_lens",
    ),
)


class ReserveSeam(Seam):
    name = "reserve"
    targets = (
        Target(INFO_MODULE, f"{INFO_CLASS}.prepare_for_decode", ("batch",)),
        Target(
            INFO_MODULE,
            "alloc_for_spec_decode",
            (
                "tree_cache",
                "req_to_token_pool",
                "reqs",
                "req_pool_indices",
                "cur_kv_lens",
                "cur_kv_lens_cpu",
                "nxt_kv_lens",
                "nxt_kv_lens_cpu",
                "num_needed_tokens",
                "batch",
            ),
        ),
    )

    def install(self, worker_module: ModuleType) -> None:
        cls = find(worker_module, INFO_CLASS)
        self.module = sys.modules[cls.__module__]
        for target in self.targets:
            target.check_function(find(self.module, target.qualname))
        current = cls.prepare_for_decode
        stock: Callable[..., None] = getattr(current, "_dflash_stock", current)
        require(inspect.isfunction(stock), f"{INFO_CLASS}.prepare_for_decode was already replaced")
        self.variant = _variant(stock)
        alloc = find(self.module, "alloc_for_spec_decode")
        # The older one reads the lengths one by one, for which a list is better.
        self.takes_lists = not self.variant.whole_pages and "tolist" not in inspect.unwrap(alloc).__code__.co_names

        @wraps(stock)
        def prepare_for_decode(draft_input: Any, batch: Any) -> None:
            if not self.active or batch.batch_size() == 0:
                return stock(draft_input, batch)
            return self.run(draft_input, batch)

        prepare_for_decode._dflash_stock = stock  # type: ignore[attr-defined]
        cls.prepare_for_decode = prepare_for_decode

    def bind(self, worker: Any) -> None:
        self.block_size = int(worker.block_size)

    def run(self, draft_input: Any, batch: Any) -> None:
        """Reserve slots up to two blocks beyond the committed tokens of every request."""
        module, variant = self.module, self.variant
        stream, stream_context = module._get_overlap_plan_stream(batch.device)
        if variant.whole_pages:
            batch.maybe_evict_swa()
        reqs = batch.reqs
        page_size = batch.token_to_kv_pool_allocator.page_size
        reserve = 2 * self.block_size
        if variant.whole_pages:
            committed = [int(req.kv.kv_committed_len) for req in reqs]
            current, reserved, needed = module.page_aligned_decode_alloc_lens(
                reqs, reserve=reserve, page_size=page_size
            )
        else:
            committed = [int(req.kv_committed_len) for req in reqs]
            current = [int(req.kv.kv_allocated_len) for req in reqs]
            reserved = [max(now, length + reserve) for now, length in zip(current, committed, strict=True)]
            needed = sum(reserved) - sum(current)
        top_ks = [int(req.sampling_params.top_k) for req in reqs]
        draft_input.max_top_k = max(1, max(top_ks))
        draft_input.uniform_top_k_value = top_ks[0] if min(top_ks) == max(top_ks) else None

        pinned = bool(module.is_pin_memory_available(batch.device))
        lengths_cpu = torch.tensor([current, reserved], dtype=torch.int32)
        lengths_cpu = lengths_cpu.pin_memory() if pinned else lengths_cpu
        caller = torch.get_device_module(batch.device).current_stream() if stream is not None else None
        with stream_context:
            if stream is not None:
                # The batch's tensors may just have been rebuilt on the caller's stream.
                stream.wait_stream(caller)
            lengths = lengths_cpu.to(batch.device, non_blocking=True)
            module.alloc_for_spec_decode(
                batch.tree_cache,
                batch.req_to_token_pool,
                reqs=reqs,
                req_pool_indices=batch.req_pool_indices,
                cur_kv_lens=lengths[0],
                cur_kv_lens_cpu=lengths_cpu[0],
                nxt_kv_lens=lengths[1],
                nxt_kv_lens_cpu=reserved if self.takes_lists and page_size == 1 else lengths_cpu[1],
                num_needed_tokens=needed,
                batch=batch,
            )
        if caller is not None:
            caller.wait_stream(stream)
        if variant.whole_pages:
            for req in reqs:
                req.decode_batch_idx += 1
        batch.seq_lens_cpu = torch.tensor(committed, dtype=torch.int64)
        batch.seq_lens_sum = sum(committed)
        setattr(draft_input, f"{variant.result}_cpu", lengths_cpu[1])
        setattr(draft_input, f"{variant.result}_sum", sum(reserved))


def _variant(stock: Callable[..., None]) -> Variant:
    names = frozenset(stock.__code__.co_names)
    for variant in VARIANTS:
        if names == variant.names:
            return variant
    nearest = min(VARIANTS, key=lambda v: len(names ^ v.names))
    changed = ", ".join(sorted(names ^ nearest.names))
    raise Declined(f"prepare_for_decode is written in another way: {changed}")

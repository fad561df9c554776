"""The SGLang plugin on the CPU: SGLang's own plugin loader, hook registry and worker methods, this package's CPU ops.

The engine itself needs a GPU stack to import. So the methods and classes that a seam replaces are compiled alone from
the wheels' source, both as the base class of the plugin's worker and as the reference that its results are compared
with.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sglang_source import Source, bare_package, make_module, unavailable

from dflash_kernels import ops
from dflash_kernels.formats import WeightFormat
from dflash_kernels.integrations.sglang import activate, plugin
from dflash_kernels.integrations.sglang.head import DraftSampler
from dflash_kernels.integrations.sglang.reserve import INFO_MODULE
from dflash_kernels.integrations.sglang.seam import WORKER_MODULE, Declined, Refused, may_pack
from dflash_kernels.integrations.sglang.settings import read_settings
from dflash_kernels.model.quantize import quantize

ACCEPT, PREPARE = "_compute_dflash_accept_bonus_triton_unchecked", "_prepare_dflash_draft_block_unchecked"
APPEND = "_append_target_hidden_to_draft_kv_by_loc"
H, HQ, HKV, D, MLP, L, K, T, V, SLOTS = 64, 4, 2, 64, 96, 2, 3, 4, 50, 60


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DFLASH_KERNELS_SEAMS", raising=False)
    monkeypatch.delenv("DFLASH_KERNELS_STRICT", raising=False)
    monkeypatch.delenv("DFLASH_KERNELS_PACK", raising=False)
    monkeypatch.delenv("DFLASH_KERNELS_WEIGHTS", raising=False)
    monkeypatch.delenv("DFLASH_KERNELS_PEERS", raising=False)


# -- a drafter of torch modules whose methods are SGLang's -------------------------------------------------------------


class RMSNorm(torch.nn.Module):
    """SGLang's forward_native in its default settings: float32 inside, one rounding."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(1 + 0.1 * torch.randn(size))
        self.variance_epsilon = eps
        self.cast_x_before_out_mul, self.variance_size_override = False, None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        x = x if residual is None else x + residual
        y = F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.variance_epsilon).to(x.dtype)
        return y if residual is None else (y, x)


class Rotary:
    """SGLang's RotaryEmbedding on contiguous halves: `cos_sin_cache` float32 [P, D]."""

    is_neox_style, rotary_dim = True, D

    def __init__(self) -> None:
        angles = torch.arange(64)[:, None] * (10000.0 ** (-torch.arange(0, D, 2) / D))
        self.cos_sin_cache = torch.cat([angles.cos(), angles.sin()], dim=-1)

    def __call__(self, positions: torch.Tensor, *heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cos, sin = self.cos_sin_cache[positions][:, None].chunk(2, dim=-1)
        halves = [x.reshape(len(positions), -1, D).float().chunk(2, dim=-1) for x in heads]
        turned = [torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1) for a, b in halves]
        return tuple(y.to(x.dtype).view(x.shape) for x, y in zip(heads, turned, strict=True))


class Attention:
    """SGLang's RadixAttention over a pool: writes the block's K and V, then attends to prefix and block."""

    k_scale = v_scale = None
    logit_cap = 0.0

    def __init__(self, layer_id: int, causal: bool, left: int) -> None:
        self.layer_id, self.causal, self.left = layer_id, causal, left

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Any) -> torch.Tensor:
        keys, values = batch.pool.k_buffer[self.layer_id], batch.pool.v_buffer[self.layer_id]
        keys[batch.out_cache_loc], values[batch.out_cache_loc] = (x.view(len(x), -1, D) for x in (k, v))
        out = torch.empty_like(q)
        for b, (row, prefix) in enumerate(zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True)):
            slots = batch.req_to_token[row, : prefix + T].long()
            at, of = prefix + torch.arange(T)[:, None], torch.arange(prefix + T)[None]
            mask = (of <= at) if self.causal else torch.ones(T, prefix + T, dtype=torch.bool)
            mask = mask & (at - of <= self.left) if self.left >= 0 else mask
            rows = slice(b * T, b * T + T)
            heads = [x.transpose(0, 1)[None] for x in (q[rows].view(T, -1, D), keys[slots], values[slots])]
            found = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
            out[rows] = found[0].transpose(0, 1).reshape(T, -1)
        return out


class SiluAndMul(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(x.dtype)


class VocabParallelEmbedding(torch.nn.Embedding):
    pass


class Linear(torch.nn.Linear):
    """Returns its output and a bias not added, as SGLang's linear layers do."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


def apply_qk_norm(q: torch.Tensor, k: torch.Tensor, q_norm: Any, k_norm: Any, head_dim: int, **_: Any) -> Any:
    return q_norm(q.reshape(-1, head_dim)).view_as(q), k_norm(k.reshape(-1, head_dim)).view_as(k)


class UnquantizedLinearMethod:
    pass


def linear(inputs: int, outputs: int) -> torch.nn.Linear:
    layer = Linear(inputs, outputs, bias=False)
    layer.quant_method = UnquantizedLinearMethod()
    return layer


def build_drafter(source: Source, dtype: torch.dtype, causal: bool = False, left: int = -1) -> torch.nn.Module:
    members = {
        "DFlashAttention": ("forward", "kv_proj_only", "apply_k_norm", "apply_k_rope", "apply_attention_output"),
        "DFlashMLP": ("forward",),
        "DFlashDecoderLayer": ("forward",),
        "DFlashDraftModel": ("forward", "project_target_hidden", "prepare_context_hidden_for_kv"),
    }
    space: dict[str, Any] = {"nn": torch.nn, "torch": torch, "F": F, "_is_npu": False, "apply_qk_norm": apply_qk_norm}
    space["can_dflash_slice_qkv_weight"] = lambda qkv_proj: (True, "")
    space["LogitsProcessorOutput"] = types.SimpleNamespace
    source.compile("sglang.srt.models.dflash", members, space)
    rotary = Rotary()
    model = space["DFlashDraftModel"]()
    model.config = types.SimpleNamespace(hidden_size=H)
    model.num_context_features, model.quantizable = K, False
    model.prefix_gru = model.embed_proj = model.embed_tokens = None
    model.fc, model.hidden_norm, model.norm = torch.nn.Linear(K * H, H, bias=False), RMSNorm(H), RMSNorm(H)
    model.layers = torch.nn.ModuleList()
    for i in range(L):
        attention = space["DFlashAttention"]()
        attention.q_size, attention.kv_size, attention.num_kv_heads, attention.head_dim = HQ * D, HKV * D, HKV, D
        attention.num_heads = attention.total_num_heads = HQ
        attention.scaling, attention.sliding_window_size = D**-0.5, left
        attention.attn_type = types.SimpleNamespace(name="DECODER" if causal else "ENCODER_ONLY")
        attention.qkv_proj, attention.o_proj = linear(H, (HQ + 2 * HKV) * D), linear(HQ * D, H)
        attention.q_norm, attention.k_norm = RMSNorm(D), RMSNorm(D)
        attention.rotary_emb, attention.v_scale, attention.attention_sink_bias = rotary, None, None
        attention.use_table_qk_norm_rope = attention.use_gemma_norm = False
        attention.attn = Attention(i, causal, left)
        layer, mlp = space["DFlashDecoderLayer"](), space["DFlashMLP"]()
        mlp.gate_up_proj, mlp.down_proj, mlp.act_fn = linear(H, 2 * MLP), linear(MLP, H), SiluAndMul()
        layer.self_attn, layer.mlp = attention, mlp
        layer.attention_conv = layer.mlp_conv = None
        layer.input_layernorm, layer.post_attention_layernorm = RMSNorm(H), RMSNorm(H)
        model.layers.append(layer)
    return model.to(dtype).requires_grad_(False)


def build_pool(source: Source, dtype: torch.dtype, kv_heads: int = HKV) -> Any:
    """SGLang's prefix-valid write on its branch for devices without Triton; `set_kv_buffer` is an indexed store."""
    space: dict[str, Any] = {"torch": torch, "KVCache": object, "_is_cuda": False, "_is_hip": False}
    members = {"MHATokenToKVPool": ("set_kv_buffer_prefix_valid",)}
    cls = source.compile("sglang.srt.mem_cache.memory_pool", members, space)["MHATokenToKVPool"]

    def set_kv_buffer(self: Any, layer: Any, loc: Any, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> None:
        slots = getattr(loc, "loc", loc)  # the newer version wraps them (KVWriteLoc)
        self.k_buffer[layer.layer_id][slots] = k
        self.v_buffer[layer.layer_id][slots] = v

    cls.set_kv_buffer = set_kv_buffer
    pool = cls()
    pool.dtype = pool.store_dtype = dtype
    pool.start_layer, pool.kv_cache_layout, pool.use_hnd, pool.is_quantized_kv_cache = 0, "nhd", False, False
    pool.k_buffer = [torch.full((SLOTS, kv_heads, D), -7.0, dtype=dtype) for _ in range(L)]
    pool.v_buffer = [torch.full((SLOTS, kv_heads, D), -7.0, dtype=dtype) for _ in range(L)]
    return pool


# -- SGLang's worker module, as far as the seams touch it --------------------------------------------------------------


class Nothing:
    """A context manager, an environment variable, a parallel state: what the methods ask for on one rank."""

    tp_rank, world_size, attn_dp_enabled = 0, 1, False

    def __enter__(self) -> None: ...

    def __exit__(self, *args: Any) -> None: ...

    def get(self) -> bool:
        return False


def reference_accept(source: Source) -> Callable[..., None]:
    """Under the Triton function's signature, the eager path that SGLang falls back to."""
    name = "compute_dflash_correct_drafts_and_bonus"
    space = source.compile(WORKER_MODULE, {name: None}, {"torch": torch, "Tuple": tuple})

    def _compute_dflash_accept_bonus_triton_unchecked(
        candidates: torch.Tensor,
        target_top1: torch.Tensor,
        accept_lens_out: torch.Tensor,
        commit_lens_out: torch.Tensor,
        bonus_ids_out: torch.Tensor,
        out_tokens_out: torch.Tensor,
        prefix_lens: torch.Tensor,
        new_seq_lens_out: torch.Tensor,
    ) -> None:
        accept, bonus = space[name](candidates=candidates, target_predict=target_top1)
        accept_lens_out.copy_(accept)
        commit_lens_out.copy_(accept + 1)
        bonus_ids_out.copy_(bonus)
        out_tokens_out[:, :-1].copy_(candidates[:, 1:])
        out_tokens_out[:, -1].fill_(0)
        out_tokens_out.scatter_(1, accept.to(torch.int64)[:, None], bonus[:, None])
        new_seq_lens_out.copy_(prefix_lens + commit_lens_out)

    return _compute_dflash_accept_bonus_triton_unchecked


def _prepare_dflash_draft_block_unchecked(
    bonus_tokens: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    block_ids_out: torch.Tensor,
    positions_out: torch.Tensor,
    cache_loc_out: torch.Tensor,
    mask_token_id: int,
) -> None:
    """The worker's eager path in forward_batch_generation; slots beyond the table are 0, as in the Triton kernel."""
    block_ids_out.fill_(mask_token_id)
    block_ids_out[:, 0].copy_(bonus_tokens)
    positions_out.copy_(prefix_lens.unsqueeze(1) + torch.arange(block_ids_out.shape[1]))
    width = req_to_token.shape[1]
    slots = req_to_token[req_pool_indices[:, None], positions_out.clamp(max=width - 1)].to(torch.int64)
    cache_loc_out.copy_(torch.where(positions_out < width, slots, 0))


def info_module(source: Source) -> types.ModuleType:
    """`dflash_info_v2` and the allocation under it, with the pool's allocator and the table's kernel in torch."""

    def assign(rows: torch.Tensor, table: torch.Tensor, start: Any, end: Any, slots: torch.Tensor, batch: int) -> None:
        used = 0
        for row, a, b in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
            table[row, a:b] = slots[used : used + b - a]
            used += b - a
        assert used == len(slots) and len(rows) == batch

    def take(tree_cache: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        count = args[-1]
        if hasattr(tree_cache, "take"):
            return tree_cache.take(count)
        start = tree_cache.taken
        tree_cache.taken += count
        return torch.arange(start, start + count, dtype=torch.int32)

    class SpecInput:
        def __init__(self, spec_input_type: Any) -> None: ...

    where = "sglang.srt.mem_cache.allocation"
    space = {"torch": torch, "alloc_token_slots": take, "assign_req_to_token_pool_func": assign}
    space |= {"get_last_loc": lambda *args: None, "_device_type": lambda batch: "cuda"}
    space["ALLOC_EXTEND_FUNCS"] = {"cuda": take, "cpu": take}
    source.compile(where, {"alloc_for_spec_decode": None}, space)
    sizing = "sglang.srt.mem_cache.allocation_sizing"
    if source.version != "0.5.16":
        source.compile(sizing, {"page_aligned_decode_alloc_lens": None}, space)
    arguments = types.SimpleNamespace(speculative_num_draft_tokens=T)
    module = make_module(
        INFO_MODULE,
        {
            **space,
            "dataclass": dataclass,
            "SpecInput": SpecInput,
            "SpecInputType": types.SimpleNamespace(DFLASH_DRAFT=0),
            "is_pin_memory_available": lambda device: False,
            "_get_overlap_plan_stream": lambda device: (None, contextlib.nullcontext()),
            "get_server_args": lambda: arguments,
            "get_spec": lambda: arguments,
        },
    )
    sys.modules[INFO_MODULE] = module  # where dataclass looks up annotations
    source.compile(INFO_MODULE, {"DFlashDraftInputV2": None}, module.__dict__)
    module.DFlashDraftInputV2.__module__ = INFO_MODULE
    return module


def worker_module(source: Source, more: tuple[str, ...] = ()) -> types.ModuleType:
    """`dflash_worker_v2` with the real methods that seams replace or are called from, and nothing else but ``more``."""
    members = (
        APPEND,
        "_append_target_hidden_sequential",
        "_maybe_build_draft_sampler",
        "_next_accept_bonus_buffers",
        "_ensure_accept_bonus_buffers",
        "forward_batch_generation",
        "_accept_block",
        "_ensure_draft_block_buffers",
        *more,
    )
    module = make_module(
        WORKER_MODULE,
        {
            "torch": torch,
            "logger": logging.getLogger("sglang-under-test"),
            "BaseSpecWorker": object,
            "_is_npu": False,
            "envs": types.SimpleNamespace(SGLANG_DFLASH_EAGER_DRAFT_SAMPLER=Nothing()),
            "get_tp_group": Nothing,
            "get_parallel": lambda: types.SimpleNamespace(tp_group=Nothing(), tp_rank=0, attn_dp_enabled=False),
            "get_exec": lambda: types.SimpleNamespace(graph=types.SimpleNamespace(cuda_graph_config=GRAPHS)),
            "unwrap_lora_layer": lambda layer: layer,
            "is_dense_head_weight": torch.is_floating_point,
            "should_apply_lm_head_quant_method": lambda head, method: False,
            "draft_tp_context": lambda layout: Nothing(),
            "publish_anchor": unavailable("LiLiCorr"),
            "DFlashDraftInputV2": info_module(source).DFlashDraftInputV2,
            "KVWriteLoc": lambda loc, **kwargs: types.SimpleNamespace(loc=loc, **kwargs),
            ACCEPT: reference_accept(source),
            PREPARE: _prepare_dflash_draft_block_unchecked,
        },
    )
    names = {"_DflashDraftSampler": None, "DFlashWorkerV2": members}
    source.compile(WORKER_MODULE, names, module.__dict__)
    cls = module.DFlashWorkerV2

    def __init__(self: Any, parts: dict[str, Any]) -> None:
        self.__dict__.update(parts)

    def init_cuda_graphs(self: Any) -> None:
        self._draft_sampler = self._maybe_build_draft_sampler()

    cls.__init__, cls.init_cuda_graphs, cls.__module__ = __init__, init_cuda_graphs, WORKER_MODULE
    return module


GRAPHS = types.SimpleNamespace(decode=types.SimpleNamespace(bs=[1, 2, 4]))


def parts(source: Source, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the worker's constructor would have set."""
    head = types.SimpleNamespace(
        weight=torch.randn(V + 6, H).to(dtype),
        shard_indices=types.SimpleNamespace(num_added_elements=0, num_org_elements=V, org_vocab_start_index=0),
    )
    embed = VocabParallelEmbedding(V, H).to(dtype)
    model = torch.nn.Module()
    model.lm_head, model.get_input_embeddings = head, lambda: embed
    target = types.SimpleNamespace(model=model)
    target.model_config = types.SimpleNamespace(context_len=40)
    target.device, target.tp_rank = torch.device("cpu"), 0
    target.req_to_token_pool = types.SimpleNamespace(req_to_token=torch.zeros(6, 40, dtype=torch.int32))
    return {
        "device": "cpu",
        "block_size": T,
        "draft_model": build_drafter(source, dtype),
        "draft_model_runner": types.SimpleNamespace(
            token_to_kv_pool=build_pool(source, dtype), req_to_token_pool=target.req_to_token_pool
        ),
        "model_runner": target,
        "_target_worker": types.SimpleNamespace(model_runner=target),
        "server_args": types.SimpleNamespace(cuda_graph_config=GRAPHS),
        "ps": Nothing(),
        "selector": None,
        "lilicorr": None,
        "_is_domino": False,
        "_target_tp_rank": 0,
        "draft_parallel_layout": None,
        "_use_fused_kv_materialize": False,
        "_fused_kv_helper": None,
        "_accept_bonus_buffer_cap": 0,
        "_accept_bonus_buffer_slot": 0,
    }


class Algorithm:
    """Stands for SpeculativeAlgorithm where the hook is called directly."""

    def __init__(self, dflash: bool = True) -> None:
        self.is_dflash = lambda: dflash


@pytest.fixture
def engine(source: Source, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.delitem(sys.modules, INFO_MODULE, raising=False)
    module = worker_module(source)
    monkeypatch.setitem(sys.modules, WORKER_MODULE, module)
    return module


def make_worker(engine: types.ModuleType, given: dict[str, Any]) -> Any:
    cls = plugin.create_worker(lambda algorithm, args: engine.DFlashWorkerV2, Algorithm(), None)
    worker = cls(given)
    worker.init_cuda_graphs()
    return worker


def table(worker: Any) -> dict[str, str]:
    rows = worker._dflash_seams.table().splitlines()[1:]
    return {row.split()[0]: " ".join(row.split()[1:]) for row in rows}


# -- settings, loader and hook -----------------------------------------------------------------------------------------


def test_settings() -> None:
    known = ("a", "b", "c")
    assert read_settings(known, {}).seams == known
    assert not read_settings(known, {}).strict
    assert read_settings(known, {"DFLASH_KERNELS_SEAMS": "none"}).seams == ()
    chosen = read_settings(known, {"DFLASH_KERNELS_SEAMS": "c, a", "DFLASH_KERNELS_STRICT": "1"})
    assert chosen.seams == ("a", "c") and chosen.strict
    with pytest.raises(ValueError, match="DFLASH_KERNELS_SEAMS must be all, none or a list of a, b, c, got x"):
        read_settings(known, {"DFLASH_KERNELS_SEAMS": "a,x"})
    with pytest.raises(ValueError, match="DFLASH_KERNELS_STRICT must be 0 or 1, got yes"):
        read_settings(known, {"DFLASH_KERNELS_STRICT": "yes"})
    assert read_settings(known, {}).pack == "auto" and read_settings(known, {"DFLASH_KERNELS_PACK": "0"}).pack == "0"
    assert read_settings(known, {"DFLASH_KERNELS_WEIGHTS": "bf16"}).weights is None
    assert read_settings(known, {"DFLASH_KERNELS_WEIGHTS": "int4-g128"}).weights == WeightFormat("int4", 128)
    with pytest.raises(ValueError, match="DFLASH_KERNELS_WEIGHTS must be bf16 or a weight format"):
        read_settings(known, {"DFLASH_KERNELS_WEIGHTS": "fp7"})
    names = ("inject", "forward", "head")
    usual, chosen = read_settings(known, {}), read_settings(known, {"DFLASH_KERNELS_ROWS": "forward=128"})
    assert [usual.limit(name) for name in names] == [1024, 32, 64]
    assert [usual.limit(name, fp8_codes=True) for name in names] == [1024, 1024, 1024]
    assert [chosen.limit(name) for name in names] == [1024, 128, 64]
    assert [chosen.limit(name, fp8_codes=True) for name in names] == [1024, 128, 1024]
    for wrong in ("accept=1", "inject", "inject=0", "forward=-3"):
        with pytest.raises(ValueError, match=f"DFLASH_KERNELS_ROWS must be a list .*, got {wrong}"):
            read_settings(known, {"DFLASH_KERNELS_ROWS": wrong})
    assert read_settings(known, {}).peers == "auto" and read_settings(known, {"DFLASH_KERNELS_PEERS": "0"}).peers == "0"
    with pytest.raises(ValueError, match="DFLASH_KERNELS_PEERS must be auto or 0, got 1"):
        read_settings(known, {"DFLASH_KERNELS_PEERS": "1"})
    with pytest.raises(ValueError, match="DFLASH_KERNELS_PACK must be auto, 0, 1, got 2"):
        read_settings(known, {"DFLASH_KERNELS_PACK": "2"})


@pytest.fixture
def plugins(source: Source, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """SGLang's real plugin loader and hook registry."""
    before = {name for name in sys.modules if name.partition(".")[0] == "sglang"}
    monkeypatch.setitem(sys.modules, "sglang", bare_package(source.root))
    import importlib

    module = importlib.import_module("sglang.srt.plugins")
    yield module
    for name in [n for n in sys.modules if n.partition(".")[0] == "sglang" and n not in before]:
        del sys.modules[name]


def spec_info(source: Source) -> types.ModuleType:
    """SGLang's `spec_info`: imported where that needs no more than torch, else its class compiled alone."""
    import importlib

    name = "sglang.srt.speculative.spec_info"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        from enum import Enum, auto

        space = {"Enum": Enum, "auto": auto, "resolving_view": lambda args: args}
        source.compile(
            name, {"SpeculativeAlgorithm": ("DFLASH", "NONE", "is_dflash", "is_none", "create_worker")}, space
        )
        module = make_module(name, space)
        module.SpeculativeAlgorithm.get_platform_worker_cls = lambda self: None
        sys.modules[name] = module
        return module


def test_loader_runs_the_entry_point_and_the_hook(
    source: Source, plugins: types.ModuleType, engine: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """load_plugins -> activate -> the hook on create_worker -> the subclass, once, and other algorithms untouched."""
    point = EntryPoint("dflash_kernels", "dflash_kernels.integrations.sglang:activate", "sglang.srt.plugins")
    monkeypatch.setattr(plugins, "entry_points", lambda group: EntryPoints([point] if group == point.group else []))
    algorithms = spec_info(source).SpeculativeAlgorithm
    plugins.load_plugins()
    plugins.load_plugins()
    from sglang.srt.plugins.hook_registry import HookRegistry  # type: ignore[import-not-found]

    assert HookRegistry._patched == {plugin.HOOK_TARGET}
    first, second = (algorithms.DFLASH.create_worker(None) for _ in range(2))
    assert first is second and issubclass(first, engine.DFlashWorkerV2) and first is not engine.DFlashWorkerV2
    with pytest.raises(AssertionError, match="Cannot create worker for NONE"):
        algorithms.NONE.create_worker(None)
    monkeypatch.setenv("DFLASH_KERNELS_SEAMS", "none")
    assert algorithms.DFLASH.create_worker(None) is engine.DFlashWorkerV2
    monkeypatch.setenv("DFLASH_KERNELS_SEAMS", "nonsense")
    with pytest.raises(ValueError, match="DFLASH_KERNELS_SEAMS"):
        algorithms.DFLASH.create_worker(None)


def test_other_algorithms_keep_their_worker() -> None:
    assert plugin.create_worker(lambda algorithm, args: int, Algorithm(dflash=False), None) is int


def test_another_plugins_worker_is_left_alone(engine: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    other = type("Other", (), {"__module__": "elsewhere"})
    assert plugin.create_worker(lambda algorithm, args: other, Algorithm(), None) is other
    monkeypatch.setenv("DFLASH_KERNELS_STRICT", "1")
    with pytest.raises(Refused, match="elsewhere.Other"):
        plugin.create_worker(lambda algorithm, args: other, Algorithm(), None)


def test_all_seams_are_active_on_a_plain_drafter(engine: types.ModuleType, source: Source) -> None:
    states = table(make_worker(engine, parts(source)))
    # These three need a target with graphs; the whole steps in test_sglang_steps.py have one.
    assert states.pop("logits").startswith("stock 0 logits processors")
    assert states.pop("inputs").startswith("stock a worker without") and states.pop("metadata").startswith(
        "stock no graphs"
    )
    assert set(states.values()) == {"active"}


@pytest.mark.parametrize(
    ("capability", "built", "reason"),
    [((8, 0), True, "compute capability 8.0"), ((9, 0), False, "a library without CUDA kernels")],
)
def test_devices_without_kernels_are_declined(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: bool, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: built)
    seams = plugin.Seams(read_settings([seam.name for seam in plugin.SEAMS], {}))
    seams.prepare(types.SimpleNamespace(device="cuda"))
    assert {seam.reason for seam in seams.all.values()} == {reason}


def test_only_the_seams_asked_for_are_active(
    engine: types.ModuleType, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFLASH_KERNELS_SEAMS", "accept")
    states = table(make_worker(engine, parts(source)))
    assert states.pop("accept") == "active"
    assert set(states.values()) == {"stock not asked for"}


# -- injection ---------------------------------------------------------------------------------------------------------


def injection(batch: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, torch.Tensor]:
    slots = torch.randperm(SLOTS - 1, generator=generator)[: batch * T] + 1
    starts = torch.randint(0, 36, (batch, 1), generator=generator)
    return {
        "target_hidden": torch.randn(batch * T, K * H, generator=generator).to(dtype),
        "cache_loc": slots,
        "cache_loc_2d": slots.view(batch, T),
        "positions": (starts + torch.arange(T)).flatten(),
        "commit_lens": torch.randint(1, T + 1, (batch,), generator=generator, dtype=torch.int32),
    }


FORMS = [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "1")]
FORM_NAMES = ["fp32", "bf16", "bf16 packed"]


@pytest.mark.parametrize(("dtype", "pack"), FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
def test_injection_equals_stock(
    engine: types.ModuleType,
    source: Source,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    pack: str,
    decode: bool,
) -> None:
    monkeypatch.setenv("DFLASH_KERNELS_PACK", pack)
    given = parts(source, dtype)
    worker = make_worker(engine, given)
    assert (worker._dflash_seams["inject"].plan is not None) == (pack == "1")
    calls = injection(3, dtype, rng)
    if not decode:
        del calls["cache_loc_2d"], calls["commit_lens"]
    getattr(worker, APPEND)(**calls)
    assert table(worker)["inject"].startswith("active")
    ours = given["draft_model_runner"].token_to_kv_pool

    stock = engine.DFlashWorkerV2({**given, "draft_model_runner": types.SimpleNamespace()})
    theirs = stock.draft_model_runner.token_to_kv_pool = build_pool(source, dtype)
    getattr(stock, APPEND)(**calls)
    # K is rounded between norm and rotation on SGLang's eager path and not on the fused one: an ulp or two in bf16.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    for a, b in zip((*ours.k_buffer, *ours.v_buffer), (*theirs.k_buffer, *theirs.v_buffer), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        assert torch.equal((a == -7).all(-1).all(-1), (b == -7).all(-1).all(-1))  # the same slots were written


@pytest.mark.parametrize("change", ["long prompt", "dtype", "strided hidden rows"])
def test_injection_leaves_other_calls_to_stock(
    engine: types.ModuleType, source: Source, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    given = parts(source)
    worker = make_worker(engine, given)
    calls = injection(2, torch.float32, rng)
    if change == "long prompt":
        worker._dflash_seams["inject"].max_rows = 2 * T - 1
    elif change == "dtype":
        calls["target_hidden"] = calls["target_hidden"].double()
    else:
        calls["target_hidden"] = calls["target_hidden"].repeat(1, 2)[:, : K * H]
    seen = []
    monkeypatch.setattr(engine.DFlashWorkerV2, APPEND, lambda self, **kwargs: seen.append(kwargs))
    getattr(worker, APPEND)(**calls)
    assert len(seen) == 1 and all(seen[0][name] is value for name, value in calls.items())
    assert table(worker)["inject"] == "active"


def test_injection_keeps_stocks_errors(engine: types.ModuleType, source: Source, rng: torch.Generator) -> None:
    worker = make_worker(engine, parts(source))
    calls = injection(2, torch.float32, rng)
    with pytest.raises(RuntimeError, match="missing target hidden"):
        getattr(worker, APPEND)(**{**calls, "target_hidden": None})
    with pytest.raises(ValueError, match="length mismatch"):
        getattr(worker, APPEND)(**{**calls, "cache_loc": calls["cache_loc"][:-1]})


def test_injection_follows_a_pool_that_was_made_anew(
    engine: types.ModuleType, source: Source, rng: torch.Generator
) -> None:
    given = parts(source)
    worker = make_worker(engine, given)
    pool = given["draft_model_runner"].token_to_kv_pool
    old = pool.k_buffer
    pool.k_buffer = [b.clone() for b in pool.k_buffer]
    pool.v_buffer = [b.clone() for b in pool.v_buffer]
    getattr(worker, APPEND)(**injection(2, torch.float32, rng))
    assert (pool.k_buffer[0] != -7).any() and (old[0] == -7).all()


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(given: dict[str, Any]) -> None:
        *owners, name = path.split(".")
        owner: Any = given
        for part in owners:
            owner = owner[part] if isinstance(owner, dict) else owner[0] if part == "0" else getattr(owner, part)
        if isinstance(owner, dict):
            owner[name] = value
        else:
            setattr(owner, name, value)

    return change


def _rename(path: str, name: str) -> Callable[[dict[str, Any]], None]:
    def change(given: dict[str, Any]) -> None:
        owner: Any = given
        for part in path.split("."):
            owner = owner[part] if isinstance(owner, dict) else owner[0] if part == "0" else getattr(owner, part)
        owner.__class__ = type(name, (type(owner),), {})

    return change


ATTENTION = "draft_model.layers.0.self_attn"
POOL = "draft_model_runner.token_to_kv_pool"
UNSUPPORTED = {
    "Laguna": (_rename("draft_model", "DFlashLagunaForCausalLM"), "drafter class DFlashLagunaForCausalLM"),
    "selector": (_set("draft_model.candidate_selector", torch.nn.Identity()), "DFlash2 candidate selector"),
    "LiLiCorr": (_set("draft_model.lilicorr", torch.nn.Identity()), "LiLiCorr head"),
    "Domino": (_set("_is_domino", True), "Domino projector"),
    "Nemotron": (_set("draft_model.is_nemotron_35_draft", True), "Nemotron drafter"),
    "quantised drafter": (_set("draft_model.quantizable", True), "quantised drafter"),
    "quantised layer": (_set(f"{ATTENTION}.qkv_proj.quant_method", Nothing()), "quantised drafter (Nothing)"),
    "convolution": (_set("draft_model.layers.0.attention_conv", torch.nn.Identity()), "DFlash2 convolution"),
    "gemma norm": (_set(f"{ATTENTION}.use_gemma_norm", True), "gemma norm"),
    "norm": (_rename("draft_model.hidden_norm", "GemmaRMSNorm"), "norm class GemmaRMSNorm"),
    "eps": (_set("draft_model.hidden_norm.variance_epsilon", 1e-5), "norms with different eps"),
    "value scale": (_set(f"{ATTENTION}.v_scale", 2.0), "attention_value_scale"),
    "sink": (_set(f"{ATTENTION}.attention_sink_bias", torch.zeros(HQ)), "attention sink bias"),
    "attention bias": (
        _set(f"{ATTENTION}.qkv_proj.bias", torch.nn.Parameter(torch.zeros((HQ + 2 * HKV) * D))),
        "attention bias",
    ),
    "KV scale": (_set(f"{ATTENTION}.attn.k_scale", 0.5), "KV scale other than 1"),
    "interleaved": (_set(f"{ATTENTION}.rotary_emb.is_neox_style", False), "interleaved rotary pairs"),
    "M-RoPE": (_set(f"{ATTENTION}.rotary_emb.mrope_section", [1, 2]), "M-RoPE"),
    "short table": (_set(f"{ATTENTION}.rotary_emb.cos_sin_cache", torch.zeros(8, D)), "a rotary table of 8 positions"),
    "HND": (_set(f"{POOL}.kv_cache_layout", "hnd"), "KV layout hnd"),
    "FP4 pool": (_rename(POOL, "MHATokenToKVPoolFP4"), "KV pool MHATokenToKVPoolFP4"),
    "page-major pool": (_rename(POOL, "PageMajorMHATokenToKVPool"), "KV pool PageMajorMHATokenToKVPool"),
    "fp8 pool": (_set(f"{POOL}.dtype", torch.float8_e4m3fn), "KV pool in torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("feature", UNSUPPORTED)
def test_unsupported_features_are_declined_by_name(
    engine: types.ModuleType, source: Source, monkeypatch: pytest.MonkeyPatch, feature: str
) -> None:
    change, reason = UNSUPPORTED[feature]
    monkeypatch.setenv("DFLASH_KERNELS_SEAMS", "inject")
    given = parts(source)
    change(given)
    assert table(make_worker(engine, given))["inject"].startswith(f"stock {reason}")
    monkeypatch.setenv("DFLASH_KERNELS_STRICT", "1")
    given = parts(source)
    change(given)
    with pytest.raises(Refused, match="seam inject declined"):
        make_worker(engine, given)


def test_fp16_drafter_is_declined(engine: types.ModuleType, source: Source) -> None:
    assert (
        table(make_worker(engine, parts(source, torch.float16)))["inject"]
        == "stock a drafter in torch.float16, not bfloat16"
    )


def test_failing_replacement_falls_back_once_and_for_all(
    engine: types.ModuleType, source: Source, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock does the call that failed, and all later ones; strict mode stops the engine at the end of the step."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("dflash_kernels.ops.inject_kv", broken)
    given = parts(source)
    worker = make_worker(engine, given)
    getattr(worker, APPEND)(**injection(2, torch.float32, rng))
    assert (given["draft_model_runner"].token_to_kv_pool.k_buffer[0] != -7).any()
    assert table(worker)["inject"] == "stock failed: no such kernel"
    worker._dflash_seams.end_step()

    monkeypatch.setenv("DFLASH_KERNELS_SEAMS", "inject")
    monkeypatch.setenv("DFLASH_KERNELS_STRICT", "1")
    worker = make_worker(engine, parts(source))
    monkeypatch.setattr(
        engine.DFlashWorkerV2,
        "forward_batch_generation",
        lambda self, calls: getattr(self, APPEND)(**calls),
    )
    with pytest.raises(Refused, match="seam inject failed: no such kernel"):
        worker.forward_batch_generation(injection(2, torch.float32, rng))


def test_seams_are_switched_between_steps(
    engine: types.ModuleType, source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file names the seams to use; those in a graph, declined ones and ones not asked for stay as they are."""
    switch = tmp_path / "seams"
    monkeypatch.setenv("DFLASH_KERNELS_SEAMS_FILE", str(switch))
    monkeypatch.setenv("DFLASH_KERNELS_SEAMS", "inject,accept,prepare,head")
    given = parts(source)
    given["draft_model"].quantizable = True
    worker = make_worker(engine, given)
    monkeypatch.setattr(engine.DFlashWorkerV2, "forward_batch_generation", lambda self, batch: None)

    def active() -> set[str]:
        worker.forward_batch_generation(None)
        return {name for name, state in table(worker).items() if state.startswith("active")}

    assert active() == {"accept", "prepare", "head"}  # no file yet
    for names, expected in (
        ("prepare,inject,reserve", {"prepare", "head"}),
        ("accept prepare", {"accept", "prepare", "head"}),
    ):
        switch.write_text(names)
        os.utime(switch, ns=(1, len(names)))
        assert active() == expected
    assert table(worker)["inject"].startswith("stock quantised drafter")
    switch.unlink()
    assert active() == {"accept", "prepare", "head"}


# -- acceptance and block preparation ----------------------------------------------------------------------------------


def acceptance(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    candidates = torch.randint(0, 3, (batch, T), generator=generator)
    return {
        "candidates": candidates,
        "target_top1": torch.randint(0, 3, (batch, T), generator=generator),
        "prefix_lens": torch.randint(1, 99, (batch,), generator=generator),
    }


OUTPUTS = ("accept_lens_out", "commit_lens_out", "bonus_ids_out", "out_tokens_out", "new_seq_lens_out")


def poisoned(worker: Any, batch: int) -> dict[str, torch.Tensor]:
    return {name: b.fill_(-9) for name, b in zip(OUTPUTS, worker._next_accept_bonus_buffers(batch), strict=True)}


def test_acceptance_equals_stock(engine: types.ModuleType, source: Source, rng: torch.Generator) -> None:
    stock = getattr(engine, ACCEPT)
    worker = make_worker(engine, parts(source))
    assert getattr(engine, ACCEPT) is not stock
    for batch in (1, 5, 40):
        calls = acceptance(batch, rng)
        # Worker and reference each have their own double buffers.
        ours, theirs = poisoned(worker, batch), poisoned(make_worker(engine, parts(source)), batch)
        getattr(engine, ACCEPT)(**calls, **ours)
        stock(**calls, **theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in OUTPUTS)
    assert table(worker)["accept"] == "active"


def test_forced_acceptance_is_honoured(engine: types.ModuleType, source: Source, rng: torch.Generator) -> None:
    """A plugin that wraps the worker's function from its own hook, inside or outside of this one."""

    def force(original: Callable[..., Any], algorithm: Any, args: Any) -> Any:
        chosen = original(algorithm, args)
        inner = getattr(engine, ACCEPT)

        def forced(**kwargs: Any) -> None:
            inner(**kwargs)
            kwargs["commit_lens_out"].fill_(2)

        setattr(engine, ACCEPT, forced)
        return chosen

    def stock(algorithm: Any, args: Any) -> Any:
        return engine.DFlashWorkerV2

    def ours(algorithm: Any, args: Any) -> Any:
        return plugin.create_worker(stock, algorithm, args)

    original = getattr(engine, ACCEPT)
    for chosen in (
        lambda: force(ours, Algorithm(), None),
        lambda: plugin.create_worker(lambda a, b: force(stock, a, b), Algorithm(), None),
    ):
        setattr(engine, ACCEPT, original)
        worker = chosen()(parts(source))
        worker.init_cuda_graphs()
        assert table(worker)["accept"] == "active"
        outputs = poisoned(worker, 3)
        getattr(engine, ACCEPT)(**acceptance(3, rng), **outputs)
        assert (outputs["commit_lens_out"] == 2).all() and (outputs["accept_lens_out"] != -9).all()


def test_a_function_that_was_replaced_before_is_left_alone(engine: types.ModuleType, source: Source) -> None:
    def elsewhere(**kwargs: Any) -> None: ...

    setattr(engine, PREPARE, elsewhere)
    worker = make_worker(engine, parts(source))
    assert table(worker)["prepare"].startswith(f"stock {PREPARE} was already replaced by")
    assert getattr(engine, PREPARE) is elsewhere


def test_long_blocks_keep_stocks_acceptance(engine: types.ModuleType, source: Source) -> None:
    given = {**parts(source), "block_size": 33}
    assert table(make_worker(engine, given))["accept"] == "stock block size 33, at most 32"


def test_preparation_equals_stock(engine: types.ModuleType, source: Source, rng: torch.Generator) -> None:
    stock = getattr(engine, PREPARE)
    worker = make_worker(engine, parts(source))
    assert table(worker)["prepare"] == "active"
    batch, rows, width = 5, 8, 40
    inputs = {
        "bonus_tokens": torch.randint(0, V, (batch,), generator=rng),
        "prefix_lens": torch.tensor([1, 36, 38, 40, 7]),
        "req_pool_indices": torch.randperm(rows, generator=rng)[:batch],
        "req_to_token": torch.randint(1, SLOTS, (rows, width), generator=rng, dtype=torch.int32),
        "mask_token_id": 3,
    }
    names = ("block_ids_out", "positions_out", "cache_loc_out")
    ours, theirs = ({n: torch.full((batch, T), -9, dtype=torch.int64) for n in names} for _ in range(2))
    getattr(engine, PREPARE)(**inputs, **ours)
    stock(**inputs, **theirs)
    assert all(torch.equal(ours[n], theirs[n]) for n in names)


# -- draft head --------------------------------------------------------------------------------------------------------


def test_draft_head_equals_stock(engine: types.ModuleType, source: Source, rng: torch.Generator) -> None:
    given = parts(source)
    worker = make_worker(engine, given)
    sampler = worker._draft_sampler
    assert isinstance(sampler, DraftSampler)
    reference = engine.DFlashWorkerV2(given)._maybe_build_draft_sampler()
    for batch in (1, 3, 4):
        hidden = torch.randn(batch * T, H, generator=rng)
        sampler.out.fill_(-9)
        sampler(hidden, None)
        reference(hidden, None)
        live = batch * (T - 1)
        assert torch.equal(sampler.out[:live], reference.out[:live])
        assert (sampler.out[live:] == -9).all()


@pytest.mark.parametrize("weights", ["bf16", "fp8", "int4-g64"])
def test_packed_draft_head(
    engine: types.ModuleType, source: Source, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """Few rows read the packed head, more the engine's own; it follows weights that are loaded later."""
    monkeypatch.setenv("DFLASH_KERNELS_PACK", "1")
    monkeypatch.setenv("DFLASH_KERNELS_WEIGHTS", weights)
    monkeypatch.setattr("dflash_kernels.lm_head.MAX_ROWS", 3 * (T - 1))
    given = parts(source, torch.bfloat16)
    model = given["model_runner"].model
    model.load_weights = lambda: model.lm_head.weight.neg_()
    worker = make_worker(engine, given)
    sampler, head = worker._draft_sampler, model.lm_head.weight
    assert table(worker)["head"].startswith("active packed weights")
    place = sampler.head.packed.weights.data_ptr()
    for _ in range(2):
        exact = (
            head[:V] if weights == "bf16" else quantize(head[:V], WeightFormat.parse(weights)).dequantize(head.dtype)
        )
        for batch in (1, 3, 4):
            hidden = torch.randn(batch * T, H, generator=rng).to(torch.bfloat16)
            sampler(hidden, None)
            kept = hidden.view(batch, T, H)[:, 1:].reshape(-1, H).float()
            logits = kept @ (head[:V] if batch == 4 else exact).float().T
            chosen = logits.gather(1, sampler.out[: batch * (T - 1), None])[:, 0]
            assert (logits.max(dim=-1).values - chosen).max() <= 2**-7 * logits.abs().max()
        model.load_weights()
        assert sampler.head.packed.weights.data_ptr() == place


@pytest.fixture
def fp8_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in fp8 on a device that multiplies their codes, where one request streams."""
    monkeypatch.setenv("DFLASH_KERNELS_PACK", "1")
    monkeypatch.setenv("DFLASH_KERNELS_WEIGHTS", "fp8")
    monkeypatch.setattr("dflash_kernels.lm_head.FP8_ROWS", T - 1)
    monkeypatch.setattr("dflash_kernels.lm_head.has_fp8_head", lambda *head: True)


def test_draft_head_multiplies_codes_of_many_rows(
    engine: types.ModuleType,
    source: Source,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    fp8_products: None,
) -> None:
    """All rows that SGLang's graphs have; after a later load, too. Within a limit that says so, only those."""
    given = parts(source, torch.bfloat16)
    model = given["model_runner"].model
    model.load_weights = lambda: model.lm_head.weight.neg_()
    worker = make_worker(engine, given)
    assert table(worker)["head"].endswith("as codes for many rows as much again")
    sampler, head = worker._draft_sampler, model.lm_head.weight
    assert sampler.max_rows == 1024 and len(sampler.head._rows[0]) == 4 * (T - 1)
    for _ in range(2):
        exact = quantize(head[:V], WeightFormat("fp8"))
        for batch in (1, 3, 4):
            hidden = torch.randn(batch * T, H, generator=rng).to(torch.bfloat16)
            sampler.out.fill_(-9)
            sampler(hidden, None)
            kept = hidden.view(batch, T, H)[:, 1:].reshape(-1, H)
            if batch == 1:
                ids = ops.lm_head_argmax(kept, exact.dequantize(torch.bfloat16))[0]
            else:
                ids = ops.lm_head_argmax_fp8(*ops.quantize_rows(kept), exact.codes, exact.scale)[0]
            assert torch.equal(sampler.out[: batch * (T - 1)], ids) and (sampler.out[batch * (T - 1) :] == -9).all()
        model.load_weights()
    monkeypatch.setenv("DFLASH_KERNELS_ROWS", f"head={2 * T}")
    sampler = make_worker(engine, parts(source, torch.bfloat16))._draft_sampler
    assert sampler.max_rows == 2 * T and len(sampler.head._rows[0]) == 2 * (T - 1)
    monkeypatch.setenv("DFLASH_KERNELS_ROWS", f"head={T}")
    assert make_worker(engine, parts(source, torch.bfloat16))._draft_sampler.head.codes is None


def test_without_codes_the_draft_heads_limit_is_the_usual_one(
    engine: types.ModuleType, source: Source, monkeypatch: pytest.MonkeyPatch, fp8_products: None
) -> None:
    monkeypatch.setattr("dflash_kernels.lm_head.has_fp8_head", lambda *head: False)
    sampler = make_worker(engine, parts(source, torch.bfloat16))._draft_sampler
    assert sampler.head.packed is not None and sampler.head.codes is None and sampler.max_rows == 64


def test_quantised_drafter_drafts_what_its_dequantised_weights_do(
    engine: types.ModuleType,
    source: Source,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    logits_processor: None,
) -> None:
    monkeypatch.setenv("DFLASH_KERNELS_PACK", "1")
    monkeypatch.setenv("DFLASH_KERNELS_WEIGHTS", "fp8")
    worker = make_worker(engine, parts(source, torch.bfloat16))
    forward = worker._dflash_seams["forward"]
    assert str(forward.packed.weight_format) == "fp8" and "in fp8" in table(worker)["forward"]
    arguments = block(worker, 2, rng)
    ours = worker.draft_model.forward(**arguments).hidden_states
    plain = type(worker.draft_model).forward(worker.draft_model, **arguments).hidden_states
    for name in ("qkv", "o", "gate_up", "down"):
        stacked = forward.weights[name]  # the parameters are views of it
        stacked.copy_(quantize(stacked, WeightFormat("fp8")).dequantize(torch.bfloat16))
    theirs = type(worker.draft_model).forward(worker.draft_model, **arguments).hidden_states
    torch.testing.assert_close(ours, theirs, rtol=2**-4, atol=2**-4)
    assert (ours - plain).abs().max() > (ours - theirs).abs().max()


class Group:
    """Two ranks in one process: gathers this rank's tensor and what the other rank gave before."""

    world_size = 2

    def __init__(self) -> None:
        self.sent: list[list[torch.Tensor]] = [[], []]
        self.rank = 0

    def all_gather_into_tensor(self, out: torch.Tensor, value: torch.Tensor) -> None:
        turn = len(self.sent[self.rank])
        self.sent[self.rank].append(value.clone())
        other = self.sent[1 - self.rank]
        known = other[turn] if turn < len(other) else torch.zeros_like(value)
        out.view(2, -1)[self.rank].copy_(value)
        out.view(2, -1)[1 - self.rank].copy_(known)


def test_draft_head_over_two_ranks(engine: types.ModuleType, rng: torch.Generator) -> None:
    """The second rank sees what the first sent and picks the token of the whole vocabulary, the smallest id on ties."""
    hidden = torch.randint(-2, 3, (2 * T, H), generator=rng).float()
    weight = torch.randint(-2, 3, (V, H), generator=rng).float()
    weight[V // 2 :] = weight[: V // 2]  # every row ties across the ranks
    group = Group()
    samplers = []
    for rank in range(2):
        group.rank = rank
        shard = weight[rank * V // 2 : (rank + 1) * V // 2].contiguous()
        stock = engine._DflashDraftSampler(
            weight=shard, block_size=T, num_org=V // 2, org_vocab_start=rank * V // 2, max_bs=2, tp_group=group
        )
        samplers.append(DraftSampler(stock))
        samplers[-1](hidden, None)
    rows = hidden.view(2, T, H)[:, 1:].reshape(-1, H)
    assert torch.equal(samplers[1].out, (rows @ weight.T).argmax(-1))


def test_ranks_agree_on_the_codes(
    engine: types.ModuleType, source: Source, monkeypatch: pytest.MonkeyPatch, fp8_products: None
) -> None:
    """Memory may suffice on one rank only: then none holds codes, and all have the same limit of rows."""

    stock = engine._DflashDraftSampler(
        weight=torch.randn(V, H).to(torch.bfloat16),
        block_size=T,
        num_org=V,
        org_vocab_start=0,
        max_bs=4,
        tp_group=Group(),
    )
    seam = make_worker(engine, parts(source, torch.bfloat16))._dflash_seams["head"]
    monkeypatch.setattr(seam.ranks, "gather", lambda value: [value, other])
    for other, rows in ((True, 1024), (False, 64)):
        sampler = seam.meet_with(seam.replace(stock))
        assert sampler.max_rows == rows and (sampler.head.codes is not None) == other
    other = True
    monkeypatch.setattr("dflash_kernels.lm_head.has_fp8_head", lambda *head: False)
    assert seam.meet_with(seam.replace(stock)).max_rows == 64


def test_other_draft_samplers_are_declined(
    engine: types.ModuleType, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = parts(source)
    given["_target_worker"].model_runner.model.lm_head.shard_indices.num_added_elements = 2
    assert table(make_worker(engine, given))["head"] == "stock SGLang keeps the draft head eager"
    with pytest.raises(Declined, match="draft sampler _DominoDraftSampler"):
        plugin.HeadSeam().replace(type("_DominoDraftSampler", (), {})())
    monkeypatch.setenv("DFLASH_KERNELS_SEAMS", "head")
    monkeypatch.setenv("DFLASH_KERNELS_STRICT", "1")
    with pytest.raises(Refused, match="seam head declined: SGLang keeps the draft head eager"):
        make_worker(engine, {**given, "draft_model": build_drafter(source, torch.float32)})


# -- the drafter's pass ------------------------------------------------------------------------------------------------


def block(worker: Any, batch: int, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of the model's forward, with a table and a pool that are filled up to random prefixes."""
    pool = worker.draft_model_runner.token_to_kv_pool
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    width = 12
    table = worker.draft_model_runner.req_to_token_pool.req_to_token
    rows = torch.randperm(table.shape[0], generator=generator)[:batch]
    table[rows, :width] = (torch.randperm(SLOTS - 1, generator=generator)[: batch * width] + 1).view(batch, -1).int()
    prefixes = torch.randint(0, width - T + 1, (batch,), generator=generator)
    positions = prefixes[:, None] + torch.arange(T)
    ids = torch.randint(0, V, (batch * T,), generator=generator)
    batch_info = types.SimpleNamespace(
        batch_size=batch,
        forward_mode=types.SimpleNamespace(is_target_verify=lambda: True),
        seq_lens=prefixes,
        req_pool_indices=rows,
        req_to_token=table,
        out_cache_loc=table[rows[:, None], positions].long().flatten(),
        pool=pool,
    )
    embeds = worker.model_runner.model.get_input_embeddings()(ids).detach()
    return {
        "input_ids": ids,
        "positions": positions.flatten(),
        "forward_batch": batch_info,
        "input_embeds": embeds,
    }


@pytest.fixture
def logits_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sglang.srt.layers.logits_processor"
    module = make_module(name, {"LogitsProcessorOutput": types.SimpleNamespace})
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(("dtype", "pack"), FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize(("causal", "left"), [(False, -1), (True, -1), (True, 3)], ids=["full", "causal", "sliding"])
def test_forward_equals_stock(
    engine: types.ModuleType,
    source: Source,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    logits_processor: None,
    dtype: torch.dtype,
    pack: str,
    causal: bool,
    left: int,
) -> None:
    monkeypatch.setenv("DFLASH_KERNELS_PACK", pack)
    given = {**parts(source, dtype), "draft_model": build_drafter(source, dtype, causal, left)}
    worker = make_worker(engine, given)
    assert table(worker)["forward"].startswith("active")
    assert (worker._dflash_seams["forward"].packed is not None) == (pack == "1")
    for batch in (1, 3):
        arguments = block(worker, batch, rng)
        pool = worker.draft_model_runner.token_to_kv_pool
        before = [buffer.clone() for buffer in (*pool.k_buffer, *pool.v_buffer)]
        ours = worker.draft_model.forward(**arguments).hidden_states
        for was, buffer in zip(before, (*pool.k_buffer, *pool.v_buffer), strict=True):
            assert torch.equal(was, buffer)  # the pool is read only
        theirs = type(worker.draft_model).forward(worker.draft_model, **arguments).hidden_states
        tolerance = 1e-4 if dtype is torch.float32 else 2**-4
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_forward_leaves_other_calls_to_stock(
    engine: types.ModuleType, source: Source, rng: torch.Generator, logits_processor: None
) -> None:
    """More rows than the op is for, another mode, no embeddings: the pool is written, as stock does."""
    worker = make_worker(engine, parts(source))
    seam = worker._dflash_seams["forward"]
    arguments = block(worker, 2, rng)
    seam.out = seam.out[:T]  # one request only
    pool = worker.draft_model_runner.token_to_kv_pool
    before = pool.k_buffer[0].clone()
    worker.draft_model.forward(**arguments)
    assert not torch.equal(before, pool.k_buffer[0])
    small = block(worker, 1, rng)
    small["forward_batch"].forward_mode.is_target_verify = lambda: False
    before = pool.k_buffer[0].clone()
    worker.draft_model.forward(**small)
    assert not torch.equal(before, pool.k_buffer[0])


def test_forward_keeps_the_parameters_alive(engine: types.ModuleType, source: Source) -> None:
    """Parameters keep their identity and values, are not held twice, and weights that are loaded later are used."""
    given = parts(source)
    layer = given["draft_model"].layers[1].self_attn
    parameter, values = layer.qkv_proj.weight, layer.qkv_proj.weight.clone()
    worker = make_worker(engine, given)
    stacked = worker._dflash_seams["forward"].weights["qkv"]
    assert layer.qkv_proj.weight is parameter and torch.equal(parameter, values)
    assert parameter.data_ptr() == stacked[1].data_ptr()
    with torch.no_grad():
        parameter.copy_(torch.ones_like(values))
    assert (stacked[1] == 1).all()


def test_more_rows_than_one_kernel_takes_are_a_chain(
    engine: types.ModuleType,
    source: Source,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    logits_processor: None,
) -> None:
    """With DFLASH_KERNELS_ROWS beyond the packed kernel's limit (here: two requests), each pass takes its own op."""
    monkeypatch.setenv("DFLASH_KERNELS_PACK", "1")
    monkeypatch.setenv("DFLASH_KERNELS_ROWS", f"forward={3 * T}")
    monkeypatch.setattr("dflash_kernels.draft_stream.DENSE_TOKENS", 2 * T)
    worker = make_worker(engine, parts(source, torch.bfloat16))
    taken: list[str] = []
    for name in ("draft_forward", "draft_forward_packed"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, op=op, name=name, **k: (taken.append(name), op(*a, **k))[1])
    for batch in (1, 2, 3, 4):
        arguments = block(worker, batch, rng)
        ours = worker.draft_model.forward(**arguments).hidden_states
        theirs = type(worker.draft_model).forward(worker.draft_model, **arguments).hidden_states
        torch.testing.assert_close(ours, theirs, rtol=2**-4, atol=2**-4)
    assert taken == ["draft_forward_packed", "draft_forward_packed", "draft_forward"]


def test_more_rows_of_fp8_multiply_the_codes(
    engine: types.ModuleType,
    source: Source,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    logits_processor: None,
) -> None:
    """With DFLASH_KERNELS_WEIGHTS=fp8 and where the device can, rows beyond those that stream take the codes, too."""
    monkeypatch.setenv("DFLASH_KERNELS_PACK", "1")
    monkeypatch.setenv("DFLASH_KERNELS_WEIGHTS", "fp8")
    monkeypatch.setenv("DFLASH_KERNELS_ROWS", f"forward={3 * T}")
    monkeypatch.setattr("dflash_kernels.draft_stream.FP8_TOKENS", 2 * T)
    can = True
    monkeypatch.setattr("dflash_kernels.integrations.sglang.forward.has_fp8_chain", lambda matrices: can)
    given = parts(source, torch.bfloat16)
    drafter = given["draft_model"]
    drafter.load_weights = lambda: [parameter.data.mul_(0.5) for parameter in drafter.parameters()]
    worker = make_worker(engine, given)
    taken: list[str] = []
    for name in ("draft_forward", "draft_forward_fp8", "draft_forward_packed"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, op=op, name=name, **k: (taken.append(name), op(*a, **k))[1])
    places = [code.codes.data_ptr() for code in worker._dflash_seams["forward"].codes]
    assert "as codes for many rows as much again" in table(worker)["forward"]
    for _ in range(2):
        for batch in (2, 3):
            arguments = block(worker, batch, rng)
            ours = drafter.forward(**arguments).hidden_states
            theirs = type(drafter).forward(drafter, **arguments).hidden_states
            assert (ours - theirs).norm() < 0.1 * theirs.norm()
        drafter.load_weights()
    assert taken == ["draft_forward_packed", "draft_forward_fp8"] * 2
    assert places == [code.codes.data_ptr() for code in worker._dflash_seams["forward"].codes]
    monkeypatch.setenv("DFLASH_KERNELS_ROWS", f"forward={2 * T}")
    assert make_worker(engine, parts(source, torch.bfloat16))._dflash_seams["forward"].codes is None
    can = False
    monkeypatch.setenv("DFLASH_KERNELS_ROWS", f"forward={3 * T}")
    assert make_worker(engine, parts(source, torch.bfloat16))._dflash_seams["forward"].codes is None


@pytest.mark.parametrize("can", [True, False])
def test_the_usual_limit_of_a_pass_is_wider_with_codes(
    engine: types.ModuleType, source: Source, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    """1024 rows, but of no more requests than the engine has places for; without codes as in bf16."""
    monkeypatch.setenv("DFLASH_KERNELS_PACK", "1")
    monkeypatch.setenv("DFLASH_KERNELS_WEIGHTS", "fp8")
    monkeypatch.setattr("dflash_kernels.integrations.sglang.forward.has_fp8_chain", lambda matrices: can)
    for places, rows in ((300, 1024 if can else 32), (10, 10 * T if can else 32), (4, 4 * T)):
        given = parts(source, torch.bfloat16)
        given["model_runner"].req_to_token_pool.req_to_token = torch.zeros(places, 40, dtype=torch.int32)
        seam = make_worker(engine, given)._dflash_seams["forward"]
        assert seam.out.shape[0] == rows and (seam.codes is not None) == (can and rows > 32)


def test_packed_weights_follow_a_later_load(
    engine: types.ModuleType,
    source: Source,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    logits_processor: None,
) -> None:
    """Weights that are loaded into a running engine reach the packed copies, which stay where they are."""

    def load_weights(scale: float) -> str:
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.mul_(scale)
        return "loaded"

    monkeypatch.setenv("DFLASH_KERNELS_PACK", "1")
    given = parts(source, torch.bfloat16)
    drafter = given["draft_model"]
    drafter.load_weights = load_weights
    worker = make_worker(engine, given)
    inject, forward = worker._dflash_seams["inject"], worker._dflash_seams["forward"]
    places = [inject.plan.tiles.data_ptr(), forward.packed.weights.data_ptr(), inject.k_norm.data_ptr()]
    assert drafter.load_weights(0.5) == "loaded"
    assert places == [inject.plan.tiles.data_ptr(), forward.packed.weights.data_ptr(), inject.k_norm.data_ptr()]
    arguments = block(worker, 2, rng)
    ours = drafter.forward(**arguments).hidden_states
    theirs = type(drafter).forward(drafter, **arguments).hidden_states
    torch.testing.assert_close(ours, theirs, rtol=2**-4, atol=2**-4)
    fresh = make_worker(engine, given)._dflash_seams["inject"]
    assert torch.equal(fresh.plan.tiles, inject.plan.tiles) and torch.equal(fresh.k_norm, inject.k_norm)


def test_weights_are_packed_only_into_free_memory(
    engine: types.ModuleType, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = types.SimpleNamespace(device=torch.device("cuda"), nbytes=10**9)
    free = 4 * 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 10**9))
    auto = read_settings((), {})
    assert may_pack(auto, [weights]) == (False, "weights not packed: 4.0 GB free, 4.1 needed")
    free = 5 * 10**9
    assert may_pack(auto, [weights]) == (True, "packed weights take 1.00 GB more")
    off = read_settings((), {"DFLASH_KERNELS_PACK": "0"})
    assert may_pack(off, [weights]) == (False, "weights not packed: DFLASH_KERNELS_PACK=0")


FORWARD_UNSUPPORTED = {
    "compact window": (_set("use_compact_draft_cache", True), "compact draft window"),
    "tensor parallelism": (_set(f"{ATTENTION}.total_num_heads", 2 * HQ), "a drafter in 2 parts on 1 ranks"),
    "activation": (_rename("draft_model.layers.0.mlp.act_fn", "GeluAndMul"), "activation GeluAndMul"),
    "logit cap": (_set(f"{ATTENTION}.attn.logit_cap", 30.0), "a logit cap"),
    "window without causality": (_set(f"{ATTENTION}.sliding_window_size", 7), "a sliding window without causality"),
    "embedding scale": (_set("_noise_embed_scale", 2.0), "a scale on the block's embedding"),
    "DP attention": (_set("_full_embed_gpu", torch.zeros(1)), "DP attention"),
    "embedding": (
        _set("model_runner.model.get_input_embeddings", lambda: torch.nn.Embedding(V, H)),
        "target embedding Embedding",
    ),
    "long block": (_set("block_size", 33), "block size 33"),
    "Laguna": UNSUPPORTED["Laguna"],
}


@pytest.mark.parametrize("feature", FORWARD_UNSUPPORTED)
def test_forward_declines_by_name(
    engine: types.ModuleType, source: Source, monkeypatch: pytest.MonkeyPatch, feature: str
) -> None:
    change, reason = FORWARD_UNSUPPORTED[feature]
    monkeypatch.setenv("DFLASH_KERNELS_SEAMS", "forward")
    given = parts(source)
    change(given)
    assert table(make_worker(engine, given))["forward"].startswith(f"stock {reason}")


# -- slot reservation --------------------------------------------------------------------------------------------------


class Request:
    """A request's lengths where each version keeps them."""

    def __init__(self, committed: int, allocated: int, top_k: int) -> None:
        self.kv_committed_len = committed
        self.kv = types.SimpleNamespace(kv_committed_len=committed, kv_allocated_len=allocated)
        self.sampling_params = types.SimpleNamespace(top_k=top_k)
        self.decode_batch_idx = 0


def reservation(lengths: list[tuple[int, int, int]], page_size: int) -> Any:
    allocator = types.SimpleNamespace(page_size=page_size)
    return types.SimpleNamespace(
        device=torch.device("cpu"),
        reqs=[Request(*one) for one in lengths],
        batch_size=lambda: len(lengths),
        token_to_kv_pool_allocator=allocator,
        tree_cache=types.SimpleNamespace(token_to_kv_pool_allocator=allocator, taken=1),
        req_to_token_pool=types.SimpleNamespace(req_to_token=torch.zeros(len(lengths), 99, dtype=torch.int32)),
        req_pool_indices=torch.arange(len(lengths)).flip(0),
        maybe_evict_swa=lambda: None,
        hisparse_coordinator=None,
    )


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("top_ks", [(1, 1, 1), (1, 40, 1)], ids=["greedy", "mixed"])
def test_reservation_equals_stock(
    engine: types.ModuleType, source: Source, page_size: int, top_ks: tuple[int, int, int]
) -> None:
    """The same slots, lengths and sums, whether a request grows, is covered already, or has just begun."""
    cls = engine.DFlashDraftInputV2
    stock = cls.prepare_for_decode
    worker = make_worker(engine, parts(source))
    assert table(worker)["reserve"] == "active" and cls.prepare_for_decode is not stock
    lengths = [(n, m, k) for (n, m), k in zip([(10, 12), (7, 40), (20, 20)], top_ks, strict=True)]
    results = []
    for method in (cls.prepare_for_decode, stock):
        batch, given = reservation(lengths, page_size), cls.create_idle_input(device="cpu")
        method(given, batch)
        reserved = "reserved_seq_lens" if source.version == "0.5.16" else "nxt_kv_lens"
        results.append(
            {
                "table": batch.req_to_token_pool.req_to_token.tolist(),
                "committed": (batch.seq_lens_cpu.tolist(), batch.seq_lens_cpu.dtype, batch.seq_lens_sum),
                "reserved": getattr(given, f"{reserved}_cpu").tolist(),
                "reserved dtype": getattr(given, f"{reserved}_cpu").dtype,
                "sum": getattr(given, f"{reserved}_sum"),
                "top k": (given.max_top_k, given.uniform_top_k_value),
                "allocated": [req.kv.kv_allocated_len for req in batch.reqs],
                "steps": [req.decode_batch_idx for req in batch.reqs],
                "taken": batch.tree_cache.taken,
            }
        )
    assert results[0] == results[1]


def test_reservation_of_nothing(engine: types.ModuleType, source: Source) -> None:
    make_worker(engine, parts(source))
    given = engine.DFlashDraftInputV2.create_idle_input(device="cpu")
    given.prepare_for_decode(reservation([], 1))
    assert given.max_top_k == 1


def test_a_full_pool_is_stocks_error_once(
    engine: types.ModuleType, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the allocator raises reaches the scheduler, and nothing is allocated twice."""
    make_worker(engine, parts(source))
    calls = []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(kwargs)
        raise RuntimeError("Out of memory")

    monkeypatch.setattr(sys.modules[INFO_MODULE], "alloc_for_spec_decode", full)
    given = engine.DFlashDraftInputV2.create_idle_input(device="cpu")
    with pytest.raises(RuntimeError, match="Out of memory"):
        given.prepare_for_decode(reservation([(10, 12, 1)], 1))
    assert len(calls) == 1


def test_a_rewritten_reservation_is_declined(engine: types.ModuleType, source: Source) -> None:
    def prepare_for_decode(self: Any, batch: Any) -> None:
        batch.tree_cache.something_new()

    engine.DFlashDraftInputV2.prepare_for_decode = prepare_for_decode
    state = table(make_worker(engine, parts(source)))["reserve"]
    assert state.startswith("stock prepare_for_decode is written in another way") and "something_new" in state
    assert engine.DFlashDraftInputV2.prepare_for_decode is prepare_for_decode


def test_activate_needs_only_the_registry(plugins: types.ModuleType) -> None:
    """Nothing of the engine is imported before the hook runs."""
    activate()
    assert WORKER_MODULE not in sys.modules
    assert Path(plugins.__file__ or "").name == "__init__.py"

"""What all seams share: the target's signature, the reason of a decline, and what happens when a replacement fails."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any, ClassVar

import torch

from dflash_kernels.formats import QuantizedWeight, WeightFormat, concatenate, stack
from dflash_kernels.integrations.sglang.ranks import Ranks
from dflash_kernels.integrations.sglang.settings import Settings
from dflash_kernels.tiles import Weight

logger = logging.getLogger("dflash_kernels.sglang")

WORKER_MODULE = "sglang.srt.speculative.dflash_worker_v2"
WORKER_CLASS = "DFlashWorkerV2"


class Declined(Exception):
    """The seam stays stock; the message says why."""


class Refused(RuntimeError):
    """In strict mode: a seam that was asked for would fall back."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a target: its name and whether it has a default."""

    name: str
    optional: bool


@dataclass(frozen=True)
class Target:
    """A function of SGLang that a seam replaces, calls or relies on, known by its signature, not by a version.

    ``required`` are passed by SGLang's caller; ``optional`` may be missing. Any other parameter is a change that the
    seam does not know.
    """

    module: str
    qualname: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def check(self, parameters: Sequence[Parameter]) -> None:
        """Raise `Declined` unless the parameters (without self) are the expected ones."""
        names = [p.name for p in parameters]
        missing = [name for name in self.required if name not in names]
        unknown = [name for name in names if name not in self.required + self.optional]
        if missing:
            raise Declined(f"{self.qualname} has no parameter {', '.join(missing)}")
        if unknown:
            raise Declined(f"{self.qualname} has the unknown parameter {', '.join(unknown)}")

    def check_function(self, function: Callable[..., Any]) -> None:
        """`check` on a function that is there."""
        parameters = inspect.signature(function).parameters.values()
        self.check([Parameter(p.name, p.default is not p.empty) for p in parameters if p.name != "self"])


class Seam:
    """One place where the worker runs this package's kernels instead of its own.

    ``prepare`` runs when the worker has been built (the models are loaded, no pool exists yet), ``bind`` before the
    drafter's CUDA graphs are captured (the pools and the target's graphs exist), ``captured`` after it. All raise
    `Declined` to stay stock; with tensor parallelism they ask no other rank, as it may have declined. ``meet`` runs
    after ``bind``, on all ranks or on none, and may.
    """

    name: ClassVar[str]
    targets: ClassVar[tuple[Target, ...]]
    switchable: bool = True  # nothing of it is captured in a CUDA graph, and no other rank waits for it

    def __init__(self) -> None:
        self.active = False
        self.bound = False
        self.reason = "not asked for"
        self.note = ""
        self.error: BaseException | None = None
        self.settings = Settings((), False)
        self.ranks = Ranks()
        self.agreed = False  # all ranks have gone through `prepare` without a decline

    def install(self, worker_module: ModuleType) -> None:
        """Check the targets on the imported module; a function seam wraps its target here."""
        for target in self.targets:
            if target.module == WORKER_MODULE:
                target.check_function(find(worker_module, target.qualname))

    def prepare(self, worker: Any) -> None:
        """Check the models, build what the pools are not needed for."""

    def bind(self, worker: Any) -> None:
        """Check the pools, build the rest."""

    def meet(self, worker: Any) -> None:
        """Build what takes the other ranks."""

    def captured(self, worker: Any) -> None:
        """The graphs are captured: what needs them."""

    def start_step(self, batch: Any) -> None:
        """Before a step of the worker; never raises."""

    def end_step(self) -> None:
        """After it."""

    def failed(self, error: BaseException) -> None:
        """The replacement raised: back to stock for good, or (strict) stop at the end of the step.

        Not raised from here, because SGLang catches what some of its functions raise and goes on without them.
        """
        self.active = self.bound = False
        self.reason = f"failed: {error}"
        if self.settings.strict:
            self.error = error
        else:
            logger.warning("dflash-kernels: seam %s failed and is stock from now on: %s", self.name, error)


class FunctionSeam(Seam):
    """A seam at a function of the worker's module that the worker calls by its global name.

    The wrapper is installed before anybody else (a forced-acceptance plugin, say) can wrap the function from within
    ``create_worker``, so that their wrapper runs around this one and is honoured. ``run`` takes the function's keywords
    and does its work; False leaves the call to stock, before anything was written.
    """

    run: Callable[..., bool]

    def install(self, worker_module: ModuleType) -> None:
        (target,) = self.targets
        current = find(worker_module, target.qualname)
        stock = getattr(current, "_dflash_stock", None)
        if stock is None and getattr(current, "__name__", "") != target.qualname:
            raise Declined(f"{target.qualname} was already replaced by {getattr(current, '__qualname__', current)!r}")
        super().install(worker_module)
        if not _is_called(getattr(worker_module, WORKER_CLASS), target.qualname):
            raise Declined(f"{WORKER_CLASS} does not call {target.qualname}")
        stock = stock or current

        @wraps(stock)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if self.active and not args:
                try:
                    if self.run(**kwargs):
                        return None
                except Exception as error:  # a fault of ours must not end the engine
                    self.failed(error)
            return stock(*args, **kwargs)

        replacement._dflash_stock = stock  # type: ignore[attr-defined]
        setattr(worker_module, target.qualname, replacement)


def find(module: ModuleType, qualname: str) -> Any:
    """The function of that name, or `Declined`."""
    found: Any = module
    for part in qualname.split("."):
        # Through __dict__ along the classes: the worker's __getattr__ must not answer.
        found = inspect.getattr_static(found, part, None)
        if found is None:
            raise Declined(f"{module.__name__} has no {qualname}")
    return found


def _is_called(cls: type, name: str) -> bool:
    methods = [f for base in cls.__mro__ for f in vars(base).values() if inspect.isfunction(f)]
    return any(name in method.__code__.co_names for method in methods)


def require(condition: object, reason: str) -> None:
    """`Declined` with the reason unless the condition holds."""
    if not condition:
        raise Declined(reason)


def require_plain_drafter(worker: Any) -> None:
    """`Declined`, naming the feature, for a drafter that is not the plain dense one.

    Source: SGLang's ``models/dflash.py`` (DFlashDraftModel, DFlashAttention, DFlashDecoderLayer) and
    ``dflash_worker_v2.py`` (selector, LiLiCorr, Domino).
    """
    model = worker.draft_model
    name = type(model).__name__
    require(name == "DFlashDraftModel", f"drafter class {name}")
    require(getattr(model, "candidate_selector", None) is None, "DFlash2 candidate selector")
    require(getattr(model, "lilicorr", None) is None, "LiLiCorr head")
    require(not getattr(worker, "_is_domino", False), "Domino projector")
    require(not getattr(model, "is_nemotron_35_draft", False), "Nemotron drafter with its own embedding")
    require(not getattr(model, "quantizable", False), "quantised drafter")
    require(len(model.layers) > 0, "a drafter without layers")
    for layer in model.layers:
        require(getattr(layer, "attention_conv", None) is None, "DFlash2 convolution")
        require(getattr(layer, "mlp_conv", None) is None, "DFlash2 convolution")
        attention = layer.self_attn
        require(type(attention).__name__ == "DFlashAttention", f"attention class {type(attention).__name__}")
        require(not getattr(attention, "use_gemma_norm", False), "gemma norm")
        require(getattr(attention, "v_scale", None) is None, "attention_value_scale")
        require(getattr(attention, "attention_sink_bias", None) is None, "attention sink bias")
        for linear in (attention.qkv_proj, attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            require_dense(linear)
        require(getattr(attention.qkv_proj, "bias", None) is None, "attention bias")
        require(getattr(attention.o_proj, "bias", None) is None, "attention bias")
        for scale in ("k_scale", "v_scale"):
            value = getattr(attention.attn, scale, None)
            require(value is None or float(value) == 1.0, f"KV scale other than 1 ({scale} {value})")
        require(attention.rotary_emb is model.layers[0].self_attn.rotary_emb, "layers with different rotary tables")
    rotary = model.layers[0].self_attn.rotary_emb
    require(getattr(rotary, "is_neox_style", True), "interleaved rotary pairs")
    require(getattr(rotary, "mrope_section", None) is None, "M-RoPE")
    require(isinstance(getattr(rotary, "cos_sin_cache", None), torch.Tensor), "a rotary embedding without a table")
    require(model.fc.bias is None, "a bias in fc")


def require_dense(linear: Any) -> None:
    """`Declined` unless the linear layer holds one plain weight."""
    method = getattr(linear, "quant_method", None)
    plain = method is None or type(method).__name__ == "UnquantizedLinearMethod"
    require(plain, f"quantised drafter ({type(method).__name__})")
    require(isinstance(getattr(linear, "weight", None), torch.Tensor), "a linear layer without a weight")


def require_norms(norms: Sequence[Any]) -> float:
    """The eps that the RMSNorms share; `Declined` where they differ or do more than a plain RMSNorm."""
    for norm in norms:
        require(type(norm).__name__ == "RMSNorm", f"norm class {type(norm).__name__}")
        require(not getattr(norm, "cast_x_before_out_mul", False), "a norm that rounds before its weight")
        require(getattr(norm, "variance_size_override", None) is None, "a norm over a part of its row")
    eps = {float(norm.variance_epsilon) for norm in norms}
    require(len(eps) == 1, f"norms with different eps {sorted(eps)}")
    return eps.pop()


def require_weights(weights: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype that the weights share; `Declined` unless the kernels take it."""
    dtypes = {weight.dtype for weight in weights}
    require(len(dtypes) == 1, f"weights of different dtypes {sorted(map(str, dtypes))}")
    dtype = dtypes.pop()
    on_cpu = weights[0].device.type == "cpu"
    require(dtype is torch.bfloat16 or (on_cpu and dtype is torch.float32), f"a drafter in {dtype}, not bfloat16")
    return dtype


# Left to SGLang beside packed weights: below 1 GiB it captures no draft graph.
MEMORY_LEFT = 2 << 30


def may_pack(settings: Settings, weights: Sequence[torch.Tensor]) -> tuple[bool, str]:
    """Whether the weights are to be held a second time, as the streaming kernels read them, and a note for the table.

    While they are packed, they are there once more.
    """
    device, weight_format = weights[0].device, settings.weights
    size = sum(weight.nbytes for weight in weights) * (16 if weight_format is None else weight_format.bits) // 16
    if settings.pack == "0":
        return False, "weights not packed: DFLASH_KERNELS_PACK=0"
    if settings.pack == "auto":
        if device.type != "cuda":
            return False, ""
        free, _ = torch.cuda.mem_get_info(device)
        if free < 2 * size + MEMORY_LEFT:
            return False, f"weights not packed: {free / 1e9:.1f} GB free, {(2 * size + MEMORY_LEFT) / 1e9:.1f} needed"
    kind = "weights" if weight_format is None else f"weights in {weight_format}"
    return True, f"packed {kind} take {size / 1e9:.2f} GB more"


def for_packing(settings: Settings, weight: torch.Tensor) -> Weight:
    """The weight in the format that was asked for; in parts, as rounding needs several times their memory."""
    if settings.weights is None:
        return weight
    if weight.dim() == 3:
        return stack([_quantized(one, settings.weights) for one in weight])
    return _quantized(weight, settings.weights)


def _quantized(weight: torch.Tensor, weight_format: WeightFormat) -> QuantizedWeight:
    from dflash_kernels.model.quantize import quantize

    return concatenate([quantize(part, weight_format) for part in weight.split(8192)])


def follow_loading(model: Any, repack: Callable[[], None]) -> None:
    """Run ``repack`` after every later load of weights into the model."""
    load = getattr(model, "load_weights", None)
    if load is None:
        return

    @wraps(load)
    def load_weights(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        repack()
        return result

    model.load_weights = load_weights


class DraftPool:
    """The drafter's KV buffers, one K and one V tensor ``[slots, Hkv, D]`` a layer.

    Source: ``mem_cache/memory_pool.py`` MHATokenToKVPool (k_buffer, v_buffer, start_layer, kv_cache_layout). Its
    subclasses (FP4, MXFP8, page-major, no-op) and the unified and sliding-window pools lay bytes out differently.
    """

    def __init__(self, worker: Any, dtype: torch.dtype) -> None:
        pool = worker.draft_model_runner.token_to_kv_pool
        layers = worker.draft_model.layers
        first = layers[0].self_attn
        require(type(pool).__name__ == "MHATokenToKVPool", f"KV pool {type(pool).__name__}")
        layout = getattr(pool, "kv_cache_layout", "nhd")
        require(layout == "nhd" and not getattr(pool, "use_hnd", False), f"KV layout {layout}")
        require(not getattr(pool, "is_quantized_kv_cache", False), "quantised KV pool")
        require(pool.dtype == dtype, f"KV pool in {pool.dtype}, weights in {dtype}")
        ids = [layer.self_attn.attn.layer_id - pool.start_layer for layer in layers]
        self.pool, self._ids = pool, ids
        self.k, self.v = [pool.k_buffer[i] for i in ids], [pool.v_buffer[i] for i in ids]
        shape = (first.num_kv_heads, first.head_dim)
        for buffer in (*self.k, *self.v):
            require(buffer.dim() == 3 and tuple(buffer.shape[1:]) == shape, f"KV buffer of shape {tuple(buffer.shape)}")
            require(buffer.dtype == dtype, f"KV buffer in {buffer.dtype}")
        self._owner = pool.k_buffer

    def refresh(self) -> None:
        """Follow the pool where it made its buffers anew (after the engine released and took back its memory)."""
        if self.pool.k_buffer is not self._owner:
            self.k, self.v = [self.pool.k_buffer[i] for i in self._ids], [self.pool.v_buffer[i] for i in self._ids]
            self._owner = self.pool.k_buffer


class RotaryTable:
    """``cos_sin_cache`` as float32, followed where SGLang replaces it.

    Source: ``layers/rotary_embedding/base.py`` RotaryEmbedding (_compute_cos_sin_cache, _ensure_cos_sin_cache_length).
    """

    def __init__(self, rotary: Any, max_positions: int) -> None:
        grow = getattr(rotary, "_ensure_cos_sin_cache_length", None)
        if callable(grow) and rotary.cos_sin_cache.shape[0] < max_positions:
            grow(max_positions - 1)
        require(
            rotary.cos_sin_cache.dim() == 2 and rotary.cos_sin_cache.shape[0] >= max_positions,
            f"a rotary table of {rotary.cos_sin_cache.shape[0]} positions, {max_positions} are needed",
        )
        self._rotary = rotary
        self._source = rotary.cos_sin_cache
        self._table = self._source.float().contiguous()

    @property
    def table(self) -> torch.Tensor:
        if self._rotary.cos_sin_cache is not self._source:
            self._source = self._rotary.cos_sin_cache
            self._table = self._source.float().contiguous()
        return self._table


def max_positions(worker: Any) -> int:
    """Positions that a block may reach: the target's context and one block more, as SGLang's own helper reserves."""
    return int(worker.model_runner.model_config.context_len) + int(worker.block_size)

"""The target model behind a static KV cache with one row per request.

Any causal language model of Hugging Face transformers whose layers are all full attention works (Llama and Qwen3 are
tested). The model's own code runs unchanged; three things are ours: a cache that scatters K and V to explicit
positions, so that rows of different lengths share one pass; a boolean mask from those same positions; and forward hooks
on the tapped layers, which give the hidden states *after layer i* before any final norm.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from dflash_kernels.engine.sharded_target import shard_target
from dflash_kernels.tensor_parallel import Communicator


class _PassPlan:
    """Where the running pass reads and writes: shared by all layers of the cache.

    ``positions`` [B, T] int64; rows ``first_row .. first_row + B``; keys ``0 .. kv_len``. ``start`` is set when B is 1
    and the positions are the run ``start .. start + T`` known to the host: then the write is one slice copy.
    """

    def __init__(self) -> None:
        self.positions: torch.Tensor | None = None
        self.first_row = 0
        self.kv_len = 0
        self.start: int | None = None


class RowCacheLayer(CacheLayerMixin):
    """K and V of one target layer, ``[rows, Hkv, Smax, D]``, allocated once at the first pass."""

    is_sliding = False

    def __init__(self, plan: _PassPlan, rows: int, max_positions: int) -> None:
        super().__init__()
        self._plan, self._rows, self._max_positions = plan, rows, max_positions

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers from the shapes of the first K and V."""

        def buffer(like: torch.Tensor) -> torch.Tensor:
            shape = (self._rows, like.shape[1], self._max_positions, like.shape[3])
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write K and V ``[B, Hkv, T, D]`` at the plan's positions; return the rows' keys ``0 .. kv_len`` (views)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self._plan
        assert plan.positions is not None and self.keys is not None and self.values is not None
        batch, heads, length, _ = key_states.shape
        rows = slice(plan.first_row, plan.first_row + batch)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if plan.start is not None:
                buffer[rows, :, plan.start : plan.start + length].copy_(states)
            else:
                index = plan.positions[:, None, :, None].expand(batch, heads, length, states.shape[3])
                buffer[rows].scatter_(2, index, states)
        return self.keys[rows, :, : plan.kv_len], self.values[rows, :, : plan.kv_len]

    def move_row(self, src: int, dst: int, length: int) -> None:
        """Copy the first ``length`` positions of row ``src`` over row ``dst``."""
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys[dst, :, :length].copy_(self.keys[src, :, :length])
            self.values[dst, :, :length].copy_(self.values[src, :, :length])

    # Positions and mask are always explicit, so the answers below only keep transformers' bookkeeping quiet.
    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Keys the running pass sees, and their offset."""
        return self._plan.kv_len, 0

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Always 0: rows have lengths of their own."""
        return 0

    def get_max_length(self) -> int:
        """Positions a row holds."""
        return self._max_positions

    def get_max_cache_shape(self) -> int:
        """Older name of :meth:`get_max_length`."""
        return self._max_positions


@dataclass(frozen=True)
class TargetOutput:
    """``logits`` [B, T, V] (or [B, 1, V] with ``last_only``), V of this rank; ``taps`` K tensors [B*T, H]."""

    logits: torch.Tensor
    taps: list[torch.Tensor]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's list of layers, found by its usual names.

    Raises:
        ValueError: the model has none that we know.
    """
    base = getattr(model, getattr(model, "base_model_prefix", "model"), model)
    for owner in (base, getattr(base, "decoder", None), getattr(base, "language_model", None)):
        layers = getattr(owner, "layers", None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise ValueError(f"target model {type(model).__name__} has no list of decoder layers to tap")


class TargetRunner:
    """Runs a causal language model over rows of different lengths with its own static KV cache.

    Args:
        model: a transformers causal LM, already on its device and in its dtype; switched to eval mode.
        tap_layers: layer ids whose output hidden states are wanted ("after layer i", 0-based); may be empty.
        rows: cache rows (the batch, padding included).
        max_positions: positions a row can hold.
        communicator: of a tensor-parallel rank: the model is cut to the rank's part, in place. Every rank must run the
            same passes.

    Attributes:
        shards: the rank's part of the vocabulary, whose logits :meth:`forward` gives; None: all of it.

    Raises:
        ValueError: a tapped layer does not exist, the model has layers other than full attention, or it cannot be cut.
    """

    def __init__(
        self,
        model: nn.Module,
        tap_layers: Sequence[int],
        *,
        rows: int,
        max_positions: int,
        communicator: Communicator | None = None,
    ) -> None:
        config: Any = model.config
        self.model = model.eval()
        self.tap_layers = tuple(int(i) for i in tap_layers)
        self.rows, self.max_positions = rows, max_positions
        lm_head_weight: torch.Tensor = model.get_output_embeddings().weight  # type: ignore[operator]
        self.dtype, self.device = lm_head_weight.dtype, lm_head_weight.device
        self.vocab_size, self.hidden_size = lm_head_weight.shape
        layers = decoder_layers(model)
        self.num_layers = len(layers)
        for layer in self.tap_layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"drafter taps target layer {layer}, but the target has layers 0..{self.num_layers - 1}"
                )
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"target model has {sorted(kinds)} layers; the engine runs targets whose layers are all full_attention"
            )
        self.shards = None if communicator is None else shard_target(model, layers, communicator).on(self.device)
        self._plan = _PassPlan()
        self._layers = [RowCacheLayer(self._plan, rows, max_positions) for _ in layers]
        self._cache = Cache(layers=list(self._layers))
        self._tapped: dict[int, torch.Tensor] = {}
        self._want_taps = False
        self._hooks = [layers[i].register_forward_hook(self._make_hook(i)) for i in sorted(set(self.tap_layers))]
        self._key_index = torch.arange(max_positions, device=self.device)

    def close(self) -> None:
        """Remove the hooks from the model and drop the cache."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for layer in self._layers:
            layer.keys = layer.values = None
            layer.is_initialized = False

    def _make_hook(self, layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._want_taps:
                self._tapped[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_len: int,
        *,
        first_row: int = 0,
        start: int | None = None,
        taps: bool = True,
        last_only: bool = False,
    ) -> TargetOutput:
        """One pass over ``input_ids`` [B, T] at ``positions`` [B, T] (int64), rows ``first_row ..``.

        A query at position p sees the row's keys 0..p, its own pass included; later keys are stale and hidden.
        ``kv_len`` is a host bound above every position of the pass: keys beyond it are not read. ``start`` (B = 1 only)
        says that the positions are ``start .. start + T``.
        """
        plan = self._plan
        plan.positions, plan.first_row, plan.kv_len, plan.start = positions, first_row, kv_len, start
        mask = self._key_index[:kv_len] <= positions[:, None, :, None]  # [B, 1, T, kv_len]
        self._want_taps = taps and bool(self.tap_layers)
        output = self.model(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        )
        tapped = [self._tapped[i].reshape(-1, self.hidden_size) for i in self.tap_layers] if self._want_taps else []
        self._tapped.clear()
        return TargetOutput(output.logits, tapped)

    def whole_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the whole vocabulary from :meth:`forward`'s, which are a rank's part where there are several."""
        return logits if self.shards is None else self.shards.gather(logits)

    def move_row(self, src: int, dst: int, length: int) -> None:
        """Copy the first ``length`` cached positions of row ``src`` over row ``dst`` (no host sync)."""
        for layer in self._layers:
            layer.move_row(src, dst, length)


def default_stop_ids(model: nn.Module, tokenizer: Any = None) -> tuple[int, ...]:
    """End-of-text ids of a model: generation config, model config and tokenizer together."""
    found: list[int] = []
    configs = (getattr(model, "generation_config", None), getattr(model, "config", None))
    for value in [getattr(c, "eos_token_id", None) for c in configs] + [getattr(tokenizer, "eos_token_id", None)]:
        found += [value] if isinstance(value, int) else list(value or ())
    return tuple(dict.fromkeys(int(v) for v in found))


def load_target(path: str | Path, dtype: torch.dtype, device: torch.device | str) -> tuple[nn.Module, Any]:
    """Load a local Hugging Face checkpoint directory as ``(model, tokenizer)``; nothing is downloaded.

    Only safetensors are read. The tokenizer is None when the directory carries none.

    Raises:
        ValueError: the path is no checkpoint directory, its model class is not a causal LM, or a file is damaged, lacks
            a tensor, or has one of another shape.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"target directory {path} must hold a Hugging Face checkpoint (config.json), found none")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # found below, and said with both shapes
            output_loading_info=True,
        )
    except Exception as error:  # of transformers, safetensors and huggingface_hub, without a common base
        raise ValueError(f"target directory {path} could not be loaded: {_one_line(error)}") from error
    model, found = loaded
    # transformers fills what it does not find with random numbers, and warns.
    for name, got, expected in sorted(found["mismatched_keys"]):
        raise ValueError(f"target directory {path}: tensor {name} must have shape {list(expected)}, got {list(got)}")
    for name in sorted(found["missing_keys"]):
        raise ValueError(f"target directory {path}: tensor {name} must be in the checkpoint, found none")
    tokenizer = None
    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # likewise, and of tokenizers
            raise ValueError(f"tokenizer of {path} could not be loaded: {_one_line(error)}") from error
    nn.Module.to(model, device)
    model.eval()
    gc.collect()
    return model, tokenizer


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 4] + " ..."

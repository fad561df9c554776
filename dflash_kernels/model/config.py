"""A drafter's config.json, in the two layouts that are published.

*z-lab*: a flat Qwen3-style config; ``block_size``, ``mask_token_id`` and ``target_layer_ids`` lie at the top level or
in ``dflash_config``, the rope base in ``rope_theta`` or ``rope_parameters``. Layer id i means "after layer i".
*speculators*: the sizes lie in ``transformer_layer_config``, the layer ids in ``aux_hidden_state_layer_ids`` and count
the embedding as 0, so they are one larger.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dflash_kernels.formats import WeightFormat, parse_quantization_config
from dflash_kernels.model.rope import RopeConfig, parse_rope

Layout = Literal["z-lab", "speculators"]
_MISSING = object()
# What the kernels are made for.
_HEAD_DIMS = (32, 64, 96, 128, 256)
_MAX_BLOCK, _MAX_LAYERS, _MAX_TAPS = 32, 16, 8


@dataclass(frozen=True)
class DrafterConfig:
    """What the ops need to know of a drafter; sizes are those of the whole model, not of a shard.

    Attributes:
        block_size: T, the anchor included; mask_token_id: input id of the other block tokens.
        target_layer_ids: K tapped target layers, "after layer i", 0-based.
        windows: per layer the sliding window W (a key is visible at a distance < W), 0 where attention is full.
        causal: per layer, whether a block token sees only the block tokens up to itself.
        max_positions: positions the drafter was made for.
        attention_bias: whether q, k and v (and o, where the checkpoint has it) carry a bias.
        layout: where the values came from; it also decides the tensors' names.
        weight_format: of the layers' projections where they are quantised, else None.
    """

    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_positions: int
    windows: tuple[int, ...]
    causal: tuple[bool, ...]
    attention_bias: bool = False
    layout: Layout = "z-lab"
    weight_format: WeightFormat | None = None

    @property
    def num_context_features(self) -> int:
        """K, the number of tapped target layers."""
        return len(self.target_layer_ids)


def load_config(path: str | Path) -> DrafterConfig:
    """Read ``config.json`` of a drafter directory (or the file itself).

    Raises:
        ValueError: no such file, no JSON object, a missing or impossible value, or features that are not supported;
            the message names the file and the key, what was expected and what was found.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"drafter directory {path} must hold config.json, found none") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} could not be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(raw).__name__}")
    return parse_config(raw, str(file))


def parse_config(raw: dict[str, Any], source: str = "config.json") -> DrafterConfig:
    """:func:`load_config` for a dictionary; ``source`` is how errors call it."""
    reader = _Reader(raw, source)
    unsupported = _unsupported(reader)
    if unsupported:
        raise ValueError(f"{source}: this drafter has features that are not supported: {'; '.join(unsupported)}")
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    num_kv_heads = reader.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{source}: num_attention_heads must be a multiple of num_key_value_heads ({num_kv_heads}), got {num_heads}"
        )
    head_dim = reader.integer("head_dim", default=hidden_size // num_heads)
    num_layers = reader.integer("num_hidden_layers")
    max_positions = reader.integer("max_position_embeddings", default=32768)
    vocab_size = reader.integer("vocab_size")
    mask_token_id = reader.integer("mask_token_id", minimum=0)
    windows, causal = _attention_kinds(reader, num_layers)
    block_size = reader.integer("block_size", minimum=2, default=16)
    target_layer_ids = _target_layer_ids(reader, num_layers)
    if head_dim not in _HEAD_DIMS:
        raise ValueError(f"{source}: head_dim must be one of {_HEAD_DIMS}, got {head_dim}")
    for what, value, limit in (
        ("block_size", block_size, _MAX_BLOCK),
        ("num_hidden_layers", num_layers, _MAX_LAYERS),
        ("number of tapped layers", len(target_layer_ids), _MAX_TAPS),
    ):
        if value > limit:
            raise ValueError(f"{source}: {what} must be at most {limit}, got {value}")
    return DrafterConfig(
        block_size=block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=target_layer_ids,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        rms_norm_eps=reader.number("rms_norm_eps", default=1e-6),
        rope=_rope(reader, head_dim, max_positions),
        max_positions=max_positions,
        windows=windows,
        causal=causal,
        attention_bias=bool(reader.get("attention_bias", False)),
        layout=reader.layout,
        weight_format=_weight_format(reader),
    )


class _Reader:
    """Looks keys up where the layouts keep them: dflash_config, the top level, then the nested model config."""

    def __init__(self, raw: dict[str, Any], source: str) -> None:
        self.source = source
        nested = raw.get("transformer_layer_config")
        self.layout: Layout = "speculators" if nested is not None or "speculators_model_type" in raw else "z-lab"
        if self.layout == "z-lab":
            nested = raw.get("text_config")
        self._places = [place for place in (raw.get("dflash_config"), raw, nested) if place is not None]
        for place in self._places:
            if not isinstance(place, dict):
                raise ValueError(f"{source}: dflash_config and nested configs must be objects, got {place!r}")

    def get(self, key: str, default: Any = None) -> Any:
        """The first value that is not null."""
        for place in self._places:
            if place.get(key) is not None:
                return place[key]
        return default

    def integer(self, key: str, *, minimum: int = 1, default: Any = _MISSING) -> int:
        value = self.get(key, default)
        if value is _MISSING:
            raise ValueError(f"{self.source}: {key} must be given, found none")
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{self.source}: {key} must be an integer of at least {minimum}, got {value!r}")
        return value

    def number(self, key: str, *, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{self.source}: {key} must be a positive number, got {value!r}")
        return float(value)


def _target_layer_ids(reader: _Reader, num_layers: int) -> tuple[int, ...]:
    key, shift = ("aux_hidden_state_layer_ids", 1) if reader.layout == "speculators" else ("target_layer_ids", 0)
    ids = reader.get(key)
    if ids is None and reader.layout == "z-lab":
        # The published default: evenly spread from the second layer to the fourth from the end.
        count = reader.integer("num_target_layers", minimum=4)
        spread = [round(1 + i * (count - 4) / max(num_layers - 1, 1)) for i in range(num_layers)]
        ids = spread if num_layers > 1 else [count // 2]
    valid = isinstance(ids, list) and bool(ids) and all(type(i) is int and i >= shift for i in ids)
    if not valid or len(set(ids)) != len(ids):
        raise ValueError(
            f"{reader.source}: {key} must be a list of distinct layer ids of at least {shift}, got {ids!r}"
        )
    return tuple(i - shift for i in ids)


def _attention_kinds(reader: _Reader, num_layers: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Per layer (window, causal). A sliding layer is causal unless the config says otherwise, a full layer is not."""
    source = reader.source
    kinds = reader.get("layer_types")
    if kinds is None:
        # As Qwen3's config fills it in: sliding from max_window_layers on, if windows are in use at all.
        sliding = bool(reader.get("use_sliding_window", False)) and reader.get("sliding_window") is not None
        first = reader.integer("max_window_layers", minimum=0, default=28) if sliding else num_layers
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ValueError(f"{source}: layer_types must have one entry for each of {num_layers} layers, got {kinds!r}")
    odd = sorted({str(k) for k in kinds} - {"full_attention", "sliding_attention"})
    if odd:
        raise ValueError(f"{source}: layer_types must be full_attention or sliding_attention, got {', '.join(odd)}")
    window = 0
    if "sliding_attention" in kinds:
        if reader.get("use_sliding_window") is False:
            raise ValueError(f"{source}: use_sliding_window must be true with sliding layers in layer_types, got false")
        window = reader.integer("sliding_window")
    is_causal = reader.get("is_causal")
    if is_causal is None and reader.get("sliding_window_non_causal"):
        is_causal = False
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    causal = tuple(kind == "sliding_attention" if is_causal is None else bool(is_causal) for kind in kinds)
    return windows, causal


def _weight_format(reader: _Reader) -> WeightFormat | None:
    quantization = reader.get("quantization_config")
    return parse_quantization_config(quantization) if quantization else None


def _rope(reader: _Reader, head_dim: int, max_positions: int) -> RopeConfig:
    parameters = reader.get("rope_parameters") or reader.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{reader.source}: rope_parameters must be an object, got {parameters!r}")
    if "full_attention" in parameters:
        # One set for each kind of layer; a drafter has one table.
        sets = [value for value in parameters.values() if isinstance(value, dict)]
        if any(value != sets[0] for value in sets):
            raise ValueError(f"{reader.source}: rope_parameters must be the same for all layers, got {parameters!r}")
        parameters = sets[0]
    original = reader.get("original_max_position_embeddings")
    if original is not None:
        parameters = {**parameters, "original_max_position_embeddings": original}
    theta = parameters.get("rope_theta") or reader.get("rope_theta") or 10000.0
    partial = parameters.get("partial_rotary_factor") or reader.get("partial_rotary_factor") or 1.0
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", partial)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{reader.source}: {key} must be a number, got {value!r}")
    return parse_rope(
        parameters,
        theta=float(theta),
        head_dim=head_dim,
        partial_rotary_factor=float(partial),
        max_positions=max_positions,
        source=reader.source,
    )


def _unsupported(reader: _Reader) -> list[str]:
    """Every feature of the config that the ops do not compute."""
    get = reader.get
    found = []

    def note(present: Any, what: str) -> None:
        if present:
            found.append(what)

    kind = get("speculators_model_type", "dflash")
    note(kind != "dflash", f"speculators_model_type {kind}")
    activation = get("hidden_act", "silu")
    note(activation not in ("silu", "swish"), f"activation {activation}")
    architectures = " ".join(str(name) for name in get("architectures", []) or [])
    gated = get("gating", "Laguna" in architectures)
    note(gated and gated != "disabled", "gated attention")
    note("Laguna" in architectures, "a norm for each tapped layer")
    note(get("attention_sink_bias"), "attention sinks")
    note(get("attention_value_scale", 1.0) != 1.0, "scaled attention values")
    note(get("attn_logit_softcapping"), "soft-capped attention scores")
    note(get("final_logit_softcapping"), "soft-capped logits")
    note(get("input_embedding_scale", 1.0) != 1.0, "scaled embeddings")
    note(get("use_gemma_norm"), "norms with weight 1 + w")
    note(get("mlp_bias"), "MLP biases")
    note(get("rope_is_neox_style", get("is_neox_style", True)) is False, "interleaved rotary pairs")
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    note(any(get(key) for key in experts), "mixture of experts")
    note(get("has_embed_tokens"), "an embedding of its own")
    note(get("has_lm_head"), "an LM head of its own")
    note(get("conv_kernel_size") or get("conv_group_size"), "grouped convolutions (DFlash2)")
    note(get("selector_rank") or get("selector_top_k"), "a candidate selector (DFlash2)")
    projector = get("projector_type", "dflash")
    note(projector != "dflash", f"projector {projector}")
    note(get("sample_from_anchor") and reader.layout == "speculators", "sampling from the anchor's row")
    note(get("shift_label"), "shifted labels")
    try:
        _weight_format(reader)
    except ValueError as error:
        found.append(f"quantised weights ({error})")
    draft_vocab, vocab = get("draft_vocab_size"), get("vocab_size")
    note(draft_vocab is not None and draft_vocab != vocab, f"a vocabulary of its own ({draft_vocab} of {vocab} ids)")
    target_hidden, hidden = get("target_hidden_size"), get("hidden_size")
    note(
        target_hidden is not None and target_hidden != hidden,
        f"a target of another hidden size ({target_hidden}, drafter {hidden})",
    )
    return found

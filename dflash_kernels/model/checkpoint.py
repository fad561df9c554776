"""Reads a drafter's safetensors into stacked weights, and says exactly what is wrong with a file that does not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dflash_kernels.formats import QuantizedWeight, WeightFormat, concatenate, is_finite, stack
from dflash_kernels.model.config import DrafterConfig
from dflash_kernels.model.weights import DrafterWeights

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CODE_DTYPES = {"fp8": "F8_E4M3", "int4": "I32", "e2m1": "U8", "nvfp4": "U8"}
_SCALE_DTYPES = {"fp8": set(_DTYPES), "int4": {"BF16"}, "e2m1": {"BF16"}, "nvfp4": {"F8_E4M3"}}
# Other names under which the tensors are published.
_ALIASES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
# Copies of the target's weights and of its vocabulary map, which speculators files may carry.
_TARGET_COPIES = ("embed_tokens.weight", "lm_head.weight", "verifier_norm.weight", "verifier_lm_head.weight")
_VOCABULARY_MAPS = ("t2d", "d2t")
# Part of a name -> what it belongs to.
_UNSUPPORTED_TENSORS = {
    "g_proj": "gated attention",
    "aux_hidden_norms": "a norm for each tapped layer",
    "sink": "attention sinks",
    "expert": "mixture of experts",
    "attention_conv": "grouped convolutions (DFlash2)",
    "mlp_conv": "grouped convolutions (DFlash2)",
    "candidate_selector": "a candidate selector (DFlash2)",
    "prefix_gru": "the Domino projector",
    "embed_proj": "the Domino projector",
    "embed_tokens": "an embedding of its own",
    "lm_head": "an LM head of its own",
    "scale": "quantised weights",
    "qweight": "quantised weights",
}


class Files:
    """The open safetensors files of a checkpoint, and where each tensor lies."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._where: dict[str, tuple[Path, Any]] = {}
        for file, named in self._list().items():
            handle = self._open(file, stack)
            names = set(handle.keys())
            for name in sorted(named - names):
                raise ValueError(f"{file.name}: tensor {name} must be there as {INDEX_FILE} says, found none")
            self._where |= {_plain_name(name): (file, (handle, name)) for name in names}

    def _list(self) -> dict[Path, set[str]]:
        """Files to read, with the tensors that the index promises in each."""
        folder = self.folder
        if (folder / SINGLE_FILE).is_file():
            return {folder / SINGLE_FILE: set()}
        index = folder / INDEX_FILE
        if not index.is_file():
            pickles = sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLES)
            if pickles:
                raise ValueError(
                    f"drafter directory {folder} must hold {SINGLE_FILE}, got {pickles[0]}: pickled checkpoints "
                    "can run code and are refused; convert them to safetensors"
                )
            raise ValueError(f"drafter directory {folder} must hold {SINGLE_FILE} or {INDEX_FILE}, found neither")
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards: dict[Path, set[str]] = {}
            for name, shard in weight_map.items():
                if Path(shard).name != shard or not shard.endswith(".safetensors"):
                    raise ValueError(f"shards must be .safetensors files of the same directory, got {shard!r}")
                shards.setdefault(folder / shard, set()).add(name)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} must map tensors to files under weight_map: {error!r}") from error
        for file in shards:
            if not file.is_file():
                raise ValueError(f"{INDEX_FILE} names {file.name}, which is not in {folder}")
        return shards

    @staticmethod
    def _open(file: Path, stack: ExitStack) -> Any:
        try:
            return stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} must be a whole safetensors file, got {file.stat().st_size} bytes that are not: {error}"
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> set[str]:
        return set(self._where)

    def dtype(self, name: str) -> torch.dtype:
        """dtype in the file, checked to be one that is read."""
        file, (handle, stored) = self._find(name)
        code = str(handle.get_slice(stored).get_dtype())
        if code not in _DTYPES:
            raise ValueError(f"{file.name}: tensor {name} must be bf16, fp32 or fp16, got {code}")
        return _DTYPES[code]

    def copy_into(self, target: torch.Tensor, name: str) -> None:
        """Read a tensor into ``target``, whose shape it must have."""
        file, (handle, stored) = self._find(name)
        self.dtype(name)
        shape, expected = list(handle.get_slice(stored).get_shape()), list(target.shape)
        if shape != expected:
            raise ValueError(f"{file.name}: tensor {name} must have shape {expected}, got {shape}")
        target.copy_(handle.get_tensor(stored))

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is in the file."""
        _, (handle, stored) = self._find(name)
        return handle.get_tensor(stored)

    def stored_name(self, name: str) -> str:
        """The name that the file has for it."""
        return str(self._find(name)[1][1])

    def read_quantized(self, name: str, shape: tuple[int, ...], weight_format: WeightFormat) -> QuantizedWeight:
        """The codes and scales that stand for the tensor ``name`` (``... .weight``) of ``shape``."""
        f = weight_format
        f.check_columns(shape[1], f"{self.folder}: tensor {name}")
        codes_name = name if f.kind == "fp8" else name + "_packed"
        columns = f.code_columns(shape[1]) // (4 if f.kind == "int4" else 1)
        codes = self._read_checked(codes_name, (shape[0], columns), {_CODE_DTYPES[f.kind]}, f)
        scale = self._read_checked(name + "_scale", (shape[0], f.scale_columns(shape[1])), _SCALE_DTYPES[f.kind], f)
        shared = None
        if f.kind == "nvfp4":
            shared = self._read_checked(name + "_global_scale", (1,), {"F32"}, f).expand(shape[0], 1).contiguous()
        quantized = QuantizedWeight(f, codes.view(torch.uint8), scale.to(f.scale_dtype), shared)
        if not is_finite(quantized):
            raise ValueError(f"{self.folder}: tensor {name} must have finite codes and scales, got inf or nan")
        if f.kind == "int4" and name + "_shape" in self:
            told = self.read(name + "_shape").tolist()
            if told != list(shape):
                raise ValueError(f"{self.folder}: tensor {name}_shape must say {list(shape)}, got {told}")
        return quantized

    def _read_checked(self, name: str, shape: tuple[int, ...], dtypes: set[str], f: WeightFormat) -> torch.Tensor:
        file, (handle, stored) = self._find(name)
        part = handle.get_slice(stored)
        if part.get_dtype() not in dtypes:
            expected = " or ".join(sorted(dtypes))
            raise ValueError(f"{file.name}: tensor {name} must be {expected} in format {f}, got {part.get_dtype()}")
        if list(part.get_shape()) != list(shape):
            raise ValueError(f"{file.name}: tensor {name} must have shape {list(shape)}, got {part.get_shape()}")
        return handle.get_tensor(stored)

    def _find(self, name: str) -> tuple[Path, Any]:
        if name not in self._where:
            raise ValueError(f"{self.folder}: tensor {name} must be in the checkpoint, found none")
        return self._where[name]


def _plain_name(name: str) -> str:
    name = name.removeprefix("model.")
    return _ALIASES.get(name, name)


def load_weights(path: str | Path, config: DrafterConfig, dtype: torch.dtype | None = None) -> DrafterWeights:
    """Read and stack a drafter's tensors on the CPU.

    Quantised projections are there twice: dequantised to ``dtype``, and as codes and scales in ``quantized``.

    Args:
        path: directory with ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.
        dtype: of the result; None: the file's, bf16 where that is fp16 or quantised.

    Raises:
        ValueError: pickles, a truncated or missing file, a missing, unknown or misshapen tensor, another dtype.
    """
    folder = Path(path)
    with ExitStack() as stack:
        files = Files(folder, stack)
        if dtype is None:
            dtype = files.dtype("hidden_norm.weight")
            dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        return _Packer(files, config, dtype).pack()


class _Packer:
    """Fills the stacked tensors, and notes which tensors of the files it used."""

    def __init__(self, files: Files, config: DrafterConfig, dtype: torch.dtype) -> None:
        self.files, self.config, self.dtype = files, config, dtype
        self.used: set[str] = set()
        self.quantized: dict[str, QuantizedWeight] = {}

    def pack(self) -> DrafterWeights:
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        attention, mlp = "self_attn.", "mlp."
        qkv_names = [attention + f"{p}_proj" for p in "qkv"]
        qkv_weight = self._projection(
            "qkv_weight", [f"{n}.weight" for n in qkv_names], [(q, c.hidden_size)] + 2 * [(kv, c.hidden_size)]
        )
        qkv_bias = o_bias = q_norm = k_norm = None
        if c.attention_bias:
            qkv_bias = self._stack([f"{n}.bias" for n in qkv_names], [(q,), (kv,), (kv,)])
            if self._in_first_layer(attention + "o_proj.bias"):
                o_bias = self._stack([attention + "o_proj.bias"], [(c.hidden_size,)])
        if self._in_first_layer(attention + "q_norm.weight"):
            q_norm = self._stack([attention + "q_norm.weight"], [(c.head_dim,)])
        if self._in_first_layer(attention + "k_norm.weight"):
            k_norm = self._stack([attention + "k_norm.weight"], [(c.head_dim,)])
        mlp_shape = (c.intermediate_size, c.hidden_size)
        weights = DrafterWeights(
            fc_weight=self._single("fc.weight", (c.hidden_size, c.num_context_features * c.hidden_size)),
            hidden_norm=self._single("hidden_norm.weight", (c.hidden_size,)),
            kv_weight=qkv_weight[:, q:].contiguous(),
            kv_bias=None if qkv_bias is None else qkv_bias[:, q:].contiguous(),
            input_norm=self._stack(["input_layernorm.weight"], [(c.hidden_size,)]),
            qkv_weight=qkv_weight,
            qkv_bias=qkv_bias,
            q_norm=q_norm,
            k_norm=k_norm,
            o_weight=self._projection("o_weight", [attention + "o_proj.weight"], [(c.hidden_size, q)]),
            o_bias=o_bias,
            post_norm=self._stack(["post_attention_layernorm.weight"], [(c.hidden_size,)]),
            gate_up_weight=self._projection(
                "gate_up_weight", [mlp + "gate_proj.weight", mlp + "up_proj.weight"], [mlp_shape, mlp_shape]
            ),
            down_weight=self._projection(
                "down_weight", [mlp + "down_proj.weight"], [(c.hidden_size, c.intermediate_size)]
            ),
            final_norm=self._single("norm.weight", (c.hidden_size,)),
            quantized=self.quantized or None,
        )
        self._check_rest()
        return weights

    def _in_first_layer(self, name: str) -> bool:
        return f"layers.0.{name}" in self.files

    def _projection(self, field: str, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """As :meth:`_stack`, from codes and scales, which are kept as ``field``, where the checkpoint has them."""
        if self.config.weight_format is None:
            return self._stack(names, shapes)
        layers = []
        for layer in range(self.config.num_layers):
            full = [f"layers.{layer}.{name}" for name in names]
            layers.append(concatenate([self._read_quantized(n, s) for n, s in zip(full, shapes, strict=True)]))
        self.quantized[field] = stack(layers)
        return self.quantized[field].dequantize(self.dtype)

    def _read_quantized(self, name: str, shape: tuple[int, ...]) -> QuantizedWeight:
        assert self.config.weight_format is not None
        self.used |= {name, name + "_packed", name + "_scale", name + "_shape", name + "_global_scale"}
        self.used.add(name.removesuffix("weight") + "input_global_scale")  # activations get their scales as they come
        return self.files.read_quantized(name, shape, self.config.weight_format)

    def _single(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if self.config.weight_format is not None and name + "_scale" in self.files:
            return self._read_quantized(name, shape).dequantize(self.dtype)
        tensor = torch.empty(shape, dtype=self.dtype)
        self.files.copy_into(tensor, name)
        self.used.add(name)
        return tensor

    def _stack(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """``[L, sum of the shapes' first sizes, ...]``: each layer's named tensors, one under the other."""
        rows = [shape[0] for shape in shapes]
        stacked = torch.empty((self.config.num_layers, sum(rows), *shapes[0][1:]), dtype=self.dtype)
        for layer in range(self.config.num_layers):
            for name, part in zip(names, stacked[layer].split(rows), strict=True):
                full = f"layers.{layer}.{name}"
                self.files.copy_into(part, full)
                self.used.add(full)
        return stacked

    def _check_rest(self) -> None:
        """Tensors nobody asked for belong to another model, or to features that would be silently left out."""
        rest = {name for name in self.files.names() - self.used if not name.endswith("rotary_emb.inv_freq")}
        if self.config.layout == "speculators":
            rest -= {*_TARGET_COPIES, *_VOCABULARY_MAPS}
        if not rest:
            return
        features = {what for part, what in _UNSUPPORTED_TENSORS.items() if any(part in name for name in rest)}
        shown = ", ".join(sorted(rest)[:4]) + (", ..." if len(rest) > 4 else "")
        reason = f"features that are not supported: {'; '.join(sorted(features))}" if features else "unknown tensors"
        raise ValueError(f"{self.files.folder}: the checkpoint has {reason} ({len(rest)} tensors: {shown})")

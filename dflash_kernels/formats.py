"""Formats of quantised weights: what the codes mean, how they lie in memory, and how a checkpoint's config tells them.

A weight ``[N, K]`` (N output channels) is ``code * scale``: one scale an output channel (fp8), or one for each group of
64 or 128 neighbours along K (4 bits). The products are exact in float32: a kernel multiplies activations with the
codes, which bf16 holds exactly, and applies the scale to the float32 sum, so nothing is rounded on the way. For more
rows than stream (32), a GPU multiplies fp8 codes with activations in fp8, which have a scale for each token
(`draft_forward_fp8`; for more than 64 rows of an LM head, `lm_head_argmax_fp8`): these are rounded on the way, so a
draft may differ from that of few rows.

On disk the layout is that of the package `compressed-tensors`, whose ``quantization_config`` SGLang and vLLM read:

=====  =====================================  ==============================  =================
kind   codes                                  scales                          format
=====  =====================================  ==============================  =================
fp8    ``weight`` F8_E4M3 [N, K]              ``weight_scale`` [N, 1]         float-quantized
int4   ``weight_packed`` I32 [N, K / 8]       ``weight_scale`` [N, K / G]     pack-quantized
e2m1   ``weight_packed`` U8 [N, K / 2]        ``weight_scale`` [N, K / G]     fp4-pack-quantized
=====  =====================================  ==============================  =================

4-bit codes lie from the low bits up; int4 is stored with 8 added, and has its shape in ``weight_shape`` I64 [2].
The last format's name is this package's: what is published for e2m1 (nvfp4, mxfp4) has groups of 16 and 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

Kind = Literal["fp8", "int4", "e2m1"]
GROUP_SIZES = (64, 128)
# fp8 is torch's float8_e4m3fn. int4 holds value + 8; e2m1 a sign, two bits of exponent and one of mantissa.
INT4_VALUES = tuple(float(code - 8) for code in range(16))
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0) + (-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_STORED_AS: dict[Kind, str] = {"fp8": "float-quantized", "int4": "pack-quantized", "e2m1": "fp4-pack-quantized"}


@dataclass(frozen=True)
class WeightFormat:
    """What codes mean and how many share a scale.

    Attributes:
        kind: "fp8" (e4m3), "int4" (-8..7) or "e2m1".
        group_size: 64 or 128 along K for 4-bit codes; None for fp8, which has a scale for each output channel.
    """

    kind: Kind
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _STORED_AS:
            raise ValueError(f"weight format must be one of {', '.join(_STORED_AS)}, got {self.kind}")
        if self.kind == "fp8" and self.group_size is not None:
            raise ValueError(f"fp8 has a scale for each output channel: group_size must be None, got {self.group_size}")
        if self.kind != "fp8" and self.group_size not in GROUP_SIZES:
            raise ValueError(f"{self.kind}: group_size must be 64 or 128, got {self.group_size}")

    def __str__(self) -> str:
        return self.kind if self.group_size is None else f"{self.kind}-g{self.group_size}"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.kind == "fp8" else 4

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype of the scales in memory: float32 an output channel, bf16 a group."""
        return torch.float32 if self.kind == "fp8" else torch.bfloat16

    def code_columns(self, columns: int) -> int:
        """Bytes of codes in a row of ``columns`` weights."""
        return columns * self.bits // 8

    def scale_columns(self, columns: int) -> int:
        """Scales of a row of ``columns`` weights."""
        return 1 if self.group_size is None else columns // self.group_size

    def check_columns(self, columns: int, what: str) -> None:
        """Raises ValueError if groups do not divide ``columns``."""
        if self.group_size is not None and columns % self.group_size:
            fitting = [size for size in GROUP_SIZES if columns % size == 0]
            hint = f" (groups of {fitting[0]} fit)" if fitting else ""
            raise ValueError(
                f"{what}: columns must be a multiple of the group size {self.group_size}, got {columns}{hint}"
            )

    @classmethod
    def parse(cls, name: str) -> WeightFormat:
        """The format that ``str`` gives: "fp8", "int4-g64", "int4-g128", "e2m1-g64" or "e2m1-g128"."""
        kind, _, group = name.partition("-g")
        if kind not in _STORED_AS or (group and not group.isdecimal()):
            names = ", ".join(["fp8", *(f"{kind}-g{size}" for kind in ("int4", "e2m1") for size in GROUP_SIZES)])
            raise ValueError(f"weight format must be one of {names}, got {name}")
        return cls(kind, int(group) if group else None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes and scales of a weight ``[..., N, K]``.

    Attributes:
        codes: uint8 [..., N, K], or [..., N, K / 2] with two 4-bit codes a byte, the even column's in the low half.
        scale: fp8: float32 [..., N, 1]; 4 bits: bf16 [..., N, K / group_size].
    """

    format: WeightFormat
    codes: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        f = self.format
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"{f}: codes must be uint8, got {_name(self.codes.dtype)}")
        if self.scale.dtype != f.scale_dtype:
            raise ValueError(f"{f}: scale must be {_name(f.scale_dtype)}, got {_name(self.scale.dtype)}")
        columns = self.codes.shape[-1] * 8 // f.bits
        f.check_columns(columns, str(f))
        expected = [*self.codes.shape[:-1], f.scale_columns(columns)]
        if list(self.scale.shape) != expected:
            raise ValueError(f"{f}: scale must have shape {expected}, got {list(self.scale.shape)}")

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight itself."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.format.bits))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def values(self) -> torch.Tensor:
        """What the codes stand for, without scales: float32 ``[..., N, K]``; exact in bf16 as well."""
        if self.format.kind == "fp8":
            return self.codes.view(torch.float8_e4m3fn).float()
        table = torch.tensor(INT4_VALUES if self.format.kind == "int4" else E2M1_VALUES, device=self.codes.device)
        return table[split_nibbles(self.codes).int()]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``code * scale``, computed in float32 and rounded to ``dtype``; contiguous."""
        values = self.values()
        groups = values.view(*self.scale.shape, -1)
        return (groups * self.scale.float()[..., None]).view(values.shape).to(dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight elsewhere."""
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))

    def __getitem__(self, layer: int) -> QuantizedWeight:
        """One of a stack."""
        return replace(self, codes=self.codes[layer], scale=self.scale[layer])

    def rows(self, *parts: slice) -> QuantizedWeight:
        """The output channels of the slices, one after the other."""
        codes = torch.cat([self.codes[..., part, :] for part in parts], dim=-2)
        return replace(self, codes=codes, scale=torch.cat([self.scale[..., part, :] for part in parts], dim=-2))

    def columns(self, start: int, stop: int) -> QuantizedWeight:
        """Columns ``start`` to ``stop``.

        Raises:
            ValueError: they begin or end inside a group.
        """
        f = self.format
        for edge in (start, stop):
            f.check_columns(edge, f"{f}: the edge of a part")
        codes = self.codes[..., f.code_columns(start) : f.code_columns(stop)].contiguous()
        if f.group_size is None:
            return replace(self, codes=codes)
        return replace(
            self, codes=codes, scale=self.scale[..., start // f.group_size : stop // f.group_size].contiguous()
        )

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors of a two-dimensional weight as they lie in a file, by the ends of their names."""
        if self.format.kind == "fp8":
            return {"weight": self.codes.view(torch.float8_e4m3fn), "weight_scale": self.scale}
        packed = {"weight_packed": self.codes, "weight_scale": self.scale}
        if self.format.kind == "int4":
            packed["weight_packed"] = self.codes.view(torch.int32)
            packed["weight_shape"] = torch.tensor(list(self.shape), dtype=torch.int64)
        return packed


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Equal weights of L layers as one, L in front."""
    first = weights[0]
    return replace(first, codes=torch.stack([w.codes for w in weights]), scale=torch.stack([w.scale for w in weights]))


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights with the same columns, one under the other."""
    first = weights[0]
    return replace(
        first, codes=torch.cat([w.codes for w in weights], -2), scale=torch.cat([w.scale for w in weights], -2)
    )


def split_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 ``[..., n]`` with two codes a byte as uint8 ``[..., 2 n]`` with one."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def join_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`split_nibbles`."""
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


# -- the config -----------------------------------------------------------------------------------------------------


def quantization_config(weight_format: WeightFormat, ignore: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` of a checkpoint whose linear layers, but for ``ignore``, are in ``weight_format``."""
    f = weight_format
    weights = {
        "num_bits": f.bits,
        "type": "int" if f.kind == "int4" else "float",
        "strategy": "channel" if f.group_size is None else "group",
        "group_size": f.group_size,
        "symmetric": True,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": _STORED_AS[f.kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


def parse_quantization_config(config: Any) -> WeightFormat:
    """The format that a ``quantization_config`` describes.

    Activations that were to be quantised as they come are left as they are: this can only be more exact.

    Raises:
        ValueError: anything else than the three formats, naming the first key that does not fit.
    """
    if not isinstance(config, dict):
        raise ValueError(f"quantization_config must be an object, got {config!r}")
    method = config.get("quant_method") or config.get("quant_algo") or "unknown method"
    if method != "compressed-tensors":
        raise ValueError(f"{method}; compressed-tensors is read")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ValueError(f"compressed-tensors with one config group is read, got {groups!r}")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f"compressed-tensors must describe the weights, got {group!r}")
    if config.get("kv_cache_scheme"):
        raise ValueError("a quantised KV cache")
    if config.get("sparsity_config"):
        raise ValueError("sparse weights")
    for key in ("input_activations", "output_activations"):
        scheme = group.get(key)
        if scheme and not (isinstance(scheme, dict) and scheme.get("dynamic") is True):
            raise ValueError(f"{key} with scales of their own")
    for key, expected in (("symmetric", True), ("dynamic", False)):
        if weights.get(key, expected) is not expected:
            raise ValueError(f"weights must have {key} = {expected}, got {weights[key]!r}")
    if weights.get("actorder"):
        raise ValueError(f"columns in another order (actorder {weights['actorder']!r})")
    described = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"), weights.get("group_size"))
    kinds: dict[tuple[Any, ...], Kind] = {
        (8, "float", "channel"): "fp8",
        (4, "int", "group"): "int4",
        (4, "float", "group"): "e2m1",
    }
    kind = kinds.get(described[:3])
    if kind is None or (kind != "fp8" and described[3] not in GROUP_SIZES):
        raise ValueError(
            "weights must be 8-bit float with a scale a channel, or 4-bit int or float in groups of 64 or 128, got "
            f"num_bits {described[0]}, type {described[1]}, strategy {described[2]}, group_size {described[3]}"
        )
    stored_as = config.get("format", _STORED_AS[kind])
    if stored_as != _STORED_AS[kind]:
        raise ValueError(f"such weights must be stored as {_STORED_AS[kind]}, got {stored_as}")
    return WeightFormat(kind, None if kind == "fp8" else described[3])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_finite(weight: QuantizedWeight) -> bool:
    """Whether no code is NaN and every scale is finite."""
    nan = weight.format.kind == "fp8" and bool(((weight.codes & 0x7F) == 0x7F).any())
    return not nan and bool(torch.isfinite(weight.scale).all())

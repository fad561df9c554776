"""Formats of quantised weights: what the codes mean, how they lie in memory, and how a checkpoint's config tells them.

A weight ``[N, K]`` (N output channels) is ``code * scale``: one scale an output channel (fp8), or one for each group of
64 or 128 neighbours along K (4 bits). The products are exact in float32: a kernel multiplies activations with the
codes, which bf16 holds exactly, and applies the scale to the float32 sum, so nothing is rounded on the way. For more
rows than stream (32), a GPU multiplies fp8 codes with activations in fp8, which have a scale for each token
(`draft_forward_fp8`; for more than 64 rows of an LM head, `lm_head_argmax_fp8`): these are rounded on the way, so a
draft may differ from that of few rows.

nvfp4 is e2m1 in groups of 16 whose scales are e4m3, with one float32 a tensor behind them: ``code * scale /
global_scale``. Only the tensor cores of compute capability 10.x multiply it, with activations in the same format
(`gemm_nvfp4`); no kernel streams it, and elsewhere it runs dequantised. In memory and on disk its scales are plain;
:func:`scale_blocks` makes the order that the tensor cores read.

On disk the layout is that of the package `compressed-tensors`, whose ``quantization_config`` SGLang and vLLM read:

=====  =====================================  =======================================  ====================
kind   codes                                  scales                                   format
=====  =====================================  =======================================  ====================
fp8    ``weight`` F8_E4M3 [N, K]              ``weight_scale`` [N, 1]                  float-quantized
int4   ``weight_packed`` I32 [N, K / 8]       ``weight_scale`` [N, K / G]              pack-quantized
e2m1   ``weight_packed`` U8 [N, K / 2]        ``weight_scale`` [N, K / G]              fp4-pack-quantized
nvfp4  ``weight_packed`` U8 [N, K / 2]        ``weight_scale`` F8_E4M3 [N, K / 16],    nvfp4-pack-quantized
                                              ``weight_global_scale`` F32 [1]
=====  =====================================  =======================================  ====================

4-bit codes lie from the low bits up; int4 is stored with 8 added, and has its shape in ``weight_shape`` I64 [2].
fp4-pack-quantized is this package's name: what is published for e2m1 (nvfp4, mxfp4) has groups of 16 and 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

Kind = Literal["fp8", "int4", "e2m1", "nvfp4"]
GROUP_SIZES = (64, 128)
NVFP4_GROUP = 16
# fp8 is torch's float8_e4m3fn. int4 holds value + 8; e2m1 a sign, two bits of exponent and one of mantissa.
INT4_VALUES = tuple(float(code - 8) for code in range(16))
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0) + (-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_STORED_AS: dict[Kind, str] = {
    "fp8": "float-quantized",
    "int4": "pack-quantized",
    "e2m1": "fp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}


@dataclass(frozen=True)
class WeightFormat:
    """What codes mean and how many share a scale.

    Attributes:
        kind: "fp8" (e4m3), "int4" (-8..7), "e2m1" or "nvfp4".
        group_size: 64 or 128 along K for int4 and e2m1, 16 for nvfp4; None for fp8, which has a scale for each output
            channel.
    """

    kind: Kind
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _STORED_AS:
            raise ValueError(f"weight format must be one of {', '.join(_STORED_AS)}, got {self.kind}")
        if self.kind == "fp8" and self.group_size is not None:
            raise ValueError(f"fp8 has a scale for each output channel: group_size must be None, got {self.group_size}")
        if self.kind == "nvfp4" and self.group_size != NVFP4_GROUP:
            raise ValueError(f"nvfp4: group_size must be {NVFP4_GROUP}, got {self.group_size}")
        if self.kind in ("int4", "e2m1") and self.group_size not in GROUP_SIZES:
            raise ValueError(f"{self.kind}: group_size must be 64 or 128, got {self.group_size}")

    def __str__(self) -> str:
        return f"{self.kind}-g{self.group_size}" if self.kind in ("int4", "e2m1") else self.kind

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.kind == "fp8" else 4

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype of the scales in memory: float32 an output channel, bf16 a group, e4m3 a group of nvfp4."""
        return {"fp8": torch.float32, "nvfp4": torch.float8_e4m3fn}.get(self.kind, torch.bfloat16)

    @property
    def streams(self) -> bool:
        """Whether the kernels that stream weights for few rows read it."""
        return self.kind != "nvfp4"

    def code_columns(self, columns: int) -> int:
        """Bytes of codes in a row of ``columns`` weights."""
        return columns * self.bits // 8

    def scale_columns(self, columns: int) -> int:
        """Scales of a row of ``columns`` weights."""
        return 1 if self.group_size is None else columns // self.group_size

    def check_columns(self, columns: int, what: str) -> None:
        """Raises ValueError if groups do not divide ``columns``."""
        if self.group_size is not None and columns % self.group_size:
            fitting = [size for size in GROUP_SIZES if columns % size == 0 and self.kind != "nvfp4"]
            hint = f" (groups of {fitting[0]} fit)" if fitting else ""
            raise ValueError(
                f"{what}: columns must be a multiple of the group size {self.group_size}, got {columns}{hint}"
            )

    @classmethod
    def parse(cls, name: str) -> WeightFormat:
        """The format that ``str`` gives: "fp8", "int4-g64", "int4-g128", "e2m1-g64", "e2m1-g128" or "nvfp4"."""
        kind, _, group = name.partition("-g")
        if kind not in _STORED_AS or (group and not group.isdecimal()):
            grouped = [f"{kind}-g{size}" for kind in ("int4", "e2m1") for size in GROUP_SIZES]
            raise ValueError(f"weight format must be one of {', '.join(['fp8', *grouped, 'nvfp4'])}, got {name}")
        if name == "nvfp4":
            return cls("nvfp4", NVFP4_GROUP)
        return cls(kind, int(group) if group else None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes and scales of a weight ``[..., N, K]``.

    Attributes:
        codes: uint8 [..., N, K], or [..., N, K / 2] with two 4-bit codes a byte, the even column's in the low half.
        scale: fp8: float32 [..., N, 1]; 4 bits: bf16 [..., N, K / group_size]; nvfp4: float8_e4m3fn [..., N, K / 16].
        global_scale: nvfp4: float32 [..., N, 1], what the tensor's scales are divided by, for each of its rows, so that
            tensors one under the other keep theirs; else None.
    """

    format: WeightFormat
    codes: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None = None

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
        if (self.global_scale is None) == (f.kind == "nvfp4"):
            raise ValueError(f"{f}: global_scale must be {'a tensor' if f.kind == 'nvfp4' else 'None'}")
        if self.global_scale is not None:
            got, expected = self.global_scale, [*self.codes.shape[:-1], 1]
            if got.dtype != torch.float32 or list(got.shape) != expected:
                raise ValueError(
                    f"{f}: global_scale must be float32 {expected}, got {_name(got.dtype)} {list(got.shape)}"
                )

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedWeight:
        """The same done to codes and scales."""
        shared = None if self.global_scale is None else change(self.global_scale)
        return replace(self, codes=change(self.codes), scale=change(self.scale), global_scale=shared)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight itself."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.format.bits))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.nbytes for t in (self.codes, self.scale, self.global_scale) if t is not None)

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
        scale = self.scale.float()
        if self.global_scale is not None:
            scale = scale / self.global_scale
        return (groups * scale[..., None]).view(values.shape).to(dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight elsewhere."""
        return self._map(lambda t: t.to(device))

    def __getitem__(self, at: int | torch.Tensor) -> QuantizedWeight:
        """One of a stack, or rows of a single weight."""
        return self._map(lambda t: t[at])

    def rows(self, *parts: slice) -> QuantizedWeight:
        """The output channels of the slices, one after the other."""
        return self._map(lambda t: torch.cat([t[..., part, :] for part in parts], dim=-2))

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
        if self.global_scale is not None:
            packed["weight_global_scale"] = self.global_scale[0].clone()
        return packed


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Equal weights of L layers as one, L in front."""
    return _joined(weights, torch.stack)


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights with the same columns, one under the other."""
    return _joined(weights, lambda parts: torch.cat(parts, -2))


def _joined(weights: Sequence[QuantizedWeight], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> QuantizedWeight:
    shared = [w.global_scale for w in weights if w.global_scale is not None]
    return replace(
        weights[0],
        codes=join([w.codes for w in weights]),
        scale=join([w.scale for w in weights]),
        global_scale=join(shared) if shared else None,
    )


def split_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 ``[..., n]`` with two codes a byte as uint8 ``[..., 2 n]`` with one."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def join_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`split_nibbles`."""
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def scale_blocks(scale: torch.Tensor, gated: bool = False) -> torch.Tensor:
    """Scales of nvfp4 in the order that tcgen05 reads (``.scale_vec::4X``), as `gemm_nvfp4` takes them.

    Each block of 128 rows and 4 scales along K is 512 bytes, and the scale of its row r and group g byte
    ``16 * (r % 32) + 4 * (r // 32) + g``; edges are filled up with zeros. cuBLAS, torch and vLLM have the same layout.

    Args:
        scale: float8_e4m3fn or uint8 ``[..., N, K / 16]``.
        gated: of a gate and, below it, an up projection of as many rows: a block is 64 rows of the first and then the
            same 64 of the second, as a tile of `gemm_nvfp4` with ``gated`` has them.

    Returns:
        uint8 ``[..., ceil(N / 128), ceil(K / 64), 512]``; gated: ``[..., ceil(N / 2 / 64), ceil(K / 64), 512]``.
    """
    codes = scale.view(torch.uint8)
    halves = codes.unflatten(-2, (2, -1)) if gated else codes[..., None, :, :]
    unit = 64 if gated else 128
    rows, groups = halves.shape[-2:]
    padded = F.pad(halves, (0, -groups % 4, 0, -rows % unit))
    blocks = padded.unflatten(-1, (-1, 4)).unflatten(-3, (-1, unit)).transpose(-5, -4).flatten(-4, -3)
    #      [..., block, 128, K / 64, 4]       quarter, row of 32, K / 64 -> K / 64, row of 32, quarter
    return blocks.unflatten(-3, (4, 32)).transpose(-4, -2).flatten(-3).contiguous()


def plain_scales(blocks: torch.Tensor, rows: int, groups: int, gated: bool = False) -> torch.Tensor:
    """The inverse of :func:`scale_blocks`: uint8 ``[..., rows, groups]``."""
    whole = blocks.unflatten(-1, (32, 4, 4)).transpose(-4, -2).flatten(-4, -3).flatten(-2)
    if not gated:
        return whole.flatten(-3, -2)[..., :rows, :groups].contiguous()
    halves = whole.unflatten(-2, (2, 64)).transpose(-4, -3).flatten(-3, -2)
    return halves[..., : rows // 2, :groups].flatten(-3, -2).contiguous()


# -- the config -----------------------------------------------------------------------------------------------------


def quantization_config(weight_format: WeightFormat, ignore: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` of a checkpoint whose linear layers, but for ``ignore``, are in ``weight_format``."""
    f = weight_format
    weights = {
        "num_bits": f.bits,
        "type": "int" if f.kind == "int4" else "float",
        "strategy": {"fp8": "channel", "nvfp4": "tensor_group"}.get(f.kind, "group"),
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
        ValueError: anything else than the four formats, naming the first key that does not fit.
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
        if scheme and not (isinstance(scheme, dict) and scheme.get("dynamic") in (True, "local")):
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
        (4, "float", "tensor_group"): "nvfp4",
    }
    kind = kinds.get(described[:3])
    sizes = (NVFP4_GROUP,) if kind == "nvfp4" else GROUP_SIZES
    if kind is None or (kind != "fp8" and described[3] not in sizes):
        raise ValueError(
            "weights must be 8-bit float with a scale a channel, 4-bit int or float in groups of 64 or 128, or 4-bit "
            f"float with strategy tensor_group in groups of 16, got num_bits {described[0]}, type {described[1]}, "
            f"strategy {described[2]}, group_size {described[3]}"
        )
    stored_as = config.get("format", _STORED_AS[kind])
    if stored_as != _STORED_AS[kind]:
        raise ValueError(f"such weights must be stored as {_STORED_AS[kind]}, got {stored_as}")
    return WeightFormat(kind, None if kind == "fp8" else described[3])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_finite(weight: QuantizedWeight) -> bool:
    """Whether no code is NaN, every scale is finite, and what scales are divided by is finite and positive."""
    nan = weight.format.kind == "fp8" and bool(((weight.codes & 0x7F) == 0x7F).any())
    shared = weight.global_scale
    divides = shared is None or bool((torch.isfinite(shared) & (shared > 0)).all())
    return not nan and divides and bool(torch.isfinite(weight.scale.float()).all())

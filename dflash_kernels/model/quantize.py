"""Quantised drafters from bf16 checkpoints: `quantize` for a tensor, `quantize_drafter` for a directory.

The projections of the layers are quantised, which are nearly all bytes of a forward pass. Norms, biases, `fc` (it
takes the target's hidden states with their outliers, once for each committed token) and what a checkpoint carries of
its target keep their values. The drafter's quality decides only how many of its tokens are accepted; the text is the
target's in any case.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from dflash_kernels.formats import (
    E2M1_VALUES,
    QuantizedWeight,
    WeightFormat,
    join_nibbles,
    quantization_config,
)
from dflash_kernels.model.checkpoint import SINGLE_FILE, Files, load_weights
from dflash_kernels.model.config import load_config

_QUANTIZED = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
_E4M3_MAX = 448.0
# Largest code by which a group's largest weight is divided.
_TOP = {"int4": 7.0, "e2m1": 6.0, "nvfp4": 6.0}
# A smaller scale clips the largest weight of a group and is finer for all others: each group takes the best of these.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_E2M1_EDGES = tuple((a + b) / 2 for a, b in zip(E2M1_VALUES[:7], E2M1_VALUES[1:8], strict=True))


def quantize(weight: torch.Tensor, weight_format: WeightFormat) -> QuantizedWeight:
    """Quantise ``weight [..., N, K]``, symmetric around zero.

    fp8: the scale takes a channel's largest weight to 448, codes are rounded to nearest even. 4 bits: of seven scales
    a group gets the one with the smallest sum of squared errors; the largest code is 7 (int4, which also has -8) or 6.
    nvfp4: ``global_scale`` takes the largest weight of ``[N, K]`` to 6 * 448, and scales are rounded to e4m3.

    Raises:
        ValueError: no float tensor of two or more dimensions, K no multiple of the group size, or a value that is not
            finite.
    """
    if not weight.is_floating_point() or weight.dim() < 2:
        raise ValueError(
            f"quantize: weight must be a float tensor with at least 2 dimensions, got {weight.dtype} "
            f"{list(weight.shape)}"
        )
    weight_format.check_columns(weight.shape[-1], "quantize: weight")
    if not torch.isfinite(weight).all():
        raise ValueError("quantize: weight must be finite, got inf or nan")
    wide = weight.float()
    if weight_format.kind == "fp8":
        scale = _nonzero(wide.abs().amax(-1, keepdim=True) / _E4M3_MAX)
        codes = (wide / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
        return QuantizedWeight(weight_format, codes.view(torch.uint8), scale)
    groups = wide.unflatten(-1, (-1, weight_format.group_size or 0))
    largest = _nonzero(groups.abs().amax(-1, keepdim=True) / _TOP[weight_format.kind])
    shared = None
    if weight_format.kind == "nvfp4":
        top = _TOP["nvfp4"] * _E4M3_MAX
        most = wide.abs().amax((-2, -1), keepdim=True)
        shared = top / torch.where(most < 2.0**-88, top, most)
    best = torch.full_like(largest, torch.inf)
    best_scale = torch.ones_like(largest, dtype=weight_format.scale_dtype)
    best_codes = torch.zeros_like(groups, dtype=torch.uint8)
    for shrink in _SHRINK:
        if shared is None:
            scale = (largest * shrink).bfloat16()
            step = scale.float()
        else:
            scale = (largest * shrink * shared[..., None]).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn)
            step = scale.float() / shared[..., None]
        codes, values = _round_4_bit(groups / torch.where(step == 0.0, torch.inf, step), weight_format)
        error = ((values * step - groups) / largest).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better, codes, best_codes)
    if shared is not None:
        shared = shared.expand(*wide.shape[:-1], 1).contiguous()
    return QuantizedWeight(weight_format, join_nibbles(best_codes.flatten(-2)), best_scale.squeeze(-1), shared)


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """Scales so small that dividing by them overflows, zero among them, become 1: such weights are then zero."""
    return torch.where(scale < 2.0**-100, 1.0, scale)


def _round_4_bit(x: torch.Tensor, weight_format: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the nearest values, and those values."""
    if weight_format.kind == "int4":
        values = x.round().clamp(-8, 7)
        return (values + 8).to(torch.uint8), values
    magnitude = torch.bucketize(x.abs(), torch.tensor(_E2M1_EDGES, device=x.device))  # ties go to the smaller
    codes = torch.where((x < 0) & (magnitude > 0), magnitude + 8, magnitude)
    return codes.to(torch.uint8), torch.tensor(E2M1_VALUES, device=x.device)[codes]


@dataclass(frozen=True)
class PackReport:
    """What :func:`quantize_drafter` did.

    Attributes:
        tensors: tensors that were quantised; kept: tensors that were copied.
        bytes_before, bytes_after: of all tensors.
        error: root mean square of the rounding, relative to that of the quantised weights.
    """

    tensors: int
    kept: int
    bytes_before: int
    bytes_after: int
    error: float


def quantize_drafter(path: str | Path, out: str | Path, weight_format: WeightFormat) -> PackReport:
    """Write the drafter of directory ``path`` to directory ``out`` with its projections in ``weight_format``.

    Float tensors that stay are stored in bf16. The config comes last, so that a directory left half-written is no
    drafter.

    Raises:
        ValueError: ``path`` is no drafter that :func:`load_drafter` reads, or is quantised already; ``out`` is not
            empty; a projection that groups do not divide, or values that are not finite.
    """
    path, out = Path(path), Path(out)
    config = load_config(path)
    if config.weight_format is not None:
        raise ValueError(f"{path}: weights must be bf16, fp16 or fp32 to be quantised, got {config.weight_format}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} must be a new or an empty directory, got one with files in it")
    load_weights(path, config)  # says what is wrong with the checkpoint, if anything is
    tensors: dict[str, torch.Tensor] = {}
    count, before, signal, noise = 0, 0, 0.0, 0.0
    with ExitStack() as stack:
        files = Files(path, stack)
        ignore = sorted({name.removesuffix(".weight") for name in files.names() if _is_linear(name)})
        for name in sorted(files.names()):
            tensor, stored = files.read(name), files.stored_name(name)
            before += tensor.nbytes
            if not _QUANTIZED.fullmatch(name):
                tensors[stored] = tensor.bfloat16().contiguous() if tensor.is_floating_point() else tensor
                continue
            try:
                quantized = quantize(tensor, weight_format)
            except ValueError as error:
                raise ValueError(f"{path}: tensor {name}: {error}") from error
            wide = tensor.float()
            signal += float(wide.square().sum(dtype=torch.float64))
            noise += float((quantized.dequantize() - wide).square().sum(dtype=torch.float64))
            module = stored.removesuffix("weight")
            tensors |= {module + end: value for end, value in quantized.stored().items()}
            count += 1
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / SINGLE_FILE, metadata={"format": "pt"})
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    raw["quantization_config"] = quantization_config(weight_format, ignore)
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    after = sum(tensor.nbytes for tensor in tensors.values())
    relative = (noise / signal) ** 0.5 if signal else 0.0
    return PackReport(count, len(files.names()) - count, before, after, relative)


def _is_linear(name: str) -> bool:
    """Whether a tensor is a linear layer's weight that stays as it is."""
    return name.endswith(("fc.weight", "lm_head.weight"))

"""A drafter's weights in the stacked form that `draft_forward` and `inject_kv` take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch

from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.model.config import DrafterConfig
from dflash_kernels.model.shard import shard_heads, shard_range


@dataclass(frozen=True)
class DrafterWeights:
    """All tensors of a drafter, one dtype, one device, contiguous; L layers stacked in front.

    ``kv_weight`` and ``kv_bias`` repeat the K and V rows of ``qkv_weight`` and ``qkv_bias``: injection reads those of
    all layers as one matrix.

    Attributes:
        fc_weight: [H, K*H]; hidden_norm: [H]; kv_weight: [L, 2*Hkv*D, H], K rows first; kv_bias: [L, 2*Hkv*D] or None.
        input_norm, post_norm: [L, H]; final_norm: [H].
        qkv_weight: [L, (Hq + 2*Hkv)*D, H]; qkv_bias: [L, (Hq + 2*Hkv)*D] or None.
        q_norm, k_norm: [L, D] or None; o_weight: [L, H, Hq*D]; o_bias: [L, H] or None.
        gate_up_weight: [L, 2*I, H], gate rows first; down_weight: [L, H, I].
        quantized: codes and scales by the names of the tensors above that were dequantised from them (qkv_weight,
            o_weight, gate_up_weight, down_weight), for kernels that read them instead; None: nothing is quantised.
    """

    fc_weight: torch.Tensor
    hidden_norm: torch.Tensor
    kv_weight: torch.Tensor
    kv_bias: torch.Tensor | None
    input_norm: torch.Tensor
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o_weight: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up_weight: torch.Tensor
    down_weight: torch.Tensor
    final_norm: torch.Tensor
    quantized: Mapping[str, QuantizedWeight] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """dtype of all tensors."""
        return self.fc_weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.fc_weight.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, codes and scales included."""
        dense = sum(tensor.nbytes for tensor in self._tensors().values() if tensor is not None)
        return dense + sum(weight.nbytes for weight in (self.quantized or {}).values())

    @property
    def weight_format(self) -> WeightFormat | None:
        """Format of the codes, None where nothing is quantised."""
        return next((weight.format for weight in (self.quantized or {}).values()), None)

    def dense(self) -> DrafterWeights:
        """The same weights without codes and scales."""
        return replace(self, quantized=None)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> DrafterWeights:
        """The same weights elsewhere; tensors that are already there are shared.

        Another dtype is made from the codes where there are any: bf16 has lost what float32 can hold.
        """
        moved = {name: None if t is None else t.to(device, dtype) for name, t in self._tensors().items()}
        quantized = {name: weight.to(device) for name, weight in (self.quantized or {}).items()}
        if dtype != self.dtype:
            moved |= {name: weight.dequantize(dtype) for name, weight in quantized.items()}
            if "qkv_weight" in quantized and moved["qkv_weight"] is not None:
                moved["kv_weight"] = moved["qkv_weight"][:, -self.kv_weight.shape[1] :].contiguous()
        return replace(self, **moved, quantized=quantized or None)  # type: ignore[arg-type]

    def _tensors(self) -> dict[str, torch.Tensor | None]:
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "quantized"}


def shard_weights(
    config: DrafterConfig, weights: DrafterWeights, rank: int, world: int
) -> tuple[DrafterConfig, DrafterWeights]:
    """One rank's part for tensor parallelism: its heads and MLP rows; norms and ``fc`` are replicated.

    The outputs of ``o_weight`` and ``down_weight`` are then partial sums, to be added over the ranks; ``o_bias`` is
    kept by rank 0 only, so that the sum holds it once. What does not divide: :mod:`dflash_kernels.model.shard`.

    Raises:
        ValueError: fewer heads or MLP rows than ranks, or a part of quantised columns would end in a group.
    """
    dim, layers, hidden = config.head_dim, config.num_layers, config.hidden_size
    heads = shard_heads(config.num_heads, config.num_kv_heads, rank, world)
    i0, i1 = shard_range(config.intermediate_size, rank, world, "intermediate_size", unit=8)
    q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim
    q_part = slice(heads.q0 * dim, heads.q1 * dim)
    kv_parts = [slice(k * dim, (k + 1) * dim) for k in heads.kv_heads]

    def moved(by: int) -> list[slice]:
        return [slice(part.start + by, part.stop + by) for part in kv_parts]

    qkv_parts = [q_part, *moved(q_rows), *moved(q_rows + kv_rows)]
    up = config.intermediate_size
    cuts: dict[str, Callable[[QuantizedWeight], QuantizedWeight]] = {
        "qkv_weight": lambda w: w.rows(*qkv_parts),
        "o_weight": lambda w: w.columns(q_part.start, q_part.stop),
        "gate_up_weight": lambda w: w.rows(slice(i0, i1), slice(up + i0, up + i1)),
        "down_weight": lambda w: w.columns(i0, i1),
    }

    def rows(tensor: torch.Tensor | None, parts: list[slice]) -> torch.Tensor | None:
        return None if tensor is None else torch.cat([tensor[:, part] for part in parts], dim=1)

    gate_up = weights.gate_up_weight.view(layers, 2, config.intermediate_size, hidden)[:, :, i0:i1]
    part = replace(
        weights,
        kv_weight=rows(weights.kv_weight, moved(0) + moved(kv_rows)),  # type: ignore[arg-type]
        kv_bias=rows(weights.kv_bias, moved(0) + moved(kv_rows)),
        qkv_weight=rows(weights.qkv_weight, qkv_parts),  # type: ignore[arg-type]
        qkv_bias=rows(weights.qkv_bias, qkv_parts),
        o_weight=weights.o_weight[:, :, q_part].contiguous(),
        o_bias=weights.o_bias if rank == 0 else None,
        gate_up_weight=gate_up.reshape(layers, 2 * (i1 - i0), hidden),
        down_weight=weights.down_weight[:, :, i0:i1].contiguous(),
        quantized={name: cuts[name](weight) for name, weight in (weights.quantized or {}).items()} or None,
    )
    return replace(config, num_heads=heads.num_heads, num_kv_heads=len(heads.kv_heads), intermediate_size=i1 - i0), part

"""A transformers target cut down to one rank's part of a tensor-parallel one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dflash_kernels.model.shard import shard_heads, shard_range
from dflash_kernels.tensor_parallel import Communicator, ShardedTable, VocabShards

__all__ = ["shard_target"]


class _RowParallel(nn.Module):
    """A linear layer over this rank's columns of its input: partial results, summed over the ranks."""

    def __init__(self, linear: nn.Linear, start: int, stop: int, communicator: Communicator) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight[:, start:stop].detach().clone(), requires_grad=False)
        # One rank adds the bias.
        self.bias = linear.bias if communicator.rank == 0 else None
        self._communicator = communicator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._communicator.all_reduce(nn.functional.linear(x, self.weight, self.bias))


class _ShardedEmbedding(nn.Module):
    """The target's embedding from every rank's rows."""

    def __init__(self, embedding: nn.Module, shards: VocabShards) -> None:
        super().__init__()
        table: torch.Tensor = embedding.weight.detach()  # type: ignore[assignment, operator]
        self._table = ShardedTable(table, shards)
        self.weight = self._table.rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._table.lookup(ids).view(*ids.shape, -1)


def _rows(linear: nn.Linear, parts: list[slice]) -> nn.Linear:
    """A linear layer with the output rows of the slices."""

    def cut(tensor: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(torch.cat([tensor.detach()[part] for part in parts]), requires_grad=False)

    weight = cut(linear.weight)
    made = nn.Linear(linear.in_features, len(weight), bias=False, device="meta")
    made.weight, made.bias = weight, None if linear.bias is None else cut(linear.bias)  # type: ignore[assignment]
    return made


def shard_target(model: nn.Module, layers: nn.ModuleList, communicator: Communicator) -> VocabShards:
    """Cut a causal LM in place to this rank's heads, MLP features and vocabulary rows.

    Its forward pass then sums over the ranks after the embedding and after both halves of each layer, and gives the
    logits of this rank's vocabulary rows.

    Args:
        layers: its decoder layers.

    Raises:
        ValueError: a layer that is not ``self_attn.{q,k,v,o}_proj`` and ``mlp.{gate,up,down}_proj``, or fewer heads,
            MLP features or tokens than ranks; nothing has been changed then.
    """
    rank, world = communicator.rank, communicator.world
    config: Any = model.config
    heads = shard_heads(config.num_attention_heads, config.num_key_value_heads, rank, world)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    shards = VocabShards.of(communicator, head.weight.shape[0])
    found = [_parts(model, layer) for layer in layers]
    for attention, mlp in found:
        dim = attention.head_dim
        i0, i1 = shard_range(mlp.down_proj.in_features, rank, world, "intermediate_size", unit=8)
        q_part = slice(heads.q0 * dim, heads.q1 * dim)
        kv_parts = [slice(k * dim, (k + 1) * dim) for k in heads.kv_heads]
        attention.q_proj = _rows(attention.q_proj, [q_part])
        attention.k_proj, attention.v_proj = _rows(attention.k_proj, kv_parts), _rows(attention.v_proj, kv_parts)
        attention.o_proj = _RowParallel(attention.o_proj, q_part.start, q_part.stop, communicator)
        attention.num_key_value_groups = heads.num_heads // len(heads.kv_heads)
        mlp.gate_proj, mlp.up_proj = (_rows(linear, [slice(i0, i1)]) for linear in (mlp.gate_proj, mlp.up_proj))
        mlp.down_proj = _RowParallel(mlp.down_proj, i0, i1, communicator)
    embedding = _ShardedEmbedding(model.get_input_embeddings(), shards)  # type: ignore[operator]
    model.set_output_embeddings(_rows(head, [slice(shards.start, shards.stop)]))  # type: ignore[operator]
    model.set_input_embeddings(embedding)  # type: ignore[operator]
    return shards


def _parts(model: nn.Module, layer: nn.Module) -> tuple[Any, Any]:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    expected = {"q_proj": attention, "k_proj": attention, "v_proj": attention, "o_proj": attention}
    expected |= {"gate_proj": mlp, "up_proj": mlp, "down_proj": mlp}
    kind = type(model).__name__
    for name, owner in expected.items():
        if not isinstance(getattr(owner, name, None), nn.Linear):
            raise ValueError(f"shard: target {kind} must have a linear layer {name} in each layer, found none")
    if not hasattr(attention, "num_key_value_groups"):
        raise ValueError(f"shard: target {kind} must have num_key_value_groups in its attention, found none")
    return attention, mlp

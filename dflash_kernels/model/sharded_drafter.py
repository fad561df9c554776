"""One rank of a tensor-parallel drafter."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from dflash_kernels import ops
from dflash_kernels.draft_stream import MAX_TOKENS, Exchange
from dflash_kernels.model.drafter import Drafter
from dflash_kernels.model.shard import shard_range
from dflash_kernels.model.weights import shard_weights
from dflash_kernels.tensor_parallel import Communicator, ShardedTable, VocabShards

__all__ = ["ShardedDrafter"]


class ShardedDrafter(Drafter):
    """This rank's part of a drafter that is bound: its heads, MLP features, and rows of embedding and LM head.

    :meth:`forward` sums over the ranks after the embedding, the attention and the MLP of each layer; the rows it
    returns are whole on every rank. Where the ranks have peer memory and the rows are few, one kernel does it all
    (`draft_forward_sharded`): which way is taken is the same on every rank, and the sums differ by their rounding.
    :meth:`inject` writes the K and V of this rank's heads.

    Args:
        whole: the drafter to take a part of.
        fc: "replicated": every rank multiplies by the whole ``fc``, and injection needs no communication; "sharded":
            by its rows of it, and the fused rows are gathered, H elements a token.

    Attributes:
        shards: this rank's part of the vocabulary, that of ``lm_head_weight``.
        exchange: where the ranks' kernels meet, made by :meth:`reserve`; None: a chain of kernels and collectives runs.

    Raises:
        ValueError: the drafter is not bound, or has fewer heads, MLP features, tokens or (fc sharded) hidden features
            than there are ranks.
    """

    def __init__(
        self, whole: Drafter, communicator: Communicator, fc: Literal["replicated", "sharded"] = "replicated"
    ) -> None:
        if not whole.bound:
            raise ValueError("drafter must be bound to its target before it is sharded: call bind(target), got none")
        rank, world = communicator.rank, communicator.world
        config, weights = shard_weights(whole.config, whole.weights, rank, world)
        super().__init__(config, weights, max_positions=whole.max_positions)
        self.communicator, self.fc = communicator, fc
        self.shards = VocabShards.of(communicator, whole.vocab_size)
        self.exchange: Exchange | None = None
        self._o_bias = whole.weights.o_bias  # of the kernel that adds it to the ranks' sum, not to one rank's part
        self._table = ShardedTable(whole.embed_weight, self.shards)
        self.embed_weight = self._table.rows
        self.lm_head_weight = whole.lm_head_weight[self.shards.start : self.shards.stop].clone()
        start, stop = (
            (0, config.hidden_size)
            if fc == "replicated"
            else _equal_rows(config.hidden_size, rank, world, 8 if weights.device.type == "cuda" else 1)
        )
        self._fc_rows = weights.fc_weight[start:stop]

    def reserve(self, batch: int, tokens: int) -> None:
        """As :meth:`Drafter.reserve`; every rank must call it."""
        self._draft_buffers.reserve(batch)
        self.shards = self.shards.on(self.device)
        if self.why_not_one_kernel(0) is None and self.exchange is None:
            words = ops.draft_exchange_words(self.communicator.world, self.hidden_size)
            self.exchange = self.communicator.exchange(words, self.device)
        if self.exchange is not None and self._pack_layers() is not None:
            self._packed_buffers.reserve(min(batch, MAX_TOKENS // self.block_size))
        self._inject_buffers.reserve(tokens)
        if self.fc == "replicated":
            self._plan_injection()

    def forward(
        self,
        block_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        prefix_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """As :meth:`Drafter.forward`; every rank must call it, and each gets all columns of all rows."""
        w, communicator = self.weights, self.communicator
        packed = self._packed
        few = block_ids.numel() <= MAX_TOKENS and self.why_not_one_kernel(0) is None
        if few and self.exchange is not None and packed is not None:
            buffer, workspace = self._packed_buffers.at_least(block_ids.shape[0])
            return ops.draft_forward_sharded(
                block_ids,
                positions,
                prefix_lens,
                req_pool_indices,
                req_to_token,
                k_caches,
                v_caches,
                self._table.rows[: self.shards.stop - self.shards.start],
                w.input_norm,
                w.qkv_bias,
                w.q_norm,
                w.k_norm,
                self._o_bias,
                w.post_norm,
                w.final_norm,
                self.cos_sin,
                packed,
                self._windows,
                self._causal,
                self.config.rms_norm_eps,
                self.exchange,
                self.shards.start,
                self.shards.size,
                out=buffer[: block_ids.numel()],
                workspace=workspace,
            )
        buffer, workspace = self._draft_buffers.at_least(block_ids.shape[0])
        x = self._table.lookup(block_ids, out=buffer[: block_ids.numel()])
        part = communicator.part_like(x)
        first, eps = communicator.rank == 0, self.config.rms_norm_eps  # one rank's part brings the residual along

        def of(stack: torch.Tensor | None, layer: int) -> torch.Tensor | None:
            return None if stack is None else stack[layer]

        for i in range(self.num_layers):
            ops.draft_attention(
                x,
                positions,
                prefix_lens,
                req_pool_indices,
                req_to_token,
                k_caches[i],
                v_caches[i],
                w.input_norm[i],
                w.qkv_weight[i],
                of(w.qkv_bias, i),
                of(w.q_norm, i),
                of(w.k_norm, i),
                w.o_weight[i],
                of(w.o_bias, i),
                self.cos_sin,
                self._windows[i],
                bool(self._causal[i]),
                eps,
                add_x=first,
                out=part,
                workspace=workspace,
            )
            communicator.sum_parts(part, x)
            ops.draft_mlp(
                x,
                w.post_norm[i],
                w.gate_up_weight[i],
                w.down_weight[i],
                eps,
                add_x=first,
                out=part,
                workspace=workspace,
            )
            communicator.sum_parts(part, x)
        return F.rms_norm(x, (self.hidden_size,), w.final_norm, eps)

    def _default_blocks(self) -> int:
        """All multiprocessors: fewer were not measured with the sums over ranks inside."""
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    def _blocks(self) -> int:
        """Never 0: parts may differ in size, and all ranks have to go the same way."""
        if self.exchange is not None and self.exchange.one_device:
            return torch.cuda.get_device_properties(self.device).multi_processor_count // self.communicator.world
        return super()._blocks() or self._default_blocks()

    def inject(
        self,
        taps: list[torch.Tensor],
        positions: torch.Tensor,
        slots: torch.Tensor,
        commit_lens: torch.Tensor | None,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> None:
        """As :meth:`Drafter.inject`, for this rank's KV heads."""
        if self.fc == "replicated":
            super().inject(taps, positions, slots, commit_lens, k_caches, v_caches)
            return
        w, rows = self.weights, positions.numel()
        casts, workspace = self._inject_buffers.at_least(rows)
        if taps and taps[0].dtype != self.dtype:
            taps = [cast[:rows].copy_(tap) for cast, tap in zip(casts, taps, strict=True)]
        ops.inject_kv_sharded(
            taps,
            self._fc_rows,
            w.hidden_norm,
            w.kv_weight,
            w.kv_bias,
            w.k_norm,
            self.cos_sin,
            positions,
            slots,
            commit_lens,
            k_caches,
            v_caches,
            workspace,
            self.config.rms_norm_eps,
            fused=torch.empty((rows, len(self._fc_rows)), dtype=self.dtype, device=self.device),
            gather=self.communicator.all_gather,
        )


def _equal_rows(hidden_size: int, rank: int, world: int, unit: int) -> tuple[int, int]:
    """As many rows of fc for every rank, a multiple of `unit`: the all-gather wants equal parts, the CUDA op eights."""
    if hidden_size % (unit * world):
        of = f"{unit} times " if unit > 1 else ""
        raise ValueError(
            f"shard: hidden_size must be a multiple of {of}the number of ranks ({world}) to shard fc, got {hidden_size}"
        )
    return shard_range(hidden_size, rank, world, "hidden_size")

"""What the engine asks of a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Bindable(Protocol):
    """A drafter that still has to be given its target's embedding and LM head."""

    @property
    def bound(self) -> bool:
        """Whether it has them."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def bind(self, target: nn.Module) -> Any:
        """Take them from a transformers causal LM, and move to its device."""

    def reserve(self, batch: int, tokens: int) -> None:
        """Allocate once what steps of up to ``batch`` blocks and injections of up to ``tokens`` rows need."""


@runtime_checkable
class DrafterLike(Protocol):
    """A drafter bound to its target's embedding and LM head.

    Attributes:
        block_size: T, the anchor included; mask_token_id: id of the other block tokens at the input.
        target_layer_ids: K tapped target layers, "after layer i", 0-based.
        num_layers, num_kv_heads, head_dim, dtype: shape of its KV caches, ``[slots, Hkv, D]`` per layer.
        hidden_size, vocab_size: must equal the target's.
        max_positions: length of its rope table.
        lm_head_weight: ``[V, width of forward's rows]`` in the dtype of those rows.
    """

    block_size: int
    mask_token_id: int
    target_layer_ids: Sequence[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    lm_head_weight: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """dtype of caches and hidden rows."""

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
        """Final-normed hidden rows ``[B*T, H]`` of the blocks (``block_ids``, ``positions``, ``slots`` [B, T] int64).

        Must neither sync with the host nor depend on host values, so that it can be captured.
        """

    def inject(
        self,
        taps: list[torch.Tensor],
        positions: torch.Tensor,
        slots: torch.Tensor,
        commit_lens: torch.Tensor | None,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> None:
        """Write context K and V for N rows: ``taps`` K tensors [N, H] in the target's dtype, ``positions`` [N] int64,
        ``slots`` [N] int; of each block of N / B rows only the first ``commit_lens[b]`` ([B] int32; None: all)."""

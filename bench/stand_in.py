"""A tiny random target, a drafter that knows nothing and a tokenizer of bytes: the engine's loop without models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["ByteTokenizer", "ConstantDrafter", "tiny_target"]

VOCAB, HIDDEN = 256, 64


def tiny_target(device: torch.device) -> Any:
    """A random two-layer Llama over bytes, without end-of-text ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(device).eval()


class ConstantDrafter:
    """Proposes token 0 always and keeps no context (see `engine.draft.DrafterLike`)."""

    block_size, mask_token_id = 8, 1
    target_layer_ids: Sequence[int] = (0,)
    num_layers = num_kv_heads = 1
    head_dim, hidden_size, vocab_size, max_positions = 8, HIDDEN, VOCAB, 4096

    def __init__(self, device: torch.device) -> None:
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.lm_head_weight = torch.zeros(VOCAB, HIDDEN, dtype=self.dtype, device=device)

    def forward(self, block_ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.lm_head_weight.new_zeros(block_ids.numel(), HIDDEN)

    def inject(self, *_: Any) -> None:
        pass


class ByteTokenizer:
    """Text as its bytes."""

    chat_template = eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")

"""Batched greedy continuation of many prompts by a Llama target, with a static left-padded KV cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class GreedyDecoder:
    """A functional Llama forward over left-padded rows: all rows share the cache index, each has its own positions."""

    def __init__(self, model: LlamaForCausalLM, max_length: int) -> None:
        config = model.config
        self.model = model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        device, dtype = model.device, model.dtype
        half = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        angles = torch.arange(max_length, device=device)[:, None] / config.rope_parameters["rope_theta"] ** half
        table = torch.cat((angles, angles), dim=-1)
        self.cos, self.sin = table.cos().to(dtype), table.sin().to(dtype)
        self.max_length = max_length
        self.cache: torch.Tensor | None = None  # [L, 2, rows, Hkv, max_length, D]
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin

    def _forward(
        self, tokens: torch.Tensor, index: torch.Tensor, padding: torch.Tensor, cache: torch.Tensor
    ) -> torch.Tensor:
        """tokens [B, n] at the cache indices `index` [n]; cache [L, 2, B, Hkv, S, D] -> next token of the last column.

        Everything that changes from step to step is a tensor, so that a decode step can be replayed as a CUDA graph.
        """
        batch, count = tokens.shape
        keys = torch.arange(cache.shape[4], device=tokens.device)
        positions = (index[None] - padding[:, None]).clamp_min(0)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        # A padding row attends to itself, so that its softmax has something to normalise.
        seen = (keys <= index[:, None]) & (keys >= padding[:, None, None]) | (keys == index[:, None])
        group = self.heads // self.kv_heads
        mask = seen[:, None]  # [B, 1, n, S]
        if count == 1:
            mask = mask.expand(batch, 1, group, -1)
        x = F.embedding(tokens, self.model.model.embed_tokens.weight)
        for number, layer in enumerate(self.model.model.layers):
            attention = layer.self_attn
            h = self._norm(x, layer.input_layernorm.weight)
            q = attention.q_proj(h).view(batch, count, self.heads, self.head_dim).transpose(1, 2)
            k = attention.k_proj(h).view(batch, count, self.kv_heads, self.head_dim).transpose(1, 2)
            v = attention.v_proj(h).view(batch, count, self.kv_heads, self.head_dim).transpose(1, 2)
            q = self._rotate(q, cos, sin)
            keys_cache, values_cache = cache[number, 0], cache[number, 1]
            keys_cache.index_copy_(2, index, self._rotate(k, cos, sin))
            values_cache.index_copy_(2, index, v)
            if count == 1:  # the query heads of a group become the rows of one KV head
                q = q.reshape(batch, self.kv_heads, group, self.head_dim)
                out = F.scaled_dot_product_attention(q, keys_cache, values_cache, attn_mask=mask)
            else:
                k, v = keys_cache.repeat_interleave(group, dim=1), values_cache.repeat_interleave(group, dim=1)
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out = out.reshape(batch, self.heads, count, self.head_dim).transpose(1, 2).reshape(batch, count, -1)
            x = x + attention.o_proj(out)
            x = x + layer.mlp(self._norm(x, layer.post_attention_layernorm.weight))
        last = self._norm(x[:, -1], self.model.model.norm.weight)
        return self.model.lm_head(last).argmax(dim=-1)

    def _step(self, end: int) -> None:
        """One token for every row: reads and writes `self.token`; the cache is read up to index `end`."""
        self.token.copy_(self._forward(self.token[:, None], self.index, self.padding, self.cache[..., :end, :]))
        self.index.add_(1)

    def _replay(self, end: int) -> None:
        if self.token.device.type != "cuda":
            self._step(end)
            return
        if end not in self.graphs:
            token, index = self.token.clone(), self.index.clone()
            self._step(end)  # warm-up outside the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(end)
            self.token.copy_(token)
            self.index.copy_(index)
            self.graphs[end] = graph
        self.graphs[end].replay()

    @torch.inference_mode()
    def decode(self, prompts: Sequence[list[int]], new_tokens: int, eos: int, deadline: float) -> list[list[int]]:
        """Greedy continuations, each cut after its first `eos`; shorter ones when the deadline (time.time()) passes."""
        device = self.model.device
        config = self.model.config
        width = max(len(prompt) for prompt in prompts)
        new_tokens = min(new_tokens, self.max_length - width)
        count = len(prompts)
        if self.cache is None or self.cache.shape[2] < count:
            shape = (config.num_hidden_layers, 2, count, self.kv_heads, self.max_length, self.head_dim)
            self.graphs.clear()
            self.cache = None
            self.cache = torch.zeros(shape, device=device, dtype=self.model.dtype)
            self.token = torch.zeros(count, dtype=torch.long, device=device)
            self.padding = torch.zeros(count, dtype=torch.long, device=device)
            self.index = torch.zeros(1, dtype=torch.long, device=device)
        rows = torch.zeros(self.cache.shape[2], width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            rows[row, width - len(prompt) :] = torch.tensor(prompt)
        rows = rows.to(device)
        lengths = [len(prompt) for prompt in prompts] + [1] * (self.cache.shape[2] - count)
        self.padding.copy_(width - torch.tensor(lengths))
        columns = torch.arange(width, device=device)
        for begin in range(0, self.cache.shape[2], 128):  # the prompt's scores are the largest tensor: in slices
            part = slice(begin, begin + 128)
            self.token[part] = self._forward(rows[part], columns, self.padding[part], self.cache[:, :, part, :, :width])
        self.index.fill_(width)
        out = torch.empty(new_tokens, count, dtype=torch.long, device=device)
        done = torch.zeros(count, dtype=torch.bool, device=device)
        steps = 0
        for step in range(new_tokens):
            out[step] = self.token[:count]
            steps = step + 1
            done |= self.token[:count] == eos
            if step % 32 == 31 and (bool(done.all()) or time.time() > deadline):
                break
            if step + 1 < new_tokens:
                self._replay(min(-(-(width + step + 1) // 64) * 64, self.max_length))
        results = []
        for row in out[:steps].T.tolist():
            results.append(row[: row.index(eos) + 1] if eos in row else row)
        return results


def cut_loop(tokens: list[int], max_period: int = 64, keep: int = 3) -> list[int]:
    """Shorten a tail that repeats itself with a period of at most `max_period` to `keep` repetitions."""
    best = len(tokens)
    for period in range(1, max_period + 1):
        run = 0
        while run + period < len(tokens) and tokens[-1 - run] == tokens[-1 - run - period]:
            run += 1
        if run >= period * keep:
            best = min(best, len(tokens) - run - period + period * keep)
    return tokens[:best]

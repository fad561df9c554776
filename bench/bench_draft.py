"""draft_forward at published drafter sizes against the same pass in torch: cuBLAS GEMMs, SDPA and small fused kernels.

Rows in fp8 and 4 bits read quantised weights, as one kernel or, many rows in fp8, as the chain that multiplies fp8 with
fp8. The baselines are bf16: eager, and everything between GEMMs and attention under torch.compile, as engines fuse it;
rows in fp8 have that chain also with the same codes and torch's own fp8 products (`bench.torch_fp8`), whose activations
are quantised in the kernels that torch.compile makes. torch's version is in the names, and the fastest is the row's.
All are favoured: their context lies dense in memory, with room behind it for the block's own keys and values, so that
they gather nothing; and the query heads of a group lie beside the block's tokens, so that SDPA reads each key once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bench import torch_fp8
from bench.harness import Calls, Case
from bench.shapes import DEMO, QWEN3_8B, QWEN35_397B_TP8, TINY, DrafterShape, random_codes
from dflash_kernels import ops
from dflash_kernels.draft_stream import FP8_TOKENS, default_blocks, has_fp8_chain, pack_draft, why_not_packed
from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.tiles import Weight, tile_columns, tile_nbytes

SUITE = "draft"
EPS = 1e-6
EMBED_ROWS = 4096  # a pass reads B * T rows, however many there are
Pieces = Sequence[Callable[..., Any]]  # a linear layer, and what stands between them


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def _rotate(x: torch.Tensor, norm: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Norm and rotation of [B, T, heads, D] with cos_sin [B, T, 1, D]."""
    x = F.rms_norm(x.float(), (x.shape[-1],), norm.float(), EPS)
    (a, b), (cos, sin) = x.chunk(2, dim=-1), cos_sin.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).bfloat16()


def _split(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    cos_sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """qkv [B, T, heads, D]: own K and V go behind the context, q comes back as [B, Hkv, G * T, D]."""
    batch, block, heads, head_dim = qkv.shape
    kv_heads = keys.shape[1]
    q, k, v = qkv.split((heads - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    keys[:, :, -block:] = _rotate(k, k_norm, cos_sin).transpose(1, 2)
    values[:, :, -block:] = v.transpose(1, 2)
    q = _rotate(q, q_norm, cos_sin).view(batch, block, kv_heads, -1, head_dim)
    return q.permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)


def _merge(attended: torch.Tensor, block: int) -> torch.Tensor:
    batch, kv_heads, rows, head_dim = attended.shape
    grouped = attended.view(batch, kv_heads, rows // block, block, head_dim)
    return grouped.permute(0, 3, 1, 2, 4).reshape(batch * block, -1)


def _gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _add(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x + y
    return x, _norm(x, weight)


def _norm_fp8(x: torch.Tensor, weight: torch.Tensor) -> torch_fp8.Codes:
    return torch_fp8.quantize_rows(_norm(x, weight))


def _merge_fp8(attended: torch.Tensor, block: int) -> torch_fp8.Codes:
    return torch_fp8.quantize_rows(_merge(attended, block))


def _gate_fp8(gate_up: torch.Tensor) -> torch_fp8.Codes:
    return torch_fp8.quantize_rows(_gate(gate_up))


def _add_fp8(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch_fp8.Codes]:
    x, normed = _add(x, y, weight)
    return x, torch_fp8.quantize_rows(normed)


# The last adds after the last layer.
BF16: Pieces = (F.linear, _norm, _split, _merge, _gate, _add, _add)
FP8: Pieces = (torch_fp8.linear, _norm_fp8, _split, _merge_fp8, _gate_fp8, _add_fp8, _add)


def _compiled(pieces: Pieces) -> Pieces:
    """All but the products."""
    return pieces[0], *map(torch_fp8.compiled, pieces[1:])


def _case(shape: DrafterShape, batch: int, context: int, weight_format: WeightFormat | None = None) -> Case:
    rows = batch * shape.T
    q_width, qkv_width = shape.Hq * shape.D, (shape.Hq + 2 * shape.Hkv) * shape.D

    def make(device: torch.device) -> Calls:
        def draw(*size: int, std: float = 0.02, mean: float = 0.0) -> torch.Tensor:
            return torch.empty(*size, device=device, dtype=torch.bfloat16).normal_(mean, std)

        pool = batch * context + 1
        k_caches = [draw(pool, shape.Hkv, shape.D, std=1.0) for _ in range(shape.L)]
        v_caches = [draw(pool, shape.Hkv, shape.D, std=1.0) for _ in range(shape.L)]
        req_to_token = torch.randperm(pool - 1, device=device, dtype=torch.int32).view(batch, context) + 1
        slots = req_to_token.long()
        prefix_lens = torch.full((batch,), context, device=device)
        request_rows = torch.arange(batch, device=device)
        positions = prefix_lens[:, None] + torch.arange(shape.T, device=device)
        block_ids = torch.randint(0, EMBED_ROWS, (batch, shape.T), device=device)
        embed_weight = draw(EMBED_ROWS, shape.H, std=1.0)
        norms = [draw(shape.L, width, mean=1.0) for width in (shape.H, shape.D, shape.D, shape.H)]
        input_norm, q_norm, k_norm, post_norm = norms
        final_norm = draw(shape.H, mean=1.0)
        qkv_weight, o_weight = draw(shape.L, qkv_width, shape.H), draw(shape.L, shape.H, q_width)
        gate_up_weight, down_weight = draw(shape.L, 2 * shape.I, shape.H), draw(shape.L, shape.H, shape.I)
        angles = torch.rand(context + shape.T, shape.D // 2, device=device) * 6
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
        out = torch.empty(rows, shape.H, device=device, dtype=torch.bfloat16)
        size = ops.draft_forward_workspace(batch, shape.T, shape.H, shape.I, shape.Hq, shape.Hkv, shape.D)
        workspace = torch.empty(size, device=device, dtype=torch.uint8)
        windows, causal = [0] * shape.L, [0] * shape.L
        dense_weights = [qkv_weight, o_weight, gate_up_weight, down_weight]
        matrices: list[Weight] = list(dense_weights)
        if weight_format is not None:
            matrices = [random_codes(weight_format, tuple(matrix.shape), device) for matrix in matrices]
        fp8 = [m for m in matrices if isinstance(m, QuantizedWeight) and m.format.kind == "fp8"]
        codes = fp8 if has_fp8_chain(matrices) else None
        reason = why_not_packed(
            tokens=rows,
            num_layers=shape.L,
            head_dim=shape.D,
            dtype=torch.bfloat16,
            weight_format=weight_format,
            fp8_chain=codes is not None,
        )
        packed = None
        if device.type == "cuda" and reason is None:
            packed = pack_draft(
                *matrices, num_kv_heads=shape.Hkv, head_dim=shape.D, blocks=default_blocks(matrices, device)
            )
            size = ops.draft_forward_packed_workspace(batch, shape.T, packed)
            workspace = torch.empty(size, device=device, dtype=torch.uint8)
            codes = None
        elif codes is not None:
            size = ops.draft_forward_fp8_workspace(batch, shape.T, shape.H, shape.I, shape.Hq, shape.Hkv, shape.D)
            workspace = torch.empty(size, device=device, dtype=torch.uint8)

        def ours() -> torch.Tensor:
            if packed is not None:
                return ops.draft_forward_packed(
                    block_ids, positions, prefix_lens, request_rows, req_to_token,
                    k_caches, v_caches, embed_weight, input_norm, None, q_norm, k_norm, None, post_norm, final_norm,
                    cos_sin, packed, windows, causal, EPS, out=out, workspace=workspace,
                )  # fmt: skip
            if codes is not None:
                qkv, o, gate_up, down = codes
                return ops.draft_forward_fp8(
                    block_ids, positions, prefix_lens, request_rows, req_to_token,
                    k_caches, v_caches, embed_weight, input_norm, qkv.codes, qkv.scale, None, q_norm, k_norm,
                    o.codes, o.scale, None, post_norm, gate_up.codes, gate_up.scale, down.codes, down.scale, final_norm,
                    cos_sin, windows, causal, EPS, out=out, workspace=workspace,
                )  # fmt: skip
            return ops.draft_forward(
                block_ids, positions, prefix_lens, request_rows, req_to_token,
                k_caches, v_caches, embed_weight, input_norm, qkv_weight, None, q_norm, k_norm, o_weight, None,
                post_norm, gate_up_weight, down_weight, final_norm, cos_sin, windows, causal, EPS, out=out,
                workspace=workspace,
            )  # fmt: skip

        def dense(cache: torch.Tensor) -> torch.Tensor:
            filled = cache.new_empty(batch, shape.Hkv, context + shape.T, shape.D)
            filled[:, :, :context] = cache[slots].transpose(1, 2)
            return filled

        dense_k = [dense(cache) for cache in k_caches]
        dense_v = [dense(cache) for cache in v_caches]

        def forward(pieces: Pieces, weights: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
            """weights: of qkv, o, gate_up and down, what `linear` takes, for all layers."""
            linear, norm, split, merge, gate, add, last = pieces
            table = cos_sin[positions][:, :, None]
            x = F.embedding(block_ids.view(-1), embed_weight)
            h = norm(x, input_norm[0])
            for layer in range(shape.L):
                qkv_layer, o_layer, gate_up_layer, down_layer = ([part[layer] for part in one] for one in weights)
                qkv = linear(h, *qkv_layer).view(batch, shape.T, -1, shape.D)
                keys, values = dense_k[layer], dense_v[layer]
                q = split(qkv, q_norm[layer], k_norm[layer], table, keys, values)
                attended = merge(F.scaled_dot_product_attention(q, keys, values), shape.T)
                x, h = add(x, linear(attended, *o_layer), post_norm[layer])
                y = linear(gate(linear(h, *gate_up_layer)), *down_layer)
                if layer + 1 < shape.L:
                    x, h = add(x, y, input_norm[layer + 1])
            return last(x, y, final_norm)[1]

        in_bf16, in_fp8 = [[weight] for weight in dense_weights], [(m.codes, m.scale) for m in fp8]
        on_cuda = device.type == "cuda"
        baselines: dict[str, Callable[[], object]]
        baselines = {f"torch eager {torch.__version__}": lambda: forward(BF16, in_bf16)}
        if on_cuda:
            baselines[f"torch compile + SDPA {torch.__version__}"] = lambda: forward(_compiled(BF16), in_bf16)
        if in_fp8:
            name = f"torch {'compile' if on_cuda else 'eager'} fp8 + SDPA {torch.__version__}"
            pieces = _compiled(FP8) if on_cuda else FP8
            baselines |= torch_fp8.that_runs(name, lambda: forward(pieces, in_fp8), device)
        return Calls(ours, baselines)

    weights = shape.L * shape.layer_weights
    # Of bf16's rate: an fp8 product takes the tensor cores half the time. Where rows are few, bytes decide.
    fp8_chain = weight_format == WeightFormat("fp8") and rows > FP8_TOKENS
    rate = 2 if fp8_chain else 1
    if fp8_chain:
        weight_bytes = 1.0
    elif weight_format is None:
        weight_bytes = 2.0
    else:
        weight_bytes = tile_nbytes(weight_format) / (128 * tile_columns(weight_format))
    return Case(
        suite=SUITE,
        op="draft_forward",
        shape=f"{shape.sizes()} B{batch} T{shape.T} ctx{context}",
        dtype="bf16" if weight_format is None else str(weight_format),
        regime="latency" if rows <= 64 else "throughput",
        bytes=int(weight_bytes * weights) + 2 * batch * context * shape.kv_token,
        flops=2 * rows * weights // rate + 4 * rows * q_width * (context + shape.T) * shape.L,
        stream="read",
        make=make,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Published sizes at context 1024, one shard of a large drafter, and one long context."""
    if device.type != "cuda":
        yield _case(TINY, 2, 64)
        return
    for shape in (QWEN3_8B, QWEN35_397B_TP8, DEMO):
        for batch in (1, 32) if quick else (1, 4, 8, 32):
            yield _case(shape, batch, 1024)
    for weight_format, batches in ((WeightFormat("fp8"), (1, 4, 8, 32)), (WeightFormat("int4", 128), (1, 4))):
        for batch in batches:
            yield _case(QWEN3_8B, batch, 1024, weight_format)
    if not quick:
        yield _case(QWEN3_8B, 1, 32768)
        yield _case(QWEN35_397B_TP8, 1, 1024, WeightFormat("fp8"))

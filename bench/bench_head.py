"""The LM head ops at published drafter sizes, against torch's matmul followed by the choice.

The baseline's logits are bf16, as the ops' are, and its weights too, whatever the format of ours; torch's version is in
its name. In fp8 many rows of hidden states are quantised, which their time includes, and multiplied as codes. Rows in
fp8 have a second baseline, on the same codes: rows quantised by a kernel of torch.compile's and torch's own product of
fp8 (`bench.torch_fp8`); the faster one is the row's.
Verification from hidden rows is compared with matmul, argmax and the accept step in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import torch_fp8
from bench.harness import Calls, Case
from bench.shapes import DEMO, DFLASH2_27B, QWEN3_8B, QWEN35_397B_TP8, TINY, DrafterShape, random_codes
from dflash_kernels import ops
from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.head_stream import pack_head
from dflash_kernels.tiles import Weight, tile_columns, tile_nbytes

SUITE = "head"
TOP_K = 16


def _matmul() -> str:
    return f"torch {torch.__version__} matmul"


def _argmax_baselines(
    hidden: torch.Tensor, dense: torch.Tensor, weight: Weight | None = None
) -> dict[str, Callable[[], object]]:
    """bf16, and where `weight` is fp8 also with its codes."""
    found: dict[str, Callable[[], object]] = {f"{_matmul()} + argmax": lambda: (hidden @ dense.T).argmax(-1)}
    if not isinstance(weight, QuantizedWeight) or weight.format.kind != "fp8":
        return found
    codes, scale = weight.codes, weight.scale
    quantize: Callable[..., Any] = torch_fp8.quantize_rows
    if hidden.is_cuda:
        quantize = torch_fp8.compiled(torch_fp8.quantize_rows)

    def in_fp8() -> torch.Tensor:
        return torch_fp8.linear(quantize(hidden), codes, scale).argmax(-1)

    return found | torch_fp8.that_runs(f"torch {torch.__version__} _scaled_mm + argmax", in_fp8, hidden.device)


def _case(
    shape: DrafterShape,
    op: str,
    detail: str,
    rows: int,
    make: Callable[[torch.device], Calls],
    weight_format: WeightFormat | None = None,
) -> Case:
    fp8_product = op == "lm_head_argmax" and weight_format is not None
    # Of bf16's rate: a product of two fp8 operands takes the tensor cores half the time.
    rate = 2 if fp8_product else 1
    if fp8_product:
        weight_bytes = 1.0
    elif weight_format is None:
        weight_bytes = 2.0
    else:
        weight_bytes = tile_nbytes(weight_format) / (128 * tile_columns(weight_format))
    return Case(
        suite=SUITE,
        op=op,
        shape=f"{shape.name} {detail} H{shape.H} V{shape.V}",
        dtype="bf16" if weight_format is None else str(weight_format),
        regime="latency" if rows <= 64 else "throughput",
        bytes=int(weight_bytes * shape.V * shape.H) + 2 * rows * shape.H,
        flops=2 * rows * shape.V * shape.H // rate,
        stream="read",
        make=make,
    )


def _inputs(shape: DrafterShape, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(rows, shape.H, device=device, dtype=torch.bfloat16)
    weight = torch.empty(shape.V, shape.H, device=device, dtype=torch.bfloat16).normal_(std=0.02)
    return hidden, weight


def _argmax_case(shape: DrafterShape, batch: int) -> Case:
    rows = batch * shape.T

    def make(device: torch.device) -> Calls:
        hidden, weight = _inputs(shape, rows, device)
        out = torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, device=device)
        workspace = ops.lm_head_workspace(rows, device)
        return Calls(
            lambda: ops.lm_head_argmax(hidden, weight, out=out, workspace=workspace),
            _argmax_baselines(hidden, weight),
        )

    return _case(shape, "lm_head_argmax", f"B{batch} T{shape.T}", rows, make)


def _fp8_case(shape: DrafterShape, batch: int) -> Case:
    rows, weight_format = batch * shape.T, WeightFormat("fp8")

    def make(device: torch.device) -> Calls:
        hidden, dense = _inputs(shape, rows, device)
        weight = random_codes(weight_format, (shape.V, shape.H), device)
        coded = ops.quantize_rows(hidden)
        out = torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, device=device)
        workspace = ops.lm_head_workspace(rows, device)

        def ours() -> None:
            ops.quantize_rows(hidden, out=coded)
            ops.lm_head_argmax_fp8(*coded, weight.codes, weight.scale, out=out, workspace=workspace)

        return Calls(ours, _argmax_baselines(hidden, dense, weight))

    return _case(shape, "lm_head_argmax", f"B{batch} T{shape.T}", rows, make, weight_format)


def _packed_case(shape: DrafterShape, batch: int, weight_format: WeightFormat | None = None) -> Case:
    rows = batch * shape.T

    def make(device: torch.device) -> Calls:
        hidden, dense = _inputs(shape, rows, device)
        on_cuda = device.type == "cuda"
        blocks = torch.cuda.get_device_properties(device).multi_processor_count if on_cuda else 4
        weight: Weight = dense if weight_format is None else random_codes(weight_format, (shape.V, shape.H), device)
        packed = pack_head(weight, blocks=blocks)
        out = torch.empty(rows, dtype=torch.int64, device=device), torch.empty(rows, device=device)
        workspace = ops.lm_head_argmax_packed_workspace(packed)
        return Calls(
            lambda: ops.lm_head_argmax_packed(hidden, packed, out=out, workspace=workspace),
            _argmax_baselines(hidden, dense, weight),
        )

    return _case(shape, "lm_head_argmax_packed", f"B{batch} T{shape.T}", rows, make, weight_format)


def _topk_case(shape: DrafterShape, batch: int, k: int) -> Case:
    rows = batch * shape.T

    def make(device: torch.device) -> Calls:
        hidden, weight = _inputs(shape, rows, device)
        out = torch.empty(rows, k, dtype=torch.int64, device=device), torch.empty(rows, k, device=device)
        workspace = ops.lm_head_topk_workspace(rows, shape.V, k, device)
        return Calls(
            lambda: ops.lm_head_topk(hidden, weight, k, out=out, workspace=workspace),
            {f"{_matmul()} + topk": lambda: (hidden @ weight.T).topk(k, dim=-1)},
        )

    return _case(shape, "lm_head_topk", f"B{batch} T{shape.T} k{k}", rows, make)


def _torch_verify(
    candidates: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, prefix_lens: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    target = (hidden @ weight.T).argmax(-1).view(candidates.shape)
    accept_lens = (target[:, :-1] == candidates[:, 1:]).long().cumprod(-1).sum(-1)
    bonus_ids = target.gather(1, accept_lens[:, None])
    out_tokens = torch.nn.functional.pad(candidates[:, 1:], (0, 1)).scatter(1, accept_lens[:, None], bonus_ids)
    return accept_lens, accept_lens + 1, bonus_ids, out_tokens, prefix_lens + accept_lens + 1


def _verify_case(shape: DrafterShape, batch: int) -> Case:
    rows = batch * shape.T

    def make(device: torch.device) -> Calls:
        hidden, weight = _inputs(shape, rows, device)
        candidates = torch.randint(0, shape.V, (batch, shape.T), device=device)
        prefix_lens = torch.randint(0, 4096, (batch,), device=device)
        outputs = ops.verify_block_from_hidden(candidates, hidden, weight, prefix_lens)
        workspace = ops.lm_head_workspace(rows, device)
        args = (candidates, hidden, weight, prefix_lens)
        return Calls(
            lambda: ops.verify_block_from_hidden(*args, out=outputs, workspace=workspace),
            {f"{_matmul()} + argmax + accept": lambda: _torch_verify(*args)},
        )

    return _case(shape, "verify_block_from_hidden", f"B{batch} T{shape.T}", rows, make)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Latency and throughput cases of the published sizes; a small one on the CPU."""
    if device.type != "cuda":
        yield _argmax_case(TINY, 1)
        yield _fp8_case(TINY, 1)
        yield _packed_case(TINY, 1)
        yield _packed_case(TINY, 1, WeightFormat("fp8"))
        yield _topk_case(TINY, 1, TOP_K)
        yield _verify_case(TINY, 1)
        return
    for batch in (1, 32) if quick else (1, 4, 8, 32):
        yield _argmax_case(QWEN3_8B, batch)
    for batch in (8,) if quick else (4, 8, 32):
        yield _fp8_case(QWEN3_8B, batch)
    for weight_format in (None, WeightFormat("fp8"), WeightFormat("int4", 128)):
        for batch in (1, 4):
            yield _packed_case(QWEN3_8B, batch, weight_format)
    yield _topk_case(QWEN3_8B, 1, TOP_K)
    yield _verify_case(QWEN3_8B, 1)
    if quick:
        return
    for shape in (DEMO, DFLASH2_27B):
        for batch in (1, 8, 32):
            yield _argmax_case(shape, batch)
    yield _packed_case(QWEN3_8B, 1, WeightFormat("e2m1", 64))
    for shape in (QWEN35_397B_TP8, DFLASH2_27B):
        yield _packed_case(shape, 1)
    for batch in (1, 8, 32):
        yield _topk_case(DFLASH2_27B, batch, TOP_K)
    yield _topk_case(QWEN3_8B, 8, TOP_K)
    yield _verify_case(QWEN3_8B, 8)

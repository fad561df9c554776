"""LM head without logits in memory: the best token of each hidden row, the k best, or greedy verification."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dflash_kernels.ops._errors import dflash_errors

__all__ = [
    "lm_head_argmax",
    "lm_head_topk",
    "lm_head_topk_workspace",
    "lm_head_workspace",
    "verify_block_from_hidden",
]

_TILE_COLUMNS = 128  # vocabulary rows that one CUDA block scores
_CPU_LOGITS = 1 << 22  # logits that the CPU implementation holds at once

_Pair = tuple[torch.Tensor, torch.Tensor]
_VerifyTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def lm_head_workspace(num_rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Workspace of :func:`lm_head_argmax` and :func:`verify_block_from_hidden`, for up to ``num_rows`` rows.

    Zeroed here once: each call finds it zero and leaves it zero, so one serves many calls and graph replays, one call
    at a time. Zero it again after a launch that failed.

    Returns:
        ``[1 + num_rows]`` int64.
    """
    return torch.zeros(1 + num_rows, dtype=torch.int64, device=device)


def lm_head_topk_workspace(num_rows: int, vocab_size: int, k: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Workspace of :func:`lm_head_topk`: the k best of each 128 vocabulary rows, for every hidden row. Any content.

    Returns:
        ``[num_rows, ceil(vocab_size / 128), k]`` int64.
    """
    tiles = -(-vocab_size // _TILE_COLUMNS)
    return torch.empty(num_rows, tiles, k, dtype=torch.int64, device=device)


@dflash_errors
def lm_head_argmax(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    vocab_start: int = 0,
    *,
    out: _Pair | None = None,
    workspace: torch.Tensor | None = None,
) -> _Pair:
    """Best token of each row; the logits are not stored::

        logits    = hidden @ weight.T + bias       fp32 accumulation, rounded once to the dtype of hidden
        ids[n]    = vocab_start + argmax_v logits[n, v]
        values[n] = the logit of ids[n], as float32

    in torch.argmax's order: the smallest v among equal logits (-0 equals +0), the first NaN if there is one. The
    result does not depend on the schedule. Accumulation order differs from a library's matmul, so logits that lie
    within its error may round, and rank, differently.

    For a vocabulary in shards, give each its ``vocab_start``: the pair with the largest value, and the smallest id
    among equals, is exactly the answer over the whole vocabulary.

    Args:
        hidden: ``[N, H]`` bf16 (fp32 too on the CPU), row stride free. On CUDA: aligned to 16 bytes, H and the row
            stride multiples of 8.
        weight: ``[V, H]``, contiguous, dtype of hidden, V <= 2**22. bias: ``[V]`` or None.
        vocab_start: id of weight's first row.
        out: ``ids [N]`` int64 and ``values [N]`` float32 to write; needs ``workspace``.
        workspace: see :func:`lm_head_workspace`.

    Returns:
        ``ids [N]`` int64 and ``values [N]`` float32.

    Raises:
        ValueError: wrong shape, dtype, device, stride or alignment.

    Source: the target's LM head and ``torch.argmax``, as the published DFlash model takes its draft tokens.
    """
    ops = torch.ops.dflash.lm_head_argmax
    if out is None:
        return ops.default(hidden, weight, bias, vocab_start)
    ops.out(hidden, weight, bias, vocab_start, ids=out[0], values=out[1], workspace=_need(workspace, "lm_head_argmax"))
    return out


@dflash_errors
def lm_head_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    bias: torch.Tensor | None = None,
    vocab_start: int = 0,
    *,
    out: _Pair | None = None,
    workspace: torch.Tensor | None = None,
) -> _Pair:
    """The k best tokens of each row, in descending order; logits and their order as in :func:`lm_head_argmax`.

    Ties go to the smaller id, NaN ranks above everything. Shards merge as there: the k best of all shards' pairs.

    Args:
        hidden, weight, bias, vocab_start: see :func:`lm_head_argmax`.
        k: 1..min(64, V).
        out: ``ids [N, k]`` int64 and ``values [N, k]`` float32 to write; needs ``workspace``.
        workspace: see :func:`lm_head_topk_workspace`.

    Returns:
        ``ids [N, k]`` int64 and ``values [N, k]`` float32.

    Raises:
        ValueError: wrong shape, dtype, device, stride or alignment, or k out of range.

    Source: the target's LM head and ``torch.topk``, made definite: DFlash2's candidates of a slot.
    """
    ops = torch.ops.dflash.lm_head_topk
    if out is None:
        return ops.default(hidden, weight, k, bias, vocab_start)
    ops.out(hidden, weight, k, bias, vocab_start, ids=out[0], values=out[1], workspace=_need(workspace, "lm_head_topk"))
    return out


@dflash_errors
def verify_block_from_hidden(
    candidates: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    prefix_lens: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: _VerifyTensors | None = None,
    workspace: torch.Tensor | None = None,
) -> _VerifyTensors:
    """Greedy verification straight from the target's hidden rows: `verify_block` in the launch of the LM head.

    For steps in which nobody else needs the target's logits::

        target[b, j]    = argmax_v (hidden[b * T + j] @ weight.T + bias)[v]
        accept_lens[b]  = the largest a with target[b, j] == candidates[b, j + 1] for all j < a
        commit_lens[b]  = accept_lens[b] + 1,  bonus_ids[b] = target[b, accept_lens[b]]
        out_tokens[b]   = candidates[b, 1:], then 0; at accept_lens[b] the bonus instead
        new_seq_lens[b] = prefix_lens[b] + commit_lens[b]

    Args:
        candidates: ``[B, T]`` int32 or int64, the anchor first; prefix_lens: ``[B]`` int32 or int64.
        hidden: ``[B * T, H]``; weight, bias: the whole vocabulary; see :func:`lm_head_argmax`.
        out: the five outputs to write, contiguous; needs ``workspace``, see :func:`lm_head_workspace`.

    Returns:
        ``accept_lens [B]`` int32, ``commit_lens [B]`` int32, ``bonus_ids [B]`` int64, ``out_tokens [B, T]`` int64,
        ``new_seq_lens [B]`` int64.

    Raises:
        ValueError: wrong shape, dtype, device, stride or alignment.

    Source: SGLang's greedy accept step of DFLASH (speculative/dflash_worker_v2.py).
    """
    ops = torch.ops.dflash.verify_block_from_hidden
    if out is None:
        return ops.default(candidates, hidden, weight, prefix_lens, bias)
    ops.out(
        candidates,
        hidden,
        weight,
        prefix_lens,
        bias,
        accept_lens=out[0],
        commit_lens=out[1],
        bonus_ids=out[2],
        out_tokens=out[3],
        new_seq_lens=out[4],
        workspace=_need(workspace, "verify_block_from_hidden"),
    )
    return out


def _need(workspace: torch.Tensor | None, op: str) -> torch.Tensor:
    if workspace is None:
        raise ValueError(f"dflash::{op}: workspace must be given with out, got None")
    return workspace


# -- CPU: torch's matmul over blocks of the vocabulary ----------------------------------------------------------------


def _blocks(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):  # type: ignore[no-untyped-def]
    """(first row, logits of that block of the vocabulary), in order."""
    step = max(1024, _CPU_LOGITS // max(hidden.shape[0], 1))
    for start in range(0, weight.shape[0], step):
        stop = start + step
        yield start, F.linear(hidden, weight[start:stop], None if bias is None else bias[start:stop])


def _argmax(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, vocab_start: int) -> _Pair:
    best_ids = torch.zeros(hidden.shape[0], dtype=torch.int64)
    best = torch.full((hidden.shape[0],), -torch.inf, dtype=torch.float32)
    for start, logits in _blocks(hidden, weight, bias):
        ids = logits.argmax(-1)
        values = logits.gather(-1, ids[:, None])[:, 0].float()
        better = (values > best) | (values.isnan() & ~best.isnan())
        best_ids = torch.where(better, ids + start, best_ids)
        best = torch.where(better, values, best)
    return best_ids + vocab_start, best


def _best(values: torch.Tensor, ids: torch.Tensor, k: int) -> _Pair:
    """The k largest of each row of ``values``, descending, smaller ids first among equals, NaN above all.

    ``ids`` ascend in each row. torch.topk leaves open which of equal values it takes, so it only gives the bound here.
    """
    bound = values.topk(k, dim=-1).values[:, -1:]
    rows, columns = ((values >= bound) | values.isnan()).nonzero(as_tuple=True)
    found = values[rows, columns].float()
    by_value = found.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).argsort(
        descending=True, stable=True
    )
    order = by_value[(~found[by_value].isnan()).to(torch.uint8).argsort(stable=True)]
    order = order[rows[order].argsort(stable=True)]
    counts = torch.bincount(rows, minlength=values.shape[0])
    places = (counts.cumsum(0) - counts)[:, None] + torch.arange(k)
    chosen = order[places]
    return ids[rows[chosen], columns[chosen]], found[chosen]


def _topk(hidden: torch.Tensor, weight: torch.Tensor, k: int, bias: torch.Tensor | None, vocab_start: int) -> _Pair:
    rows = hidden.shape[0]
    ids, values = torch.empty(rows, 0, dtype=torch.int64), torch.empty(rows, 0)
    for start, logits in _blocks(hidden, weight, bias):
        block = torch.arange(start, start + logits.shape[1]).expand(rows, -1)
        block_ids, block_values = _best(logits, block, min(k, logits.shape[1]))
        ids, values = torch.cat([ids, block_ids], dim=-1), torch.cat([values, block_values], dim=-1)
        # Ids must ascend for the next choice.
        order = ids.argsort(dim=-1)
        ids, values = ids.gather(-1, order), values.gather(-1, order)
    ids, values = _best(values, ids, k)
    return ids + vocab_start, values


@torch.library.impl("dflash::lm_head_argmax", "CPU")
def _lm_head_argmax_cpu(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, vocab_start: int = 0
) -> _Pair:
    torch.ops.dflash._lm_head_check("lm_head_argmax", hidden, weight, bias, 0, vocab_start, None, None, None)
    return _argmax(hidden, weight, bias, vocab_start)


@torch.library.impl("dflash::lm_head_argmax.out", "CPU")
def _lm_head_argmax_out_cpu(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    vocab_start: int = 0,
    *,
    ids: torch.Tensor,
    values: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    check = torch.ops.dflash._lm_head_check
    check("lm_head_argmax", hidden, weight, bias, 0, vocab_start, ids, values, workspace)
    for out, result in zip((ids, values), _argmax(hidden, weight, bias, vocab_start), strict=True):
        out.copy_(result)


@torch.library.impl("dflash::lm_head_topk", "CPU")
def _lm_head_topk_cpu(
    hidden: torch.Tensor, weight: torch.Tensor, k: int, bias: torch.Tensor | None = None, vocab_start: int = 0
) -> _Pair:
    torch.ops.dflash._lm_head_check("lm_head_topk", hidden, weight, bias, k, vocab_start, None, None, None)
    return _topk(hidden, weight, k, bias, vocab_start)


@torch.library.impl("dflash::lm_head_topk.out", "CPU")
def _lm_head_topk_out_cpu(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    bias: torch.Tensor | None = None,
    vocab_start: int = 0,
    *,
    ids: torch.Tensor,
    values: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    torch.ops.dflash._lm_head_check("lm_head_topk", hidden, weight, bias, k, vocab_start, ids, values, workspace)
    for out, result in zip((ids, values), _topk(hidden, weight, k, bias, vocab_start), strict=True):
        out.copy_(result)


def _verify(
    candidates: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    prefix_lens: torch.Tensor,
    bias: torch.Tensor | None,
) -> _VerifyTensors:
    target = _argmax(hidden, weight, bias, 0)[0].view(candidates.shape)
    batch = candidates.shape[0]
    matches = (target[:, :-1] == candidates[:, 1:]).long().cumprod(-1)
    accept_lens = matches.sum(-1)
    bonus_ids = target.gather(1, accept_lens[:, None])[:, 0]
    out_tokens = torch.cat([candidates[:, 1:].long(), torch.zeros(batch, 1, dtype=torch.int64)], dim=-1)
    out_tokens.scatter_(1, accept_lens[:, None], bonus_ids[:, None])
    new_seq_lens = prefix_lens.long() + accept_lens + 1
    return accept_lens.int(), (accept_lens + 1).int(), bonus_ids, out_tokens, new_seq_lens


@torch.library.impl("dflash::verify_block_from_hidden", "CPU")
def _verify_block_from_hidden_cpu(
    candidates: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    prefix_lens: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> _VerifyTensors:
    outputs = [None] * 6
    torch.ops.dflash._verify_block_from_hidden_check(candidates, hidden, weight, prefix_lens, bias, *outputs)
    return _verify(candidates, hidden, weight, prefix_lens, bias)


@torch.library.impl("dflash::verify_block_from_hidden.out", "CPU")
def _verify_block_from_hidden_out_cpu(
    candidates: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    prefix_lens: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    accept_lens: torch.Tensor,
    commit_lens: torch.Tensor,
    bonus_ids: torch.Tensor,
    out_tokens: torch.Tensor,
    new_seq_lens: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    outputs = (accept_lens, commit_lens, bonus_ids, out_tokens, new_seq_lens)
    check = torch.ops.dflash._verify_block_from_hidden_check
    check(candidates, hidden, weight, prefix_lens, bias, *outputs, workspace)
    for out, result in zip(outputs, _verify(candidates, hidden, weight, prefix_lens, bias), strict=True):
        out.copy_(result)


# -- fakes ------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("dflash::lm_head_argmax")
def _lm_head_argmax_fake(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, vocab_start: int = 0
) -> _Pair:
    rows = hidden.shape[0]
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("dflash::lm_head_topk")
def _lm_head_topk_fake(
    hidden: torch.Tensor, weight: torch.Tensor, k: int, bias: torch.Tensor | None = None, vocab_start: int = 0
) -> _Pair:
    rows = hidden.shape[0]
    return hidden.new_empty(rows, k, dtype=torch.int64), hidden.new_empty(rows, k, dtype=torch.float32)


@torch.library.register_fake("dflash::verify_block_from_hidden")
def _verify_block_from_hidden_fake(
    candidates: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    prefix_lens: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> _VerifyTensors:
    batch, block = candidates.shape
    return (
        hidden.new_empty(batch, dtype=torch.int32),
        hidden.new_empty(batch, dtype=torch.int32),
        hidden.new_empty(batch, dtype=torch.int64),
        hidden.new_empty(batch, block, dtype=torch.int64),
        hidden.new_empty(batch, dtype=torch.int64),
    )


@torch.library.register_fake("dflash::lm_head_argmax.out")
@torch.library.register_fake("dflash::lm_head_topk.out")
@torch.library.register_fake("dflash::verify_block_from_hidden.out")
def _mutating_fake(*args: object, **kwargs: object) -> None:
    return None

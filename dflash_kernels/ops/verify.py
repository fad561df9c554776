"""Chain verification: what the target's pass over a block commits, greedy or sampled, with sharded vocabularies.

A block is ``[anchor, x_1, ..., x_G]``, ``G = T - 1``. Row ``j`` of the target is its distribution of the token after
``x_j`` (``x_0`` is the anchor); ``x_{j+1}`` is the draft's guess at it. The longest accepted prefix and one *bonus*
token of the target are committed.

Every op returns or fills, for each request:

==================  ============  =====================================================================
``accept_lens``     [B] int32     accepted draft tokens, 0..T-1
``commit_lens``     [B] int32     ``accept_lens + 1``: the bonus is counted
``bonus_ids``       [B] int64     the target's own token after the accepted ones
``out_tokens``      [B, T] int64  ``x_1 .. x_G, 0`` with the bonus at ``accept_lens``; the first ``commit_lens`` count
``new_seq_lens``    [B] int64     ``prefix_lens + commit_lens``
==================  ============  =====================================================================
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dflash_kernels import tuning
from dflash_kernels.draft_stream import Exchange
from dflash_kernels.ops._errors import dflash_errors

__all__ = [
    "Verified",
    "argmax_logits",
    "merge_exchange_words",
    "merge_vocab_ranks",
    "merge_vocab_shards",
    "verify_block",
    "verify_block_sampled",
    "verify_workspace",
]


class Verified(NamedTuple):
    """Outputs of a verification; see the module's table."""

    accept_lens: torch.Tensor
    commit_lens: torch.Tensor
    bonus_ids: torch.Tensor
    out_tokens: torch.Tensor
    new_seq_lens: torch.Tensor

    @staticmethod
    def empty(batch: int, block_size: int, device: torch.device | str) -> Verified:
        """Outputs for the ``out`` form, uninitialised."""
        return Verified(
            torch.empty(batch, dtype=torch.int32, device=device),
            torch.empty(batch, dtype=torch.int32, device=device),
            torch.empty(batch, dtype=torch.int64, device=device),
            torch.empty(batch, block_size, dtype=torch.int64, device=device),
            torch.empty(batch, dtype=torch.int64, device=device),
        )


def verify_workspace(
    batch: int, block_size: int, device: torch.device | str, vocab_size: int | None = None
) -> torch.Tensor:
    """Scratch for the ``out`` forms, int64 zeros; with ``vocab_size``, of `verify_block_sampled` too.

    Any smaller batch, block or vocabulary may use it too. Every call leaves zero what has to be (the first ``batch *
    (2 * block_size + 2)`` elements; with ``vocab_size`` three more, and ``8 * ceil(vocab_size / 4096) + 2`` for each
    row of a block), so it is made once; two calls that may run at the same time need one each.
    """
    size = batch * (2 * block_size + 2)
    if vocab_size is not None:
        keys = -(-vocab_size // 4096) * 8 + 2
        size += 3 + batch * block_size * keys + batch * (block_size * 260 + 1) + 1
    return torch.zeros(size, dtype=torch.int64, device=device)


@dflash_errors
def verify_block(
    candidates: torch.Tensor,
    target: torch.Tensor,
    prefix_lens: torch.Tensor,
    *,
    lazy: int = -1,
    out: Verified | None = None,
    workspace: torch.Tensor | None = None,
) -> Verified:
    """Greedy verification: ``accept_lens`` = the longest prefix with ``top1[j] == candidates[j + 1]``.

    From logits, ``top1[j]`` is ``torch.argmax(logits[j])`` made definite: the first index among equals, the first NaN
    if there is any.

    Args:
        candidates: [B, T] int32 or int64, any strides; column 0 is the anchor; 1 <= T <= 32.
        target: [B, T] int32 or int64 top-1 ids, or [B, T, V] bfloat16, float16 or float32 logits, the last dimension
            contiguous.
        prefix_lens: [B] int32 or int64, committed length before the step.
        lazy: CUDA, from logits: 1 skips rows past a request's first mismatch once that is known, 0 reads all rows, -1
            chooses by the bytes of the logits: by what was measured on this machine (`dflash_kernels.tuning`), else by
            the kernel's own limit. The results are the same.
        out: with ``workspace`` (see `verify_workspace`; used by logits only, still to be given): fills these tensors
            and allocates nothing.

    Returns:
        The five outputs of the module's table.

    Raises:
        ValueError: wrong shape, dtype, device or strides of an argument.

    Source: the accept step of SGLang's DFLASH worker, bit for bit.
    """
    if lazy == -1 and target.is_cuda and target.dim() == 3 and not torch.compiler.is_compiling():
        lazy = tuning.lazy(target)
    if out is None:
        return Verified(*torch.ops.dflash.verify_block(candidates, target, prefix_lens, lazy))
    torch.ops.dflash.verify_block.out(
        candidates, target, prefix_lens, lazy, **out._asdict(), workspace=_given(workspace, "verify_block")
    )
    return out


@dflash_errors
def verify_block_sampled(
    candidates: torch.Tensor,
    logits: torch.Tensor,
    prefix_lens: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    offsets: torch.Tensor,
    draft_ids: torch.Tensor | None = None,
    draft_probs: torch.Tensor | None = None,
    token_bitmask: torch.Tensor | None = None,
    logit_bias: torch.Tensor | None = None,
    rule: str = "token",
    *,
    out: Verified | None = None,
    workspace: torch.Tensor | None = None,
) -> Verified:
    """Speculative sampling: the committed tokens are distributed as the target's own samples.

    The target's distribution ``p_j`` of row ``j``: ``softmax((logits + logit_bias) / temperature)`` over the tokens the
    bitmask allows, then top-k (values equal to the k-th stay), then top-p of what is left (the largest threshold whose
    upper set has at least ``top_p`` of the mass; ties stay), then min-p (``p >= min_p * max p``), normalised. Logits
    whose distances to the row's largest are the same float32 number are ties. ``temperature == 0`` is greedy. A row
    with a NaN or +inf, or with nothing allowed, has all its mass on its argmax.

    ``rule="token"``: ``x_{j+1}`` is accepted with probability ``min(1, p/q)``; the bonus comes from
    ``max(p - q, 0)`` after a rejection (Leviathan et al. 2023, Chen et al. 2023). ``rule="block"``: block verification
    (Sun et al. 2024, algorithm 2), which never accepts less in expectation. Both are exact if the draft token was drawn
    from ``q`` (always so for a one-hot ``q``: a token chosen by argmax).

    Random numbers: Philox4x32-10, key ``seeds[b]``, counter ``(offsets[b], j, 0)``; word 0 decides acceptance of
    ``x_{j+1}``, word 1 draws the bonus at row ``j`` by inverse CDF in the order of ids (where the bonus replaces a
    rejected token and ``draft_ids`` is given, the draft row's tokens come in their order after all others). A request's
    result does not depend on the rest of the batch.

    Args:
        candidates: [B, T] int32 or int64, any strides; 1 <= T <= 32.
        logits: [B, T, V] bfloat16, float16 or float32, the last dimension contiguous.
        prefix_lens: [B] int32 or int64.
        temperature, top_p, min_p: [B] float32; off at 1 (top_p) and 0 (min_p).
        top_k: [B] int32 or int64; off if <= 0 or >= V.
        seeds, offsets: [B] int64.
        draft_ids, draft_probs: [B, T-1, Kd] int32/int64 and float32: the draft's distribution of ``x_{j+1}``; ids with
            a probability > 0 are distinct in a row, the others are ignored. Not given: all mass on the candidate.
        token_bitmask: [B, T, ceil(V/32)] int32, bit ``v % 32`` of word ``v // 32`` set: token ``v`` is allowed.
        logit_bias: [B, V] float32, added before anything else.
        rule: "token" or "block".
        out: with ``workspace`` (see `verify_workspace`, with its ``vocab_size``): fills these tensors and allocates
            nothing.

    Raises:
        ValueError: wrong shape, dtype, device or strides; on the CPU, and on CUDA under ``DFLASH_DEBUG=1``, also a
            value out of its range.

    Source: the papers named above; the filters' order is SGLang's (top-k, top-p, min-p).
    """
    inputs = (
        *(candidates, logits, prefix_lens, temperature, top_k, top_p, min_p, seeds, offsets),
        *(draft_ids, draft_probs, token_bitmask, logit_bias, rule),
    )
    if out is None:
        return Verified(*torch.ops.dflash.verify_block_sampled(*inputs))
    torch.ops.dflash.verify_block_sampled.out(
        *inputs, **out._asdict(), workspace=_given(workspace, "verify_block_sampled")
    )
    return out


@dflash_errors
def argmax_logits(
    logits: torch.Tensor,
    vocab_start: int = 0,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    workspace: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best token of each row of one vocabulary shard: ``(ids [N] int64, values [N] float32)``.

    The first index among equals, the first NaN if there is any. What each rank of a tensor-parallel LM head computes
    before `merge_vocab_shards`.

    Args:
        logits: [N, V] bfloat16, float16 or float32, the last dimension contiguous.
        vocab_start: id of column 0.
        out: with ``workspace`` (``verify_workspace(N, 1, device)``): fills these tensors and allocates nothing.

    Raises:
        ValueError: wrong shape, dtype, device or strides.
    """
    if out is None:
        return torch.ops.dflash.argmax_logits(logits, vocab_start)
    torch.ops.dflash.argmax_logits.out(
        logits, vocab_start, out_ids=out[0], out_values=out[1], workspace=_given(workspace, "argmax_logits")
    )
    return out


@dflash_errors
def merge_vocab_shards(
    ids: torch.Tensor, values: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best of S shards' ``(id, value)`` pairs: ``(ids [N] int64, values [N] float32)``.

    The largest value, a NaN above all, the smallest id among equals: whatever the order of the shards, the token the
    argmax of the whole row gives.

    Args:
        ids: [S, N] int64, contiguous (what an all-gather of `argmax_logits` gives), S >= 1.
        values: [S, N] float32, contiguous.
        out: fills these tensors and allocates nothing.

    Raises:
        ValueError: wrong shape, dtype, device or strides.
    """
    if out is None:
        return torch.ops.dflash.merge_vocab_shards(ids, values)
    torch.ops.dflash.merge_vocab_shards.out(ids, values, out_ids=out[0], out_values=out[1])
    return out


@dflash_errors
def merge_exchange_words(world: int) -> int:
    """int32 elements of :attr:`Exchange.words` that :func:`merge_vocab_ranks` needs for `world` ranks.

    Raises:
        ValueError: ``world`` not in 1..8.
    """
    return torch.ops.dflash.merge_exchange_words(world)


@dflash_errors
def merge_vocab_ranks(
    ids: torch.Tensor,
    values: torch.Tensor,
    exchange: Exchange,
    *,
    patience: float = 60.0,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_vocab_shards` of all ranks' pairs without a gather: ``(ids [N] int64, values [N] float32)`` on each rank.

    Every rank must make the same call, with its own pairs. CUDA only, as :func:`draft_forward_sharded`, but with an
    exchange of its own; the CPU takes one rank.

    Args:
        ids: [N] int64, contiguous, this rank's best, below 2^32 - 1; N at most 1024.
        values: [N] float32, contiguous.
        exchange: of :func:`merge_exchange_words` elements. Its words change.
        patience: seconds after which a rank that waits for another ends the kernel, and the process's use of the GPU,
            with an error.
        out: fills these tensors, which may be ``ids`` and ``values``, and allocates nothing.

    Raises:
        ValueError: wrong shape, dtype, device or strides; an exchange that is too small; several ranks on the CPU.
    """
    inputs = (ids, values, exchange.words, list(exchange.addresses), exchange.rank, patience)
    if out is None:
        return torch.ops.dflash.merge_vocab_ranks(*inputs)
    torch.ops.dflash.merge_vocab_ranks.out(*inputs, out_ids=out[0], out_values=out[1])
    return out


def _given(workspace: torch.Tensor | None, op: str) -> torch.Tensor:
    if workspace is None:
        raise ValueError(f"dflash::{op}: workspace must be given with out, got None")
    return workspace


def _fake_outputs(candidates: torch.Tensor) -> tuple[torch.Tensor, ...]:
    batch, block_size = candidates.shape
    return (
        candidates.new_empty(batch, dtype=torch.int32),
        candidates.new_empty(batch, dtype=torch.int32),
        candidates.new_empty(batch, dtype=torch.int64),
        candidates.new_empty((batch, block_size), dtype=torch.int64),
        candidates.new_empty(batch, dtype=torch.int64),
    )


@torch.library.register_fake("dflash::verify_block")
def _(candidates: torch.Tensor, target: torch.Tensor, prefix_lens: torch.Tensor, lazy: int = -1) -> object:
    return _fake_outputs(candidates)


@torch.library.register_fake("dflash::verify_block_sampled")
def _(candidates: torch.Tensor, *args: object, **kwargs: object) -> object:
    return _fake_outputs(candidates)


@torch.library.register_fake("dflash::argmax_logits")
def _(logits: torch.Tensor, vocab_start: int = 0) -> object:
    return logits.new_empty(logits.size(0), dtype=torch.int64), logits.new_empty(logits.size(0), dtype=torch.float32)


@torch.library.register_fake("dflash::merge_vocab_shards")
def _(ids: torch.Tensor, values: torch.Tensor) -> object:
    return ids.new_empty(ids.size(1)), values.new_empty(values.size(1))


@torch.library.register_fake("dflash::merge_vocab_ranks")
def _(ids: torch.Tensor, values: torch.Tensor, *args: object) -> object:
    return torch.empty_like(ids), torch.empty_like(values)


@torch.library.register_fake("dflash::merge_vocab_ranks.out")
@torch.library.register_fake("dflash::verify_block.out")
@torch.library.register_fake("dflash::verify_block_sampled.out")
@torch.library.register_fake("dflash::argmax_logits.out")
@torch.library.register_fake("dflash::merge_vocab_shards.out")
def _(*args: object, **kwargs: object) -> None:
    return None

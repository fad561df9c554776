"""What DFlash2 adds to a DFlash drafter: a walk through candidates instead of an argmax, and a grouped convolution.

Letters beyond the usual: G = T - 1 slots to fill, Kd candidates a slot (16 in the published drafters), R the selector's
rank (256).
"""

from __future__ import annotations

import torch

from dflash_kernels.ops._errors import dflash_errors

__all__ = ["grouped_conv", "select_path"]


@dflash_errors
def select_path(
    candidate_ids: torch.Tensor,
    base_logits: torch.Tensor,
    hidden: torch.Tensor,
    anchor_ids: torch.Tensor,
    predecessor_codebook: torch.Tensor,
    successor_codebook: torch.Tensor,
    temperature: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one token a slot among the slot's candidates, each choice scored against the one before.

    With ``A``, ``B`` the predecessor and successor codebooks and ``prev_0 = anchor_ids[b]``, for j = 0..G-1::

        m[r]     = round(A[prev_j, r] * hidden[b, j, r])
        score[c] = base_logits[b, j, c] + round(sum_r m[r] * B[candidate_ids[b, j, c], r])

        temperature 0:  c* = argmax score;            q = 1 at c*, 0 elsewhere
        else:           q = softmax(score / max(temperature[b], 1e-5));
                        c* = first c with uniforms[b, j] < q[0] + .. + q[c]  (failing that, the last c with q[c] > 0)

        path_ids[b, j] = prev_{j+1} = candidate_ids[b, j, c*];    draft_probs[b, j, :] = q

    ``round`` rounds to the codebooks' dtype, the sum is float32, the score float32. The argmax is torch's: first index
    on ties, the first NaN if there is one. Where no softmax exists (a NaN, or an infinite largest score) the slot is
    taken as at temperature 0, so that q always is the distribution the token was drawn from. In bfloat16 the scores are
    the same bits on every device; a request's result depends on nothing else in the batch.

    ``candidate_ids`` and ``draft_probs`` are the ``draft_ids`` and ``draft_probs`` of ``verify_block_sampled``.

    Args:
        candidate_ids: ``[B, G, Kd]`` int32 or int64, the top Kd tokens of each slot in any order, distinct within a
            slot; G <= 32, Kd in 1..32. From ``lm_head_topk`` over the block's hidden rows 1..T-1.
        base_logits: ``[B, G, Kd]`` float32, their logits (after any scale or softcap).
        hidden: ``[B, G, R]`` bfloat16 (CPU: or float32), the rows' hidden states times the selector's
            ``hidden_projection``; R a multiple of 8 in 8..256. On CUDA rows start at multiples of 16 bytes.
        anchor_ids: ``[B]`` int32 or int64, the block's first token.
        predecessor_codebook, successor_codebook: ``[V, R]`` contiguous, hidden's dtype; V is the whole vocabulary.
        temperature: ``[B]`` float32, >= 0; None: 0 for all.
        uniforms: ``[B, G]`` float32 in [0, 1), the draws; given iff ``temperature`` is.
        out: contiguous ``path_ids`` and ``draft_probs`` to write instead of new tensors.

        The last dimensions of ``candidate_ids``, ``base_logits`` and ``hidden`` are contiguous, other strides free.

    Returns:
        ``path_ids`` ``[B, G]`` int64 and ``draft_probs`` ``[B, G, Kd]`` float32.

    Raises:
        ValueError: wrong shape, dtype, device, stride or alignment; on the CPU (on CUDA only under DFLASH_DEBUG=1) also
            an id outside the vocabulary, a temperature that is negative or NaN, a uniform outside [0, 1). Unchecked, an
            id outside the vocabulary has a row of zeros and a temperature that is negative or NaN counts as 0.

    Source: SGLang's DFlash2 ``CandidateSelector`` (models/dflash.py), whose scores round as above (bfloat16 products
    and sums, float32 base logits). It clips a draw to the last candidate and lets NaN through to q. The published model
    code (``dflash`` on PyPI) also rounds the score itself to bfloat16.
    """
    ops = torch.ops.dflash.select_path
    arguments = (candidate_ids, base_logits, hidden, anchor_ids, predecessor_codebook, successor_codebook)
    if out is None:
        return ops.default(*arguments, temperature, uniforms)
    ops.out(*arguments, temperature, uniforms, path_ids=out[0], draft_probs=out[1])
    return out


@dflash_errors
def grouped_conv(
    x: torch.Tensor,
    delta: torch.Tensor,
    base: torch.Tensor,
    block_size: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal depthwise convolution over the tokens of each block, its kernel partly a function of the token.

    ::

        out[n, h] = round( sum over tap of (base[tap, h] + delta[n, tap, h // group_size]) * x[n - tap, h] )

    where ``x[n - tap]`` counts as 0 if it lies before the block's first row (``n % block_size < tap``). Taps are added
    in order, in float32, every operation rounded by itself; ``round`` rounds once, to x's dtype. Results are the same
    bits on every device.

    A DFlash2 layer convolves the input and the output of its attention and of its MLP: with
    ``c = (x @ kernel_projection.T).view(N, 2, taps, H // group_size)``, x being the sublayer's normed input, ``delta``
    is ``c[:, 0]`` before the sublayer and ``c[:, 1]`` after it, ``base`` is ``base_kernel[0]`` and ``base_kernel[1]``.

    Args:
        x: ``[N, H]`` bfloat16 (CPU: or float32), N = B * T rows in the order of the blocks; row stride free, last
            dimension contiguous.
        delta: ``[N, taps, H / group_size]`` in x's dtype, last dimension contiguous; its sizes give taps >= 1 (2 in the
            published drafters) and group_size (16).
        base: ``[taps, H]`` contiguous, in x's dtype.
        block_size: T.
        out: contiguous ``[N, H]`` in x's dtype to write instead of a new tensor; may not share memory with an input.

    Returns:
        ``[N, H]`` in x's dtype.

    Raises:
        ValueError: wrong shape, dtype, device or stride; N no multiple of ``block_size``; 2**31 elements or more.

    Source: SGLang's ``DFlashGroupedConv`` (models/dflash.py), compiled: float32 inside, rounded once. The published
    model code rounds after every operation.
    """
    ops = torch.ops.dflash.grouped_conv
    if out is None:
        return ops.default(x, delta, base, block_size)
    ops.out(x, delta, base, block_size, out=out)
    return out


@torch.library.register_fake("dflash::select_path")
def _select_path_fake(
    candidate_ids: torch.Tensor,
    base_logits: torch.Tensor,
    hidden: torch.Tensor,
    anchor_ids: torch.Tensor,
    predecessor_codebook: torch.Tensor,
    successor_codebook: torch.Tensor,
    temperature: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    path_ids = candidate_ids.new_empty(candidate_ids.shape[:2], dtype=torch.int64)
    return path_ids, candidate_ids.new_empty(candidate_ids.shape, dtype=torch.float32)


@torch.library.register_fake("dflash::select_path.out")
def _select_path_out_fake(
    candidate_ids: torch.Tensor,
    base_logits: torch.Tensor,
    hidden: torch.Tensor,
    anchor_ids: torch.Tensor,
    predecessor_codebook: torch.Tensor,
    successor_codebook: torch.Tensor,
    temperature: torch.Tensor | None = None,
    uniforms: torch.Tensor | None = None,
    *,
    path_ids: torch.Tensor,
    draft_probs: torch.Tensor,
) -> None:
    return None


@torch.library.register_fake("dflash::grouped_conv")
def _grouped_conv_fake(x: torch.Tensor, delta: torch.Tensor, base: torch.Tensor, block_size: int) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("dflash::grouped_conv.out")
def _grouped_conv_out_fake(
    x: torch.Tensor, delta: torch.Tensor, base: torch.Tensor, block_size: int, *, out: torch.Tensor
) -> None:
    return None

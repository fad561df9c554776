"""Verification: from top-1 ids, from logits, lazily from logits, and sampled.

Baselines, each in the same process; those that cannot be had here are left out:

* accept step: SGLang's Triton kernel, loaded from the file of an installed SGLang without importing SGLang; else the
  same job in torch calls, named so;
* from logits: `torch.argmax` or SGLang's `row_argmax`, then that accept step;
* sampled: `torch` with `torch.topk` (k is the same for all requests here, which the op does not need to know), the same
  with a full sort, and the two chains that SGLang launches with sgl-kernel, where that is installed and runs; the row
  names the fastest of them.

Rows "read, .." are not of an op: launches that only read as many bytes as `verify_block` does from logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from bench import sglang_kernels
from bench.harness import Calls, Case
from bench.shapes import DFLASH2_27B, QWEN3_8B, TINY, DrafterShape
from dflash_kernels import ops
from dflash_kernels.ops import Verified

SUITE = "verify"
TEMPERATURE, TOP_K, TOP_P = 0.7, 20, 0.95
MEAN_COMMITTED = 6.5  # tokens a step, in the rows that say "acc"

Accept = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Verified], object]


@cache
def _sglang_accept() -> tuple[str, Callable[..., None]] | None:
    """SGLang's accept kernel from its file, which needs torch and Triton alone."""
    try:
        kernel = sglang_kernels.find("_compute_dflash_accept_bonus_triton_unchecked")
        return f"sglang {sglang_kernels.version()} accept", kernel
    except Exception as error:  # whatever a file of another version can raise
        print(f"# verify: no sglang baseline: {type(error).__name__}: {error}")
        return None


@cache
def _sglang_row_argmax() -> Callable[[torch.Tensor], torch.Tensor] | None:
    try:
        found: Callable[[torch.Tensor], torch.Tensor] = sglang_kernels.find("row_argmax")
        return found
    except Exception as error:  # whatever a file of another version can raise
        print(f"# verify: no row_argmax of sglang: {type(error).__name__}: {error}")
        return None


def _torch_accept(candidates: torch.Tensor, top1: torch.Tensor, prefix_lens: torch.Tensor, out: Verified) -> object:
    accept_lens = (candidates[:, 1:] == top1[:, :-1]).cumprod(1).sum(1)
    bonus_ids = top1.gather(1, accept_lens[:, None])
    out.accept_lens.copy_(accept_lens)
    torch.add(accept_lens, 1, out=out.commit_lens)
    out.bonus_ids.copy_(bonus_ids[:, 0])
    out.out_tokens[:, :-1].copy_(candidates[:, 1:])
    out.out_tokens.scatter_(1, accept_lens[:, None], bonus_ids)
    torch.add(prefix_lens, out.commit_lens, out=out.new_seq_lens)
    return out


def _accept_step(device: torch.device) -> tuple[str, Accept]:
    """Name and call of the accept step that baselines use."""
    found = _sglang_accept() if device.type == "cuda" else None
    if found is None:
        return f"torch {torch.__version__.split('+')[0]} accept", _torch_accept
    name, kernel = found

    def accept(candidates: torch.Tensor, top1: torch.Tensor, prefix_lens: torch.Tensor, out: Verified) -> object:
        return kernel(
            candidates,
            top1,
            out.accept_lens,
            out.commit_lens,
            out.bonus_ids,
            out.out_tokens,
            prefix_lens,
            out.new_seq_lens,
        )

    return name, accept


def _lengths(batch: int, block_size: int, mean_committed: float) -> list[int]:
    """Accepted tokens of each request: spread evenly over 0..T-1 around the mean, always the same."""
    mean = mean_committed - 1.0
    if batch == 1:
        return [round(mean)]
    low, high = max(2.0 * mean - (block_size - 1.0), 0.0), min(2.0 * mean, block_size - 1.0)
    return [round(low + (high - low) * i / (batch - 1)) for i in range(batch)]


def _candidates(top1: torch.Tensor, vocab: int, lengths: list[int]) -> torch.Tensor:
    """[B, T] candidates of which request b has `lengths[b]` accepted."""
    candidates = torch.zeros_like(top1)
    candidates[:, 1:] = top1[:, :-1]
    for b, length in enumerate(lengths):
        candidates[b, length + 1 :] = (candidates[b, length + 1 :] + 1) % vocab
    return candidates


def _regime(rows: int) -> str:
    return "latency" if rows <= 64 else "throughput"


def _top1_case(shape: DrafterShape, batch: int) -> Case:
    def make(device: torch.device) -> Calls:
        top1 = torch.randint(0, shape.V, (batch, shape.T), device=device)
        candidates = _candidates(top1, shape.V, _lengths(batch, shape.T, MEAN_COMMITTED))
        prefix_lens = torch.randint(0, 4096, (batch,), device=device)
        out, theirs = Verified.empty(batch, shape.T, device), Verified.empty(batch, shape.T, device)
        workspace = ops.verify_workspace(0, 0, device)
        name, accept = _accept_step(device)
        return Calls(
            lambda: ops.verify_block(candidates, top1, prefix_lens, out=out, workspace=workspace),
            {name: lambda: accept(candidates, top1, prefix_lens, theirs)},
        )

    traffic = batch * (3 * shape.T * 8 + 2 * 8 + 2 * 4 + 8)
    return Case(SUITE, "verify_block top-1", f"B{batch} T{shape.T}", "i64", _regime(batch), traffic, 0, "copy", make)


def _logits_case(
    shape: DrafterShape, batch: int, dtype: torch.dtype, lazy: int, committed: float = MEAN_COMMITTED
) -> Case:
    rows = batch * shape.T
    lengths = _lengths(batch, shape.T, committed)

    def make(device: torch.device) -> Calls:
        logits = torch.randn(batch, shape.T, shape.V, device=device, dtype=dtype)
        candidates = _candidates(logits.argmax(-1), shape.V, lengths)
        prefix_lens = torch.randint(0, 4096, (batch,), device=device)
        out, theirs = Verified.empty(batch, shape.T, device), Verified.empty(batch, shape.T, device)
        workspace = ops.verify_workspace(batch, shape.T, device)
        name, accept = _accept_step(device)
        baselines: dict[str, Callable[[], object]] = {
            f"torch argmax + {name}": lambda: accept(candidates, logits.argmax(-1), prefix_lens, theirs)
        }
        row_argmax = _sglang_row_argmax() if device.type == "cuda" else None
        if row_argmax is not None:  # takes float32 alone: bfloat16 is copied first, as the engine does
            flat, best = logits.view(rows, shape.V), row_argmax
            copy = " of a float32 copy" if dtype != torch.float32 else ""
            baselines[f"row_argmax{copy} + {name}"] = lambda: accept(
                candidates, best(flat.float()).view_as(candidates), prefix_lens, theirs
            )
        return Calls(
            lambda: ops.verify_block(candidates, logits, prefix_lens, lazy=lazy, out=out, workspace=workspace),
            baselines,
        )

    read = sum(length + 1 for length in lengths) if lazy == 1 else rows
    mode = "full" if lazy == 0 else f"lazy, acc {committed:g}"
    return Case(
        SUITE,
        f"verify_block {mode}",
        f"B{batch} T{shape.T} V{shape.V}",
        "bf16" if dtype == torch.bfloat16 else "f32",
        _regime(rows),
        read * shape.V * dtype.itemsize,
        0,
        "read",
        make,
    )


_READERS = {"torch amax": 0, "triton 4 KB": 1024, "triton 16 KB": 4096}  # name -> elements of a tile


def _reader_names() -> list[str]:
    """Those that can run here."""
    try:
        import bench.triton_read  # noqa: F401
    except ImportError:
        return [name for name, block in _READERS.items() if not block]
    return list(_READERS)


def _reader(name: str, words: torch.Tensor) -> Callable[[], object]:
    """A launch that only reads `words` (float32)."""
    if block := _READERS[name]:
        from bench.triton_read import reader

        return reader(words, block)
    rows = words.view(-1, words.size(-1))
    out = torch.empty(rows.size(0), device=words.device)
    return lambda: torch.amax(rows, dim=1, out=out)


def _read_case(shape: DrafterShape, batch: int, name: str) -> Case:
    """A launch that only reads as many bytes as `verify_block` does: what one launch can reach at that size."""

    def make(device: torch.device) -> Calls:
        words = torch.randn(batch, shape.T, shape.V // 2, device=device)
        return Calls(_reader(name, words), {})

    rows = batch * shape.T
    label = f"B{batch} T{shape.T} V{shape.V}"
    return Case(SUITE, f"read, {name}", label, "bf16", _regime(rows), rows * shape.V * 2, 0, "read", make)


def _sampled_finish(
    candidates: torch.Tensor,
    guess_p: torch.Tensor,
    prefix_lens: torch.Tensor,
    draw: Callable[[torch.Tensor], torch.Tensor],
) -> object:
    """Token rule for one-hot drafts: accept lengths from p of the guesses, then a draw at those rows."""
    accepted = torch.rand_like(guess_p) < guess_p
    accept_lens = accepted.to(torch.int32).cumprod(1).sum(1)
    bonus = draw(accept_lens)
    out_tokens = torch.nn.functional.pad(candidates[:, 1:], (0, 1)).scatter(1, accept_lens[:, None], bonus[:, None])
    return accept_lens, accept_lens + 1, bonus, out_tokens, prefix_lens + accept_lens + 1


def _torch_sampled(
    candidates: torch.Tensor,
    logits: torch.Tensor,
    prefix_lens: torch.Tensor,
    ordered: tuple[torch.Tensor, torch.Tensor],
) -> object:
    """The job on rows that are sorted, or cut to their top k, as `ordered` (values, ids)."""
    values, ids = ordered
    probs = torch.softmax(values.float() / TEMPERATURE, -1)
    ranks = torch.arange(values.size(-1), device=values.device)
    probs = probs * (ranks < TOP_K)
    probs = probs / probs.sum(-1, keepdim=True)
    probs = probs * (probs.cumsum(-1) - probs < TOP_P)
    probs = probs / probs.sum(-1, keepdim=True)
    guess = candidates[:, 1:, None]
    guess_p = (probs[:, :-1] * (ids[:, :-1] == guess)).sum(-1)

    def draw(accept_lens: torch.Tensor) -> torch.Tensor:
        at = accept_lens[:, None, None].expand(-1, 1, probs.size(-1))
        row, row_ids = probs.gather(1, at)[:, 0], ids.gather(1, at)[:, 0]
        rejected = torch.nn.functional.pad(candidates[:, 1:], (0, 1), value=-1).gather(1, accept_lens[:, None])
        row = row * (row_ids != rejected)
        cumulative = row.cumsum(-1)
        target = torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, target, right=True).clamp_max(row.size(-1) - 1)
        return row_ids.gather(1, place)[:, 0]

    return _sampled_finish(candidates, guess_p, prefix_lens, draw)


@cache
def _sgl_kernel() -> tuple[str, Any] | None:
    """Version and module of sgl-kernel, where it is installed for this torch."""
    try:
        import sgl_kernel  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except Exception as error:  # built for another torch, or not there
        print(f"# verify: no sgl-kernel baseline: {type(error).__name__}: {error}")
        return None
    return getattr(sgl_kernel, "__version__", "?"), sgl_kernel


def _sgl_kernel_baselines(
    candidates: torch.Tensor, logits: torch.Tensor, prefix_lens: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """What SGLang launches for sampled requests of a DFLASH step (0.5.16), by name; those that run here.

    `topk`: its usual path: top-k of the scaled logits, softmax and top-p of these, scattered to dense probabilities.
    `dense`: its other one: softmax, then top-k and top-p renormalisation over the vocabulary. Both end in the sampling
    kernel for trees, on a chain whose draft probabilities are zero; it writes to them, so they are made afresh.
    """
    found = _sgl_kernel()
    if found is None:
        return {}
    version, sgl_kernel = found
    batch, block_size, vocab = logits.shape
    device = logits.device
    rows = batch * block_size
    temperatures = torch.full((batch, 1), TEMPERATURE, device=device)
    top_ks = torch.full((batch,), TOP_K, dtype=torch.int32, device=device)
    top_ps = torch.full((batch,), TOP_P, device=device)
    index = torch.arange(rows, device=device).view(batch, block_size)
    following = torch.arange(1, block_size + 1, device=device).repeat(batch, 1)
    following[:, -1] = -1
    sibling = torch.full_like(following, -1)
    predicts = torch.empty(rows, dtype=torch.int32, device=device)
    accept_index = torch.empty(batch, block_size, dtype=torch.int32, device=device)
    accepted = torch.empty(batch, dtype=torch.int32, device=device)
    requests = torch.arange(batch, device=device)

    def each_row(values: torch.Tensor) -> torch.Tensor:
        return torch.repeat_interleave(values, block_size, dim=0)

    def topk_probs(scaled: torch.Tensor) -> torch.Tensor:
        values, ids = torch.topk(scaled, TOP_K, dim=-1)
        probs = sgl_kernel.top_p_renorm_prob(torch.softmax(values, -1), each_row(top_ps))
        return torch.zeros_like(scaled).scatter_(1, ids, probs)

    def dense_probs(scaled: torch.Tensor) -> torch.Tensor:
        probs = sgl_kernel.top_k_renorm_prob(torch.softmax(scaled, -1), each_row(top_ks))
        probs = sgl_kernel.top_p_renorm_prob(probs, each_row(top_ps))
        assert isinstance(probs, torch.Tensor)
        return probs

    def chain(probs_of: Callable[[torch.Tensor], torch.Tensor]) -> object:
        probs = probs_of(logits.view(rows, vocab).float() / each_row(temperatures)).view(batch, block_size, vocab)
        sgl_kernel.tree_speculative_sampling_target_only(
            predicts=predicts,
            accept_index=accept_index,
            accept_token_num=accepted,
            candidates=candidates,
            retrive_index=index,
            retrive_next_token=following,
            retrive_next_sibling=sibling,
            uniform_samples=torch.rand(batch, block_size, device=device),
            uniform_samples_for_final_sampling=torch.rand(batch, device=device),
            target_probs=probs,
            draft_probs=torch.zeros_like(probs),
            threshold_single=1.0,
            threshold_acc=1.0,
            deterministic=True,
        )
        bonus = predicts[accept_index[requests, accepted.long()].long()].long()
        out_tokens = torch.nn.functional.pad(candidates[:, 1:], (0, 1))
        out_tokens.scatter_(1, accepted.long()[:, None], bonus[:, None])
        commit_lens = accepted + 1
        return accepted, commit_lens, bonus, out_tokens, prefix_lens + commit_lens

    chains: dict[str, Callable[[], object]] = {}
    for name, probs_of in (("topk", topk_probs), ("dense", dense_probs)):
        label = f"sgl-kernel {version} {name} chain"

        def run(probs_of: Callable[[torch.Tensor], torch.Tensor] = probs_of) -> object:
            return chain(probs_of)

        try:
            run()
            torch.cuda.synchronize(device)
        except Exception as error:  # its kernels, or those that it compiles on first use, do not run here
            print(f"# verify: {label} left out: {type(error).__name__}: {error}")
        else:
            chains[label] = run
    return chains


def _sampled_case(shape: DrafterShape, batch: int, rule: str) -> Case:
    rows = batch * shape.T
    lengths = _lengths(batch, shape.T, MEAN_COMMITTED)

    def make(device: torch.device) -> Calls:
        # Each row has one likely token, so that how much is accepted is what `lengths` says.
        logits = torch.randn(batch, shape.T, shape.V, device=device, dtype=torch.bfloat16) * 2
        peak = torch.randint(0, shape.V, (batch, shape.T), device=device)
        logits.scatter_(2, peak[..., None], 24.0)
        candidates = _candidates(peak, shape.V, lengths)
        prefix_lens = torch.randint(0, 4096, (batch,), device=device)

        def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((batch,), value, dtype=dtype, device=device)

        settings = (full(TEMPERATURE), full(TOP_K, torch.int32), full(TOP_P), full(0.0))
        seeds = torch.arange(batch, device=device)
        out, workspace = Verified.empty(batch, shape.T, device), ops.verify_workspace(batch, shape.T, device, shape.V)
        inputs = (candidates, logits, prefix_lens)
        version = torch.__version__.split("+")[0]
        baselines: dict[str, Callable[[], object]] = {
            f"torch {version} topk chain": lambda: _torch_sampled(*inputs, ordered=logits.topk(TOP_K)),
            f"torch {version} sort chain": lambda: _torch_sampled(*inputs, ordered=logits.sort(descending=True)),
        }
        if device.type == "cuda":
            baselines |= _sgl_kernel_baselines(*inputs)
        return Calls(
            lambda: ops.verify_block_sampled(
                *inputs, *settings, seeds, prefix_lens, rule=rule, out=out, workspace=workspace
            ),
            baselines,
        )

    # The block rule looks at every row, unless a draft token is impossible: here the first rejected one is.
    read = sum(length + 1 for length in lengths)
    return Case(
        SUITE,
        f"verify_block_sampled {rule}",
        f"B{batch} T{shape.T} V{shape.V}",
        "bf16",
        _regime(rows),
        read * shape.V * 2,
        0,
        "read",
        make,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The shapes of a Qwen3-8B target, and of the vocabulary of 248320; a small one on the CPU."""
    if device.type != "cuda":
        yield _top1_case(TINY, 1)
        yield _logits_case(TINY, 1, torch.float32, 0)
        yield _sampled_case(TINY, 1, "token")
        return
    shape = QWEN3_8B
    for batch in (1, 32) if quick else (1, 8, 64, 256):
        yield _top1_case(shape, batch)
    for batch in (1, 8, 32):
        yield _logits_case(shape, batch, torch.bfloat16, 0)
        for name in _reader_names():
            yield _read_case(shape, batch, name)
    for committed in (MEAN_COMMITTED, float(shape.T)):  # all of them: where nothing can be left out
        yield _logits_case(shape, 32, torch.bfloat16, 1, committed)
    for batch in (1, 32) if quick else (1, 8, 32):
        yield _sampled_case(shape, batch, "token")
    if quick:
        return
    yield _sampled_case(shape, 8, "block")
    for batch in (1, 32):
        yield _logits_case(shape, batch, torch.float32, 0)
    yield _logits_case(shape, 8, torch.bfloat16, 1)
    yield _logits_case(DFLASH2_27B, 8, torch.bfloat16, 0)
    yield _sampled_case(DFLASH2_27B, 8, "token")

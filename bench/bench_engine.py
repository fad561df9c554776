"""End to end on the demo pair: DFlash against plain decoding of the same engine, and transformers' generate().

A row's `ours_us` and `baseline_us` are microseconds per emitted token of whole calls, prompts included, with natural
stops; the baseline is the faster of the two and `baselines_us` holds both. Further keys: `mean_acceptance` (tokens a
decode step, the bonus counted), `tokens_per_s`, `ms_per_step` and `plain_ms_per_step` (decode only), `decode_ratio`
(ours / plain by time from the first token on, prompts left out), `graph_captures` (within the measured calls: 0 means
that none of them paid for one), and `identical` (prompts whose text equals plain decoding's token for token, as "8/8";
with a bf16 target rounding may flip a tie).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
import transformers

from bench.demo_pair import load_demo_pair
from bench.harness import Row
from bench.runner import Problem
from dflash_kernels.engine import Engine, GenerationResult, SamplingParams
from dflash_kernels.engine.step import Mode

SUITE, OP = "engine", "generate"

PROMPTS = (
    'Complete the following Python function.\n```python\ndef is_leap_year(year: int) -> bool:\n    """Say whether a '
    'Gregorian year has a 29th of February.\n    >>> is_leap_year(1900)\n    False\n    """\n```',
    "Complete the following Python function.\n```python\ndef count_words(text: str) -> dict[str, int]:\n    "
    '"""Count how often each word occurs, ignoring case."""\n```',
    "Write a Python function that returns the n-th Fibonacci number.",
    "Complete the following Python function.\n```python\ndef rotate(items: list[int], k: int) -> list[int]:\n    "
    '"""Rotate a list to the right by k places.\n    >>> rotate([1, 2, 3], 1)\n    [3, 1, 2]\n    """\n```',
    "Write a Python function that checks whether a string is a palindrome.",
    "A baker sells 14 loaves in the morning and twice as many in the afternoon. How many loaves is that in all?",
    "Complete the following Python function.\n```python\ndef running_max(values: list[float]) -> list[float]:\n    "
    '"""For each place, the largest value up to it."""\n```',
    "Explain in a few sentences why leaves change their colour in autumn.",
)


def rows(
    device: torch.device, quick: bool, name_filter: str, seconds_left: Callable[[], float]
) -> Iterator[Row | Problem]:
    """One row per target dtype and batch size."""
    gpu = device.type == "cuda"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    new_tokens = (64 if quick else 128) if gpu else 16
    order: tuple[Mode, ...] = ("dflash", "plain") if quick or not gpu else ("dflash", "plain", "plain", "dflash")
    for name, dtype in dtypes.items() if gpu else [("fp32", torch.float32)]:
        pair = None
        for batch in (1, 8) if gpu else (1, 2):
            # No fewer prompts than rows: a batch that is never full would measure a smaller one.
            count = max(2, batch) if quick or not gpu else len(PROMPTS)
            shape = f"demo pair B{batch} T16, {count} prompts, up to {new_tokens} tokens"
            title = f"{SUITE} {OP} {shape} {name}"
            if name_filter not in title:
                continue
            if seconds_left() <= 0:
                yield Problem(SUITE, title, "time limit")
                continue
            pair = pair or load_demo_pair(dtype, device)
            yield _measure(pair, device, name, batch, PROMPTS[:count], new_tokens, shape, order)


def _measure(
    pair: tuple[Any, Any, Any],
    device: torch.device,
    dtype: str,
    batch: int,
    prompts: tuple[str, ...],
    new_tokens: int,
    shape: str,
    order: Sequence[Mode],
) -> Row:
    model, tokenizer, drafter = pair
    engine = Engine(model, drafter, tokenizer, max_batch=batch, max_len=512)
    try:
        ids = [engine.encode(text) for text in prompts]
        params = SamplingParams(max_new_tokens=new_tokens)
        ours, plain = engine.generate(ids, params), engine.decode_plain(ids, params)  # warm: graphs are captured here
        us: dict[str, list[float]] = {"dflash": [], "plain": []}
        captures = 0
        for mode in order:
            results = engine.generate(ids, params, mode=mode)
            us[mode].append(engine.last_stats.seconds * 1e6 / engine.last_stats.new_tokens)
            captures += engine.last_stats.graph_captures
            ours, plain = (results, plain) if mode == "dflash" else (ours, results)
    finally:
        engine.close()
    baselines = {"plain decoding, same engine": median(us["plain"])}
    try:
        baselines[f"transformers {transformers.__version__} generate"] = _transformers_us(
            model, ids, batch, new_tokens, params.resolved(engine.stop_token_ids).stop_token_ids or (), device
        )
    except Exception as error:  # its generate() is a courtesy baseline: another release may want other arguments
        print(f"  # transformers generate not measured: {type(error).__name__}: {error}")
    best = min(baselines, key=lambda name: baselines[name])
    commits = [n for r in ours for n in r.stats.commit_lens]
    same = sum(a.token_ids == b.token_ids for a, b in zip(ours, plain, strict=True))
    ours_us = median(us["dflash"])
    return Row(
        SUITE, OP, shape, dtype, "latency" if batch * engine.block_size <= 64 else "throughput",
        "cold", ours_us, best, baselines[best], 0, 0, None,
        extra={
            "baselines_us": baselines,
            "mean_acceptance": sum(commits) / max(len(commits), 1),
            "tokens_per_s": 1e6 / ours_us,
            "ms_per_step": _ms_per_step(ours, batch),
            "plain_ms_per_step": _ms_per_step(plain, batch),
            "decode_ratio": _decode_us(ours) / _decode_us(plain),
            "graph_captures": captures,
            "identical": f"{same}/{len(ours)}",
        },
    )  # fmt: skip


def _ms_per_step(results: list[GenerationResult], batch: int) -> float:
    """Decode time over decode steps of a full batch: each request's own span over its own steps, median."""
    each = [r.stats.decode_seconds / len(r.stats.commit_lens) for r in results if r.stats.commit_lens]
    return median(each) * 1e3 if each else 0.0


def _decode_us(results: list[GenerationResult]) -> float:
    """us per token after the first of each request, over the requests' own spans."""
    tokens = sum(len(r.token_ids) - 1 for r in results)
    return sum(r.stats.decode_seconds for r in results) * 1e6 / max(tokens, 1)


def _transformers_us(
    model: Any, ids: list[list[int]], batch: int, new_tokens: int, stops: tuple[int, ...], device: torch.device
) -> float:
    """us per emitted token of `model.generate`, greedy, left-padded batches; at most one batch or two prompts."""
    ids = ids[: max(batch, 2)]
    pad = stops[0] if stops else 0

    def run(limit: int) -> int:
        emitted = 0
        for first in range(0, len(ids), batch):
            group = ids[first : first + batch]
            width = max(len(p) for p in group)
            tokens = torch.tensor([[pad] * (width - len(p)) + p for p in group], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in group], device=device)
            output = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=limit,
                do_sample=False,
                eos_token_id=list(stops),
                pad_token_id=pad,
            )
            for row in output[:, width:].tolist():
                ends = [row.index(stop) + 1 for stop in stops if stop in row]
                emitted += min([len(row), *ends])
        return emitted

    run(4)
    started = time.perf_counter()
    emitted = run(new_tokens)
    return (time.perf_counter() - started) * 1e6 / emitted

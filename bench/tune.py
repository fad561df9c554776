"""`python -m bench.tune`: measures what the package leaves to a machine, and writes the best to its tuning file.

* blocks of the streaming kernels (drafter, LM head, injection) at the benches' shapes: all multiprocessors, three
  quarters, half, a quarter; for a bf16 drafter also none, which is the chain of kernels;
* bytes of logits from which greedy verification skips rows, at 6.5 of 16 tokens committed.

Each candidate runs the real op and has to pass the op's correctness rule against the reference before it is timed; one
that fails is reported and never chosen. Candidates take turns in CUDA-graph replays over sets that outrun the L2 (see
`bench.harness`); another value than the default has to be 2 % faster. What is fixed when the library is compiled (depth
of the rings, tile sizes, warps) is not tuned here. The file is `dflash_kernels.tuning`'s.

Exit codes: 0; 1 a candidate was wrong or a question failed; 2 bad arguments or no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.bench_verify import MEAN_COMMITTED, _candidates, _lengths
from bench.harness import _replayable, _seconds, _time_players, free_memory, rotation_count
from bench.shapes import DEMO, QWEN3_8B, QWEN35_397B_TP8, DrafterShape
from dflash_kernels import ops, tuning
from dflash_kernels.draft_stream import default_blocks, pack_draft
from dflash_kernels.head_stream import pack_head
from dflash_kernels.ops import Verified
from dflash_kernels.reference import draft as draft_reference
from dflash_kernels.reference import inject as inject_reference

__all__ = ["Question", "answer", "block_candidates", "choose", "lazy_limit", "main", "questions"]

EPS = 1e-6
CONTEXT = 1024
MARGIN = 0.02
NEVER = 1 << 62  # bytes
MAX_SETS = 24  # what is so small that these fit the L2 is timed hot, for all candidates alike
VERIFY_BATCHES = (1, 4, 8, 16, 32, 64)

Times = dict[int, dict[str, float]]  # value -> load -> us
Timer = Callable[[Sequence[Sequence[Callable[[], object]]], int], list[float]]


@dataclass
class Question:
    """One parameter for one shape.

    Attributes:
        kind, shape: its place in the tuning file.
        candidates: values to try; default: what is taken without tuning, one of them.
        calls: value -> load -> a callable for each rotating set.
        wrong: value -> what is wrong with its results, None if nothing.
    """

    kind: str
    shape: str
    candidates: Sequence[int]
    default: int
    calls: Callable[[int], Mapping[str, Sequence[Callable[[], object]]]]
    wrong: Callable[[int], str | None]


@dataclass
class Answer:
    """What came out: times of all that passed, who failed and why, and the choice."""

    kind: str
    shape: str
    default: int
    chosen: int
    times: Times = field(default_factory=dict)
    wrong: dict[int, str] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """Time by default over the chosen one's, geometric mean over the loads."""
        return _mean_ratio(self.times[self.default], self.times[self.chosen]) if self.times else 1.0

    def as_json(self) -> dict[str, Any]:
        names = ("kind", "shape", "default", "chosen", "gain", "times", "wrong")
        return {name: getattr(self, name) for name in names}


def _mean_ratio(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    return math.exp(sum(math.log(a[load] / b[load]) for load in a) / len(a))


def choose(times: Times, default: int, margin: float = MARGIN) -> int:
    """The fastest value, if it beats the default by more than the margin over all loads together."""
    best = min(times, key=lambda value: _mean_ratio(times[value], times[default]))
    return best if _mean_ratio(times[best], times[default]) < 1 - margin else default


def lazy_limit(sizes: Sequence[tuple[int, float, float]], margin: float = MARGIN) -> int:
    """Of (bytes, all rows us, skipping us): the bytes from which skipping wins, there and at every larger size."""
    limit = NEVER
    for nbytes, full, skipping in sorted(sizes, reverse=True):
        if skipping >= (1 - margin) * full:
            break
        limit = nbytes
    return limit


def block_candidates(multiprocessors: int, chain: bool) -> list[int]:
    """Numbers of blocks to try, largest first; 0 is the chain of kernels."""
    quarters = {max(1, multiprocessors * n // 4) for n in (1, 2, 3, 4)}
    return sorted(quarters, reverse=True) + ([0] if chain else [])


def time_players(players: Sequence[Sequence[Callable[[], object]]], rounds: int) -> list[float]:
    """Median us a call of each, in turns; a player is a callable for each set."""
    if torch.cuda.is_available():
        return _time_players([_replayable(fns) for fns in players], rounds)
    best = [math.inf] * len(players)
    for _ in range(rounds):
        for i, fns in enumerate(players):
            best[i] = min(best[i], sum(_seconds(fn, 1) for fn in fns) / len(fns) * 1e6)
    return best


def answer(question: Question, rounds: int = 6, timer: Timer = time_players) -> Answer:
    """Check and time the candidates.

    Raises:
        RuntimeError: the default itself is wrong.
    """
    wrong = {value: reason for value in question.candidates if (reason := question.wrong(value)) is not None}
    if question.default in wrong:
        raise RuntimeError(f"{question.kind} {question.shape}: the default is wrong: {wrong[question.default]}")
    values = [value for value in question.candidates if value not in wrong]
    calls = {value: question.calls(value) for value in values}
    times: Times = {value: {} for value in values}
    for load in calls[question.default]:
        for value, us in zip(values, timer([calls[value][load] for value in values], rounds), strict=True):
            times[value][load] = us
    return Answer(question.kind, question.shape, question.default, choose(times, question.default), times, wrong)


# -- the questions ----------------------------------------------------------------------------------------------------


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _sets(nbytes: int, device: torch.device) -> int:
    """Copies of weights to rotate over, so that they are cold."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(rotation_count(nbytes, nbytes, l2)[0], MAX_SETS)


def _normal(device: torch.device, *size: int, std: float = 0.02, mean: float = 0.0) -> torch.Tensor:
    return torch.empty(*size, device=device, dtype=torch.bfloat16).normal_(mean, std)


def _within_rounding(out: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> str | None:
    """The rule for bf16 results: no farther from float32 than twice as far as rounding alone leads."""
    error = (out.float() - exact).abs().max().item()
    allowed = 2 * (rounded.float() - exact).abs().max().item() + 4e-3
    return None if error <= allowed else f"error {error:.3g}, allowed {allowed:.3g}"


def draft_question(shape: DrafterShape, device: torch.device, batches: Sequence[int] = (1, 2)) -> Question:
    """Blocks of `draft_forward_packed`, or the chain, over passes of so many requests."""
    q, kv = shape.Hq * shape.D, shape.Hkv * shape.D
    matrices: dict[str, Any] = {
        "qkv_weight": _normal(device, shape.L, q + 2 * kv, shape.H),
        "o_weight": _normal(device, shape.L, shape.H, q),
        "gate_up_weight": _normal(device, shape.L, 2 * shape.I, shape.H),
        "down_weight": _normal(device, shape.L, shape.H, shape.I),
    }
    rest: dict[str, Any] = {
        "embed_weight": _normal(device, 512, shape.H, std=1.0),
        "input_norm": _normal(device, shape.L, shape.H, mean=1.0),
        "qkv_bias": None,
        "q_norm": _normal(device, shape.L, shape.D, mean=1.0),
        "k_norm": _normal(device, shape.L, shape.D, mean=1.0),
        "o_bias": None,
        "post_norm": _normal(device, shape.L, shape.H, mean=1.0),
        "final_norm": _normal(device, shape.H, mean=1.0),
        "windows": [0] * shape.L,
        "causal": [0] * shape.L,
        "eps": EPS,
    }
    angles = torch.rand(CONTEXT + shape.T, shape.D // 2, device=device) * 6
    rest["cos_sin"] = torch.cat([angles.cos(), angles.sin()], dim=-1)

    def inputs(batch: int) -> dict[str, Any]:
        pool = batch * CONTEXT + 1
        prefix = torch.full((batch,), CONTEXT, device=device)
        return rest | {
            "block_ids": torch.randint(0, 512, (batch, shape.T), device=device),
            "positions": prefix[:, None] + torch.arange(shape.T, device=device),
            "prefix_lens": prefix,
            "req_pool_indices": torch.arange(batch, device=device),
            "req_to_token": torch.randperm(pool - 1, device=device, dtype=torch.int32).view(batch, CONTEXT) + 1,
            "k_caches": [_normal(device, pool, shape.Hkv, shape.D, std=1.0) for _ in range(shape.L)],
            "v_caches": [_normal(device, pool, shape.Hkv, shape.D, std=1.0) for _ in range(shape.L)],
        }

    loads = {f"B{batch}": inputs(batch) for batch in batches}
    exact = {
        name: tuple(draft_reference.draft_forward(**load, **matrices, dtype=t) for t in (torch.float32, torch.bfloat16))
        for name, load in loads.items()
    }
    count = _sets(2 * shape.L * shape.layer_weights, device)

    def pack(blocks: int) -> Any:
        return pack_draft(*matrices.values(), num_kv_heads=shape.Hkv, head_dim=shape.D, blocks=blocks)

    # The weights of all candidates are the same tensors; only the schedules differ.
    first = pack(1).weights
    copies = [first] + [first.clone() for _ in range(count - 1)]
    dense = [matrices] + [{name: m.clone() for name, m in matrices.items()} for _ in range(count - 1)]

    def run(value: int, load: Mapping[str, Any], at: int, packed: Any) -> Callable[[], torch.Tensor]:
        batch = load["block_ids"].shape[0]
        out = torch.full((batch * shape.T, shape.H), float("nan"), device=device, dtype=torch.bfloat16)
        if value == 0:
            size = ops.draft_forward_workspace(batch, shape.T, shape.H, shape.I, shape.Hq, shape.Hkv, shape.D)
            arguments = {**load, **dense[at]}
        else:
            size = ops.draft_forward_packed_workspace(batch, shape.T, packed)
            arguments = {**load, "packed": packed}
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        op: Callable[..., torch.Tensor] = ops.draft_forward_packed if value else ops.draft_forward
        return lambda: op(**arguments, out=out, workspace=workspace)

    def packs(value: int) -> list[Any]:
        if value == 0:
            return [None] * count
        one = pack(value)  # launches follow each other: they may share its counters
        return [replace(one, weights=weights) for weights in copies]

    def calls(value: int) -> dict[str, list[Callable[[], object]]]:
        packed = packs(value)
        return {name: [run(value, load, at, packed[at]) for at in range(count)] for name, load in loads.items()}

    def wrong(value: int) -> str | None:
        packed = packs(value)
        for name, load in loads.items():
            for at in range(count):
                if reason := _within_rounding(run(value, load, at, packed[at])(), *exact[name]):
                    return f"{name}: {reason}"
        return None

    sms = _multiprocessors(device)
    default = default_blocks(list(matrices.values()), device) if device.type == "cuda" else sms
    key = tuning.draft_shape(shape.L, shape.H, shape.I, (shape.Hq, shape.Hkv), shape.D, None)
    return Question("draft", key, block_candidates(sms, chain=True), default, calls, wrong)


def head_question(shape: DrafterShape, device: torch.device, batches: Sequence[int] = (1, 4)) -> Question:
    """Blocks of `lm_head_argmax_packed`."""
    weight = _normal(device, shape.V, shape.H)
    loads = {f"B{batch}": _normal(device, batch * shape.T, shape.H, std=1.0) for batch in batches}
    tiles = pack_head(weight, blocks=1).weights
    copies = [tiles] + [tiles.clone() for _ in range(_sets(weight.nbytes, device) - 1)]

    def runs(value: int) -> dict[str, list[Callable[[], tuple[torch.Tensor, torch.Tensor]]]]:
        one = pack_head(weight, blocks=value)
        packed = [replace(one, weights=copy) for copy in copies]

        def run(hidden: torch.Tensor, head: Any) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
            rows = hidden.shape[0]
            out = (torch.full((rows,), -1, device=device), torch.full((rows,), float("nan"), device=device))
            workspace = ops.lm_head_argmax_packed_workspace(head)
            return lambda: ops.lm_head_argmax_packed(hidden, head, out=out, workspace=workspace)

        return {name: [run(hidden, head) for head in packed] for name, hidden in loads.items()}

    def wrong(value: int) -> str | None:
        for name, calls in runs(value).items():
            logits = loads[name].float() @ weight.float().T
            best = logits.max(-1).values
            slack = 2.0**-7 * best.abs() + 1e-3  # logits that round to the same bf16 are a tie
            for call in calls:
                ids, values = call()
                if bool(((ids < 0) | (ids >= shape.V)).any()):
                    return f"{name}: ids out of range"
                chosen = logits.gather(1, ids[:, None])[:, 0]
                if bool(((best - chosen) > slack).any()) or not bool(((values - chosen).abs() <= slack).all()):
                    return f"{name}: not the largest logits"
        return None

    sms = _multiprocessors(device)
    key = tuning.head_shape(shape.V, shape.H, None)
    return Question("head", key, block_candidates(sms, chain=False), sms, runs, wrong)


def inject_question(shape: DrafterShape, device: torch.device, batches: Sequence[int] = (1, 4)) -> Question:
    """Blocks of `inject_kv` with a plan, all rows committed."""
    fc = _normal(device, shape.H, shape.K * shape.H)
    kv = _normal(device, shape.L, 2 * shape.Hkv * shape.D, shape.H)
    hidden_norm, k_norm = _normal(device, shape.H, mean=1.0), _normal(device, shape.L, shape.D, mean=1.0)
    angles = torch.rand(256, shape.D // 2, device=device) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    first = ops.inject_kv_plan(fc, kv, shape.D, blocks=1)
    assert first is not None, "bf16, D up to 128"
    copies = [first.tiles] + [first.tiles.clone() for _ in range(_sets(first.tiles.nbytes, device) - 1)]

    def inputs(batch: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        rows = batch * shape.T
        taps = [_normal(device, rows, shape.H, std=1.0) for _ in range(shape.K)]
        return taps, torch.randperm(128, device=device)[:rows]

    loads = {f"B{batch}": inputs(batch) for batch in batches}

    def plans(value: int) -> list[Any]:
        one = ops.inject_kv_plan(fc, kv, shape.D, blocks=value)
        assert one is not None
        return [replace(one, tiles=copy) for copy in copies]

    def run(
        plan: Any, load: tuple[list[torch.Tensor], torch.Tensor]
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        taps, slots = load
        rows = slots.numel()
        shape_of = (shape.L, 128, shape.Hkv, shape.D)
        k, v = (torch.full(shape_of, float("nan"), device=device, dtype=torch.bfloat16) for _ in range(2))
        workspace = ops.inject_kv_workspace(rows, shape.H, shape.L, shape.Hkv, shape.D, device=device)

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            ops.inject_kv(
                taps, fc, hidden_norm, kv, None, k_norm, cos_sin, slots, slots, None, list(k), list(v), workspace, EPS,
                plan,
            )  # fmt: skip
            return k, v

        return call

    def calls(value: int) -> dict[str, list[Callable[[], object]]]:
        made = plans(value)
        return {name: [run(plan, load) for plan in made] for name, load in loads.items()}

    def wrong(value: int) -> str | None:
        made = plans(value)
        for name, load in loads.items():
            taps, slots = load
            exact, rounded = (
                inject_reference.context_kv(
                    taps, fc, hidden_norm, kv, None, k_norm, cos_sin, slots, shape.D, EPS, dtype
                )
                for dtype in (torch.float32, torch.bfloat16)
            )
            for plan in made:
                found = run(plan, load)()
                for which, cache in enumerate(found):
                    if reason := _within_rounding(cache[:, slots], exact[which], rounded[which]):
                        return f"{name}, {'KV'[which]}: {reason}"
        return None

    sms = _multiprocessors(device)
    key = tuning.inject_shape(shape.K, shape.H, shape.L * 2 * shape.Hkv, shape.D)
    return Question("inject", key, block_candidates(sms, chain=False), sms, calls, wrong)


def verify_question(shape: DrafterShape, batch: int, device: torch.device) -> Question:
    """Whether greedy verification of so many requests skips rows: 0 or 1. Not a parameter itself, see `lazy_limit`."""
    lengths = _lengths(batch, shape.T, MEAN_COMMITTED)
    nbytes = 2 * batch * shape.T * shape.V

    def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # One largest logit a row: which of several torch.argmax would name is not defined.
        logits = torch.randn(batch, shape.T, shape.V, device=device, dtype=torch.bfloat16)
        best = torch.randint(0, shape.V, (batch, shape.T), device=device)
        logits.scatter_(2, best[..., None], 30.0)
        return _candidates(best, shape.V, lengths), logits, torch.randint(0, 4096, (batch,), device=device)

    loads = [inputs() for _ in range(_sets(nbytes, device))]

    def run(value: int, load: tuple[torch.Tensor, ...]) -> Callable[[], Verified]:
        candidates, logits, prefix_lens = load
        out = _poisoned(batch, shape.T, device)
        workspace = ops.verify_workspace(batch, shape.T, device)
        return lambda: ops.verify_block(candidates, logits, prefix_lens, lazy=value, out=out, workspace=workspace)

    def calls(value: int) -> dict[str, list[Callable[[], object]]]:
        return {f"B{batch}": [run(value, load) for load in loads]}

    def wrong(value: int) -> str | None:
        for load in loads:
            candidates, logits, prefix_lens = load
            found = run(value, load)()
            if found.accept_lens.tolist() != lengths:
                return f"accepted {found.accept_lens.tolist()}, not {lengths}"
            best = logits.argmax(-1)
            bonus = best.gather(1, found.accept_lens[:, None].long())[:, 0]
            if not torch.equal(found.bonus_ids, bonus):
                return "bonus tokens are not the largest logits"
            if not torch.equal(found.new_seq_lens.long(), prefix_lens + found.commit_lens):
                return "lengths do not add up"
        return None

    return Question("verify_block", f"B{batch} T{shape.T} V{shape.V} bf16", [0, 1], 0, calls, wrong)


def _poisoned(batch: int, block: int, device: torch.device) -> Verified:
    int32, int64 = torch.int32, torch.int64
    sizes = (((batch,), int32), ((batch,), int32), ((batch,), int64), ((batch, block), int64), ((batch,), int64))
    return Verified(*(torch.full(size, -7, dtype=dtype, device=device) for size, dtype in sizes))


def questions(device: torch.device, quick: bool) -> Iterator[Callable[[], Question]]:
    """Makers of all questions, cheap ones first; each holds its tensors only while it is asked."""
    shapes = (DEMO, QWEN35_397B_TP8) if quick else (DEMO, QWEN35_397B_TP8, QWEN3_8B)
    for batch in VERIFY_BATCHES[:5] if quick else VERIFY_BATCHES:
        yield partial(verify_question, QWEN3_8B, batch, device)
    for shape in shapes:
        for question in (inject_question, draft_question, head_question):
            yield partial(question, shape, device)


# -- the command ------------------------------------------------------------------------------------------------------


def tune(
    makers: Iterator[Callable[[], Question]],
    rounds: int,
    seconds: float = math.inf,
    timer: Timer = time_players,
    device: torch.device | None = None,
) -> tuple[list[Answer], list[str]]:
    """Ask until the time is over; what failed does not stop the rest."""
    answers, failures, started = [], [], time.monotonic()
    for make in makers:
        if time.monotonic() - started > seconds:
            failures.append("time limit: the other questions were not asked")
            break
        try:
            found = answer(make(), rounds, timer)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            print(f"  FAILED {failures[-1]}", flush=True)
            continue
        answers.append(found)
        times = ", ".join(f"{v}: {'/'.join(f'{us:.1f}' for us in t.values())}" for v, t in found.times.items())
        print(f"  {found.kind:<12} {found.shape:<40} {times} us -> {found.chosen} ({found.gain:.3f}x)", flush=True)
        for value, reason in found.wrong.items():
            print(f"    {value} is WRONG: {reason}", flush=True)
        if device is not None:
            free_memory(device)
    return answers, failures


def parameters(answers: Sequence[Answer]) -> dict[str, Any]:
    """What goes into the file: defaults too, as they were measured."""
    found: dict[str, Any] = {}
    for one in answers:
        if one.kind != "verify_block":
            found.setdefault(one.kind, {})[one.shape] = {"blocks": one.chosen}
    sizes = []
    for one in answers:
        if one.kind == "verify_block" and 1 in one.times:
            batch, block, vocab = (int(part[1:]) for part in one.shape.split(" ")[:3])
            (full,), (skipping,) = one.times[0].values(), one.times[1].values()
            sizes.append((2 * batch * block * vocab, full, skipping))
    if sizes:
        found["verify_block"] = {"lazy_bytes": lazy_limit(sizes)}
    return found


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="Tune the package for this machine.")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and samples")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there")
    parser.add_argument("--no-cache", action="store_true", help="measure only: leave the tuning file as it is")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="ask nothing later")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("python -m bench.tune: a CUDA GPU is needed, torch sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    key, where = tuning.machine(device), tuning.path()
    print(f"# {key}")
    answers, failures = tune(questions(device, args.quick), 4 if args.quick else 8, args.time_limit, device=device)
    found = parameters(answers)
    report = {
        "machine": key,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "file": None if args.no_cache or where is None else _short(where),
        "parameters": found,
        "answers": [one.as_json() for one in answers],
        "failures": failures,
    }
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if report["file"] is not None and where is not None and found:
        tuning.save(where, key, found)
        print(f"# written to {where}")
    return 1 if any(not f.startswith("time limit") for f in failures) or any(a.wrong for a in answers) else 0


if __name__ == "__main__":
    sys.exit(main())

"""A model of the rows: what a call needs of the machine, and what each need costs, fitted to filed rows of one card.

A row's time is ``sum(count * cost) + max(memory, arithmetic)``: what follows one after the other (launches, trips to
memory, hand-offs between blocks) and what overlaps. Counts, bytes and operations come from the shape and the kernels'
design, never from a measurement; costs and efficiencies are few, shared by all rows of a family, and fitted to the
measured rows so that the sum of |log(predicted / measured)| is least: a row that is far off for a reason of its own
stays off and does not drag the others along. On another card bytes, operations and SM-cycles go by that card's rates;
costs in microseconds are taken to be the same.

A fit agrees with what it was fitted to. So every row also has a prediction by a fit that has not seen it (nor the same
call in another cache state), and that one is judged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import median
from typing import Any

import numpy as np

from bench.cards import Rates
from bench.shapes import DEMO, DFLASH2_27B, QWEN3_8B, QWEN35_397B_TP8, DrafterShape

__all__ = ["FAMILIES", "Fit", "Need", "fit_all", "need_of", "not_modelled", "superseded"]

SHAPES = {shape.name: shape for shape in (QWEN3_8B, QWEN35_397B_TP8, DEMO, DFLASH2_27B)}
FEW_ROWS = 64  # up to here the streaming kernels run
DENSE_ROWS = 32  # .. over a bf16 drafter
FP8_ROWS = 32  # .. over an fp8 drafter
FP8_CHAIN_SINCE = "2026-11-28T08:59:28+00:00"  # before, an fp8 drafter was streamed up to FEW_ROWS (commit bae66e3)
ROW_TILE = 128  # of the GEMM for many rows
CHAIN = 9  # kernels of a drafter's layer (csrc/smxx/draft), as the chain launches them
QUANTISING = 2  # more of them in fp8: of what attention and the gated product write


@dataclass(frozen=True)
class Need:
    """What one call needs.

    Attributes:
        family: whose costs apply.
        serial: cost -> how many of it, one after the other.
        bytes, stream: moved at least, and by which ceiling ("read" or "copy").
        flops: of the tensor cores (floor); padded_flops: of the GEMMs, with rows filled up to whole tiles, what is
            really done.
        attention: operations of attention kernels, after one another with the GEMMs.
        codes: weights that are dequantised.
        fp8: the GEMMs multiply fp8 with fp8; attention stays bf16.
        skippable: bytes beside `bytes` that a call which reads no more than it needs leaves out.
    """

    family: str
    serial: Mapping[str, float]
    bytes: float = 0.0
    flops: float = 0.0
    padded_flops: float = 0.0
    attention: float = 0.0
    codes: float = 0.0
    fp8: bool = False
    stream: str = "read"
    skippable: float = 0.0

    def overshot(self, share: float) -> Need:
        """With so much of the skippable bytes read."""
        return replace(self, bytes=self.bytes + share * self.skippable, skippable=0.0)

    def floors_us(self, rates: Rates) -> tuple[float, float]:
        """Lower bounds by bytes and by operations, at full rates."""
        arithmetic = (self.flops - self.attention) / self.gemm_rate(rates) + self.attention / rates.flops
        return self.bytes / rates.bandwidth(self.stream) * 1e6, arithmetic * 1e6

    def gemm_rate(self, rates: Rates) -> float:
        """FLOP/s that the GEMMs can reach."""
        return rates.fp8_flops if self.fp8 else rates.flops


@dataclass(frozen=True)
class Family:
    """A group of kernels that share their costs.

    Attributes:
        title: for people.
        costs: us of one, with a first guess; the fit starts there, and stays there where no row tells.
        memory: whether an efficiency of the bandwidth is fitted (else bytes go at the full rate).
        arithmetic: "tensor": operations at an efficiency of the attainable FLOP/s; "sm": FLOP for each SM and cycle,
            and cycles for a dequantised weight; "": none.
        of: another family, whose costs are also this one's; the only parameter is the share of the bytes which need not
            be read that is read all the same.
        borrows: parameters that are another family's, whose rows tell them better.
    """

    title: str
    costs: Mapping[str, float] = field(default_factory=dict)
    memory: bool = True
    arithmetic: str = ""
    of: str = ""
    borrows: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        if self.of:
            return ["overshoot"]
        names = list(self.costs) + (["read"] if self.memory else [])
        if self.arithmetic == "tensor":
            names.append("tensor")
        elif self.arithmetic == "sm":
            names += ["sm", "code"]
        return names

    def first_guess(self) -> dict[str, float]:
        rest = {"overshoot": 0.5, "read": 1.1, "tensor": 1.3, "sm": 1 / 800.0, "code": 0.05}
        return {name: self.costs.get(name, rest.get(name, 1.0)) for name in self.parameters}


FAMILIES: Mapping[str, Family] = {
    "small": Family(
        "launches of index logic (allocation, acceptance from ids)",
        {"launch": 1.0, "trip": 0.4, "barrier": 0.5},
        memory=False,
    ),
    "verify": Family("verify_block from logits, all rows", {"fixed": 4.0}),
    "lazy": Family("verify_block from logits, needed rows only", of="verify"),
    "sampled": Family("verify_block_sampled", {"fixed": 15.0}),
    "probe": Family("Triton kernels that only read", {"fixed": 2.0}),
    "stream": Family(
        "streaming kernels, up to 64 rows (drafter, LM head, injection)",
        {"fixed": 4.0, "handoff": 5.0, "handoff of 64 tokens": 1.0},
        arithmetic="sm",
    ),
    "gemm": Family("LM head as one GEMM, in fp8 after its rows are quantised", {"quantise": 5.0}, arithmetic="tensor"),
    "chain": Family(
        "chains of GEMMs and small kernels (drafter beyond 32 or 64 rows, injection beyond 64, shards, gemm_fp8)",
        {"kernel": 5.0, "attend": 1 / 300.0},
        arithmetic="tensor",
        borrows={"read": "gemm", "tensor": "gemm"},
    ),
}

# Why a family's rows may be off; printed beside those that are.
REASONS = {
    "small": "a launch, a trip and a barrier cost one figure each; how far apart entries lie is not modelled",
    "verify": "a fixed cost and a rate; the ends of a call grow a little with the number of units",
    "lazy": "few rows; how much is read beyond the needed rows depends on timing, not on bytes alone",
    "sampled": "a fixed cost and a rate; the block rule looks at more rows than the token rule's bytes say",
    "probe": "a launch of Triton's, fitted for comparison only",
    "stream": "hand-offs cost one figure, though those around attention cost more and grow with tokens and context, "
    "and stages that are long enough hide some; formats share one cost a code",
    "gemm": "one efficiency of reads and one of arithmetic for all tiles and both types",
    "chain": "one cost a kernel whatever its size, attention at one rate for all head counts, and the LM head's "
    "efficiency for all GEMMs, fp8's too: tiles that leave SMs empty at few hundred rows, and the L2's rate, are not "
    "modelled",
}


def not_modelled(row: Mapping[str, Any]) -> str | None:
    """Why a row has no prediction; None: it has one."""
    op = row["op"]
    if op.endswith("(host)"):
        return "time of the host: no property of the card"
    if row["suite"] == "engine":
        return "the target's own kernels decide, which are not this package's"
    if row["suite"] == "tp":
        return "several cards; the tensor-parallel check below uses it"
    if op == "read, torch amax":
        return "a library kernel, a block a row, kept for comparison"
    try:
        need_of(row)
    except ValueError as error:
        return str(error).removeprefix("predict: ")
    return None


def superseded(row: Mapping[str, Any]) -> bool:
    """Whether the row was measured with another kernel than its call takes today; `date` is that of its run."""
    if row["op"] != "draft_forward" or row["dtype"] != "fp8":
        return False
    rows = _number("B", row["shape"]) * _number("T", row["shape"])
    return FP8_ROWS < rows <= FEW_ROWS and row.get("date", FP8_CHAIN_SINCE) < FP8_CHAIN_SINCE


def need_of(row: Mapping[str, Any]) -> Need:
    """The need of a bench row, from its op, shape, dtype, bytes and operations; of a filed one as it ran on its `date`.

    Raises:
        ValueError: an op that the model does not know, or a shape without what it needs.
    """
    op, shape, dtype = row["op"], row["shape"], row["dtype"]
    size = {"bytes": float(row["bytes"]), "stream": row.get("stream", "read")}
    if op in _SMALL:
        return Need("small", _SMALL[op], float(row["bytes"]), stream="copy")
    if op == "grouped_conv":
        return Need("small", {"launch": 1, "trip": 1}, float(row["bytes"]), stream="copy")
    if op == "select_path":
        return Need("small", {"launch": 1, "trip": 2, "barrier": _number("T", shape) - 1}, **size)
    if op.startswith("verify_block lazy"):
        everything = _number("B", shape) * _number("T", shape) * _number("V", shape) * (2 if dtype == "bf16" else 4)
        return Need("lazy", {"fixed": 1}, **size, skippable=max(everything - size["bytes"], 0.0))
    if op == "verify_block full":
        return Need("verify", {"fixed": 1}, **size)
    if op.startswith("verify_block_sampled"):
        return Need("sampled", {"fixed": 1}, **size)
    if op.startswith("read, triton"):
        return Need("probe", {"fixed": 1}, **size)
    flops = float(row["flops"])
    if op == "lm_head_argmax_packed":
        drafter = _drafter(shape)
        codes = 0.0 if dtype == "bf16" else float(drafter.V * drafter.H)
        rows = int(_number("B", shape) * _number("T", shape))
        return _stream(1, rows, flops, codes, size)
    if op in ("lm_head_argmax", "verify_block_from_hidden", "lm_head_topk"):
        rows = int(_number("B", shape) * _number("T", shape))
        if dtype == "fp8":
            drafter = _drafter(shape)
            need = _gemm({"quantise": 1}, rows, 2.0 * rows * drafter.V * drafter.H, size, family="gemm")
            return replace(need, fp8=True)
        return _gemm({}, rows, flops, size, family="gemm")
    if op == "draft_forward":
        drafter, rows = _drafter(shape), int(_number("B", shape) * _number("T", shape))
        few_rows = {"bf16": DENSE_ROWS, "fp8": FEW_ROWS if superseded(row) else FP8_ROWS}.get(dtype, FEW_ROWS)
        if rows > few_rows or drafter.D not in (64, 128):
            context = _number("ctx", shape) + _number("T", shape)
            attention = 4.0 * rows * drafter.Hq * drafter.D * context * drafter.L
            kernels = CHAIN * drafter.L + 2
            if dtype == "fp8":
                kernels += QUANTISING * drafter.L
                products = 2.0 * rows * drafter.L * drafter.layer_weights
                return replace(_gemm({"kernel": kernels}, rows, products, size, attention), fp8=True)
            return _gemm({"kernel": kernels}, rows, flops - attention, size, attention)
        codes = 0.0 if dtype == "bf16" else float(drafter.L * drafter.layer_weights)
        return _stream(draft_handoffs(drafter), rows, flops, codes, size)
    if op == "gemm_fp8":
        m, n, k = (_number(letter, shape) for letter in "MNK")
        return replace(_gemm({"kernel": 1}, int(m), 2.0 * m * n * k, size), fp8=True)
    if op == "inject_kv":
        drafter = _drafter(shape)
        prefill = re.search(r"prefill (\d+)", shape)
        rows = int(prefill[1]) if prefill else int(_number("B", shape) * _number("T", shape))
        live = max(1, round(flops / (2 * drafter.inject_weights)))
        if rows <= FEW_ROWS and " fc 1/" not in shape:
            return _stream(inject_handoffs(drafter), live, flops, 0.0, size)
        return _gemm({"kernel": 4}, live, flops, size)
    raise ValueError(f"predict: op must be one of the benches', got {op!r}")


# Launches, dependent trips to memory and barriers, in a row (csrc/smxx/alloc/alloc.cu, csrc/smxx/verify).
_RESET = {"launch": 1, "trip": 1}
_RESERVE = {"launch": 1, "trip": 2, "barrier": 2}
_RELEASE = {"launch": 1, "trip": 3, "barrier": 1}


def _both(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}


_SMALL: Mapping[str, Mapping[str, float]] = {
    "prepare_block": {"launch": 1, "trip": 2},
    "verify_block top-1": {"launch": 1, "trip": 2},
    "reset": _RESET,
    "fused, covered": _RESERVE,
    "fused + reset": _both(_RESET, _RESERVE),
    "fused + release": _both(_RESERVE, _RELEASE),
}


def _number(letter: str, shape: str) -> float:
    found = re.search(rf"(?:^|\s){letter}(\d+)(?:\s|$)", shape)
    if found is None:
        raise ValueError(f"predict: the shape must name {letter}, got {shape!r}")
    return float(found[1])


def _drafter(shape: str) -> DrafterShape:
    name = shape.split(" ")[0]
    if name not in SHAPES:
        raise ValueError(f"predict: the shape must begin with one of {', '.join(SHAPES)}, got {shape!r}")
    return SHAPES[name]


def _stream(handoffs: int, rows: int, flops: float, codes: float, size: Mapping[str, Any]) -> Need:
    serial = {"fixed": 1.0, "handoff": handoffs, "handoff of 64 tokens": handoffs * max(rows - 16, 0) / 48}
    return Need("stream", serial, flops=flops, padded_flops=flops, codes=codes, **size)


def _gemm(
    serial: Mapping[str, float],
    rows: int,
    flops: float,
    size: Mapping[str, Any],
    attention: float = 0.0,
    family: str = "chain",
) -> Need:
    padded = flops if rows <= FEW_ROWS else flops * (-(-rows // ROW_TILE) * ROW_TILE) / rows
    return Need(family, serial, flops=flops + attention, padded_flops=padded, attention=attention, **size)


@cache
def draft_handoffs(drafter: DrafterShape) -> int:
    """Stages of the drafter's streaming kernel that wait for another, counted in its schedule."""
    import torch

    from dflash_kernels.draft_stream import PackedDraft, draft_schedule

    none = torch.empty(0)
    sizes = (drafter.H, drafter.I, drafter.Hq, drafter.Hkv, drafter.D, drafter.L)
    shapes = PackedDraft(none, none, none, 0, *sizes).shapes()
    return _waiting_stages(draft_schedule(shapes, drafter.L, 8).units())


@cache
def inject_handoffs(drafter: DrafterShape) -> int:
    """The same of injection."""
    from dflash_kernels.ops.inject import inject_schedule

    schedule = inject_schedule(drafter.K, drafter.H, drafter.L * 2 * drafter.Hkv, drafter.D, 8)
    return _waiting_stages(schedule.units())


def _waiting_stages(units: Any) -> int:
    from dflash_kernels.stream import UNIT_FIELDS

    stage, wait, tiles = (UNIT_FIELDS.index(name) for name in ("stage", "wait", "tiles"))
    flat = units.view(-1, units.shape[-1])
    return len({int(unit[stage]) for unit in flat if unit[wait] >= 0 and unit[tiles] >= 0})


# -- fit --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Costs of one family, on the card that they were fitted on.

    Attributes:
        values: of each parameter: us for a cost; time over its floor for "read" and "tensor"; a share for "overshoot";
            SM-cycles of one operation or code for "sm", "attend" and "code".
        rows: how many it was fitted to.
        idle: parameters that no row tells anything about, left at their first guess.
    """

    family: str
    values: Mapping[str, float]
    rows: int
    idle: frozenset[str] = frozenset()
    of: Fit | None = None

    def terms(self, need: Need, rates: Rates) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """us for a parameter of 1: in a row, of memory, of arithmetic."""
        family = FAMILIES[self.family]
        serial = {name: float(count) for name, count in need.serial.items()}
        memory_us, _ = need.floors_us(rates)
        memory = {"read" if family.memory else "": memory_us}
        arithmetic: dict[str, float] = {}
        if family.arithmetic == "tensor":
            arithmetic["tensor"] = need.padded_flops / need.gemm_rate(rates) * 1e6
            if "attend" in family.costs:
                serial["attend"] = need.attention / rates.sm_cycles * 1e6
        elif family.arithmetic == "sm":
            arithmetic["sm"] = need.padded_flops / rates.sm_cycles * 1e6
            arithmetic["code"] = need.codes / rates.sm_cycles * 1e6
        return serial, memory, arithmetic

    def parts_us(self, need: Need, rates: Rates) -> tuple[float, float, float]:
        """In a row, by memory, by arithmetic."""
        values = {**self.values, "": 1.0}
        first, second, third = (sum(values[n] * us for n, us in term.items()) for term in self.terms(need, rates))
        return first, second, third

    def us(self, need: Need, rates: Rates) -> float:
        """Predicted time of a call."""
        if self.of is not None:
            return self.of.us(need.overshot(self.values["overshoot"]), rates)
        serial, memory, arithmetic = self.parts_us(need, rates)
        return serial + max(memory, arithmetic)

    def bound(self, need: Need, rates: Rates) -> str:
        """What takes most of it."""
        if self.of is not None:
            return self.of.bound(need.overshot(self.values["overshoot"]), rates)
        serial, memory, arithmetic = self.parts_us(need, rates)
        if serial > max(memory, arithmetic):
            return "latency"
        if memory >= arithmetic:
            return "bytes"
        return "SMs" if FAMILIES[self.family].arithmetic == "sm" else "tensor"

    def describe(self) -> list[str]:
        """Each parameter in the units that people use."""
        words = []
        for name in FAMILIES[self.family].parameters:
            value = self.values[name]
            if name == "overshoot":
                text = f"as {FAMILIES[self.family].of}, and {100 * value:.0f} % of the rows that need not be read"
            elif name in ("read", "tensor"):
                what = {"read": "of the read ceiling", "tensor": "of the bf16 rate"}
                text = f"{100 / value:.0f} % {what[name]}"
            elif name in ("sm", "attend"):
                text = f"{1 / value:.0f} FLOP an SM and cycle" + (" in attention" if name == "attend" else "")
            elif name == "code":
                text = f"{value:.3g} SM-cycles a dequantised weight"
            else:
                text = f"{name} {value:.2f} us"
            lender = FAMILIES[self.family].borrows.get(name)
            note = " (no row tells: assumed)" if name in self.idle else f" (as {lender})" if lender else ""
            words.append(text + note)
        return words


_REWEIGHTINGS = 12
_EXACT = 0.02  # below this the logarithm's square counts, not its size
_PRIOR = 1e-3  # a weak pull to the first guess keeps what the rows hardly tell where it was


def _least_squares(
    evaluate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    logs: np.ndarray,
    start: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """Levenberg-Marquardt from `logs`."""

    def cost(at: np.ndarray, residual: np.ndarray) -> float:
        return float((weights * residual**2).sum() + _PRIOR * ((at - start) ** 2).sum())

    damping = 1e-2
    residual, jacobian = evaluate(logs)
    for _ in range(100):
        normal = (jacobian.T * weights) @ jacobian + _PRIOR * np.eye(len(logs))
        slope = (jacobian.T * weights) @ residual + _PRIOR * (logs - start)
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope)
        trial = logs + np.clip(step, -1.0, 1.0)
        new_residual, new_jacobian = evaluate(trial)
        gain = cost(logs, residual) - cost(trial, new_residual)
        if gain > 0:
            logs, residual, jacobian, damping = trial, new_residual, new_jacobian, damping / 3
            if gain < 1e-8:
                break
        else:
            damping *= 4
            if damping > 1e8:
                break
    return logs


def _fit_family(
    name: str, needs: Sequence[Need], measured: Sequence[float], rates: Rates, fits: Mapping[str, Fit]
) -> Fit:
    """Least |log(predicted / measured)| over the parameters' logarithms: least squares, weighted again and again."""
    family = FAMILIES[name]
    guess = family.first_guess()
    lent = {parameter: fits[lender].values[parameter] for parameter, lender in family.borrows.items()}
    guess.update(lent)
    names = [parameter for parameter in guess if parameter not in lent]
    of = fits[family.of] if family.of else None
    if of is not None:

        def off(share: float) -> float:
            times = [of.us(need.overshot(share), rates) for need in needs]
            return sum(abs(math.log(us / time)) for us, time in zip(measured, times, strict=True))

        share = min((n / 100 for n in range(201)), key=off) if needs else guess["overshoot"]
        return Fit(name, {"overshoot": share}, len(needs), frozenset() if needs else frozenset(names), of)
    shape = Fit(name, guess, len(needs))
    terms = [shape.terms(need, rates) for need in needs]
    logs = np.array([math.log(guess[n]) for n in names])
    start = logs.copy()
    target = np.log(np.asarray(measured, dtype=float)) if needs else np.zeros(0)

    def evaluate(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value = {**lent, **dict(zip(names, np.exp(at), strict=True)), "": 1.0}
        residual, jacobian = np.zeros(len(terms)), np.zeros((len(terms), len(names)))
        for i, (serial, memory, arithmetic) in enumerate(terms):
            by_memory, by_arithmetic = (sum(value[n] * us for n, us in t.items()) for t in (memory, arithmetic))
            active = memory if by_memory >= by_arithmetic else arithmetic
            total = sum(value[n] * us for n, us in serial.items()) + max(by_memory, by_arithmetic)
            residual[i] = math.log(total) - target[i]
            for term in (serial, active):
                for n, us in term.items():
                    if n in names:
                        jacobian[i, names.index(n)] += value[n] * us / total
        return residual, jacobian

    told = np.zeros(len(names), dtype=bool)
    weights = np.ones(len(terms))
    for _ in range(_REWEIGHTINGS if needs else 0):
        logs = _least_squares(evaluate, logs, start, weights)
        residual, jacobian = evaluate(logs)
        weights = 1 / np.maximum(np.abs(residual), _EXACT)
        told = np.abs(jacobian).max(axis=0) > 1e-3
    values = dict(zip(names, (float(v) for v in np.exp(logs)), strict=True))
    idle = frozenset(n for n, seen in zip(names, told, strict=True) if not seen)
    return Fit(name, {**lent, **{n: guess[n] if n in idle else v for n, v in values.items()}}, len(needs), idle)


def fit_all(rows: Sequence[tuple[Need, float]], rates: Rates) -> dict[str, Fit]:
    """A fit of every family to (need, measured us) on a card of those rates."""
    fits: dict[str, Fit] = {}
    for name in sorted(FAMILIES, key=lambda name: bool(FAMILIES[name].of or FAMILIES[name].borrows)):
        mine = [(need, us) for need, us in rows if need.family == name]
        fits[name] = _fit_family(name, [need for need, _ in mine], [us for _, us in mine], rates, fits)
    return fits


def left_out(rows: Sequence[tuple[Need, float]], rates: Rates, fits: Mapping[str, Fit]) -> Iterator[float | None]:
    """Of each row the prediction by a fit of its family without it; None where it is the family's only row."""
    for i, (need, _) in enumerate(rows):
        others = [(n, us) for j, (n, us) in enumerate(rows) if j != i and n.family == need.family]
        if not others:
            yield None
            continue
        fit = _fit_family(need.family, [n for n, _ in others], [us for _, us in others], rates, fits)
        yield fit.us(need, rates)


def middle_error(ratios: Sequence[float]) -> float:
    """Median of |log ratio|, as a share."""
    return math.exp(median(abs(math.log(r)) for r in ratios)) - 1 if ratios else 0.0

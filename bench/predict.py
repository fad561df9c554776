"""`python -m bench predict --card b200|h100|h200`: what the benches' rows and SGLang's step should take on a card.

For every row: the floor (bytes over the bandwidth, or operations over the rate, whichever is longer) and the expected
time, from the costs and efficiencies that `bench.model` fits to the rows measured on an H100 (`results/`). No GPU is
needed. With ``--card h100`` the same model meets what it was fitted to: each row is also predicted by a fit without it,
and rows off by more than 15 % are listed with the reason. Nothing here says that code ran on a card that it has not
run on.

Exit codes: 0; 2 bad arguments or no results to fit to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.cards import CARDS, PUBLISHED_STEPS, Card, PublishedStep, Rates, card_of, rates
from bench.harness import Case
from bench.model import (
    CHAIN,
    FAMILIES,
    FP8_CHAIN_SINCE,
    FP8_ROWS,
    QUANTISING,
    REASONS,
    Fit,
    Need,
    draft_handoffs,
    fit_all,
    left_out,
    middle_error,
    need_of,
    not_modelled,
    superseded,
)
from bench.results import OTHERS, RESULTS, preferred_rows
from bench.shapes import QWEN3_8B, QWEN35_397B_TP8, DrafterShape

__all__ = ["Predicted", "Predictor", "bench_rows", "main", "predict_row"]

FITTED_ON = "h100"
SUITES = ("verify", "alloc", "gemm", "head", "inject", "draft", "dflash2")
TOLERANCE = 0.15
TARGET_LAYERS = 36  # of Qwen3-8B, each the size of its drafter's
CONTEXT = 1024
SUMMED = "sums over ranks"
COMMITTED = (5.0, 6.5, 8.0)  # tokens a step where the publication does not say


@dataclass(frozen=True)
class Predicted:
    """One row. Times in us; `ratio` is measured / expected, `unseen` measured / expected by a fit without the row."""

    suite: str
    op: str
    shape: str
    dtype: str
    family: str
    floor_us: float | None
    bound: str
    expected_us: float | None
    measured_us: float | None
    ratio: float | None
    unseen: float | None
    note: str

    @property
    def judged(self) -> float | None:
        """The ratio that counts: where there is one, that of the fit that has not seen the row."""
        return self.unseen if self.unseen is not None else self.ratio

    @property
    def off(self) -> bool:
        return self.judged is not None and abs(self.judged - 1) > TOLERANCE


def _key(row: Mapping[str, Any]) -> tuple[str, str, str, bool]:
    """What a row is found by; one of a kernel that its call no longer takes is another row."""
    return row["op"], row["shape"], row["dtype"], superseded(row)


def _as_row(case: Case) -> dict[str, Any]:
    names = ("suite", "op", "shape", "dtype", "regime", "bytes", "flops", "stream")
    return {name: getattr(case, name) for name in names}


def bench_rows() -> list[dict[str, Any]]:
    """All cases that the suites of ops run on a GPU, without a GPU."""
    import importlib

    import torch

    found = []
    for suite in SUITES:
        module = importlib.import_module(f"bench.bench_{suite}")
        found += [_as_row(case) for case in module.cases(torch.device("cuda"), False)]
    return found


def measured_rows(card: Card, root: Path = RESULTS) -> list[dict[str, Any]]:
    """The filed rows of a card, each with its run's date; of an op's two cache states the cold one."""
    found: list[dict[str, Any]] = []
    for path in sorted((root / card.folder).glob("*.json")) if card.folder else []:
        if path.stem in OTHERS:
            continue
        run = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(run, dict) and "suites" in run and "rows" in run:
            found += [{**row, "date": run["date"]} for row in preferred_rows(run["rows"])]
    return found


class Predictor:
    """The fit on the H100, and what it says of other cards.

    Raises:
        ValueError: there are no filed rows to fit to.
    """

    def __init__(self, root: Path = RESULTS) -> None:
        self.root = root
        self.base = CARDS[FITTED_ON]
        self.base_rates = rates(self.base, root)
        self.rows = [row for row in measured_rows(self.base, root) if not_modelled(row) is None]
        if not self.rows:
            raise ValueError(f"predict: results/{self.base.folder} must hold rows to fit to, got none")
        self.suites = {row["suite"] for row in self.rows}
        self.data = [(need_of(row), float(row["ours_us"])) for row in self.rows]
        self.fits: Mapping[str, Fit] = fit_all(self.data, self.base_rates)
        unseen = left_out(self.data, self.base_rates, self.fits)
        self.unseen = {
            _key(row): us / value
            for row, (_, us), value in zip(self.rows, self.data, unseen, strict=True)
            if value is not None
        }

    @property
    def parameters(self) -> int:
        """How many were fitted: those that some row tells something about, and no other family lends."""
        return sum(
            len([p for p in FAMILIES[name].parameters if p not in fit.idle and p not in FAMILIES[name].borrows])
            for name, fit in self.fits.items()
            if fit.rows
        )

    def us(self, need: Need, card_rates: Rates) -> float:
        """Expected time of a call."""
        return self.fits[need.family].us(need, card_rates)

    def case_us(self, case: Case, card_rates: Rates) -> float:
        return self.us(need_of(_as_row(case)), card_rates)

    def predict(self, card: Card, measured: Sequence[Mapping[str, Any]] | None = None) -> list[Predicted]:
        """Every row of the benches, then measured ones that the benches no longer have.

        Args:
            measured: rows of a run on that card; None: the filed ones.
        """
        here = rates(card, self.root)
        found = {_key(row): row for row in (measured_rows(card, self.root) if measured is None else measured)}
        listed = bench_rows()
        known = {_key(row) for row in listed}
        listed += [{"stream": "read", **row} for key, row in found.items() if key not in known]
        unseen = self.unseen if card is self.base and measured is None else {}
        return [self._row(row, found.get(_key(row)), here, unseen.get(_key(row))) for row in listed]

    def _row(
        self, row: Mapping[str, Any], measured: Mapping[str, Any] | None, here: Rates, unseen: float | None
    ) -> Predicted:
        us = None if measured is None else float(measured["ours_us"])
        head = (row["suite"], row["op"], row["shape"], row["dtype"])
        if reason := not_modelled(row):
            return Predicted(*head, "", None, "", None, us, None, None, reason)
        need = need_of(row)
        fit = self.fits[need.family]
        expected = fit.us(need, here)
        note = "" if fit.rows and row["suite"] in self.suites else "no row of its kind was measured"
        if superseded(row):
            note = f"streamed, as such rows were before {FP8_CHAIN_SINCE[:16]}; the chain's row is its own"
        elif need.fp8 and not any(known.fp8 and known.family == need.family for known, _ in self.data):
            note = "fp8 products at the efficiency of bf16's: the H100 has no row of them"
        ratio = None if us is None else us / expected
        floor = max(need.floors_us(here))
        return Predicted(*head, need.family, floor, fit.bound(need, here), expected, us, ratio, unseen, note)


def predict_row(predictor: Predictor, card: Card, row: Mapping[str, Any]) -> Predicted:
    """A single measured row against what was expected of it."""
    return predictor._row({"stream": "read", **row}, row, rates(card, predictor.root), None)


# -- another card than that of the fit: the only one there is ---------------------------------------------------------


def other_card_checks(predictor: Predictor) -> list[dict[str, Any]]:
    """What one rank does alone in rows measured on H200s, by the fit on the H100."""
    card = CARDS["h200"]
    path = predictor.root / card.folder / "tp.json"
    if not path.is_file():
        return []
    here = rates(card, predictor.root)
    checks: list[dict[str, Any]] = []

    def add(name: str, need: Need, measured: float) -> None:
        expected = predictor.us(need, here)
        checks.append({"row": name, "expected_us": expected, "measured_us": measured, "ratio": measured / expected})

    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        layers = int(row["shape"].split(" L")[1].split(" ")[0]) if " L" in row["shape"] else 0
        if row["op"] == "drafter_step":
            nbytes = float(row["bytes"])  # layers, LM head and context of a rank
            chain = Need("chain", {"kernel": CHAIN * layers + 3}, bytes=nbytes)
            if us := row.get("chain_alone_us") or row.get("alone_us"):
                add(f"{row['shape']}: chain without its sums", chain, us)
            if us := row.get("packed_alone_us"):
                handoffs = draft_handoffs(replace(QWEN3_8B, L=layers))
                add(f"{row['shape']}: one kernel, alone", Need("stream", {"fixed": 1, "handoff": handoffs}, nbytes), us)
        elif row["op"] == "inject_fc":
            sharded = Need("chain", {"kernel": 4}, bytes=float(row["bytes"]))
            add(f"{row['shape']}: fc shared, without the gather", sharded, row["ours_us"] - row["gather_us"])
    return checks


# -- a step of SGLang -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a step, us: its floor, and what is expected, between two assumptions."""

    name: str
    floor_us: float
    low_us: float
    high_us: float
    measured_us: float | None = None


def _scaled(name: str, measured: float, floor_there: float, floor_here: float, same: bool) -> Part:
    """From a time on the H100: the same efficiency (low), or as much over the floor in us (high)."""
    if floor_there <= 0:
        return Part(name, 0.0, measured, measured, measured if same else None)
    bounds = sorted((measured * floor_here / floor_there, floor_here + max(measured - floor_there, 0.0)))
    return Part(name, floor_here, bounds[0], bounds[1], measured if same else None)


def _floor(need: Need, card_rates: Rates) -> float:
    return max(need.floors_us(card_rates))


def _dense(drafter: DrafterShape, layers: int, batch: int, with_head: bool) -> Need:
    """A pass over dense layers of the drafter's size, for its floor."""
    weights = layers * drafter.layer_weights + (drafter.V * drafter.H if with_head else 0)
    cache = 2 * batch * CONTEXT * layers * 2 * drafter.Hkv * drafter.D
    attention = 4.0 * batch * drafter.T * drafter.Hq * drafter.D * (CONTEXT + drafter.T) * layers
    return Need("chain", {}, bytes=2.0 * weights + cache, flops=2.0 * batch * drafter.T * weights + attention)


def _cases(drafter: DrafterShape, batch: int) -> dict[str, Case]:
    """Our ops of a step."""
    from bench import bench_draft, bench_head, bench_inject

    few = batch * drafter.T <= 64
    head = bench_head._packed_case(drafter, batch) if few else bench_head._argmax_case(drafter, batch)
    return {
        "draft": bench_draft._case(drafter, batch, CONTEXT),
        "head": head,
        "inject": bench_inject._case(drafter, batch, 6.5),
    }


def single_card_steps(predictor: Predictor, card: Card) -> list[dict[str, Any]]:
    """Qwen3-8B on one card, from the split of the step measured on an H100 (`sglang.json`)."""
    path = predictor.root / predictor.base.folder / "sglang.json"
    if not path.is_file():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    here, there, drafter = rates(card, predictor.root), predictor.base_rates, QWEN3_8B
    steps = []
    for engine in report["engines"]:
        for trace in (t for t in engine.get("traces", []) if "parts_us" in t):
            batch = trace["concurrency"]
            cases = _cases(drafter, batch)
            floors = {
                "draft": _dense(drafter, drafter.L, batch, False),
                "head": need_of(_as_row(cases["head"])),
                "verify": _dense(drafter, TARGET_LAYERS, batch, True),
                "inject": need_of(_as_row(cases["inject"])),
            }
            ours = engine["seams"].startswith("all")
            few = batch * drafter.T <= 64
            parts = []
            for name, measured in trace["parts_us"].items():
                need = floors.get(name)
                if ours and name in cases and (few or name == "inject"):
                    # On the card of the fit the op's own rows against the engine; elsewhere the engine's time scaled.
                    us, own = predictor.case_us(cases[name], here), measured
                    if card is not predictor.base:
                        us, own = measured * us / predictor.case_us(cases[name], there), None
                    parts.append(Part(name, _floor(need_of(_as_row(cases[name])), here), us, us, own))
                else:
                    then, now = (0.0, 0.0) if need is None else (_floor(need, there), _floor(need, here))
                    parts.append(_scaled(name, measured, then, now, card is predictor.base))
            steps.append(
                {
                    "model": "Qwen3-8B",
                    "tp": 1,
                    "concurrency": batch,
                    "engine": engine["seams"],
                    "host_us": trace["host_us"],
                    "launches": trace["host_launches"],
                    "parts": parts,
                }
            )
    return steps


def sharded_draft_side(predictor: Predictor, card: Card, batch: int) -> dict[str, Any]:
    """One of 8 ranks of Qwen3.5-397B-A17B: what the package replaces, stock and ours, without the target's pass."""
    from dflash_kernels.integrations.sglang.settings import ROWS

    drafter = QWEN35_397B_TP8
    here, there = rates(card, predictor.root), predictor.base_rates
    seams = {"draft": "forward", "head": "head", "inject": "inject"}
    stock, ours, missing = [], [], []
    same = card is predictor.base
    for name, case in _cases(drafter, batch).items():
        row = _as_row(case)
        found = [r for r in predictor.rows if r.get("baseline_us") and _plain(r["op"]) == _plain(case.op)]
        exact = next((r for r in found if _key(r) == _key(row)), None)
        # Of another drafter at that batch: the same share of the floor, or as much over it.
        other = next((r for r in found if f" B{batch} " in r["shape"] and r["dtype"] == "bf16"), None)
        theirs = None
        if (known := exact or other) is not None:
            floors = _floor(need_of(known), there), _floor(need_of(row), here)
            theirs = _scaled(name, float(known["baseline_us"]), *floors, same and exact is not None)
            stock.append(theirs)
        else:
            missing.append(name)
        if batch * drafter.T > ROWS[seams[name]] and theirs is not None:
            ours.append(theirs)  # so many rows are left to SGLang
            continue
        us = predictor.us(need_of(row), here)
        measured = float(exact["ours_us"]) if exact is not None and same else None
        ours.append(Part(name, _floor(need_of(row), here), us, us, measured))
    sums = sum_times(predictor)
    count = 1 + 2 * drafter.L
    if sums is not None:
        stock.append(Part(SUMMED, 0.0, count * sums[0], count * sums[1]))
        ours.append(Part(SUMMED, 0.0, count * sums[0], count * sums[1]))
    return {
        "model": "Qwen3.5-397B-A17B",
        "tp": 8,
        "concurrency": batch,
        "stock": stock,
        "ours": ours,
        "missing": missing,
        "sums": count,
    }


def _plain(op: str) -> str:
    """The op's name whichever way its weights lie."""
    return op.removesuffix("_packed")


def sum_times(predictor: Predictor) -> tuple[float, float] | None:
    """us of one sum of a block's rows: over peer memory, and NCCL's; measured on two H200s, the only ones there are."""
    path = predictor.root / CARDS["h200"].folder / "tp.json"
    if not path.is_file():
        return None
    rows = [r for r in json.loads(path.read_text(encoding="utf-8"))["rows"] if r["op"] == "all_reduce"]
    times = [us for row in rows for us in (row["ours_us"], row["baseline_us"]) if us]
    return (min(times), max(times)) if times else None


def _span(parts: Sequence[Part]) -> tuple[float, float]:
    return sum(part.low_us for part in parts), sum(part.high_us for part in parts)


DRAFT_SIDE = ("draft", "head", "accept", "inject", "other")


def against_published(
    predictor: Predictor, steps: Sequence[Mapping[str, Any]], sharded: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Of each published B200 row: its step, the share that the package replaces, and what it may become."""
    found = []
    for row in PUBLISHED_STEPS:
        if row.block != 16:
            continue  # the drafter's rows here are those of T 16
        if row.tp == 1:
            stock = next((s for s in steps if s["engine"] == "stock" and s["concurrency"] == row.concurrency), None)
            ours = next((s for s in steps if s["engine"] == "all" and s["concurrency"] == row.concurrency), None)
            if stock is None or ours is None:
                continue
            whole = _span(stock["parts"])
            before, after = (_span([part for part in s["parts"] if part.name in DRAFT_SIDE]) for s in (stock, ours))
            saved = [b - a for b, a in zip(whole, _span(ours["parts"]), strict=True)]
            without = None
        else:
            side = sharded[row.concurrency]
            whole = None
            before, after = _span(side["stock"]), _span(side["ours"])
            saved = [b - a for b, a in zip(before, after, strict=True)]
            kept = [p for p in side["stock"] if p.name == "draft"] + [p for p in side["ours"] if p.name != "draft"]
            without = [b - a for b, a in zip(before, _span(kept), strict=True)]
        committed = (row.committed,) if row.committed else COMMITTED
        found.append(_published(row, committed, whole, before, after, saved, without))
    return found


def _published(
    row: PublishedStep,
    committed: Sequence[float],
    whole: tuple[float, float] | None,
    before: tuple[float, float],
    after: tuple[float, float],
    saved: Sequence[float],
    without: Sequence[float] | None,
) -> dict[str, Any]:
    steps = [row.step_us(tokens) for tokens in committed]
    middle = median(steps)

    def gain(less: Sequence[float]) -> tuple[float, float]:
        """Step over what is left of it, at both assumptions."""
        found = [middle / (middle - us) for us in less]
        return min(found), max(found)

    return {
        "model": row.model,
        "cards": row.cards,
        "concurrency": row.concurrency,
        "tokens_per_s": row.tokens_per_s,
        "committed": list(committed),
        "published": row.committed is not None,
        "step_us": steps,
        "expected_step_us": whole,
        "ours_us": before,
        "share": (before[0] / max(steps), before[1] / min(steps)),
        "with_package_us": after,
        "gain": gain(saved),
        "gain_without_forward": None if without is None else gain(without),
        "source": row.source,
    }


# -- all of it --------------------------------------------------------------------------------------------------------


def report(card: Card, predictor: Predictor | None = None) -> dict[str, Any]:
    """Everything that the command prints, in one object."""
    predictor = predictor or Predictor()
    here = rates(card, predictor.root)
    rows = predictor.predict(card)
    steps = single_card_steps(predictor, card)
    sharded = {batch: sharded_draft_side(predictor, card, batch) for batch in (1, 32)}
    judged = [row.judged for row in rows if row.judged is not None]
    result: dict[str, Any] = {
        "card": asdict(card),
        "rates": {
            "read_bw": here.read_bw,
            "copy_bw": here.copy_bw,
            "flops": here.flops,
            "fp8_flops": here.fp8_flops,
            "sm_cycles": here.sm_cycles,
        },
        "origin": here.origin,
        "fitted_on": {"card": predictor.base.name, "rows": len(predictor.rows), "parameters": predictor.parameters},
        "fits": {
            name: {**asdict(replace(fit, of=None)), "idle": sorted(fit.idle)} for name, fit in predictor.fits.items()
        },
        "describe": {name: fit.describe() for name, fit in predictor.fits.items()},
        "assumptions": assumptions(card, here, predictor),
        "rows": rows,
        "middle_error": middle_error(judged),
        "off": [row for row in rows if row.off],
        "other_card": other_card_checks(predictor),
        "steps": steps,
        "sharded": sharded,
        "published": against_published(predictor, steps, sharded) if card.key == "b200" else [],
    }
    return result


def assumptions(card: Card, here: Rates, predictor: Predictor) -> list[str]:
    """What the figures rest on."""
    base = predictor.base_rates
    lines = [
        f"{card.name}: {card.sms} SMs at {card.clock / 1e9:.3g} GHz, {card.l2_bytes >> 20} MB of L2; {card.source}",
        f"rates: read {here.read_bw / 1e12:.2f} TB/s, copy {here.copy_bw / 1e12:.2f} TB/s, "
        f"bf16 {here.flops / 1e12:.0f} TFLOP/s; {here.origin}",
        f"costs and efficiencies: {predictor.parameters} parameters, fitted to {len(predictor.rows)} rows measured on "
        f"an H100 (read {base.read_bw / 1e12:.2f} TB/s), each family's below; read from results/, none by hand",
        "expected = what follows one after the other + max(bytes, arithmetic) at the H100's efficiencies",
        "streaming kernels turn quantised weights into bf16 before they multiply them; fp8 is multiplied with fp8 in "
        f"drafts of more than {FP8_ROWS} rows ({QUANTISING} more kernels a layer quantise rows) and in the LM head's "
        f"GEMM: at {here.fp8_flops / 1e12:.0f} TFLOP/s, bf16's times the datasheet's ratio, with bf16's efficiencies; "
        "attention stays bf16",
    ]
    if card is not predictor.base:
        lines += [
            "a launch, a trip to memory, a barrier, a hand-off and a small kernel cost as many us as on the H100",
            "mma.sync and shared memory (streaming kernels, attention) go by SMs times clock: "
            f"{here.sm_cycles / base.sm_cycles:.2f} of the H100's; GEMMs of many rows by the bf16 rate: "
            f"{here.flops / base.flops:.2f}, or fp8's: {here.fp8_flops / base.fp8_flops:.2f}",
            "weights are cold: a larger L2 is given no credit",
        ]
    if card.key == "b200":
        lines.append(
            "no code of this package has run on a B200 or any other sm_100 card: every figure for it is a prediction; "
            "those of many rows are of kernels as close to its rate as the H100's are to that card's"
        )
    return lines


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The report as text."""
    card = result["card"]["name"]
    yield f"# Predicted for {_one(card)}"
    yield from (f"#   {line}" for line in result["assumptions"])
    yield "#"
    for name, words in result["describe"].items():
        fit = result["fits"][name]
        yield f"# {name:<8} {fit['rows']:>3} rows: {FAMILIES[name].title}: {', '.join(words)}"
    yield ""
    yield (
        f"{'op':<27} {'shape':<60} {'dtype':<9} {'floor us':>9} {'bound':<7} {'expected':>9} {'floor/exp':>9} "
        f"{'measured':>9} {'meas/exp':>8} {'unseen':>6}"
    )
    rows: Sequence[Predicted] = result["rows"]
    for row in rows:
        text = f"{row.op[:27]:<27} {row.shape[:60]:<60} {row.dtype:<9} "
        measured = f"{row.measured_us:>9.2f}" if row.measured_us is not None else f"{'':>9}"
        if row.floor_us is None or row.expected_us is None:
            yield f"{text}{'':>9} {'':<7} {'':>9} {'':>9} {measured} not predicted: {row.note}"
            continue
        text += f"{row.floor_us:>9.2f} {row.bound:<7} {row.expected_us:>9.2f} {row.floor_us / row.expected_us:>8.0%}  "
        ratio = f"{row.ratio:>8.2f}" if row.ratio is not None else f"{'':>8}"
        unseen = f"{row.unseen:>6.2f}" if row.unseen is not None else f"{'':>6}"
        yield f"{text}{measured} {ratio} {unseen} {'!' if row.off else ''} {row.note}".rstrip()
    yield ""
    yield from _verdict(rows, card, result["middle_error"])
    if result["other_card"]:
        yield ""
        yield "A card that the fit has not seen (H200, one rank's part of rows of two; fitted on the H100 alone):"
        for check in result["other_card"]:
            yield (
                f"  {check['row']:<90} expected {check['expected_us']:>7.1f}  measured {check['measured_us']:>7.1f}  "
                f"ratio {check['ratio']:.2f}"
            )
    yield from _step_lines(result, card)
    yield from _published_lines(result["published"])


def _one(card: str) -> str:
    return f"an {card}" if card[0] in "AHL" else f"a {card}"


def _verdict(rows: Sequence[Predicted], card: str, error: float) -> Iterator[str]:
    judged = [row for row in rows if row.judged is not None]
    if not judged:
        yield f"No row was measured on {_one(card)} by this project: nothing to compare with."
        return
    off = [row for row in judged if row.off]
    how = "by a fit that has not seen the row" if any(row.unseen is not None for row in judged) else "by the H100's fit"
    yield (
        f"{len(judged)} rows measured on {_one(card)}, predicted {how}: {len(judged) - len(off)} within "
        f"{TOLERANCE:.0%}, median error {error:.1%}. Off by more:"
    )
    for row in off:
        yield f"  {row.op} {row.shape} {row.dtype}: measured / expected {row.judged:.2f}"
    for family in dict.fromkeys(row.family for row in off):
        yield f"    {family}: {REASONS[family]}"


def _step_lines(result: Mapping[str, Any], card: str) -> Iterator[str]:
    steps = result["steps"]
    if steps:
        yield ""
        yield (
            f"SGLang's DFLASH step, Qwen3-8B, {_one(card)}, from the split measured on an H100 (forced acceptance, "
            f"prompts of {CONTEXT}). Low: each part keeps its efficiency; high: what it takes beyond its floor. us:"
        )
        if card == "H100":
            yield "  (the package's ops by the model, beside their time in the engine; the rest is as measured)"
    for step in steps:
        low, high = _span(step["parts"])
        yield f"  concurrency {step['concurrency']}, {step['engine']}: {low:.0f} to {high:.0f}"
        yield f"    {_part_text(step['parts'])}"
        host = step["host_us"]
        if host > low:
            yield (
                f"    the host took {host:.0f} us a step there ({step['launches']:.0f} launches, under the profiler, "
                "which slows it): if the GPU's time falls below the host's, the host decides"
            )
    yield ""
    yield (
        f"One of 8 ranks of Qwen3.5-397B-A17B's drafter on {_one(card)}; the target's pass is not modelled; sums over "
        "ranks at what two H200s took (peer memory to NCCL), not measured for 8. us:"
    )
    for side in result["sharded"].values():
        for engine in ("stock", "ours"):
            low, high = _span(side[engine])
            without = f"; not measured: {', '.join(side['missing'])}" if engine == "stock" and side["missing"] else ""
            yield f"  concurrency {side['concurrency']}, {engine}: {low:.0f} to {high:.0f}{without}"
            yield f"    {_part_text(side[engine])}"


def _part_text(parts: Sequence[Part]) -> str:
    words = []
    for part in parts:
        span = f"{part.low_us:.0f}" if part.high_us - part.low_us < 1 else f"{part.low_us:.0f}-{part.high_us:.0f}"
        floor = f" (floor {part.floor_us:.0f})" if part.floor_us else ""
        was = (
            f", measured {part.measured_us:.0f}"
            if part.measured_us is not None and span != f"{part.measured_us:.0f}"
            else ""
        )
        words.append(f"{part.name} {span}{floor}{was}")
    return "; ".join(words)


def _published_lines(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not found:
        return
    yield ""
    yield "Against what others published for B200 (stock SGLang there; nothing of this package ran):"
    for row in found:
        steps = [f"{us / 1e3:.2f}" for us in row["step_us"]]
        tokens = ", ".join(f"{c:g}" for c in row["committed"])
        said = "published" if row["published"] else "assumed, not published"
        yield (
            f"  {row['model']}, {row['cards']}, concurrency {row['concurrency']}: {row['tokens_per_s']:g} tokens/s, "
            f"so a step of {' / '.join(steps)} ms at {tokens} tokens committed ({said})"
        )
        if row["expected_step_us"]:
            low, high = row["expected_step_us"]
            yield f"    expected here from the H100's split: {low / 1e3:.2f} to {high / 1e3:.2f} ms"
        yield (
            f"    what the package replaces takes {row['ours_us'][0]:.0f} to {row['ours_us'][1]:.0f} us of it, "
            f"{row['share'][0]:.0%} to {row['share'][1]:.0%}; with the package {row['with_package_us'][0]:.0f} to "
            f"{row['with_package_us'][1]:.0f} us: the step {row['gain'][0]:.3f} to {row['gain'][1]:.3f} times as fast"
        )
        if row["gain_without_forward"]:
            low, high = row["gain_without_forward"]
            yield f"    with the drafter's pass left to SGLang, {low:.3f} to {high:.3f} times"
        yield f"    source: {row['source']}"


def jsonable(value: Any) -> Any:
    """Dataclasses to objects, at any depth."""
    if isinstance(value, Predicted | Part):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m bench predict", description="Floors and expected times of the benches' rows on a card."
    )
    parser.add_argument("--card", choices=tuple(CARDS), required=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    args = parser.parse_args(argv)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        print(f"python -m bench predict: --json {args.json}: its directory does not exist", file=sys.stderr)
        return 2
    try:
        result = report(CARDS[args.card])
    except ValueError as error:
        print(f"python -m bench {error}" if str(error).startswith("predict") else error, file=sys.stderr)
        return 2
    print("\n".join(lines(result)))
    if args.json is not None:
        args.json.write_text(json.dumps(jsonable(result), indent=1) + "\n", encoding="utf-8")
    return 0


__all__ += ["card_of"]

if __name__ == "__main__":
    sys.exit(main())

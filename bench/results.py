"""Handles a run's JSON file: `python -m bench.results FILE...` files its rows as bench/results/<card>/<suite>.json.

`--markdown FILE...` prints a table of the files' rows (of an op's two cache states the cold one), `--readme README.md`
puts a summary of all filed results, a line an op, between a document's lines `<!-- bench:begin -->` and
`<!-- bench:end -->`.
`--remaining FILE` prints the suites that a run cut short has not reached, for a second run in a fresh process;
`--show FILE` prints its rows as the run did.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.harness import HEADER, Row, geomean

RESULTS = Path(__file__).resolve().parent / "results"
OTHERS = (
    "acceptance",
    "acceptance_w8a8",
    "acceptance_nvfp4",
    "drafter",
    "sglang_tokens",
    "verify_warps",
    "verify_registers",
    "verify_reporter",
    "inject_sglang",
    "sglang",
    "sglang_stock",
    "many_rows_sweep",
    "verify_sampled",
    "sglang_tp2",
    "engine_trace",
)  # filed there too, but no runs of the suites


def file_run(run: dict[str, Any], root: Path) -> list[Path]:
    """Write one file per suite that has rows; an older file of that card and suite is replaced."""
    folder = root / re.sub(r"[^a-z0-9]+", "-", run["card"].lower()).strip("-")
    written = []
    for suite in run["suites"]:
        rows = [row for row in run["rows"] if row["suite"] == suite]
        if not rows:
            continue
        part = {
            **run,
            "suites": {suite: run["suites"][suite]},
            "geomean": {suite: run["geomean"].get(suite)},
            "rows": rows,
            "errors": [e for e in run["errors"] if e["suite"] == suite],
            "skipped": [s for s in run["skipped"] if s["suite"] == suite],
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{suite}.json"
        path.write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
        written.append(path)
    return written


def remaining(run: dict[str, Any]) -> list[str]:
    """Suites not started."""
    return [suite for suite, state in run["suites"].items() if state == "not run"]


def show(run: dict[str, Any]) -> None:
    """Print a run's rows."""
    print(f"# {run['card']}; torch {run['torch']}; commit {run['commit']}; {run['command']}")
    print(f"# {HEADER}")
    known = {f.name for f in fields(Row)} - {"extra"}
    for row in run["rows"]:
        print(f"  {Row(**{k: v for k, v in row.items() if k in known}).line()}")
    for suite, mean in run["geomean"].items():
        if mean is not None:
            print(f"# {suite}: geomean of ours / best baseline: {mean:.3f}")


def preferred_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of an op's two cache states at one shape only the cold one, where there is one."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["suite"], row["op"], row["shape"], row["dtype"]

    cold = {key(row) for row in rows if row["cache"] == "cold"}
    return [row for row in rows if row["cache"] == "cold" or key(row) not in cold]


def _by_card(runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A heading that says what was measured on what, and the runs of that card."""
    for card in dict.fromkeys(run["card"] for run in runs):
        of_card = [run for run in runs if run["card"] == card]
        stamps = dict.fromkeys(f"torch {run['torch']}, commit {run['commit']}, {run['date'][:10]}" for run in of_card)
        yield f"{card} ({'; '.join(stamps)}):", of_card


def summary(runs: Sequence[dict[str, Any]]) -> str:
    """A line for each op, dtype and regime of each card."""
    lines: list[str] = []
    for heading, of_card in _by_card(runs):
        lines += [heading, "", "| op | dtype | regime | shapes | ours / best baseline | % of ceiling |"]
        lines += ["|---|---|---|---:|---|---|"]
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in (row for run in of_card for row in preferred_rows(run["rows"])):
            groups.setdefault((row["op"], row["dtype"], row["regime"]), []).append(row)
        for key, rows in groups.items():
            ratios = [row["ratio"] for row in rows if row["ratio"]]
            ceilings = [row["pct_ceiling"] for row in rows if row["pct_ceiling"] is not None]
            cells = [*key, str(len(rows))]
            cells += [f"{geomean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""]
            cells += [f"{min(ceilings):.0f} to {max(ceilings):.0f}" if ceilings else ""]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines.append(
        "Ratios are geometric means of times, with the best and the worst shape: below 1 is faster than the baseline."
    )
    return "\n".join(lines)


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """One table a card; the numbers come from the files alone."""
    lines: list[str] = []
    for heading, of_card in _by_card(runs):
        lines += [heading, ""]
        lines += ["| op | shape | dtype | ours us | best baseline | its us | ours / it | % of ceiling |"]
        lines += ["|---|---|---|---:|---|---:|---:|---:|"]
        for run in of_card:
            for row in preferred_rows(run["rows"]):
                cells = [row["op"], row["shape"], row["dtype"], f"{row['ours_us']:.1f}"]
                cells += [row["baseline"], f"{row['baseline_us']:.1f}"] if row["baseline_us"] else ["none", ""]
                cells += [f"{row['ratio']:.2f}" if row["ratio"] else ""]
                cells += [f"{row['pct_ceiling']:.0f}" if row["pct_ceiling"] is not None else ""]
                lines.append(f"| {' | '.join(cells)} |")
        means = [f"{s} {mean:.2f}" for run in of_card for s, mean in run["geomean"].items() if mean is not None]
        lines += ["", f"Geometric means of ours / best baseline: {', '.join(means) or 'none'}.", ""]
    return "\n".join(lines)


def put_between_marks(document: str, table: str) -> str:
    """The document with `table` between its two marks.

    Raises:
        ValueError: it lacks the marks.
    """
    begin, end = (f"<!-- bench:{word} -->" for word in ("begin", "end"))
    before, found, rest = document.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"the document must hold the lines {begin} and {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def _read(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(run, dict) or not isinstance(run.get("suites"), dict):
        raise ValueError(f"{path}: not the file of a bench run")
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 with one line when a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.results", description="File or read a run's JSON.")
    parser.add_argument("file", nargs="+", type=Path)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--remaining", action="store_true", help="print the suites not started")
    mode.add_argument("--show", action="store_true", help="print the rows as the run did")
    mode.add_argument("--markdown", action="store_true", help="print a table")
    mode.add_argument("--readme", action="store_true", help="FILE is a document: renew the table between its marks")
    args = parser.parse_args(argv)
    try:
        if args.readme:
            path = args.file[0]
            runs = [_read(found) for found in sorted(RESULTS.glob("*/*.json")) if found.stem not in OTHERS]
            path.write_text(put_between_marks(path.read_text(encoding="utf-8"), summary(runs)), encoding="utf-8")
            return 0
        runs = [_read(path) for path in args.file]
    except (OSError, ValueError) as error:
        print(f"python -m bench.results: {error}", file=sys.stderr)
        return 2
    if args.markdown:
        print(markdown(runs))
    for run in runs:
        if args.remaining:
            print(" ".join(remaining(run)))
        elif args.show:
            show(run)
        elif not args.markdown:
            for written in file_run(run, RESULTS):
                print(written.relative_to(RESULTS.parent.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())

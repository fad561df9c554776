"""Handles a run's JSON file: `python -m bench.results FILE...` files its rows as bench/results/<card>/<suite>.json.

`--remaining FILE` prints the suites that a run cut short has not reached, for a second run in a fresh process;
`--show FILE` prints its rows as the run did.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.harness import HEADER, Row

RESULTS = Path(__file__).resolve().parent / "results"


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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 with one line when a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.results", description="File or read a run's JSON.")
    parser.add_argument("file", nargs="+", type=Path)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--remaining", action="store_true", help="print the suites not started")
    mode.add_argument("--show", action="store_true", help="print the rows")
    args = parser.parse_args(argv)
    for path in args.file:
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(run["suites"], dict):
                raise TypeError("suites must be an object")
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"python -m bench.results: {path} is no bench run: {type(error).__name__}: {error}", file=sys.stderr)
            return 2
        if args.remaining:
            print(" ".join(remaining(run)))
        elif args.show:
            show(run)
        else:
            for written in file_run(run, RESULTS):
                print(written.relative_to(RESULTS.parent.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())

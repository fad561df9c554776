"""Runs suites one case at a time: prints a line a row, keeps going past failures, and keeps the JSON file current.

A kernel that faults or never ends takes the process's device with it. A fault is seen at the next synchronisation, a
hang by a watchdog; both end the run with exit code 3 after the rows so far were written, and the file says which suites
are left, so that they can be run in a fresh process.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import Ceilings
from bench.harness import HEADER, Case, Row, free_memory, geomean, measure_case

__all__ = ["SUITES", "DeviceLost", "Run", "commit_id"]

SUITES = ("verify", "alloc", "gemm", "head", "inject", "draft", "dflash2", "engine", "tp")
HANG_SECONDS = 90.0
ROOT = Path(__file__).resolve().parent.parent


class DeviceLost(Exception):
    """The CUDA context of this process can no longer be used."""


@dataclass
class Problem:
    """A case without a row: `reason` is the error, or why it was skipped."""

    suite: str
    case: str
    reason: str


@dataclass
class Run:
    """One invocation: what was measured, what failed, what was not reached.

    Attributes:
        state: of each suite: "done", "partial" or "not run".
        budget_seconds: cases that would start later than this after `started` are skipped; None: no limit.
    """

    command: str
    device: torch.device
    ceilings: Ceilings
    quick: bool = False
    name_filter: str = ""
    json_path: Path | None = None
    budget_seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    commit: str = "unknown"
    rows: list[Row] = field(default_factory=list)
    errors: list[Problem] = field(default_factory=list)
    skipped: list[Problem] = field(default_factory=list)
    state: dict[str, str] = field(default_factory=dict)

    def suites(self, names: list[str]) -> None:
        """Run the suites in order.

        Raises:
            DeviceLost: a case broke the CUDA context.
        """
        self.state = dict.fromkeys(names, "not run")
        print(f"# {HEADER}")
        for name in names:
            self.state[name] = "partial"
            first_row, first_error = len(self.rows), len(self.errors)
            print(f"# -- {name}", flush=True)
            try:
                self._suite(name)
            finally:
                self._print_geomean(name, self.rows[first_row:])
                self.save()
            if len(self.errors) == first_error and not any(s.suite == name for s in self.skipped):
                self.state[name] = "done"
        self.save()

    def _suite(self, name: str) -> None:
        try:
            module = importlib.import_module(f"bench.bench_{name}")
            if hasattr(module, "rows"):
                self._measured_rows(name, module.rows(self.device, self.quick, self.name_filter, self.seconds_left))
                return
            cases: Iterator[Case] = iter(module.cases(self.device, self.quick))
        except Exception as error:
            self._fail(name, name, error)
            return
        while True:
            try:
                case = next(cases)
            except StopIteration:
                return
            except Exception as error:
                self._fail(name, "building the cases", error)
                return
            if self.name_filter not in case.title:
                continue
            if self.seconds_left() <= 0:
                self._skip(name, case.title)
                continue
            watchdog = self._watch(name, case.title)
            try:
                self._add(measure_case(case, self.device, self.ceilings, samples=6 if self.quick else 12))
            except Exception as error:
                self._fail(name, case.title, error)
            finally:
                watchdog.cancel()
            free_memory(self.device)

    def _measured_rows(self, name: str, produced: Iterator[Row | Problem]) -> None:
        """A suite that times itself: it yields finished rows, and a `Problem` for a case without one."""
        while True:
            watchdog = self._watch(name, name)
            try:
                item = next(produced)
            except StopIteration:
                return
            except Exception as error:
                self._fail(name, name, error)
                return
            finally:
                watchdog.cancel()
            if isinstance(item, Row):
                self._add([item])
            elif item.reason == "time limit":
                self._skip(name, item.case)
            else:
                self._fail(name, item.case, RuntimeError(item.reason))

    def seconds_left(self) -> float:
        """Until the time limit; infinite without one."""
        if self.budget_seconds is None:
            return float("inf")
        return self.budget_seconds - (time.monotonic() - self.started)

    def _add(self, rows: list[Row]) -> None:
        for row in rows:
            print(f"  {row.line()}", flush=True)
            if row.extra:
                print(f"    # {', '.join(f'{key} {_short(value)}' for key, value in row.extra.items())}", flush=True)
        self.rows += rows
        self.save()

    def _fail(self, suite: str, case: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.errors.append(Problem(suite, case, reason))
        print(f"  ERROR {case}: {reason}", flush=True)
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError as lost:
                raise DeviceLost(f"{case}: {lost}") from error

    def _skip(self, suite: str, case: str) -> None:
        self.skipped.append(Problem(suite, case, "time limit"))
        print(f"  SKIPPED {case}: time limit", flush=True)

    def _print_geomean(self, name: str, rows: list[Row]) -> None:
        for cache in ("cold", "hot"):
            ratios = [row.ratio for row in rows if row.ratio and row.cache == cache]
            mean = geomean(ratios)
            if mean is not None:
                print(f"# {name}: geomean of ours / best baseline, {cache}, {len(ratios)} rows: {mean:.3f}", flush=True)

    def _watch(self, suite: str, case: str) -> threading.Timer:
        def hung() -> None:
            self.errors.append(Problem(suite, case, f"no end after {HANG_SECONDS:.0f} s"))
            print(f"  ERROR {case}: no end after {HANG_SECONDS:.0f} s; leaving the process", flush=True)
            self.save()
            os._exit(3)

        timer = threading.Timer(HANG_SECONDS, hung)
        timer.daemon = True
        if self.device.type == "cuda":
            timer.start()
        return timer

    # -- output -------------------------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """The whole run; `geomean` is of the cold rows where a suite has any."""
        means = {}
        for suite in self.state:
            rows = [row for row in self.rows if row.suite == suite and row.ratio]
            cold = [row for row in rows if row.cache == "cold"]
            means[suite] = geomean(row.ratio for row in (cold or rows) if row.ratio)
        return {
            "command": self.command,
            "card": self.ceilings.card,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "driver": driver_version() if self.device.type == "cuda" else None,
            "commit": self.commit,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "ceilings": self.ceilings.as_json(),
            "suites": self.state,
            "geomean": means,
            "rows": [row.as_json(self.ceilings.card, self.commit) for row in self.rows],
            "errors": [asdict(problem) for problem in self.errors],
            "skipped": [asdict(problem) for problem in self.skipped],
        }

    def save(self) -> None:
        """Write the JSON file, whole or not at all."""
        if self.json_path is None:
            return
        partial = self.json_path.with_suffix(self.json_path.suffix + ".part")
        partial.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")
        partial.replace(self.json_path)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_short(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_driver: str | None = None


def driver_version() -> str:
    """The NVIDIA driver's version, asked once."""
    global _driver
    if _driver is None:
        _driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0]
    return _driver or "unknown"


def commit_id() -> str:
    """`DFLASH_COMMIT`, else the checkout's commit ("+" appended when tracked files differ), else "unknown".

    The variable comes first: a copy of a checkout may carry git metadata that its files have left behind.
    """
    if named := os.environ.get("DFLASH_COMMIT"):
        return named
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if commit:
        return commit + ("+" if _output(["git", "-C", str(ROOT), "status", "--porcelain", "-uno"]) else "")
    return "unknown"


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()

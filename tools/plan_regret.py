"""How good the tiles are that csrc/smxx/many_rows/plan.h chooses, against a filed sweep of candidates.

    python tools/plan_regret.py [bench/results/CARD/many_rows_sweep.json]

Compiles plan.h with the host's C++ compiler (CXX, else g++) and prints, for each GEMM of the sweep, the chosen
candidate and the fastest one. A candidate is (columns, row tiles that share W, parts of K, column tiles that share A).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ROOT / "bench" / "results" / "nvidia-h200" / "many_rows_sweep.json"
PROGRAM = """
#include <cstdio>
#include "smxx/many_rows/plan.h"
int main() {
  long rows, n, k_steps;
  int granule, counted, sms;
  using namespace dflash::many_rows;
  while (std::scanf("%ld %ld %ld %d %d %d", &rows, &n, &k_steps, &granule, &counted, &sms) == 6) {
    const Plan plan = choose_plan(rows, n, k_steps, granule, sms, kHopperRates, kColumnChoices[0], 256, counted != 0);
    std::printf("%d,%d,%d,%d\\n", plan.columns, plan.pair, plan.splits, plan.across);
  }
}
"""


@dataclass(frozen=True)
class Choice:
    """Of one GEMM: what is chosen and what was fastest, with their times."""

    name: str
    chosen: str
    us: float
    best: str
    best_us: float

    @property
    def regret(self) -> float:
        """Time over the fastest candidate's."""
        return self.us / self.best_us


def choices(sweep: dict[str, Any]) -> list[Choice]:
    """One for each GEMM of the sweep.

    Raises:
        KeyError: a chosen candidate was not measured.
    """
    gemms = sweep["gemms"]
    fields = ("rows", "n", "k_steps", "granule", "counted")
    lines = [" ".join(str(g[f]) for f in fields) + f" {sweep['multiprocessors']}" for g in gemms]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "plan.cpp", Path(folder) / "plan"
        source.write_text(PROGRAM, encoding="utf-8")
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
        done = subprocess.run([str(program)], input="\n".join(lines), capture_output=True, text=True, check=True)
    found = []
    for gemm, chosen in zip(gemms, done.stdout.split(), strict=True):
        us = gemm["us"]
        best = min(us, key=us.get)
        found.append(Choice(f"{gemm['of']} {gemm['gemm']}", chosen, us[chosen], best, us[best]))
    return found


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else SWEEP
    found = choices(json.loads(path.read_text(encoding="utf-8")))
    for c in found:
        print(f"{c.name:<58} {c.chosen:>8} {c.us:7.1f} us   best {c.best:>8} {c.best_us:7.1f} us  {c.regret:5.2f}x")
    regrets = [c.regret for c in found]
    print(f"{len(regrets)} GEMMs: {mean(regrets):.3f}x on average, {max(regrets):.2f}x at worst")


if __name__ == "__main__":
    main()

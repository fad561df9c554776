"""Achieved against ceiling, one bar a row: `python -m bench ... --plot FILE.png`, or from a run's JSON file with
`python -m bench.plot RUN.json FILE.png`.

A bar is the row's percentage of its floor (bandwidth or arithmetic, as measured in that run); the tick on it is where
the best baseline stands, the label gives microseconds and the ratio to it. Of an op's two cache states the cold one is
drawn.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.results import preferred_rows

__all__ = ["draw", "draw_predicted"]

_COLOURS = ("#4477aa", "#66a182", "#ccaa44", "#aa6677", "#775599", "#55a0b4", "#888888")
_BASELINE = "#222222"


def draw(run: dict[str, Any], path: Path) -> None:
    """Draw a run (the object of its JSON file) into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    rows = [row for row in preferred_rows(run["rows"]) if row["pct_ceiling"] is not None]
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    height = 1.6 + 0.27 * len(rows) + 0.3 * len(suites)
    figure, axis = pyplot.subplots(figsize=(13, height), layout="constrained")
    place, places, names = 0.0, [], []
    for number, suite in enumerate(suites):
        for row in (r for r in rows if r["suite"] == suite):
            percent = row["pct_ceiling"]
            axis.barh(place, min(percent, 120), height=0.72, color=_COLOURS[number % len(_COLOURS)])
            label = f"{percent:.0f}%  {_microseconds(row['ours_us'])}"
            if row["baseline_us"]:
                mark = percent * row["ours_us"] / row["baseline_us"]
                axis.plot([min(mark, 120)] * 2, [place - 0.42, place + 0.42], color=_BASELINE, linewidth=1.8)
                label += f"  {row['ratio']:.2f}x the time of {row['baseline']}"
            else:
                mark = 0.0
            axis.text(min(max(percent, mark), 120) + 1, place, label, va="center", fontsize=7.5)
            places.append(place)
            names.append(f"{row['op']}  {row['shape']}  {row['dtype']}" + (" hot" if row["cache"] == "hot" else ""))
            place += 1
        place += 0.6
    axis.axvline(100, color="#999999", linewidth=0.8, linestyle="--")
    axis.set_yticks(places, names, fontsize=7.5)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_xlim(0, 190)
    axis.set_xticks(range(0, 121, 20))
    axis.set_xlabel("% of the measured ceiling (the floor's time over ours); label: time, ratio ours / best baseline")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    rates = run["ceilings"]
    figure.suptitle(
        f"{run['card']}: read {rates['read_bw'] / 1e9:.0f} GB/s, copy {rates['copy_bw'] / 1e9:.0f} GB/s, "
        f"{rates['flop_dtype']} {rates['flop_rate'] / 1e12:.3g} TFLOP/s (torch {run['torch']}, {run['commit']})",
        fontsize=10,
    )
    handles = [Line2D([], [], color=_BASELINE, linewidth=1.8, label="best baseline")]
    handles += [
        Line2D([], [], color=_COLOURS[n % len(_COLOURS)], linewidth=6, label=suite) for n, suite in enumerate(suites)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_predicted(compared: dict[str, Any], path: Path) -> None:
    """Measured against expected times, of `bench.first_run.compare`, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in compared["rows"] if row["expected_us"] and row["measured_us"]]
    tolerance = compared["tolerance"]
    figure, axis = pyplot.subplots(figsize=(8, 7), layout="constrained")
    families = list(dict.fromkeys(row["family"] for row in rows))
    for number, family in enumerate(families):
        mine = [row for row in rows if row["family"] == family]
        x, y = [row["expected_us"] for row in mine], [row["measured_us"] for row in mine]
        axis.scatter(x, y, s=22, color=_COLOURS[number % len(_COLOURS)], label=f"{family} ({len(mine)})", zorder=3)
    ends = [
        min((row["expected_us"] for row in rows), default=1.0) / 2,
        max((r["expected_us"] for r in rows), default=1) * 2,
    ]
    axis.plot(ends, ends, color=_BASELINE, linewidth=1, label="as expected")
    lower, upper = ([end * (1 + sign * tolerance) for end in ends] for sign in (-1, 1))
    axis.fill_between(ends, lower, upper, color="#dddddd", label=f"within {tolerance:.0%}")
    axis.set(xscale="log", yscale="log", xlabel="expected us", ylabel="measured us", xlim=ends)
    axis.set_title(
        f"{compared['card']}: {compared['within']} of {compared['compared']} rows within {tolerance:.0%}", fontsize=10
    )
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _microseconds(us: float) -> str:
    return f"{us:.1f} us" if us < 1000 else f"{us / 1000:.2f} ms"


def main() -> int:
    """Draw one JSON file."""
    if len(sys.argv) != 3:
        print("python -m bench.plot: RUN.json and FILE.png are needed", file=sys.stderr)
        return 2
    try:
        run = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        draw(run, Path(sys.argv[2]))
    except (OSError, ValueError, KeyError) as error:
        print(f"python -m bench.plot: {sys.argv[1]}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench engine-trace RECIPE`: where a step of SGLang's DFLASH goes, stock and with the plugin.

RECIPE and engines are those of `bench.bench_sglang` (random weights, forced acceptance). A profiler trace of decode
steps of each engine is reduced to microseconds a step and drawn as stacked bars:

=========  =========================================================================================================
draft      the drafter's pass: its CUDA graph up to the final norm
head       the rest of that graph: LM head and choice of the draft tokens
verify     the target's CUDA graph, its LM head and logits included
accept     argmax over the verified logits and acceptance
inject     the target's hidden states into the drafter's KV cache
other      any other kernel or copy: block preparation, inputs and attention metadata of both graphs, the scheduler's
idle       no kernel and no copy runs
=========  =========================================================================================================

A step ends at its acceptance kernel. Kernels that overlap share the time, so that the parts add up to the step.
Beside that: launches by the host (a graph counts once) and the host's time, the step less what its thread waits in
synchronisations, and in the report torch's operators in it. The profiler itself makes both larger. `--report FILE`
draws what an earlier run, or `bench.bench_sglang --trace`, has measured.

Exit codes: 0 every engine ran and every trace was reduced; 1 otherwise; 2 bad arguments or something missing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PARTS = ("draft", "head", "verify", "accept", "inject", "other", "idle")
COLOURS = ("#4477aa", "#55a0b4", "#ccaa44", "#aa6677", "#66a182", "#888888", "#e4e4e4")
STEP_ENDS = ("accept_bonus", "verify_top1", "verify_logits", "verify_lazy")

_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cuda_runtime", "cuda_driver")
# Kernels outside of the two large graphs; the first pattern that is found in the name. A decode step has no eager GEMM
# or norm but those of injection.
_EAGER = (
    ("accept", r"accept|verify_|argmax|ArgMax|reduce_kernel"),
    ("inject", r"inject|prefix_valid|norm|Norm|[Rr]ope|gemm|nvjet|cutlass|gemv|splitK|cublas"),
)
_LAST_OF_DRAFT = re.compile(r"norm|stream_draft", re.IGNORECASE)


def reduce_trace(path: Path) -> dict[str, Any]:
    """A trace of decode steps as microseconds and launches a step, or ``{"error": ...}``."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    gpu = sorted((e for e in events if e.get("cat") in _GPU), key=lambda e: e["ts"])
    marks = [e["ts"] for e in gpu if any(mark in e["name"] for mark in STEP_ENDS)]
    if len(marks) < 8:
        return {"error": f"{len(marks)} steps in the trace"}
    low, high, steps = marks[3], marks[-2], len(marks) - 5
    host = [e for e in events if e.get("cat") in _HOST]
    graphs = {_correlation(e) for e in host if "GraphLaunch" in e["name"]}
    inside = [e for e in gpu if low <= e["ts"] < high]
    if not any(_correlation(e) in graphs for e in inside):
        return {"error": "no kernel of the trace belongs to a graph's launch"}

    part = {id(e): name for e, name in _parts(inside, marks, graphs)}
    micros = dict.fromkeys(PARTS, 0.0)
    names: dict[tuple[str, str], list[float]] = {}
    for e, busy in _exclusive(inside, high):
        micros[part[id(e)]] += busy
        names.setdefault((part[id(e)], e["name"][:100]), []).append(e["dur"])
    micros["idle"] = (high - low) - sum(micros.values())
    top = sorted(names.items(), key=lambda item: -sum(item[1]))[:40]
    return {
        "steps": steps,
        "span_us": (high - low) / steps,
        "parts_us": {name: us / steps for name, us in micros.items()},
        "gpu_operations": len(inside) / steps,
        **_host_side(
            [e for e in host if low <= e["ts"] < high],
            [e for e in events if e.get("cat") == "cpu_op" and low <= e["ts"] < high],
            high - low,
            steps,
        ),
        "gaps": _gaps([e for e in gpu if low <= e["ts"] <= high], steps),
        "kernels": [{"part": p, "name": n, "us": sum(d) / steps, "launches": len(d) / steps} for (p, n), d in top],
    }


def _correlation(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")


def _parts(inside: list[dict[str, Any]], marks: list[float], graphs: set[Any]) -> list[tuple[dict[str, Any], str]]:
    """Each kernel's part. Of a step's graphs, the target's is the longest, the drafter's the longest one before it."""
    found: list[tuple[dict[str, Any], str]] = []
    for low, high in zip(marks, marks[1:], strict=False):
        step = [e for e in inside if low <= e["ts"] < high]
        launched: dict[Any, list[dict[str, Any]]] = {}
        for e in step:
            if _correlation(e) in graphs:
                launched.setdefault(_correlation(e), []).append(e)
        groups = sorted(launched.values(), key=lambda group: -sum(e["dur"] for e in group))
        verify = groups[0] if groups else []
        before = [g for g in groups[1:] if g[0]["ts"] < verify[0]["ts"]]
        draft = before[0] if before else []
        in_verify, in_draft = set(map(id, verify)), set(map(id, draft))
        last = max((n for n, e in enumerate(draft) if _LAST_OF_DRAFT.search(e["name"])), default=len(draft))
        head = set(map(id, draft[last + 1 :]))
        for e in step:
            if id(e) in in_verify:
                # The kernel that ends a step may be in a graph of its own, never in the target's.
                found.append((e, "verify"))
            elif id(e) in in_draft:
                found.append((e, "head" if id(e) in head else "draft"))
            else:
                found.append((e, next((name for name, p in _EAGER if re.search(p, e["name"])), "other")))
    return found


def _exclusive(inside: list[dict[str, Any]], high: float) -> list[tuple[dict[str, Any], float]]:
    """Each kernel with its share of the busy time: where some overlap, the time is divided among them."""
    edges = sorted({e["ts"] for e in inside} | {min(e["ts"] + e["dur"], high) for e in inside})
    shares: dict[int, float] = {}
    running: list[dict[str, Any]] = []
    at = 0
    for start, stop in zip(edges, edges[1:], strict=False):
        running = [e for e in running if e["ts"] + e["dur"] > start]
        while at < len(inside) and inside[at]["ts"] <= start:
            if inside[at]["ts"] + inside[at]["dur"] > start:
                running.append(inside[at])
            at += 1
        for e in running:
            shares[id(e)] = shares.get(id(e), 0.0) + (stop - start) / len(running)
    return [(e, shares.get(id(e), 0.0)) for e in inside]


def _gaps(inside: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Where the GPU is idle: the kernels before and after, largest first."""
    found: dict[tuple[str, str], list[float]] = {}
    end, last = inside[0]["ts"], ""
    for e in inside:
        if e["ts"] > end:
            found.setdefault((last, e["name"][:60]), []).append(e["ts"] - end)
        if e["ts"] + e["dur"] > end:
            end, last = e["ts"] + e["dur"], e["name"][:60]
    largest = sorted(found.items(), key=lambda item: -sum(item[1]))[:20]
    return [{"after": a, "before": b, "us": sum(g) / steps, "times": len(g) / steps} for (a, b), g in largest]


def _host_side(host: list[dict[str, Any]], operators: list[dict[str, Any]], span: float, steps: int) -> dict[str, Any]:
    """Launches and time of the thread that launches the graphs; of torch's operators, those that no other one calls."""
    threads = Counter((e.get("pid"), e.get("tid")) for e in host if "GraphLaunch" in e["name"])
    thread = threads.most_common(1)[0][0] if threads else None
    mine = [e for e in host if (e.get("pid"), e.get("tid")) == thread]
    launches = [e for e in mine if re.search("Launch|Memcpy|Memset", e["name"])]
    outer: dict[str, list[float]] = {}
    end = 0.0
    for e in sorted((e for e in operators if (e.get("pid"), e.get("tid")) == thread), key=lambda e: e["ts"]):
        if e["ts"] >= end:
            end = e["ts"] + e["dur"]
            outer.setdefault(e["name"], []).append(e["dur"])
    largest = sorted(outer.items(), key=lambda item: -sum(item[1]))[:20]
    waits = sum(e["dur"] for e in mine if "Synchronize" in e["name"])
    return {
        "host_us": (span - waits) / steps,
        "launching_us": sum(e["dur"] for e in launches) / steps,
        "host_launches": len({(_correlation(e), e["ts"]) for e in launches}) / steps,
        "graph_launches": sum("GraphLaunch" in e["name"] for e in launches) / steps,
        "operators_us": sum(map(sum, outer.values())) / steps,
        "operators": [{"name": n, "us": sum(d) / steps, "calls": len(d) / steps} for n, d in largest],
    }


def traces_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The reduced traces of a report, by concurrency, stock first."""
    found = [{"seams": engine["seams"], **trace} for engine in report["engines"] for trace in engine.get("traces", [])]
    order = {"plain": 0, "stock": 1}
    return sorted((t for t in found if "error" not in t), key=lambda t: (t["concurrency"], order.get(t["seams"], 2)))


def table(report: dict[str, Any]) -> str:
    """One line a trace."""
    columns = [*PARTS, "step", "host", "launches", "graphs"]
    lines = ["# " + f"{'conc':>4} {'engine':<16}" + "".join(f"{name:>9}" for name in columns)]
    for trace in traces_of(report):
        values = [*trace["parts_us"].values(), trace["span_us"], trace["host_us"]]
        counts = [trace["host_launches"], trace["graph_launches"]]
        numbers = "".join(f"{v:>9.0f}" for v in values) + "".join(f"{v:>9.1f}" for v in counts)
        lines.append(f"  {trace['concurrency']:>4} {trace['seams'][:16]:<16}{numbers}")
    return "\n".join(lines)


def idle_table(report: dict[str, Any], count: int = 8) -> str:
    """The largest gaps of every trace."""
    lines = ["# idle, microseconds a step"]
    for trace in traces_of(report):
        for gap in trace.get("gaps", [])[:count]:
            where = f"{gap['after'][:50]} .. {gap['before'][:50]}"
            lines.append(f"  {trace['concurrency']:>4} {trace['seams'][:16]:<16}{gap['us']:>8.1f}  {where}")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Stacked bars, one a trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    traces = traces_of(report)
    figure, axis = pyplot.subplots(figsize=(12, 1.8 + 0.55 * len(traces)), layout="constrained")
    widest = max((t["span_us"] for t in traces), default=1.0)
    for place, trace in enumerate(traces):
        left = 0.0
        for colour, (name, us) in zip(COLOURS, trace["parts_us"].items(), strict=True):
            axis.barh(place, us, left=left, height=0.7, color=colour)
            if us > 0.035 * widest:
                dark = name in ("draft", "accept", "other")
                axis.text(left + us / 2, place, f"{us:.0f}", ha="center", va="center", fontsize=7,
                          color="white" if dark else "black")  # fmt: skip
            left += us
        label = f"{left:.0f} us, host {trace['host_us']:.0f}, {trace['host_launches']:.0f} launches"
        axis.text(left + 0.006 * widest, place, label, va="center", fontsize=8)
    axis.set_yticks(range(len(traces)), [f"{t['seams']}, {t['concurrency']} at a time" for t in traces], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.28 * widest)
    axis.set_xlabel("microseconds of a decode step, under the profiler")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    facts = report.get("environment", {})
    figure.suptitle(
        f"{facts.get('card', 'unknown card')}, SGLang {facts.get('sglang', '?')}, torch {facts.get('torch', '?')}, "
        f"commit {facts.get('commit', '?')}",
        fontsize=10,
    )
    handles = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, PARTS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(PARTS), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module's text for the exit codes."""
    from bench import bench_sglang

    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench engine-trace", description="Where a DFLASH step goes.")
    parser.add_argument("recipe", type=Path, nargs="?", help="directory with target/config.json and draft/config.json")
    parser.add_argument("--report", type=Path, metavar="FILE", help="draw this report, run nothing")
    parser.add_argument("--concurrency", type=bench_sglang.numbers, default=[1, 32], help="default: 1,32")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt; default: 1024")
    parser.add_argument("--forced", type=float, default=6.5, help="tokens committed a step; default: 6.5")
    parser.add_argument("--order", default="stock/all", help="engines; default: stock/all")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs of an engine; default: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, kept current")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the picture")
    parser.add_argument("--work", type=Path, default=Path("build/engine_trace"), metavar="DIR", help="logs, traces")
    parser.add_argument("--time-limit", type=float, default=560.0, metavar="SECONDS", help="default: 560")
    parser.add_argument("--start-seconds", type=float, default=120.0, help="start no engine with less time left")
    args = parser.parse_args(argv)
    if (args.recipe is None) == (args.report is None):
        print("python -m bench engine-trace: give either RECIPE or --report", file=sys.stderr)
        return 2
    code = 0
    if args.report is not None:
        report = json.loads(args.report.read_text())
    else:
        missing = bench_sglang.missing_file(args.recipe)
        if missing is not None:
            print(f"python -m bench engine-trace: {missing} is not there", file=sys.stderr)
            return 2
        command = ["python", "-m", "bench", "engine-trace", *argv]
        settings = argparse.Namespace(**vars(args), trace=args.concurrency, repeats=0, append=False)
        code, report = bench_sglang.measure(settings, command, args.order.split("/"))
    print("\n" + table(report))
    print(idle_table(report))
    wanted = len(args.concurrency) * len(args.order.split("/"))
    if args.report is None and len(traces_of(report)) < wanted:
        code = 1
    if args.plot is not None:
        draw(report, args.plot)
        print(f"# plot: {args.plot}")
    return code


if __name__ == "__main__":
    sys.exit(main())

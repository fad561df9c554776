"""`python -m bench.bench_sglang RECIPE`: step time of SGLang's DFLASH, stock and with the plugin, in fresh engines.

RECIPE holds target/config.json and draft/config.json (`tools/sglang_recipe.py` writes them); the weights are random
(``load_format="dummy"``) and the acceptance length is forced, so that a step is a step whatever the tokens. Engines run
in the order A B B A (stock, plugin, plugin, stock; --ab: once each); the ratio is that of the medians over the repeats
of all engines of a kind. As an engine takes minutes to start, each start measures all concurrencies. --seams adds
engines with these seams only, --trace a profiler trace of each kind, reduced to microseconds a step
(`bench.engine_trace`). --tp N cuts every engine over N GPUs. --append joins the engines of an earlier report of the
same card, number of GPUs, recipe, prompts and acceptance.

Exit codes: 0 every engine ran; 1 otherwise; 2 bad arguments or something missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.engine_trace import table
from bench.sglang_engine import PLAIN, STOCK, environment_facts, run_engine, several_gpus


def engine_arguments(args: argparse.Namespace, seams: str) -> dict[str, Any]:
    """Arguments of the engine for random weights."""
    sizes = args.concurrency
    arguments: dict[str, Any] = {
        "model_path": str((args.recipe / "target").resolve()),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "attention_backend": "fa3",
        "mem_fraction_static": 0.8,
        "context_length": 8192,
        "max_running_requests": max(sizes),
        "cuda_graph_bs_decode": sorted(sizes),
        "disable_prefill_cuda_graph": True,
        "disable_radix_cache": True,
        "grammar_backend": "none",
        "log_level": "warning",
        "random_seed": 1,
    }
    if args.tp > 1:
        arguments["tp_size"] = args.tp
    if seams != PLAIN:
        arguments["speculative_algorithm"] = "DFLASH"
        arguments["speculative_draft_model_path"] = str((args.recipe / "draft").resolve())
    return arguments


def summarise(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a kind of engine and concurrency: medians, and the speed over stock."""
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for engine in report["engines"]:
        for row in engine["rows"]:
            found.setdefault((row["concurrency"], engine["seams"]), []).append(row)
    rows = []
    for (concurrency, seams), samples in sorted(found.items()):
        median = statistics.median(s["ms_per_step"] for s in samples)
        row = {
            "concurrency": concurrency,
            "seams": seams,
            "samples": len(samples),
            "ms_per_step": median,
            "tokens_per_step": statistics.median(s["tokens_per_step"] for s in samples),
            "tokens_per_s": statistics.median(s["tokens_per_s"] for s in samples),
        }
        stock = found.get((concurrency, STOCK))
        if stock and seams not in (STOCK, PLAIN):
            row["over_stock"] = statistics.median(s["ms_per_step"] for s in stock) / median
        rows.append(row)
    return rows


def measure(args: argparse.Namespace, command: Sequence[str], order: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run the engines; returns the exit code and the report. Each start serves all concurrencies."""
    report: dict[str, Any] = {
        "command": shlex.join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment_facts(),
        "recipe": recipe_of(args.recipe),
        "prompt": args.prompt,
        "forced_tokens_per_step": args.forced,
        "tp": args.tp,
        "engines": [],
    }
    if args.tp > 1:
        report["collectives"] = several_gpus(os.environ)
    if args.json is not None and args.append and args.json.is_file():
        older = json.loads(args.json.read_text())
        report["engines"] = older["engines"]
        report["command"] = f"{older['command']}; {report['command']}"
    started = time.monotonic()
    complete, traced = True, set()
    for number, seams in enumerate(order):
        left = args.time_limit - (time.monotonic() - started)
        if left < args.start_seconds:
            complete = False
            print(f"# {seams}: no time left", flush=True)
            continue
        # What hangs must not take the other engines' time.
        limit = max(args.start_seconds, left - args.start_seconds * (len(order) - number - 1))
        tasks: list[dict[str, Any]] = []
        if args.repeats:
            committed = 1.0 if seams == PLAIN else args.forced
            long = min(args.new_tokens, 161) if seams == PLAIN else args.new_tokens
            lengths = {"short": max(round(long / 8), round(4 * committed)), "long": long}
            tasks += [
                {"task": "step", "concurrency": c, "prompt": args.prompt, "repeats": args.repeats, **lengths}
                for c in args.concurrency
            ]
        if args.trace and seams not in traced:
            traced.add(seams)
            folder = args.work.resolve() / f"trace-{seams.replace(',', '+').replace(':', '-')}"
            tasks += [
                {"task": "trace", "concurrency": c, "prompt": args.prompt, "steps": 36, "folder": f"{folder}-{c}"}
                for c in args.trace
            ]
        engine: dict[str, Any] = {"seams": seams, "rows": [], "traces": []}
        report["engines"].append(engine)
        work = args.work / f"{number}-{seams.replace(',', '+').replace(':', '-')}"
        forced = None if seams == PLAIN else args.forced
        for result in run_engine(seams, engine_arguments(args, seams), tasks, work, limit, forced):
            if result["task"] == "start":
                engine.update(start_seconds=result["seconds"], sglang=result["sglang"])
                print(f"# {seams}: up in {result['seconds']:.0f} s", flush=True)
            elif result["task"] == "step":
                engine["rows"].append({k: v for k, v in result.items() if k != "task"})
                print(f"  {seams:<8} c {result['concurrency']:>3}  {result['ms_per_step']:8.3f} ms/step", flush=True)
            elif result["task"] == "trace":
                engine["traces"].append({k: v for k, v in result.items() if k != "task"})
                print(f"  {seams:<8} c {result['concurrency']:>3}  {_short(result)}", flush=True)
            else:
                engine.update(code=result["code"], table=result["table"])
                print("\n".join(result["table"]), flush=True)
                if result["code"] != 0:
                    complete = False
                    engine["log"] = result["log"]
                    print(f"# {seams}: {result['code']}\n{result['log']}", flush=True)
            report["summary"] = summarise(report)
            if args.json is not None:
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return (0 if complete else 1), report


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run the engines, print the summary; returns the exit code."""
    order = ([STOCK, "all"] if args.ab else args.order.split("/")) + (args.seams or [])
    code, report = measure(args, ["python", "-m", "bench.bench_sglang", *argv], order)
    print(f"\n# {'conc':>4} {'seams':<24} {'ms/step':>8} {'tok/step':>8} {'tok/s':>8} {'over stock':>10}")
    for row in report.get("summary", []):
        print(
            f"  {row['concurrency']:>4} {row['seams']:<24} {row['ms_per_step']:>8.3f} {row['tokens_per_step']:>8.2f} "
            f"{row['tokens_per_s']:>8.0f} {row.get('over_stock', float('nan')):>10.3f}"
        )
    if args.trace:
        print(table(report))
    return code


def missing_file(recipe: Path) -> Path | None:
    """The file that a recipe lacks."""
    files = [recipe / name / "config.json" for name in ("target", "draft")]
    return next((file for file in files if not file.is_file()), None)


def unlike(args: argparse.Namespace) -> str | None:
    """Why the engines of --append's report must not be compared with new ones; None: nothing is known against it."""
    if not args.append or args.json is None or not args.json.is_file():
        return None
    older = json.loads(args.json.read_text())
    wanted = {
        "card": environment_facts()["card"],
        "recipe": recipe_of(args.recipe),
        "prompt": args.prompt,
        "forced_tokens_per_step": args.forced,
        "tp": args.tp,
    }
    older.setdefault("tp", 1)
    for name, value in wanted.items():
        found = older["environment"]["card"] if name == "card" else older[name]
        if found != value:
            return f"{args.json} has another {name}" + (f": {found}, not {value}" if name != "recipe" else "")
    return None


def recipe_of(path: Path) -> dict[str, Any]:
    """Both configurations."""
    return {name: json.loads((path / name / "config.json").read_text()) for name in ("target", "draft")}


def numbers(text: str) -> list[int]:
    """A comma-separated list of whole numbers."""
    return [int(part) for part in text.split(",")]


def _short(trace: dict[str, Any]) -> str:
    if "error" in trace:
        return str(trace["error"])
    parts = ", ".join(f"{name} {us:.0f}" for name, us in trace["parts_us"].items())
    return (
        f"step {trace['span_us']:.0f} us: {parts}; host {trace['host_us']:.0f}, {trace['host_launches']:.0f} launches "
        f"({trace['graph_launches']:.0f} graphs), {trace['gpu_operations']:.0f} GPU operations"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module's text for the exit codes."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.bench_sglang", description="Step time of SGLang's DFLASH.")
    parser.add_argument("recipe", type=Path, help="directory with target/config.json and draft/config.json")
    parser.add_argument("--concurrency", type=numbers, default=[1, 4, 8, 16, 32])
    parser.add_argument("--new-tokens", type=int, default=512, help="of the longer runs; default: 512")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt; default: 1024")
    parser.add_argument("--forced", type=float, default=6.5, help="tokens committed a step; default: 6.5")
    parser.add_argument("--repeats", type=int, default=3, help="of each concurrency in one engine; default: 3")
    parser.add_argument("--order", default=f"{STOCK}/all/all/{STOCK}", help="engines; default: stock/all/all/stock")
    parser.add_argument("--ab", action="store_true", help="the order stock/all")
    parser.add_argument(
        "--seams",
        type=lambda s: s.split("/"),
        metavar="A/B,C",
        help="more engines: seams of each, as in --order; all:fp8: with the drafter in that format",
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs of an engine; default: 1")
    parser.add_argument("--trace", type=numbers, help="concurrencies to profile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, kept current")
    parser.add_argument("--append", action="store_true", help="keep the engines that the report has")
    parser.add_argument("--work", type=Path, default=Path("build/bench_sglang"), metavar="DIR", help="logs, traces")
    parser.add_argument("--time-limit", type=float, default=560.0, metavar="SECONDS", help="default: 560")
    parser.add_argument("--start-seconds", type=float, default=120.0, help="start no engine with less time left")
    args = parser.parse_args(argv)
    if args.tp < 1:
        parser.error("--tp must be at least 1")
    if (missing := missing_file(args.recipe)) is not None:
        print(f"python -m bench.bench_sglang: {missing} is not there", file=sys.stderr)
        return 2
    if (reason := unlike(args)) is not None:
        print(f"python -m bench.bench_sglang: --append: {reason}", file=sys.stderr)
        return 2
    return run(args, argv)


if __name__ == "__main__":
    sys.exit(main())

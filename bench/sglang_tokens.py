"""`python -m bench.sglang_tokens MODELS`: the same tokens from SGLang's DFLASH with and without the plugin.

MODELS is what `tools/sglang_models.py` wrote. Engines, in this order: `stock` DFLASH, `all` seams, `switched`, every
seam that CUDA graphs hold alone, `plain` decoding of the target. `switched` starts once with all other seams and uses
them one at a time. Each runs the same prompts greedily at concurrency 1, 8 and 32, --repeat times; stock at least
twice, and once with other prompts sharing a batch, so that what stock itself leaves open (kernels whose result depends
on the batch) is known. Where texts differ, the report has the position, both tokens and, once `plain` has run, the two
likeliest tokens there and the difference of their logits: as logits of 16 and more are 0.125 apart in bfloat16, a gap
of that size is a tie. The report is kept current; with the same --json, a later run does the engines that are missing.

`faults` is one more engine, only where --engines names it: all seams, a KV pool too small for its requests (so that
some are retracted), a prefix cache, prompts in chunks, random arrivals, some of them aborted. Its completed texts are
compared with stock's at the largest concurrency, and the engine ends itself where its idle check finds a slot missing.

Exit codes: 0 every engine ran and no plugin engine differs from stock more often than stock from itself; 1 otherwise;
2 bad arguments or something missing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.sglang_engine import PLAIN, STOCK, environment_facts, run_engine

CONCURRENCIES = (1, 8, 32)
SWITCHED = "switched"
FAULTS = "faults"
FAULT_IDLE = 5.0  # seconds, for the engine's check of its pools
ROTATED = "rotated"


def choose_prompts(sets: dict[str, list[list[int]]], count: int) -> list[list[int]]:
    """``count`` prompts, taken from the sets in turn."""
    longest = max((len(prompts) for prompts in sets.values()), default=0)
    turns = [prompts[i] for i in range(longest) for prompts in sets.values() if i < len(prompts)]
    return turns[:count]


def compare(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How many texts are identical; of each other one, where it first differs and both tokens (None: it ended)."""
    differing = {}
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if list(a) != list(b):
            pairs = zip(a, b, strict=False)
            at = next((j for j, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
            tokens = [text[at] if at < len(text) else None for text in (a, b)]
            differing[str(i)] = {"position": at, "ours": tokens[0], "theirs": tokens[1]}
    return {"identical": len(ours) - len(differing), "prompts": len(ours), "differences": differing}


def against_one(found: Sequence[tuple[int, list[int]]], stock: Sequence[list[int]] | None) -> dict[str, int]:
    """How many of the texts (prompt, tokens) are those of stock, or of the first text of their prompt."""
    first: dict[int, list[int]] = {} if stock is None else dict(enumerate(stock))
    same = sum(first.setdefault(prompt, tokens) == tokens for prompt, tokens in found)
    return {"identical": same, "texts": len(found)}


def engine_arguments(models: Path, seams: str, concurrencies: Sequence[int]) -> dict[str, Any]:
    """Arguments of the engine for the demo pair."""
    most = max(concurrencies)
    arguments: dict[str, Any] = {
        "model_path": str(models / "target"),
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "attention_backend": "fa3",
        "mem_fraction_static": 0.5,
        "context_length": 2048,
        "max_running_requests": most,
        "cuda_graph_bs_decode": sorted({*(n for n in (1, 2, 4, 8, 16, 32) if n < most), most}),
        "disable_prefill_cuda_graph": True,
        "disable_radix_cache": True,
        "grammar_backend": "none",
        "log_level": "warning",
        "random_seed": 1,
    }
    if seams == FAULTS:
        arguments.update(
            disable_radix_cache=False,
            chunked_prefill_size=64,
            max_total_tokens=96 * most,
            schedule_conservativeness=0.1,
        )
    if seams != PLAIN:
        draft = {"speculative_algorithm": "DFLASH", "speculative_draft_model_path": str(models / "draft")}
        arguments.update(draft)
    return arguments


def summarise(report: dict[str, Any], texts: dict[str, Any]) -> bool:
    """Fill the report's comparisons from the texts; whether each pass of the plugin was compared and wavers no more
    than stock itself."""
    gaps = report.setdefault("gaps", {})
    for engine, passes in texts.items():
        rows = report["engines"][engine]["passes"]
        for key, tokens in passes.items():
            concurrency = key.split("/")[0]
            first = texts.get(STOCK, {}).get(f"{concurrency}/0")
            plain = texts.get(PLAIN, {}).get(f"{concurrency}/0")
            if first is not None and (engine, key) != (STOCK, f"{concurrency}/0"):
                rows[key]["against_stock"] = compare(tokens, first)
                for prompt, difference in rows[key]["against_stock"]["differences"].items():
                    difference.update(gaps.get(f"{prompt}/{concurrency}/{difference['position']}", {}))
            if plain is not None and engine != PLAIN:
                rows[key]["against_plain"] = compare(tokens, plain)
    stock = report["engines"].get(STOCK, {}).get("passes", {})
    fine = True
    for engine, entry in report["engines"].items():
        if engine in (STOCK, PLAIN, SWITCHED, FAULTS):
            continue
        for key, row in entry["passes"].items():
            concurrency = key.split("/")[0]
            others = [r["against_stock"]["identical"] for k, r in stock.items()
                      if k.split("/")[0] == concurrency and "against_stock" in r]  # fmt: skip
            same = row.get("against_stock")
            if same is None or same["identical"] < min(others, default=same["prompts"]):
                fine = False
    return fine


def common_beginnings(report: dict[str, Any], texts: dict[str, Any], prompts: list[list[int]]) -> dict[str, list[int]]:
    """Of every difference from stock, the prompt and the tokens before it."""
    found = {}
    for entry in report["engines"].values():
        for key, row in entry["passes"].items():
            concurrency = key.split("/")[0]
            for prompt, difference in row.get("against_stock", {}).get("differences", {}).items():
                at = difference["position"]
                before = texts[STOCK][f"{concurrency}/0"][int(prompt)][:at]
                found[f"{prompt}/{concurrency}/{at}"] = prompts[int(prompt)] + before
    return found


def tasks_of(engine: str, args: argparse.Namespace, prompts: Path, switchable: Sequence[str]) -> list[dict[str, Any]]:
    """What one engine is to do, in order."""
    if engine == FAULTS:
        task = {"task": "faults", "prompts": str(prompts.resolve()), "concurrency": max(args.concurrency), "seed": 1}
        load = {
            "seconds": args.fault_seconds,
            "rate": args.fault_rate,
            "aborts": 0.1,
            "patience": 1.0,
            "idle": FAULT_IDLE,
        }
        return [{**task, **load, "new_tokens": args.new_tokens}]
    common = {"task": "tokens", "prompts": str(prompts.resolve()), "new_tokens": args.new_tokens}
    repeats = max(2, args.repeat) if engine == STOCK else args.repeat
    passes: list[dict[str, Any]] = [{"pass": p} for p in range(repeats)]
    if engine == SWITCHED:
        passes = [{**one, "seams": seam} for seam in switchable for one in passes]
    tasks = [{**common, **one, "concurrency": c} for one in passes for c in args.concurrency]
    if engine == STOCK:
        # By less than a batch, and not by a divisor of it.
        tasks += [
            {**common, "pass": ROTATED, "rotated": c // 2 + 1, "concurrency": c} for c in args.concurrency if c > 1
        ]
    return tasks


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run the engines that the report lacks; returns the exit code."""
    from dflash_kernels.integrations.sglang.plugin import SEAMS

    sets = json.loads(args.prompts.read_text(encoding="utf-8"))
    prompts = choose_prompts(sets, args.count)
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    chosen = work / "prompts.json"
    chosen.write_text(json.dumps(prompts))
    report: dict[str, Any] = {"engines": {}}
    texts_file = args.json.with_suffix(".tokens.json")
    texts: dict[str, Any] = {}
    if args.json.is_file() and texts_file.is_file():
        report, texts = json.loads(args.json.read_text()), json.loads(texts_file.read_text())
    report.update(
        command=shlex.join(["python", "-m", "bench.sglang_tokens", *argv]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment_facts(),
        prompts=len(prompts),
        new_tokens=args.new_tokens,
    )
    switchable = [seam.name for seam in SEAMS if seam.switchable]
    held = [seam.name for seam in SEAMS if not seam.switchable]
    engines = args.engines or [STOCK, "all", SWITCHED, *held, PLAIN]
    started = time.monotonic()
    print(f"# {'engine':<10} {'conc':>4} {'pass':>7} {'tok/s':>8} {'acceptance':>10} {'as stock':>10}", flush=True)
    complete = True

    def save() -> None:
        report["fine"] = summarise(report, texts)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        texts_file.write_text(json.dumps(texts) + "\n", encoding="utf-8")

    for engine in engines:
        if report["engines"].get(engine, {}).get("code") == 0:
            continue
        left = args.time_limit - (time.monotonic() - started)
        if left < args.start_seconds:
            complete = False
            print(f"# {engine}: no time left", flush=True)
            save()
            continue
        tasks = tasks_of(engine, args, chosen, switchable)
        if engine == PLAIN and (beginnings := common_beginnings(report, texts, prompts)):
            (work / "differences.json").write_text(json.dumps(beginnings))
            tasks.append({"task": "gaps", "texts": str((work / "differences.json").resolve())})
        report["engines"][engine] = {"passes": {}}
        texts.pop(engine, None)
        seams = {SWITCHED: ",".join(switchable), FAULTS: "all"}.get(engine, engine)
        arguments = engine_arguments(args.models.resolve(), engine, args.concurrency)
        for result in run_engine(seams, arguments, tasks, work / engine, left):
            entry = report["engines"][engine]
            if result["task"] == "start":
                entry.update(start_seconds=result["seconds"], sglang=result["sglang"])
                print(f"# {engine}: up in {result['seconds']:.0f} s", flush=True)
            elif result["task"] == "exit":
                entry.update(code=result["code"], table=result["table"], retractions=result["retractions"])
                if result["code"] != 0:
                    complete = False
                    entry["log"] = result["log"]
                    print(f"# {engine}: {result['code']}\n{result['log']}", flush=True)
            elif result["task"] == "faults":
                entry["faults"] = result["counts"]
                entry["texts"] = against_one(result["texts"], texts.get(STOCK, {}).get(f"{max(args.concurrency)}/0"))
                print(f"# faults: {result['counts']}, texts {entry['texts']}", flush=True)
            elif result["task"] == "gaps":
                report["gaps"].update(result["gaps"])
            else:
                name = result.get("seams", engine)
                entry = report["engines"].setdefault(name, {"passes": {}, "code": 0, "engine": engine})
                key = f"{result['concurrency']}/{result['pass']}"
                texts.setdefault(name, {})[key] = result["tokens"]
                count, steps = sum(map(len, result["tokens"])), sum(result["steps"])
                # The first token of a request comes from its prompt's pass.
                acceptance = (count - len(prompts)) / max(1, steps)
                row: dict[str, Any] = {"tokens": count, "steps": steps, "acceptance": acceptance}
                entry["passes"][key] = {**row, "tokens_per_s": count / result["seconds"]}
                summarise(report, texts)
                row = entry["passes"][key]
                same = row.get("against_stock")
                as_stock = f"{same['identical']}/{same['prompts']}" if same else "-"
                print(
                    f"  {name:<10} {result['concurrency']:>4} {result['pass']:>7} {row['tokens_per_s']:>8.0f} "
                    f"{acceptance:>10.3f} {as_stock:>10}",
                    flush=True,
                )
            save()
    show_differences(report)
    return 0 if complete and report.get("fine") else 1


def show_differences(report: dict[str, Any]) -> None:
    """Print each difference from stock."""
    for engine, entry in report["engines"].items():
        for key, row in entry["passes"].items():
            for prompt, found in row.get("against_stock", {}).get("differences", {}).items():
                gap = f", likeliest {found['likeliest']}, gap {found['gap']:.4f}" if "gap" in found else ""
                print(
                    f"# {engine} {key}: prompt {prompt} at token {found['position']}: {found['ours']}, stock "
                    f"{found['theirs']}{gap}"
                )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module's text for the exit codes."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.sglang_tokens", description="Tokens of stock and plugin.")
    parser.add_argument("models", type=Path, help="what tools/sglang_models.py wrote")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="prompts.json of the same tool")
    parser.add_argument("--count", type=int, default=208, metavar="N", help="prompts; default: 208")
    parser.add_argument("--new-tokens", type=int, default=96, metavar="N", help="at most, a prompt; default: 96")
    parser.add_argument("--concurrency", type=lambda s: [int(x) for x in s.split(",")], default=list(CONCURRENCIES))
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="passes of every engine; default: 1")
    parser.add_argument("--fault-seconds", type=float, default=60.0, help="of arrivals in faults; default: 60")
    parser.add_argument("--fault-rate", type=float, default=60.0, help="arrivals a second in faults; default: 60")
    parser.add_argument(
        "--engines", type=lambda s: s.split("/"), metavar="A/B", help="stock, plain, all, switched, seams"
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the report; continued if it is there")
    parser.add_argument("--work", type=Path, default=Path("build/sglang_tokens"), metavar="DIR", help="logs")
    parser.add_argument("--time-limit", type=float, default=560.0, metavar="SECONDS", help="default: 560")
    parser.add_argument("--start-seconds", type=float, default=100.0, help="start no engine with less time left")
    args = parser.parse_args(argv)
    for path in (args.models / "target/config.json", args.models / "draft/config.json", args.prompts):
        if not path.is_file():
            print(f"python -m bench.sglang_tokens: {path} is not there", file=sys.stderr)
            return 2
    return run(args, argv)


if __name__ == "__main__":
    sys.exit(main())

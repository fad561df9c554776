"""`python -m bench.sglang_tokens MODELS`: the same tokens from SGLang's DFLASH with and without the plugin.

MODELS is what `tools/sglang_models.py` wrote. Engines, in this order: `stock` DFLASH, `all` seams, `switched`, every
seam that CUDA graphs hold alone, `plain` decoding of the target. `switched` starts once with all other seams and uses
them one at a time; `switched:A,B` takes these alone (--switched N: the default engines have N such parts). Each runs
the same prompts greedily at concurrency 1, 8 and 32, --repeat times; stock at least twice, and once with other prompts
sharing a batch, so that what stock itself leaves open (kernels whose result depends on the batch) is known. Where texts
differ, the report has the position, both tokens and, once `plain` has run, the two likeliest tokens there and the
difference of their logits: as logits of 16 and more are 0.125 apart in bfloat16, a gap of that size is a tie. The
report is kept current; with the same --json, a later run does the engines that are missing.

--tp N cuts every engine over N GPUs, for models that `tools/sglang_models.py --tp N` wrote.

--at-once N lets the first engine come up alone, as it fills the compilers' caches, and then keeps N engines running on
the one GPU. Their texts are what they are alone, their tokens/s are not. Texts that the time limit cuts off are left
out of the comparison, and their engine counts as missing.

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
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

from bench.sglang_engine import PLAIN, STOCK, environment_facts, run_engine

CONCURRENCIES = (1, 8, 32)
SWITCHED = "switched"
FAULTS = "faults"
FAULT_IDLE = 5.0  # seconds, for the engine's check of its pools
CONTEXT = 2048
END_SECONDS = 20.0  # of an engine's time, in which it starts no further group of prompts
FIRST_PORT = 29500  # below those that the system gives out
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


def common_part(ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> dict[str, Any]:
    """`compare` of the prompts that both have."""
    shared = min(len(ours), len(theirs))
    return compare(ours[:shared], theirs[:shared])


def against_one(found: Sequence[tuple[int, list[int]]], stock: Sequence[list[int]] | None) -> dict[str, int]:
    """How many of the texts (prompt, tokens) are those of stock, or of the first text of their prompt."""
    first: dict[int, list[int]] = {} if stock is None else dict(enumerate(stock))
    same = sum(first.setdefault(prompt, tokens) == tokens for prompt, tokens in found)
    return {"identical": same, "texts": len(found)}


def engine_arguments(models: Path, seams: str, concurrencies: Sequence[int], gpus: int = 1) -> dict[str, Any]:
    """Arguments of the engine for the demo pair. ``seams``: the engine's name."""
    most = max(concurrencies)
    arguments: dict[str, Any] = {
        "model_path": str(models / "target"),
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "attention_backend": "fa3",
        "mem_fraction_static": 0.5,
        "context_length": CONTEXT,
        "max_running_requests": most,
        "cuda_graph_bs_decode": sorted({*(n for n in (1, 2, 4, 8, 16, 32) if n < most), most}),
        "disable_prefill_cuda_graph": True,
        "disable_radix_cache": True,
        "grammar_backend": "none",
        "log_level": "warning",
        "random_seed": 1,
    }
    if gpus > 1:
        arguments["tp_size"] = gpus
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


def beside_others(arguments: dict[str, Any], number: int) -> dict[str, Any]:
    """Arguments of an engine that shares its GPU: a KV pool of a fixed size, so that how much of the memory the others
    have taken in the meantime says nothing, and a port of its own.
    """
    pool = {"max_total_tokens": arguments["max_running_requests"] * CONTEXT, **arguments}
    return {**pool, "mem_fraction_static": 0.9, "nccl_port": FIRST_PORT + number}


def summarise(report: dict[str, Any], texts: dict[str, Any]) -> bool:
    """Fill the report's comparisons from the texts; whether each pass of the plugin was compared and wavers no more
    than stock itself."""
    gaps = report.setdefault("gaps", {})
    for engine, passes in texts.items():
        if engine == FAULTS:
            most = max((int(key.split("/")[0]) for key in texts.get(STOCK, {})), default=0)
            stock_texts = texts.get(STOCK, {}).get(f"{most}/0")
            report["engines"][FAULTS]["texts"] = against_one(passes["completed"], stock_texts)
            continue
        rows = report["engines"][engine]["passes"]
        for key, tokens in passes.items():
            concurrency = key.split("/")[0]
            first = texts.get(STOCK, {}).get(f"{concurrency}/0")
            plain = texts.get(PLAIN, {}).get(f"{concurrency}/0")
            if first is not None and (engine, key) != (STOCK, f"{concurrency}/0"):
                rows[key]["against_stock"] = common_part(tokens, first)
                for prompt, difference in rows[key]["against_stock"]["differences"].items():
                    difference.update(gaps.get(f"{prompt}/{concurrency}/{difference['position']}", {}))
            if plain is not None and engine != PLAIN:
                rows[key]["against_plain"] = common_part(tokens, plain)
    stock = report["engines"].get(STOCK, {}).get("passes", {})
    fine = True
    for engine, entry in report["engines"].items():
        if engine in (STOCK, PLAIN, FAULTS) or is_switched(engine):
            continue
        for key, row in entry["passes"].items():
            concurrency = key.split("/")[0]
            others = [differing_share(r) for k, r in stock.items()
                      if k.split("/")[0] == concurrency and "against_stock" in r]  # fmt: skip
            if "against_stock" not in row or differing_share(row) > max(others, default=Fraction(0)):
                fine = False
    return fine


def differing_share(row: dict[str, Any]) -> Fraction:
    """The share of a pass's texts that are not stock's; all, where none was compared."""
    same = row["against_stock"]
    return Fraction(same["prompts"] - same["identical"], same["prompts"]) if same["prompts"] else Fraction(1)


def is_switched(engine: str) -> bool:
    """Whether the engine uses its seams one at a time."""
    return engine.partition(":")[0] == SWITCHED


def seams_of(engine: str, switchable: Sequence[str]) -> list[str]:
    """The seams that a switched engine uses."""
    named = engine.partition(":")[2]
    return named.split(",") if named else list(switchable)


def default_engines(switchable: Sequence[str], held: Sequence[str], parts: int) -> list[str]:
    """All engines but `faults`, the switched one in parts."""
    size = -(-len(switchable) // parts)
    cut = [switchable[i : i + size] for i in range(0, len(switchable), size)]
    switched = [SWITCHED] if parts == 1 else [f"{SWITCHED}:{','.join(part)}" for part in cut]
    return [STOCK, "all", *switched, *held, PLAIN]


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


def tasks_of(
    engine: str, args: argparse.Namespace, prompts: Path, switchable: Sequence[str], until: float
) -> list[dict[str, Any]]:
    """What one engine is to do, in order. ``until``: the time at which it begins no more."""
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
    common = {"task": "tokens", "prompts": str(prompts.resolve()), "new_tokens": args.new_tokens, "until": until}
    repeats = max(2, args.repeat) if engine == STOCK else args.repeat
    passes: list[dict[str, Any]] = [{"pass": p} for p in range(repeats)]
    if is_switched(engine):
        passes = [{**one, "seams": seam} for seam in seams_of(engine, switchable) for one in passes]
    tasks = []
    for c in args.concurrency:
        tasks += [{**common, **one, "concurrency": c} for one in passes]
        if engine == STOCK and c > 1:
            # By less than a batch, and not by a divisor of it.
            tasks.append({**common, "pass": ROTATED, "rotated": c // 2 + 1, "concurrency": c})
    if args.single_count is not None and engine not in (STOCK, PLAIN, "all"):
        tasks = [{**task, "count": args.single_count} if task["concurrency"] == 1 else task for task in tasks]
    return tasks


class Comparison:
    """The report, its texts, and the engines that fill both, from several threads where --at-once says so."""

    def __init__(self, args: argparse.Namespace, argv: Sequence[str]) -> None:
        from dflash_kernels.integrations.sglang.plugin import SEAMS

        self.args = args
        self.lock = threading.Lock()
        self.started = time.monotonic()
        self.complete = True
        self.switchable = [seam.name for seam in SEAMS if seam.switchable]
        held = [seam.name for seam in SEAMS if not seam.switchable]
        self.engines: list[str] = args.engines or default_engines(self.switchable, held, args.switched)
        self.engines += [FAULTS] if args.faults and FAULTS not in self.engines else []
        self.prompts = choose_prompts(json.loads(args.prompts.read_text(encoding="utf-8")), args.count)
        args.work.mkdir(parents=True, exist_ok=True)
        self.chosen = args.work / "prompts.json"
        self.chosen.write_text(json.dumps(self.prompts))
        self.beginnings = args.work / "differences.json"
        self.beginnings.unlink(missing_ok=True)
        self.texts_file = args.json.with_suffix(".tokens.json")
        self.report: dict[str, Any] = {"engines": {}}
        self.texts: dict[str, Any] = {}
        if args.json.is_file() and self.texts_file.is_file():
            self.report, self.texts = json.loads(args.json.read_text()), json.loads(self.texts_file.read_text())
            if self.report.get("tp", 1) != args.tp:
                raise SystemExit(f"{args.json} has engines on {self.report.get('tp', 1)} GPUs, not {args.tp}")
        self.report.update(
            command=shlex.join(["python", "-m", "bench.sglang_tokens", *argv]),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            environment=environment_facts(),
            prompts=len(self.prompts),
            new_tokens=args.new_tokens,
            at_once=args.at_once,
            tp=args.tp,
        )
        done = {name for name, entry in self.report["engines"].items() if entry.get("code") == 0 and not is_cut(entry)}
        self.missing = [engine for engine in self.engines if engine not in done]
        self.running = set(self.missing)

    def save(self) -> None:
        self.report["fine"] = summarise(self.report, self.texts)
        ranks = {name: rank for rank, name in enumerate(self.engines)}
        engines = self.report["engines"]
        # An engine's seams come behind it, whichever ended first.
        order = sorted(engines, key=lambda name: ranks.get(engines[name].get("engine", name), len(ranks)))
        self.report["engines"] = {name: engines[name] for name in order}
        self.args.json.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        self.texts_file.write_text(json.dumps(self.texts) + "\n", encoding="utf-8")

    def run(self) -> int:
        """Run the engines that the report lacks; returns the exit code."""
        print(f"# {'engine':<10} {'conc':>4} {'pass':>7} {'tok/s':>8} {'acceptance':>10} {'as stock':>10}", flush=True)
        up = threading.Event()
        with ThreadPoolExecutor(self.args.at_once) as pool:
            jobs = []
            for number, engine in enumerate(self.missing):
                jobs.append(pool.submit(self.run_one, engine, number, up))
                if number == 0 and self.args.at_once > 1:
                    up.wait()
        for job in jobs:
            job.result()
        with self.lock:
            self.save()
            if self.args.at_once > 1:  # what was compared with a stock engine that was not done yet
                for name, entry in self.report["engines"].items():
                    for key, row in entry["passes"].items():
                        self.show(name, *key.split("/"), row)
            show_differences(self.report)
            cut = any(is_cut(entry) for entry in self.report["engines"].values())
            return 0 if self.complete and not cut and self.report["fine"] else 1

    def run_one(self, engine: str, number: int, up: threading.Event) -> None:
        """Run one engine; ``up`` is set once it is up, or has ended."""
        try:
            args, alone = self.args, self.args.at_once == 1
            left = args.time_limit - (time.monotonic() - self.started)
            if left < args.start_seconds:
                with self.lock:
                    self.complete = False
                    print(f"# {engine}: no time left", flush=True)
                    self.save()
                return
            tasks = tasks_of(engine, args, self.chosen, self.switchable, time.time() + left - END_SECONDS)
            with self.lock:
                self.report["engines"][engine] = {"passes": {}}
                self.texts.pop(engine, None)
                if engine == PLAIN:
                    if alone or self.only_plain_left():
                        self.write_beginnings()
                    wait = 0.0 if alone else time.time() + left - END_SECONDS / 2
                    tasks.append({"task": "gaps", "texts": str(self.beginnings.resolve()), "until": wait})
            seams = {FAULTS: "all"}.get(engine, engine)
            if is_switched(engine):
                seams = ",".join(seams_of(engine, self.switchable))
            arguments = engine_arguments(args.models.resolve(), engine, args.concurrency, args.tp)
            if not alone:
                arguments = beside_others(arguments, number)
            work = args.work / engine.replace(":", "-").replace(",", "+")
            for result in run_engine(seams, arguments, tasks, work, left):
                with self.lock:
                    self.take(engine, result)
                if result["task"] in ("start", "exit"):
                    up.set()
        finally:
            up.set()
            with self.lock:
                self.running.discard(engine)
                if self.only_plain_left():  # it waits for this
                    self.write_beginnings()

    def only_plain_left(self) -> bool:
        return self.running - {FAULTS} == {PLAIN}

    def write_beginnings(self) -> None:
        summarise(self.report, self.texts)
        new = self.beginnings.with_suffix(".new")
        new.write_text(json.dumps(common_beginnings(self.report, self.texts, self.prompts)))
        new.replace(self.beginnings)

    def take(self, engine: str, result: dict[str, Any]) -> None:
        """Enter one result of an engine."""
        entry = self.report["engines"][engine]
        if result["task"] == "start":
            entry.update(start_seconds=result["seconds"], sglang=result["sglang"])
            print(f"# {engine}: up in {result['seconds']:.0f} s", flush=True)
        elif result["task"] == "exit":
            entry.update(code=result["code"], table=result["table"], retractions=result["retractions"])
            if result["code"] != 0:
                self.complete = False
                entry["log"] = result["log"]
                print(f"# {engine}: {result['code']}\n{result['log']}", flush=True)
        elif result["task"] == "faults":
            entry["faults"] = result["counts"]
            self.texts[FAULTS] = {"completed": result["texts"]}
            summarise(self.report, self.texts)
            print(f"# faults: {result['counts']}, texts {entry['texts']}", flush=True)
        elif result["task"] == "gaps":
            self.report.setdefault("gaps", {}).update(result["gaps"])
        else:
            self.take_texts(engine, result)
        self.save()

    def take_texts(self, engine: str, result: dict[str, Any]) -> None:
        name, key = result.get("seams", engine), f"{result['concurrency']}/{result['pass']}"
        if result["cut"]:
            self.report["engines"][engine].setdefault("cut", []).append(f"{name} {key}" if name != engine else key)
            print(f"# {name} {key}: cut off after {len(result['tokens'])} prompts", flush=True)
        if not result["tokens"]:
            return
        entry = self.report["engines"].setdefault(name, {"passes": {}, "code": 0, "engine": engine})
        self.texts.setdefault(name, {})[key] = result["tokens"]
        count, steps = sum(map(len, result["tokens"])), sum(result["steps"])
        # The first token of a request comes from its prompt's pass.
        acceptance = (count - len(result["tokens"])) / max(1, steps)
        row: dict[str, Any] = {"tokens": count, "steps": steps, "acceptance": acceptance}
        entry["passes"][key] = {**row, "tokens_per_s": count / result["seconds"]}
        summarise(self.report, self.texts)
        self.show(name, str(result["concurrency"]), str(result["pass"]), entry["passes"][key])

    def show(self, name: str, concurrency: str, number: str, row: dict[str, Any]) -> None:
        same = row.get("against_stock")
        as_stock = f"{same['identical']}/{same['prompts']}" if same else "-"
        print(
            f"  {name:<10} {concurrency:>4} {number:>7} {row['tokens_per_s']:>8.0f} {row['acceptance']:>10.3f} "
            f"{as_stock:>10}",
            flush=True,
        )


def is_cut(entry: dict[str, Any]) -> bool:
    """Whether the time limit cut an engine's texts off."""
    return bool(entry.get("cut"))


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
    parser.add_argument(
        "--single-count", type=int, metavar="N", help="prompts at concurrency 1 of one seam alone; default: --count"
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs of an engine; default: 1")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="engines on the GPU; default: 1")
    parser.add_argument(
        "--switched", type=int, default=1, metavar="N", help="engines that share the switchable seams; default: 1"
    )
    parser.add_argument("--fault-seconds", type=float, default=60.0, help="of arrivals in faults; default: 60")
    parser.add_argument("--fault-rate", type=float, default=60.0, help="arrivals a second in faults; default: 60")
    parser.add_argument(
        "--engines",
        type=lambda s: s.split("/"),
        metavar="A/B",
        help="stock, plain, all, switched, switched:A,B, faults, seams",
    )
    parser.add_argument("--faults", action="store_true", help="also the engine faults, behind the default ones")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the report; continued if it is there")
    parser.add_argument("--work", type=Path, default=Path("build/sglang_tokens"), metavar="DIR", help="logs")
    parser.add_argument("--time-limit", type=float, default=560.0, metavar="SECONDS", help="default: 560")
    parser.add_argument("--start-seconds", type=float, default=100.0, help="start no engine with less time left")
    args = parser.parse_args(argv)
    single_count = args.count if args.single_count is None else args.single_count
    if min(args.at_once, args.switched, args.count, single_count, args.tp) < 1:
        parser.error("--at-once, --switched, --count, --single-count and --tp must be at least 1")
    for path in (args.models / "target/config.json", args.models / "draft/config.json", args.prompts):
        if not path.is_file():
            print(f"python -m bench.sglang_tokens: {path} is not there", file=sys.stderr)
            return 2
    return Comparison(args, argv).run()


if __name__ == "__main__":
    sys.exit(main())

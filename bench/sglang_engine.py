"""One SGLang engine in a process of its own: started with chosen seams, given tasks, its results a JSON line each.

`run_engine` is the parent's side, `python -m bench.sglang_engine SPEC.json` the child's. An engine costs a minute or
more to start, so one start serves many tasks. The environment decides the seams (`DFLASH_KERNELS_SEAMS`), in strict
mode unless `DFLASH_KERNELS_STRICT=0`: an engine that comes up runs every seam that was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLAIN, STOCK = "plain", "stock"  # no speculation; SGLang's own DFLASH
# Of an engine on several GPUs of one host, unless the user says otherwise: it need not find an interface to other
# hosts, and takes no NVLink multicast, which not every host lends. The same for stock and plugin.
SEVERAL_GPUS = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


def environment_facts() -> dict[str, Any]:
    """Card and versions, asked without a CUDA context of this process."""
    from bench.runner import commit_id

    versions = {}
    for name in ("sglang", "torch", "triton", "sglang-kernel", "sgl-kernel", "flashinfer-python", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
        card, driver = (part.strip() for part in found[0].split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        card = driver = "unknown"
    return {"card": card, "driver": driver, "python": platform.python_version(), "commit": commit_id(), **versions}


def plugin_path(where: Path) -> list[str]:
    """Directories that make the plugin's entry point visible: none where the package is installed."""
    points = importlib.metadata.entry_points(group="sglang.srt.plugins")
    if any(point.value.startswith("dflash_kernels.") for point in points):
        return []
    info = where / "dflash_kernels_plugin-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dflash-kernels-plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\ndflash_kernels = dflash_kernels.integrations.sglang:activate\n"
    )
    return [str(where)]


def several_gpus(environment: Mapping[str, str]) -> dict[str, str]:
    """What `SEVERAL_GPUS` names, as that environment has it or as it is given there."""
    return {name: environment.get(name, value) for name, value in SEVERAL_GPUS.items()}


def environment(seams: str, work: Path, forced: float | None = None, gpus: int = 1) -> dict[str, str]:
    """The child's environment: ``seams`` is PLAIN, STOCK, or what `DFLASH_KERNELS_SEAMS` takes, and perhaps a weight
    format (``all:fp8``).
    """
    paths = [*plugin_path(work / "plugin"), str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    env = {**os.environ, "PYTHONPATH": ":".join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    seams, _, weights = seams.partition(":")
    env["DFLASH_KERNELS_WEIGHTS"] = weights or env.get("DFLASH_KERNELS_WEIGHTS", "bf16")
    env["DFLASH_KERNELS_SEAMS"] = "none" if seams in (PLAIN, STOCK) else seams
    env.setdefault("DFLASH_KERNELS_STRICT", "1")
    env.setdefault("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE", "1")  # a leak ends the engine
    env.setdefault("DFLASH_KERNELS_SEAMS_FILE", str((work / "seams").resolve()))
    if gpus > 1:
        env.update(several_gpus(env))
    if forced is not None:
        # The recipe's plugin for 0.5.16; newer engines read the other variable.
        env["DFLASH_FORCE_ACC_LEN"] = env["SGLANG_SIMULATE_ACC_LEN"] = str(forced)
    return env


def run_engine(
    seams: str,
    engine: dict[str, Any],
    tasks: Sequence[dict[str, Any]],
    work: Path,
    limit: float,
    forced: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Results of the tasks as they come; the last is ``{"task": "exit", "code": ..., "log": tail}``.

    A child that is not done after ``limit`` seconds is ended, its whole process group with it.
    """
    work.mkdir(parents=True, exist_ok=True)
    name = seams.replace(",", "+").replace(":", "-")
    spec, results, log = work / f"{name}.spec.json", work / f"{name}.jsonl", work / f"{name}.log"
    results.write_text("")
    spec.write_text(json.dumps({"engine": engine, "tasks": list(tasks), "results": str(results)}))
    deadline = time.monotonic() + limit
    with log.open("w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "bench.sglang_engine", str(spec)],
            cwd=ROOT,
            env=environment(seams, work, forced, engine.get("tp_size", 1)),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        seen = 0
        try:
            while True:
                code = child.poll()
                lines = results.read_text().splitlines(keepends=True)
                whole = [line for line in lines if line.endswith("\n")]
                for line in whole[seen:]:
                    yield json.loads(line)
                seen = len(whole)
                if code is not None:
                    break
                if time.monotonic() > deadline:
                    code = "time limit"
                    break
                time.sleep(0.5)
        finally:
            _end(child)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
    table = [line for line in log.read_text(errors="replace").splitlines() if "  active" in line or "  stock " in line]
    retractions = log.read_text(errors="replace").count("Retract requests")
    yield {"task": "exit", "code": code, "log": tail if code != 0 else "", "table": table, "retractions": retractions}


def _end(child: subprocess.Popen[Any]) -> None:
    """End the child and the engine's processes, all in the session that it was started in."""
    import signal

    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        time.sleep(1.0)
    child.wait()


# -- the child ---------------------------------------------------------------------------------------------------------


def _generate(engine: Any, ids: list[list[int]], new_tokens: int, ignore_eos: bool) -> tuple[float, list[Any]]:
    params = {"max_new_tokens": new_tokens, "temperature": 0.0, "ignore_eos": ignore_eos}
    started = time.perf_counter()
    out = engine.generate(input_ids=ids, sampling_params=params)
    return time.perf_counter() - started, out


def _tokens(engine: Any, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Greedy tokens of every prompt, ``concurrency`` requests at a time, in fixed groups.

    ``rotated`` prompts begin that much later, so that other prompts share a batch; ``seams`` are switched to. Of
    ``count`` prompts, those are left out whose turn has not come ``until`` then; of rotated ones, all.
    """
    prompts, width = json.loads(Path(task["prompts"]).read_text())[: task.get("count")], task["concurrency"]
    until = task.get("until", float("inf"))
    rotated = task.get("rotated", 0) % max(1, len(prompts))
    prompts = prompts[rotated:] + prompts[:rotated]
    if "seams" in task:
        switch = Path(os.environ["DFLASH_KERNELS_SEAMS_FILE"])
        Path(f"{switch}.new").write_text(task["seams"])
        os.replace(f"{switch}.new", switch)
    tokens: list[list[int]] = []
    steps: list[int] = []
    seconds = 0.0
    if time.time() < until:
        _generate(engine, prompts[:width], 8, False)
    for start in range(0, len(prompts), width):
        if time.time() >= until:
            break
        taken, out = _generate(engine, prompts[start : start + width], task["new_tokens"], False)
        seconds += taken
        tokens += [o["output_ids"] for o in out]
        steps += [o["meta_info"].get("spec_verify_ct", len(o["output_ids"])) for o in out]
    cut = len(tokens) < len(prompts)
    if cut and rotated:
        tokens, steps = [], []
    back = len(prompts) - rotated
    yield {
        "seconds": seconds,
        "cut": cut,
        "steps": steps[back:] + steps[:back],
        "tokens": tokens[back:] + tokens[:back],
    }


def _gaps(engine: Any, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The two likeliest tokens after each text and the difference of their logits, of an engine without speculation.

    The file of the texts is waited for ``until`` then.
    """
    while not Path(task["texts"]).is_file() and time.time() < task["until"]:
        time.sleep(0.2)
    if not Path(task["texts"]).is_file():
        yield {"gaps": {}}
        return
    texts = json.loads(Path(task["texts"]).read_text())
    params = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
    names = list(texts)
    if not names:
        yield {"gaps": {}}
        return
    out = engine.generate(
        input_ids=[texts[name] for name in names], sampling_params=params, return_logprob=True, top_logprobs_num=2
    )
    found = {}
    for name, one in zip(names, out, strict=True):
        (first, a, *_), (second, b, *_) = one["meta_info"]["output_top_logprobs"][0][:2]
        found[name] = {"likeliest": [a, b], "gap": first - second}
    yield {"gaps": found}


def _faults(engine: Any, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Random arrivals for a while, some aborted: the texts that were completed, and how often what happened.

    At the end the engine is left idle, when it checks its pools, and asked for one text more.
    """
    prompts, rng = json.loads(Path(task["prompts"]).read_text()), random.Random(task["seed"])
    texts: list[tuple[int, list[int]]] = []
    counts = {"arrivals": 0, "completed": 0, "aborted": 0, "steps": 0}

    async def one(number: int, gate: asyncio.Semaphore) -> None:
        async with gate:
            prompt, patience = rng.randrange(len(prompts)), rng.uniform(0.0, task["patience"])
            params = {"max_new_tokens": task["new_tokens"], "temperature": 0.0}
            call = engine.async_generate(input_ids=prompts[prompt], sampling_params=params, rid=f"r{number:06d}-")
            job = asyncio.ensure_future(call)
            if rng.random() < task["aborts"]:
                await asyncio.wait([job], timeout=patience)
                if not job.done():
                    engine.tokenizer_manager.abort_request(f"r{number:06d}-")
            try:
                out = await job
            except ValueError:  # some aborts are reported so
                counts["aborted"] += 1
                return
            counts["steps"] += out["meta_info"].get("spec_verify_ct", 0)
            if (out["meta_info"].get("finish_reason") or {}).get("type") == "abort":
                counts["aborted"] += 1
            else:
                counts["completed"] += 1
                texts.append((prompt, out["output_ids"]))

    async def all_of_them() -> None:
        gate, jobs = asyncio.Semaphore(2 * task["concurrency"]), []
        ends = time.monotonic() + task["seconds"]
        while time.monotonic() < ends:
            if counts["arrivals"] - counts["completed"] - counts["aborted"] > 4 * task["concurrency"]:
                await asyncio.sleep(0.01)  # what a slow engine has not begun would all come after the end
                continue
            counts["arrivals"] += 1
            jobs.append(asyncio.ensure_future(one(counts["arrivals"], gate)))
            await asyncio.sleep(rng.expovariate(task["rate"]))
        await asyncio.gather(*jobs)

    engine.loop.run_until_complete(all_of_them())
    time.sleep(task["idle"])
    _generate(engine, prompts[:1], 8, False)
    yield {"texts": texts, "counts": counts}


def _step_time(engine: Any, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Milliseconds of a decode step: the difference of a long and a short run, so that the prompts cancel."""
    rng = random.Random(0)
    batch = task["concurrency"]

    def run(new_tokens: int) -> tuple[float, float, int]:
        ids = [[rng.randrange(1000, 100000) for _ in range(task["prompt"])] for _ in range(batch)]
        seconds, out = _generate(engine, ids, new_tokens, True)
        steps = sum(o["meta_info"].get("spec_verify_ct", new_tokens) for o in out) / batch
        return seconds, steps, sum(len(o["output_ids"]) for o in out)

    run(task["short"])
    for _ in range(task["repeats"]):
        (t1, s1, n1), (t2, s2, n2) = run(task["short"]), run(task["long"])
        yield {
            "ms_per_step": (t2 - t1) / (s2 - s1) * 1e3,
            "tokens_per_step": (n2 - n1) / batch / (s2 - s1),
            "tokens_per_s": (n2 - n1) / (t2 - t1),
        }


def _trace(engine: Any, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A profiler trace of decode steps, reduced."""
    from bench.engine_trace import reduce_trace

    rng = random.Random(1)
    batch, folder = task["concurrency"], Path(task["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    ids = [[rng.randrange(1000, 100000) for _ in range(task["prompt"])] for _ in range(batch)]
    _generate(engine, ids, task["steps"], True)
    older = set(folder.iterdir())
    engine.start_profile(output_dir=str(folder), num_steps=task["steps"], activities=["CPU", "GPU"])
    _generate(engine, ids, 10 * task["steps"], True)
    sizes: list[int] = []
    for _ in range(60):  # the profiler writes in the background
        time.sleep(1.0)
        sizes.append(sum(f.stat().st_size for f in set(folder.glob("*.json.gz")) - older))
        if len(sizes) > 2 and sizes[-1] and sizes[-1] == sizes[-3]:
            break
    written = set(folder.glob("*.json.gz")) - older
    if not written:
        yield {"error": "the profiler wrote no trace"}
        return
    yield reduce_trace(max(written, key=lambda f: f.stat().st_size))


TASKS = {"tokens": _tokens, "faults": _faults, "gaps": _gaps, "step": _step_time, "trace": _trace}


def child(spec_path: str) -> int:
    """Start the engine, run the tasks, append a line a result."""
    spec = json.loads(Path(spec_path).read_text())

    def say(line: dict[str, Any]) -> None:
        with open(spec["results"], "a") as file:
            file.write(json.dumps(line) + "\n")

    import sglang

    started = time.monotonic()
    engine = sglang.Engine(**spec["engine"])
    say({"task": "start", "seconds": time.monotonic() - started, "sglang": sglang.__version__})
    try:
        for task in spec["tasks"]:
            for result in TASKS[task["task"]](engine, task):
                say({**{k: task[k] for k in ("task", "concurrency", "pass", "seams") if k in task}, **result})
    finally:
        engine.shutdown()
    return 0


if __name__ == "__main__":  # the engine's own processes are spawned from this module
    sys.exit(child(sys.argv[1]))

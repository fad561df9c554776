"""`python -m bench.acceptance`: the demo pair on the held-out sets: acceptance, and equality with plain decoding.

`--formats bf16 fp8 int4-g64 e2m1-g64` quantises the drafter on the way and measures each; a set's name then carries the
format. `fp8-w8a8`: fp8 with activations in fp8, too, in all passes of more rows than are streamed; on the CPU in all.
`nvfp4-w4a4`: the same of NVFP4. The text is the target's in every one, so plain decoding runs once a set.

Acceptance length is tokens per decode step with the bonus counted, over all steps of a set. Every prompt's text must
equal plain decoding of the same target token for token; with a bf16 target a tie within rounding may fall either way,
so such texts are reported and no failure. Tokens/s count whole calls, prompts and graph captures included. The sets are
HumanEval, GSM8K and MT-Bench's first turns (`held_out_sets`), or a JSON file `{"set": ["prompt", ...]}`, which
`--write-prompts` makes for a machine that lacks the packages.

Exit codes: 0 fine; 1 an fp32 text differs; 2 bad arguments or something missing, in one line.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def read_sets(path: Path | None, limit: int | None) -> dict[str, list[str]]:
    """The sets by name, each cut to `limit` prompts.

    Raises:
        FileNotFoundError: the file, or a package that carries a set, is not there.
        ValueError: the file is not an object of lists of strings.
    """
    if path is None:
        from tools.drafter.prompts import held_out_sets

        sets = held_out_sets()
    else:
        sets = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(sets, dict) or not all(
            isinstance(v, list) and all(isinstance(p, str) and p for p in v) for v in sets.values()
        ):
            raise ValueError(f"{path} must hold an object of lists of prompts")
    return {name: prompts[:limit] for name, prompts in sets.items()}


def summarise(ours: Sequence[Any], plain: Sequence[Any] | None, seconds: float, plain_seconds: float) -> dict[str, Any]:
    """One set's numbers from the results of both ways."""
    commits = [n for result in ours for n in result.stats.commit_lens]
    tokens = sum(len(result.token_ids) for result in ours)
    summary: dict[str, Any] = {
        "prompts": len(ours),
        "tokens": tokens,
        "steps": len(commits),
        "mean_acceptance": sum(commits) / len(commits) if commits else 0.0,
        "commit_histogram": {str(k): n for k, n in sorted(Counter(commits).items())},
        "tokens_per_s": tokens / seconds,
    }
    if plain is not None:
        differing = [a.index for a, b in zip(ours, plain, strict=True) if a.token_ids != b.token_ids]
        summary |= {
            "identical": len(ours) - len(differing),
            "differing_prompts": differing,
            "plain_tokens_per_s": sum(len(r.token_ids) for r in plain) / plain_seconds,
        }
    return summary


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measure the sets; returns the exit code."""
    sets = read_sets(args.prompts, args.limit)
    if args.write_prompts is not None:
        args.write_prompts.write_text(json.dumps(sets, indent=1) + "\n", encoding="utf-8")
        return 0
    for name in args.formats:
        weights_of(name)
    from bench.demo_pair import load_demo_pair
    from bench.runner import commit_id
    from dflash_kernels.engine import Engine, SamplingParams

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model, tokenizer, drafter = load_demo_pair(dtype, device)
    drafters = {}
    for name in args.formats:
        weights = weights_of(name)
        drafters[name] = drafter if name == "bf16" else load_quantized(weights).bind(model)
        if name != weights:
            drafters[name].multiply_codes()
    params = SamplingParams(max_new_tokens=args.max_new_tokens)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench.acceptance", *argv]),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "commit": commit_id(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": args.dtype,
        "batch": args.batch,
        "max_new_tokens": args.max_new_tokens,
        "sets": {},
    }
    print(f"# {'set':<19} {'prompts':>7} {'tokens':>8} {'acceptance':>10} {'tok/s':>8} {'plain':>8} {'identical':>10}")
    started = time.monotonic()
    for name, prompts in sets.items():
        ids = [_encode(tokenizer, text) for text in prompts]
        longest = max(map(len, ids), default=1)
        plain: list[Any] | None = None
        plain_seconds = 0.0
        for weight_format, packed in drafters.items():
            engine = Engine(
                model, packed, tokenizer, max_batch=args.batch, max_len=longest + args.max_new_tokens, device=device
            )
            try:
                ours, seconds = _timed(engine, ids, params, "dflash")
                if plain is None and not args.no_compare:
                    plain, plain_seconds = _timed(engine, ids, params, "plain")
            finally:
                engine.close()
            done = summarise(ours, plain, seconds, plain_seconds) | {"weights": weight_format}
            label = name if args.formats == ["bf16"] else f"{name} {weight_format}"
            report["sets"][label] = done
            same = f"{done['identical']}/{done['prompts']}" if plain is not None else "-"
            print(
                f"  {label:<19} {done['prompts']:>7} {done['tokens']:>8} {done['mean_acceptance']:>10.3f} "
                f"{done['tokens_per_s']:>8.0f} {done.get('plain_tokens_per_s', 0.0):>8.0f} {same:>10}",
                flush=True,
            )
            if args.json is not None:
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if args.time_limit is not None and time.monotonic() - started > args.time_limit:
            print("# time limit: the remaining sets were skipped")
            break
    differing = sum(len(s.get("differing_prompts", ())) for s in report["sets"].values())
    return 1 if differing and args.dtype == "fp32" else 0


CODED_ACTIVATIONS = {"fp8-w8a8": "fp8", "nvfp4-w4a4": "nvfp4"}  # with activations in the same format


def weights_of(name: str) -> str:
    """The format of the weights; activations are in it, too, where that is not `name` itself.

    Raises:
        ValueError: activations in another format.
    """
    if "-w" in name and name not in CODED_ACTIVATIONS:
        raise ValueError(f"--formats: activations as codes come as {' and '.join(CODED_ACTIVATIONS)}, got {name}")
    return CODED_ACTIVATIONS.get(name, name)


def load_quantized(name: str) -> Any:
    """The demo drafter in the format of that name, packed and loaded by way of files as a user would."""
    from dflash_kernels.cli import DEMO_DRAFTER
    from dflash_kernels.model import WeightFormat, load_drafter, quantize_drafter

    with tempfile.TemporaryDirectory() as folder:
        quantize_drafter(DEMO_DRAFTER, Path(folder) / name, WeightFormat.parse(name))
        return load_drafter(Path(folder) / name)


def _encode(tokenizer: Any, text: str) -> list[int]:
    from dflash_kernels.engine.text import encode_prompt

    return encode_prompt(tokenizer, text)


def _timed(engine: Any, ids: list[list[int]], params: Any, mode: str) -> tuple[list[Any], float]:
    started = time.perf_counter()
    results = engine.generate(ids, params, mode=mode)
    return results, time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module's text for the exit codes."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench.acceptance", description="Acceptance and losslessness of the demo pair on held-out sets."
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N prompts a set")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="requests at a time; default: 32")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the target; default: fp32")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["bf16"],
        metavar="FORMAT",
        help="of the drafter's weights: bf16 (default), fp8, fp8-w8a8, int4-g64, e2m1-g64, nvfp4, nvfp4-w4a4",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="sets from a JSON file")
    parser.add_argument("--write-prompts", type=Path, metavar="FILE", help="only write the sets as a JSON file")
    parser.add_argument("--no-compare", action="store_true", help="skip plain decoding")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, kept current")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no set later than this")
    args = parser.parse_args(argv)
    try:
        return run(args, argv)
    except (FileNotFoundError, ValueError, ImportError) as error:
        print(f"python -m bench.acceptance: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

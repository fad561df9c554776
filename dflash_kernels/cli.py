"""``dflash-kernels``: generate, pack, info, doctor, bench.

Exit codes: 0 fine; 1 a check failed (outputs differ, doctor found a fault); 2 bad input, said in one line on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dflash_kernels

if TYPE_CHECKING:
    from dflash_kernels.engine import Engine, GenerationResult, SamplingParams
    from dflash_kernels.tensor_parallel import Communicator, Ranks

DEMO_DRAFTER = Path(__file__).parent / "assets" / "smollm2-135m-dflash"


class UsageError(Exception):
    """Bad input; the message is one clear line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv[:1]) == ["bench"]:
        # Its options are the benchmarks' own: argparse would take the first of them for one of ours.
        args = argparse.Namespace(command="bench", run=_bench, rest=list(argv[1:]))
    else:
        args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"dflash-kernels {args.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader went away (`| head`): no traceback, and none from the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dflash-kernels", description="DFlash speculative decoding: kernels, embedded engine, checks."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    gen = commands.add_parser(
        "generate",
        help="generate text with a target and its drafter, and compare with plain decoding",
        description="Without --target and --drafter the demo pair is used (SmolLM2-135M-Instruct, extra [demo]).",
    )
    gen.add_argument("prompt", nargs="*", metavar="PROMPT", help="the prompt (words are joined with blanks)")
    gen.add_argument("--target", type=Path, metavar="DIR", help="Hugging Face checkpoint directory (safetensors)")
    gen.add_argument("--drafter", type=Path, metavar="DIR", help="DFlash drafter directory")
    gen.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt a line, run as a batch")
    gen.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    gen.add_argument("--max-len", type=int, metavar="N", help="longest text with its prompt; default: what is needed")
    gen.add_argument("--max-batch", type=int, default=8, metavar="N", help="prompts at a time; default: 8")
    gen.add_argument("--page-size", type=int, default=16, metavar="N", help="drafter KV page, 1..64; default: 16")
    gen.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    gen.add_argument("--top-p", type=float, default=1.0)
    gen.add_argument("--top-k", type=int, default=0, help="0 (default) is off")
    gen.add_argument("--seed", type=int, help="for sampling; default: a fresh one")
    gen.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the target; default: fp32")
    gen.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N")
    gen.add_argument(
        "--tp", type=int, default=1, metavar="N", help="tensor parallel over N GPUs, or N processes with --device cpu"
    )
    gen.add_argument("--raw", action="store_true", help="no chat template")
    gen.add_argument("--no-compare", action="store_true", help="skip plain decoding of the same target")
    gen.add_argument("--quiet", action="store_true", help="print only the text")
    gen.set_defaults(run=_generate)

    pack = commands.add_parser(
        "pack",
        help="write a drafter with fp8 or 4-bit weights",
        description="Quantises a drafter's projections. The text that generate makes stays the target's; a coarser "
        "drafter has fewer tokens accepted.",
    )
    pack.add_argument("drafter", type=Path, metavar="DRAFTER", help="DFlash drafter directory, unquantised")
    pack.add_argument("out", type=Path, metavar="OUT", help="directory to write, new or empty")
    pack.add_argument(
        "--format", choices=("fp8", "w4", "nvfp4"), required=True, help="e4m3 a channel, 4 bits in groups, or NVFP4"
    )
    pack.add_argument("--group-size", type=int, choices=(64, 128), help="w4: weights that share a scale; default: 128")
    pack.add_argument("--codes", choices=("int4", "e2m1"), help="w4: what 4 bits mean; default: int4")
    pack.set_defaults(run=_pack)

    for name, text in (
        ("info", "versions, device, what the binary holds, which implementation each op would use"),
        ("doctor", "check the install and say what to fix"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("--json", action="store_true", help="machine-readable output")
        sub.set_defaults(run=_info if name == "info" else _doctor)

    commands.add_parser("bench", help="run the benchmark suites of a repository checkout", add_help=False)
    return parser


# -- info, doctor, bench --------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> int:
    from dflash_kernels import info

    return int(info.run(args))


def _doctor(args: argparse.Namespace) -> int:
    from dflash_kernels import doctor

    return int(doctor.run(args))


def _bench(args: argparse.Namespace) -> int:
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (root / "bench" / "__main__.py").is_file():
            return subprocess.run([sys.executable, "-m", "bench", *args.rest], cwd=root, check=False).returncode
    raise UsageError(
        "the benchmarks (bench/) belong to the repository and are not installed; run this from a checkout's root"
    )


# -- pack -----------------------------------------------------------------------------------------------------------


def _pack(args: argparse.Namespace) -> int:
    if args.format != "w4" and (args.group_size or args.codes):
        why = {"fp8": "has one scale for each output channel", "nvfp4": "is e2m1 in groups of 16"}[args.format]
        raise UsageError(f"--group-size and --codes belong to --format w4: {args.format} {why}")
    if dflash_kernels.load_error is not None:
        raise UsageError(str(dflash_kernels.load_error))
    from dflash_kernels.formats import WeightFormat
    from dflash_kernels.model.quantize import quantize_drafter

    if args.format == "w4":
        wanted = WeightFormat(args.codes or "int4", args.group_size or 128)
    else:
        wanted = WeightFormat.parse(args.format)
    try:
        report = quantize_drafter(args.drafter, args.out, wanted)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    print(f"{args.out}: {report.tensors} projections in {wanted}, {report.kept} tensors as they were")
    print(
        f"{report.bytes_before / 1e6:.1f} MB to {report.bytes_after / 1e6:.1f} MB; "
        f"rounding error {100 * report.error:.2f} % of the quantised weights (root mean square)"
    )
    return 0


# -- generate -------------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    prompts = _read_prompts(args)
    if (args.target is None) != (args.drafter is None):
        given, missing = ("--target", "--drafter") if args.drafter is None else ("--drafter", "--target")
        raise UsageError(f"{given} needs {missing} as well: a drafter belongs to one target")
    _import_torch()
    if args.tp == 1:
        return _generate_rank(args, prompts, _device(args.device), None)
    if args.tp < 1:
        raise UsageError(f"--tp must be at least 1, got {args.tp}")
    return _generate_ranks(args, prompts)


def _generate_ranks(args: argparse.Namespace, prompts: list[str]) -> int:
    """This process is rank 0 and starts the others, or is one of those that `torchrun` started."""
    from dflash_kernels.tensor_parallel import process_group, start_ranks

    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if started and int(os.environ["WORLD_SIZE"]) != args.tp:
        raise UsageError(f"--tp must be torchrun's number of processes, {os.environ['WORLD_SIZE']}, got {args.tp}")
    device = _rank_device(args.device, args.tp, int(os.environ.get("LOCAL_RANK", 0)) if started else 0)
    if args.seed is None and args.temperature > 0:
        if started:
            raise UsageError("--seed is needed to sample under torchrun: all processes must draw the same")
        args.seed = int.from_bytes(os.urandom(4), "little")
    if started:
        with process_group(int(os.environ["RANK"]), args.tp, device) as communicator:
            return _generate_rank(args, prompts, device, communicator)
    ranks = start_ranks(range(1, args.tp), args.tp, _other_rank, args, prompts)
    done = threading.Event()
    threading.Thread(target=_end_with_ranks, args=(ranks, done), daemon=True).start()
    try:
        with process_group(0, args.tp, device, ranks.port) as communicator:
            return _generate_rank(args, prompts, device, communicator)
    finally:
        done.set()
        ranks.end()


def _rank_device(name: str, world: int, rank: int) -> Any:
    """The device of a rank: one GPU each, or the CPU for all."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda with --tp, got {name}")
    found = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and found == 0):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
        return torch.device("cpu")
    if found < world:
        raise UsageError(f"--tp {world} needs {world} CUDA devices, torch sees {found}; --device cpu needs none")
    return torch.device("cuda", rank)


def _other_rank(rank: int, world: int, port: int, args: argparse.Namespace, prompts: list[str]) -> None:
    """A rank that says nothing: what there is to say, rank 0 says too."""
    from dflash_kernels.tensor_parallel import process_group

    _import_torch()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        device = _rank_device(args.device, world, rank)
        with process_group(rank, world, device, port) as communicator, contextlib.suppress(UsageError):
            _generate_rank(args, prompts, device, communicator)


def _end_with_ranks(ranks: Ranks, done: threading.Event) -> None:
    """End this process if another rank failed: it would wait for it in the next sum."""
    while not done.wait(1.0):
        if ranks.failed() and not done.wait(5.0):
            print(f"dflash-kernels generate: another rank ended with code {ranks.failed()[0]}", file=sys.stderr)
            os._exit(1)


def _generate_rank(args: argparse.Namespace, prompts: list[str], device: Any, communicator: Communicator | None) -> int:
    from dflash_kernels.engine import SamplingParams

    try:
        params = SamplingParams(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            seed=args.seed,
        ).resolved(())
        params = SamplingParams(**{**params.__dict__, "stop_token_ids": None})
        with_compare = not args.no_compare
        with _status("loading the models", args):
            engine, ids = _build_engine(args, prompts, device, communicator)
        try:
            with _status("warming up", args):
                _warm_up(engine, ids, params, with_compare)
            results = _stream(engine, ids, params, args)
            if args.quiet and not with_compare:
                return 0
            return _report(engine, ids, params, results, args)
        finally:
            engine.close()
    except ValueError as error:
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def _status(what: str, args: argparse.Namespace) -> Iterator[None]:
    """Says on a terminal what is going on, and takes it back at the end; nothing in a pipe."""
    if args.quiet or not sys.stderr.isatty():
        yield
        return
    print(f"{what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = [" ".join(args.prompt)] if args.prompt else []
    if args.prompts_file is not None:
        try:
            lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts-file {args.prompts_file} could not be read: {error}") from error
        prompts += [line for line in lines if line.strip()]
    if not prompts or not all(p.strip() for p in prompts):
        raise UsageError("a prompt is needed: give PROMPT or --prompts-file")
    return prompts


def _import_torch() -> Any:
    if dflash_kernels.load_error is not None:
        raise UsageError(str(dflash_kernels.load_error))
    try:
        import torch
        from transformers.utils import logging
    except ImportError as error:
        raise UsageError(
            f"generate needs torch and transformers, {error.name} is missing: pip install 'dflash-kernels[demo]'"
        ) from error
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return torch


def _build_engine(
    args: argparse.Namespace, prompts: list[str], device: Any, communicator: Communicator | None
) -> tuple[Engine, list[list[int]]]:
    import torch

    from dflash_kernels.engine import Engine, load_target
    from dflash_kernels.engine.text import encode_prompt
    from dflash_kernels.model.drafter import load_drafter

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    # fp32 means fp32: block-shaped and single-token passes must round alike.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if args.target is not None:
        model, tokenizer = load_target(args.target, dtype, device)
        if tokenizer is None:
            raise UsageError(f"target directory {args.target} must hold a tokenizer, found none")
    else:
        try:
            from dflash_kernels.model.smollm2 import load_smollm2

            model, tokenizer = load_smollm2(dtype=dtype, device=device)
        except FileNotFoundError as error:
            raise UsageError(str(error)) from error
        except ImportError as error:
            raise UsageError(
                f"the demo target needs the extra [demo] ({error.name or error}): pip install 'dflash-kernels[demo]'"
            ) from error
    where = args.drafter or DEMO_DRAFTER
    if not (where / "config.json").is_file():
        raise UsageError(f"drafter directory {where} must hold config.json and model.safetensors, found no config.json")
    drafter = load_drafter(where)
    ids = [encode_prompt(tokenizer, prompt, not args.raw) for prompt in prompts]
    longest = max(len(p) for p in ids)
    max_len = args.max_len or longest + args.max_new_tokens
    engine = Engine(
        model,
        drafter,
        tokenizer,
        max_batch=min(args.max_batch, len(ids)),
        max_len=max_len,
        page_size=args.page_size,
        device=device,
        communicator=communicator,
    )
    return engine, ids


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {name}") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {name}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"--device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _warm_up(engine: Engine, ids: list[list[int]], params: SamplingParams, compare: bool) -> None:
    """A few untimed tokens each way: first-touch memory, library set-up, graph capture."""
    import dataclasses

    short = dataclasses.replace(
        params, max_new_tokens=min(params.max_new_tokens, 4 * engine.block_size), stop_token_ids=()
    )
    if engine.device.type == "cpu":
        short, ids = dataclasses.replace(short, max_new_tokens=2), ids[:1]
    engine.generate(ids, short)
    if compare:
        engine.decode_plain(ids, dataclasses.replace(short, max_new_tokens=min(short.max_new_tokens, 4)))


def _stream(
    engine: Engine, ids: list[list[int]], params: SamplingParams, args: argparse.Namespace
) -> list[GenerationResult]:
    """Generate and show; one prompt is shown as it comes, several each when done."""
    run = engine.stream(ids, params)
    if len(ids) == 1 and sys.stdout.isatty() and not args.quiet:
        return _stream_live(run, params)
    shown = 0
    for event in run:
        if len(ids) == 1:
            print(event.text, end="", flush=True)
        while shown < len(ids) and run.results[shown].finish_reason and len(ids) > 1:
            print(f"== prompt {shown + 1} ==\n{run.results[shown].text}\n", flush=True)
            shown += 1
    if len(ids) == 1:
        print(flush=True)
    return list(run.results)


def _stream_live(run: Any, params: SamplingParams) -> list[GenerationResult]:
    """On a terminal: the text, with a status line under it while it grows."""
    try:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        for event in run:
            print(event.text, end="", flush=True)
        print(flush=True)
        return list(run.results)
    result = run.results[0]
    with Live(console=Console(), refresh_per_second=12, vertical_overflow="visible") as live:
        for _ in run:
            stats = result.stats
            rate = (len(result.token_ids) - 1) / stats.decode_seconds if stats.decode_seconds else 0.0
            status = Text(
                f"{len(result.token_ids)}/{params.max_new_tokens} tokens  {rate:.1f} tokens/s  "
                f"{stats.mean_commit:.2f} tokens a step",
                style="dim",
            )
            live.update(Group(Text(result.text), status))
        live.update(Text(result.text))
    return list(run.results)


def _report(
    engine: Engine, ids: list[list[int]], params: SamplingParams, ours: list[GenerationResult], args: argparse.Namespace
) -> int:
    out = sys.stderr if args.quiet else sys.stdout

    def say(line: str = "") -> None:
        print(line, file=out, flush=True)

    steps = [n for r in ours for n in r.stats.commit_lens]
    if not args.quiet:
        say()
        for number, result in enumerate(ours, 1):
            label = f"prompt {number}: " if len(ours) > 1 else ""
            lens = " ".join(str(n) for n in result.stats.commit_lens)
            say(f"{label}acceptance length per step: {lens or 'no decode step'}")
        mean = sum(steps) / len(steps) if steps else 0.0
        say(f"mean acceptance length: {mean:.2f} tokens a step over {len(steps)} steps (block of {engine.block_size})")
        where = str(engine.device) if args.tp == 1 else f"{args.tp} ranks on {engine.device.type}"
        say(f"DFlash: {_rate(ours):.1f} tokens/s ({args.dtype} target, {where})")
    if args.no_compare:
        return 0
    with _status("decoding the same prompts without a drafter", args):
        plain = engine.decode_plain(ids, params)
    if not args.quiet:
        ratio = _rate(ours) / _rate(plain) if _rate(plain) else 0.0
        say(f"plain decoding of the same target: {_rate(plain):.1f} tokens/s; DFlash is {ratio:.2f}x")
    if not params.greedy:
        if not args.quiet:
            say("sampled: the two texts follow the same distribution and are not compared token for token")
        return 0
    differing = [i for i, (a, b) in enumerate(zip(ours, plain, strict=True)) if a.token_ids != b.token_ids]
    if not args.quiet or differing:
        total = sum(len(r.token_ids) for r in ours)
        say(f"identical to plain decoding: {f'yes ({total} tokens)' if not differing else 'NO'}")
    if args.dtype == "bf16":
        return _report_rounding(engine, ids, ours, plain, differing, say)
    for i in differing:
        offset = _first_difference(ours[i].token_ids, plain[i].token_ids)
        say(f"prompt {i + 1} differs from token {offset} on")
    return 1 if differing else 0


def _report_rounding(
    engine: Engine,
    ids: list[list[int]],
    ours: list[GenerationResult],
    plain: list[GenerationResult],
    differing: list[int],
    say: Any,
) -> int:
    """bf16: how often rounding alone flips a token, and whether it explains each difference; 1 if it does not."""
    from dflash_kernels.engine.rounding import measure_rounding, near_tie

    unexplained = 0
    for i in range(len(ids)):
        report = measure_rounding(engine.target, ids[i], plain[i].token_ids, engine.block_size)
        say(f"prompt {i + 1}, bf16 rounding of the target by itself: {report}")
        if i in differing:
            offset, gap, tie = near_tie(
                engine.target, ids[i], ours[i].token_ids, plain[i].token_ids, report.max_abs_diff
            )
            verdict = "a tie within rounding" if tie else "NOT explained by rounding"
            say(f"prompt {i + 1} differs from token {offset} on; the two tokens are {gap:.3g} apart: {verdict}")
            unexplained += not tie
    return 1 if unexplained else 0


def _rate(results: list[GenerationResult]) -> float:
    """Decode tokens per second of a batch, from the first token of any request to the last; prompts excluded."""
    started = min(r.stats.first_token for r in results)
    seconds = max(r.stats.finished for r in results) - started
    tokens = sum(len(r.token_ids) - 1 for r in results)
    return tokens / seconds if seconds > 0 else 0.0


def _first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench SUITE...`: measure the card's ceilings, then the suites; see `--help` and NOTES.md.
`python -m bench engine-trace ...`: where a step of SGLang's DFLASH goes (`bench.engine_trace`).
`python -m bench predict --card CARD`: what each row should take on a card (`bench.predict`); needs no GPU.
`python -m bench first-run ...`: everything at once on a new machine (`bench.first_run`).

Exit codes: 0 all rows measured (or skipped for time); 1 a case failed; 2 bad arguments; 3 the device was lost.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of a run; leaves with code 2 and one line on a mistake."""
    from bench.runner import SUITES

    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of the dflash ops.")
    parser.add_argument("suite", nargs="+", metavar="SUITE", help=f"{', '.join(SUITES)}, or all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the run's rows there, kept current")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and samples")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw achieved against ceiling")
    parser.add_argument(
        "--filter", default="", metavar="SUBSTR", help="only cases with this in suite, op, shape, dtype"
    )
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no case later than this")
    parser.add_argument("--tp", default="", metavar="N[,N...]", help="numbers of ranks of the suite tp")
    args = parser.parse_args(argv)
    try:
        args.tp = tuple(int(count) for count in args.tp.split(",") if count)
    except ValueError:
        _leave(f"--tp must be numbers of ranks, as 2,4, got {args.tp}")
    if any(count < 2 for count in args.tp):
        _leave(f"--tp: at least 2 ranks are needed, got {min(args.tp)}")
    unknown = [name for name in args.suite if name not in (*SUITES, "all")]
    if unknown:
        _leave(f"unknown suite {', '.join(unknown)}; there are: {', '.join(SUITES)}, all")
    args.suite = list(SUITES) if "all" in args.suite else list(dict.fromkeys(args.suite))
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.resolve().parent.is_dir():
            _leave(f"{option} {path}: its directory does not exist")
    if args.plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            _leave("--plot needs matplotlib: pip install 'dflash-kernels[bench]'")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["engine-trace"]:
        from bench.engine_trace import main as engine_trace

        return engine_trace(argv[1:])
    if argv[:1] == ["predict"]:
        from bench.predict import main as predict

        return predict(argv[1:])
    if argv[:1] == ["first-run"]:
        from bench.first_run import main as first_run

        return first_run(argv[1:])
    args = parse(argv)
    import torch

    from bench import ceilings
    from bench.runner import DeviceLost, Run, commit_id
    from dflash_kernels import tuning

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        _leave("--device cuda: torch sees no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")
    rates = ceilings.measure(device)
    commit = commit_id()
    print(f"# {rates.card}; torch {torch.__version__}; commit {commit}")
    print(
        f"# ceilings measured now: read {rates.read_bw / 1e9:.0f} GB/s ({rates.read_kernel}), "
        f"copy {rates.copy_bw / 1e9:.0f} GB/s, {rates.flop_dtype} {rates.flop_rate / 1e12:.3g} TFLOP/s"
    )
    where = tuning.path()
    if device.type == "cuda" and where is not None and where.is_file():
        print(f"# tuned by {where}; DFLASH_TUNING=off measures the defaults")
    run = Run(
        command=shlex.join(["python", "-m", "bench", *argv]),
        device=device,
        ceilings=rates,
        quick=args.quick,
        name_filter=args.filter,
        json_path=args.json,
        budget_seconds=args.time_limit,
        commit=commit,
    )
    if "tp" in args.suite:
        from bench import bench_tp

        bench_tp.wanted = args.tp
    code = 0
    try:
        run.suites(args.suite)
    except DeviceLost as error:
        print(f"# device lost at {error}", flush=True)
        code = 3
    seconds = f"{time.monotonic() - run.started:.0f} s"
    print(f"# {len(run.rows)} rows, {len(run.errors)} failed, {len(run.skipped)} skipped for time, {seconds}")
    if args.plot is not None and run.rows:
        from bench.plot import draw

        draw(run.as_json(), args.plot)
        print(f"# plot: {args.plot}")
    return code or (1 if run.errors else 0)


def _leave(message: str) -> None:
    print(f"python -m bench: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())

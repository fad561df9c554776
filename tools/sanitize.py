"""Every CUDA kernel once under compute-sanitizer: memcheck, racecheck, synccheck.

    python tools/sanitize.py [--out DIR] [--tools memcheck,...] [--groups alloc,...] [--time-limit SECONDS] [--jobs N]

One process a tool and group of ops makes small direct calls of every op, chosen so that each kernel and each path of it
runs (tile sizes, tails, unaligned rows, splits, both index types, DFLASH_DEBUG's checks). Only kernels of this library
are instrumented, launches are blocking, and every tensor is its own allocation, so that an access beyond one is seen.
Up to --jobs processes run side by side. Prints a line per tool and group, and the first findings; whole logs go to
DIR/<tool>.<group>.log. With --go-on, what is clean by its log in DIR is not run again.

    --calls-only [--device cpu]    makes the calls without a sanitizer: are they still in step with the ops?

Exit codes: 0 nothing found; 1 findings, a failed call, or a group that hangs; 2 no compute-sanitizer, or bad arguments;
75 the time was too short for all: call again with --go-on.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck")
MARK = "@@sanitize"  # starts the lines by which the calling process says where it is
FIRST_PORT = 49152
UNFINISHED = 75  # exit code
GROUP_LIMIT = 240.0  # seconds of one tool and group: more is a hang
SHOWN = 6  # lines of findings printed per tool and group

# -- the calls --------------------------------------------------------------------------------------------------------


class Maker:
    """Random tensors, drawn on the CPU so that no kernel but the library's runs; counts the calls."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch = torch
        self.device = device
        self.calls = 0
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: Any = None, scale: float = 1.0) -> Any:
        values = self.torch.randn(shape, generator=self.generator) * scale
        return values.to(dtype or self.torch.bfloat16).to(self.device)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Any:
        return (self.torch.rand(shape, generator=self.generator) * (high - low) + low).to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: Any = None) -> Any:
        values = self.torch.randint(low, high, shape, generator=self.generator)
        return values.to(dtype or self.torch.int64).to(self.device)

    def distinct(self, count: int, high: int, dtype: Any = None) -> Any:
        """`count` different numbers below `high`."""
        values = self.torch.randperm(high, generator=self.generator)[:count]
        return values.to(dtype or self.torch.int64).to(self.device)

    def table(self, values: list[int] | list[float], dtype: Any = None) -> Any:
        return self.torch.tensor(values, dtype=dtype or self.torch.int64).to(self.device)

    def empty(self, *shape: int, dtype: Any) -> Any:
        return self.torch.zeros(shape, dtype=dtype).to(self.device)

    @property
    def blocks(self) -> int:
        """Persistent blocks of the streaming kernels."""
        on_cuda = self.device == "cuda"
        return self.torch.cuda.get_device_properties(0).multi_processor_count if on_cuda else 4

    def quantized(self, weight: Any, name: str | None) -> Any:
        """Rounded on the CPU; None: the weight as it is."""
        from dflash_kernels.formats import WeightFormat
        from dflash_kernels.model.quantize import quantize

        return weight if name is None else quantize(weight.cpu(), WeightFormat.parse(name)).to(self.device)

    def codes(self, matrix: Any) -> tuple[Any, Any]:
        """Of fp8, and their scales."""
        coded = self.quantized(matrix, "fp8")
        return coded.codes, coded.scale

    @property
    def multiplies_fp8(self) -> bool:
        from dflash_kernels import ops

        return self.device == "cpu" or ops.draft_forward_fp8_supported(self.device)

    def call(self, op: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        op(*args, **kwargs)
        self.calls += 1


@contextmanager
def debug_checks() -> Iterator[None]:
    os.environ["DFLASH_DEBUG"] = "1"
    try:
        yield
    finally:
        del os.environ["DFLASH_DEBUG"]


def call_alloc(m: Maker) -> None:
    from dflash_kernels import ops

    for index in (m.torch.int32, m.torch.int64):
        table = m.integers(1, 900, 5, 40, dtype=index)
        ids, lens, rows = m.integers(0, 99, 3, dtype=index), m.table([0, 3, 36], index), m.distinct(3, 5, index)
        m.call(ops.prepare_block, ids, lens, rows, table, 8, 7)
        with debug_checks():
            m.call(ops.prepare_block, ids, lens, rows, table, 16, 7)
    # more requests than a block has threads; page sizes with and without a tail
    for batch, page_size in ((3, 1), (3, 16), (300, 4)):
        width = 41
        free_pages, ring = ops.init_free_pages(batch * (width // page_size + 1) + 2, page_size, m.device)
        table = m.empty(batch, width, dtype=m.torch.int32)
        held = m.empty(batch, dtype=m.torch.int32)
        rows = m.distinct(batch, batch)
        for target, keep in ((17, 9), (41, 0), (25, 25)):
            state = (table, held, free_pages, ring, rows)
            m.call(ops.reserve_kv_slots, *state, m.table([target] * batch), page_size)
            block = (m.integers(0, 99, batch), m.table([target] * batch), rows, page_size, 7)
            m.call(ops.reserve_and_prepare_block, *state[:4], *block, block_size=16, active=m.integers(0, 2, batch))
            m.call(ops.release_kv_slots, *state, m.table([keep] * batch), page_size)


def call_dflash2(m: Maker) -> None:
    from dflash_kernels import ops

    # fewer slots than the ring of rows has places, more, and the most; candidates and rank at their limits
    for batch, slots, top_k, rank in ((3, 7, 16, 256), (2, 15, 16, 256), (1, 32, 32, 256), (2, 2, 1, 8), (1, 9, 5, 72)):
        vocab = 100
        args = (
            m.torch.stack([m.distinct(top_k, vocab) for _ in range(batch * slots)]).view(batch, slots, top_k),
            m.normal(batch, slots, top_k, dtype=m.torch.float32),
            m.normal(batch, slots, rank),
            m.integers(0, vocab, batch, dtype=m.torch.int32),
            m.normal(vocab, rank),
            m.normal(vocab, rank),
        )
        m.call(ops.select_path, *args)
        m.call(ops.select_path, *args, m.uniform(batch), m.uniform(batch, slots))
        with debug_checks():
            m.call(ops.select_path, *args, m.uniform(batch), m.uniform(batch, slots))
    # one row a thread, four rows a thread, more taps, groups that no vector fits
    for rows, block, hidden, taps, group in (
        (24, 8, 576, 2, 16),
        (511, 7, 4672, 2, 16),
        (21, 7, 96, 3, 8),
        (20, 10, 60, 2, 4),
    ):
        delta = m.normal(rows, 2, taps, hidden // group)[:, 1]
        m.call(ops.grouped_conv, m.normal(rows, hidden), delta, m.normal(taps, hidden), block)


def call_inject(m: Maker) -> None:
    from dflash_kernels import ops

    # rows pick the GEMM's tile: up to 16, up to 64, more, many with wide weights
    for batch, block, commit, hidden, taps, layers, heads, dim, rotary, bias in (
        (2, 8, [3, 8], 64, 3, 2, 2, 32, 32, True),
        (5, 10, [0, 1, 10, 4, 7], 72, 1, 1, 1, 64, 16, False),
        (9, 8, None, 64, 2, 2, 1, 128, 128, True),
        (16, 16, None, 64, 1, 12, 2, 128, 128, False),
        (10, 8, [8, 0, 3, 1, 8, 5, 2, 0, 4, 7], 64, 2, 2, 1, 64, 64, True),  # live rows are gathered
    ):
        rows = batch * block
        pool = rows + 3
        widest = m.normal(rows, taps * hidden)
        args = (
            [widest[:, i * hidden : (i + 1) * hidden] for i in range(taps)],
            m.normal(hidden, taps * hidden, scale=0.1),
            m.normal(hidden),
            m.normal(layers, 2 * heads * dim, hidden, scale=0.1),
            m.normal(layers, 2 * heads * dim) if bias else None,
            m.normal(layers, dim) if bias else None,
            m.normal(40, rotary, dtype=m.torch.float32),
            m.integers(0, 40, rows),
            m.distinct(rows, pool, m.torch.int32),
            None if commit is None else m.table(commit, m.torch.int32),
            [m.normal(pool, heads, dim) for _ in range(layers)],
            [m.normal(pool, heads, dim) for _ in range(layers)],
            ops.inject_kv_workspace(rows, hidden, layers, heads, dim, device=m.device, num_taps=taps),
            1e-6,
        )
        m.call(ops.inject_kv, *args)
        if rows <= 64:
            plan = ops.inject_kv_plan(args[1], args[3], dim)
            m.call(ops.inject_kv, *args, plan)
        norms = {"tap_norm": m.normal(taps, hidden), "value_scale": 0.5}
        m.call(ops.inject_kv, *args, **norms)
        shards = 2 if hidden % 16 == 0 else 1
        fused = m.normal(shards, rows, hidden // shards)
        m.call(ops.inject_kv_fuse, args[0], args[1][: hidden // shards], args[9], fused[0], args[12], 1e-6)
        m.call(ops.inject_kv_project, fused, *args[2:])
        if layers < 3:
            with debug_checks():
                m.call(ops.inject_kv, *args)


STREAMED = (None, "fp8", "int4-g64", "e2m1-g64")  # formats of packed weights


def call_head(m: Maker) -> None:
    from dflash_kernels import ops
    from dflash_kernels.head_stream import pack_head

    for rows, vocab, hidden, bias in (
        (1, 300, 64, True),
        (16, 130, 72, False),
        (30, 129, 64, True),
        (40, 300, 64, False),
        (200, 257, 64, True),
    ):
        args = (m.normal(rows, hidden), m.normal(vocab, hidden))
        extra = m.normal(vocab) if bias else None
        for _ in range(2):  # the second call finds what the first left in its workspace
            m.call(ops.lm_head_argmax, *args, extra, 1000)
        for k in (1, 16, 64):
            m.call(ops.lm_head_topk, *args, k, extra)
        if hidden % 16 == 0 and m.multiplies_fp8:
            coded = [part for x in args for part in m.codes(x)]
            for _ in range(2):
                m.call(ops.lm_head_argmax_fp8, *coded, extra, 1000)
        if rows <= 64:
            for name in STREAMED[: 4 if hidden == 64 else 2]:
                weight = m.quantized(args[1], name)
                # K cut over several blocks, and more whole row tiles than blocks
                for blocks in (m.blocks, 2):
                    packed = pack_head(weight, blocks=blocks, bias=extra)
                    for _ in range(2):
                        m.call(ops.lm_head_argmax_packed, args[0], packed, 1000)
    args = (m.integers(0, 300, 3, 8, dtype=m.torch.int32), m.normal(24, 64), m.normal(300, 64), m.table([1, 2, 3]))
    m.call(ops.verify_block_from_hidden, *args)


def call_verify(m: Maker) -> None:
    from dflash_kernels import ops

    prefix = m.table([5, 0, 70], m.torch.int32)
    ids = m.integers(0, 4, 3, 8)
    m.call(ops.verify_block, ids, m.integers(0, 4, 3, 8, dtype=m.torch.int32), prefix)
    for dtype in (m.torch.bfloat16, m.torch.float16, m.torch.float32):
        for vocab in (1000, 4099, 20000):  # 4099: rows start anywhere; 20000: a row goes to several blocks
            logits = m.normal(3, 8, vocab, dtype=dtype)
            for lazy in (0, 1):
                m.call(ops.verify_block, ids, logits, prefix, lazy=lazy)
            m.call(ops.argmax_logits, logits.view(24, vocab), 1000)
    m.call(ops.merge_vocab_shards, m.integers(0, 99, 3, 24), m.normal(3, 24, dtype=m.torch.float32))
    for dtype, vocab in ((m.torch.bfloat16, 20000), (m.torch.float16, 1000), (m.torch.float32, 4099)):
        logits = m.normal(3, 8, vocab, dtype=dtype, scale=3.0)
        candidates = m.integers(0, vocab, 3, 8)
        settings = (
            m.table([0.0, 0.7, 1.0], m.torch.float32),
            m.table([0, 20, 0]),
            m.table([1.0, 0.9, 0.8], m.torch.float32),
            m.table([0.0, 0.05, 0.0], m.torch.float32),
            m.integers(0, 2**40, 3),
            m.integers(0, 2**40, 3),
        )
        draft_ids = m.torch.stack([m.distinct(16, vocab) for _ in range(21)]).view(3, 7, 16)
        candidates[:, 1:] = draft_ids[:, :, 3]  # the draft has mass on what it proposes
        draft_probs = m.torch.softmax(m.normal(3, 7, 16, dtype=m.torch.float32).cpu(), -1).to(m.device)
        mask = m.integers(-(2**31), 2**31, 3, 8, (vocab + 31) // 32, dtype=m.torch.int32)
        bias = m.normal(3, vocab, dtype=m.torch.float32)
        for rule in ("token", "block"):
            m.call(ops.verify_block_sampled, candidates, logits, prefix, *settings, rule=rule)
            args = (candidates, logits, prefix, *settings, draft_ids, draft_probs, mask, bias, rule)
            m.call(ops.verify_block_sampled, *args)
            with debug_checks():
                m.call(ops.verify_block_sampled, *args)


def call_draft(m: Maker) -> None:
    from dflash_kernels import ops
    from dflash_kernels.draft_stream import pack_draft

    for columns in (8, 72, 2056, 8192, 32768):  # rows in 1 to 16 loads of a thread
        x = m.normal(3, columns)
        m.call(ops.quantize_rows, x)
        if columns <= 8192:
            m.call(ops.rmsnorm_quantize_rows, x, m.normal(columns), 1e-6)

    # a row, tiles that are not full, pairs of them
    for rows, columns, k, gated in ((1, 64, 16, False), (130, 264, 80, False), (300, 512, 1040, True)):
        if m.multiplies_fp8:
            residual = None if gated else m.normal(rows, columns)
            coded = (*m.codes(m.normal(rows, k)), *m.codes(m.normal(columns, k)))
            m.call(ops.gemm_fp8, *coded, m.normal(columns), residual, gated)

    # every head size; keys cut into many parts, and (34 requests) not cut: several tiles in one block
    for prefixes, block, q_heads, kv_heads, dim, bias in (
        ([0, 5, 150], 8, 4, 2, 64, True),
        ([700], 16, 8, 2, 128, False),
        ([33, 1], 7, 3, 1, 32, False),
        ([40], 10, 2, 1, 96, True),
        ([20, 70], 32, 2, 2, 256, False),
        ([150] * 34, 4, 4, 4, 32, False),
    ):
        batch, hidden, inner, vocab, width = len(prefixes), 64, 96 if bias else 128, 50, max(prefixes) + block
        qkv = (q_heads + 2 * kv_heads) * dim
        pool = batch * width + 1
        lens = m.table(prefixes, m.torch.int32)
        args = (
            m.integers(0, vocab, batch, block),
            m.torch.stack([m.table([p + t for t in range(block)]) for p in prefixes]),
            lens,
            m.distinct(batch, batch),
            m.distinct(batch * width, pool, m.torch.int32).view(batch, width),
            [m.normal(pool, kv_heads, dim) for _ in range(2)],
            [m.normal(pool, kv_heads, dim) for _ in range(2)],
            m.normal(vocab, hidden),
            m.normal(2, hidden),
            m.normal(2, qkv, hidden, scale=0.1),
            m.normal(2, qkv) if bias else None,
            m.normal(2, dim) if bias else None,
            m.normal(2, dim) if bias else None,
            m.normal(2, hidden, q_heads * dim, scale=0.1),
            m.normal(2, hidden) if bias else None,
            m.normal(2, hidden),
            m.normal(2, 2 * inner, hidden, scale=0.1),
            m.normal(2, hidden, inner, scale=0.1),
            m.normal(hidden),
            m.normal(800, dim, dtype=m.torch.float32),
            [0, 16],
            [0, 1],
            1e-6,
        )
        m.call(ops.draft_forward, *args)
        if m.multiplies_fp8:
            coded_args = list(args)
            for i in (17, 16, 13, 9):
                coded_args[i : i + 1] = m.codes(args[i])
            m.call(ops.draft_forward_fp8, *coded_args)
        if dim in (64, 128):  # as one kernel
            for name in STREAMED[:2] if inner % 64 else STREAMED:
                matrices = [m.quantized(args[i], name) for i in (9, 13, 16, 17)]
                packed = pack_draft(*matrices, num_kv_heads=kv_heads, head_dim=dim, blocks=m.blocks)
                others = (*args[:9], *args[10:13], args[14], args[15], *args[18:20], packed, *args[20:])
                for _ in range(2):
                    m.call(ops.draft_forward_packed, *others)
        if dim == 64:
            with debug_checks():
                m.call(ops.draft_forward, *args)


GROUPS: dict[str, Callable[[Maker], None]] = {
    "alloc": call_alloc,
    "verify": call_verify,
    "head": call_head,
    "inject": call_inject,
    "draft": call_draft,
    "dflash2": call_dflash2,
}


def make_calls(groups: list[str], device: str) -> int:
    """Run the groups in this process, saying on standard output where it is. Returns the number of failed groups."""
    sys.path.insert(0, str(ROOT))
    import torch

    failed = 0
    for group in groups:
        print(f"{MARK} begin {group}", flush=True)
        maker, started = Maker(device), time.monotonic()
        try:
            GROUPS[group](maker)
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            failed += 1
            text = str(error).splitlines()
            print(f"{MARK} error {group} {type(error).__name__}: {text[0] if text else ''}", flush=True)
        print(f"{MARK} end {group} {maker.calls} {time.monotonic() - started:.1f}", flush=True)
    return failed


# -- the tools --------------------------------------------------------------------------------------------------------


@dataclass
class GroupReport:
    """What one tool said about one group."""

    state: str = "not reached"  # then "running", "done"
    calls: int = 0
    seconds: float = 0.0
    error: str = ""
    findings: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return self.state == "done" and not self.error and not self.findings


@dataclass
class ToolReport:
    groups: dict[str, GroupReport]
    total: int | None = None  # errors and warnings by the tool's own count; None: it did not get to count
    outside: list[str] = field(default_factory=list)  # findings outside of any group


# A finding's first line is indented by one space, what explains it by more; summaries have their own words.
_FINDING = re.compile(r"^========= (?! )(?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|LEAK SUMMARY|$)(\S.*)$")
_DETAIL = re.compile(r"^=========  +(at |by |and |Address |Access)")
_SUMMARY = re.compile(r"^========= (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazards? displayed)")
_REPEATED = re.compile(r"^=========  ?(Target application returned|Process .* exited|This tool)")


def parse_log(text: str, groups: list[str]) -> ToolReport:
    """Attribute a log's findings to the groups whose marks enclose them."""
    report = ToolReport({group: GroupReport() for group in groups})
    current: GroupReport | None = None
    for line in text.splitlines():
        if line.startswith(MARK):
            _, what, group, *rest = line.split(" ", 3)
            entry = report.groups[group]
            if what == "begin":
                entry.state, current = "running", entry
            elif what == "error":
                entry.error = rest[0] if rest else "failed"
            else:
                calls, seconds = rest[0].split()
                entry.state, entry.calls, entry.seconds, current = "done", int(calls), float(seconds), None
            continue
        into = report.outside if current is None else current.findings
        if summary := _SUMMARY.match(line):
            report.total = int(summary.group(1) or summary.group(2))
        elif _REPEATED.match(line):
            continue
        elif finding := _FINDING.match(line):
            into.append(finding.group(1))
        elif into and _DETAIL.match(line):
            into[-1] += " | " + line.removeprefix("=========").strip()
    return report


def tool_command(sanitizer: str, tool: str, group: str) -> list[str]:
    place = TOOLS.index(tool) * len(GROUPS) + list(GROUPS).index(group)
    options = ["--tool", tool, "--port", str(FIRST_PORT + 100 * place)]
    options += ["--kernel-name", "kernel_substring=dflash", "--force-blocking-launches"]
    options += ["--show-backtrace", "no", "--demangle", "simple"]
    options += ["--report-api-errors", "no", "--destroy-on-device-error", "kernel", "--launch-timeout", "60"]
    if tool == "memcheck":
        options += ["--padding", "1024"]
    return [sanitizer, *options, sys.executable, str(Path(__file__).resolve()), "--calls-only", "--groups", group]


def find_sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    beside = (str(Path(place) / "bin" / "compute-sanitizer") for place in places if place)
    return shutil.which("compute-sanitizer") or next((path for path in beside if os.access(path, os.X_OK)), None)


def is_clean(report: ToolReport) -> bool:
    return all(entry.clean for entry in report.groups.values()) and not report.outside and report.total == 0


def print_report(tool: str, report: ToolReport, timed_out: bool, exit_code: int | None) -> bool:
    """A line per group; whether all is clean."""
    for group, entry in report.groups.items():
        if entry.clean:
            verdict = "ok"
        elif entry.findings:
            verdict = f"{len(entry.findings)} FINDINGS"
        elif entry.error:
            verdict = "CALL FAILED"
        else:
            verdict = "OUT OF TIME" if timed_out else entry.state.upper()
        print(
            f"{tool:<10} {group:<8} {verdict:<12} {entry.calls:>3} calls {entry.seconds:>6.1f} s {entry.error}".rstrip()
        )
        for finding in entry.findings[:SHOWN]:
            print(f"    {finding[:300]}")
    for finding in report.outside[:SHOWN]:
        print(f"{tool:<10} outside  {finding[:300]}")
    attributed = sum(len(entry.findings) for entry in report.groups.values())
    if report.total is None:
        print(f"{tool:<10} ended without a summary, {'out of time' if timed_out else f'exit code {exit_code}'}")
    elif report.total > attributed + len(report.outside):
        print(f"{tool:<10} counts {report.total} in all")
    sys.stdout.flush()
    return is_clean(report)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a tool and the process it runs, which have a session of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_tools(
    sanitizer: str, tools: list[str], groups: list[str], out: Path, limit: float, jobs: int, go_on: bool
) -> tuple[bool, bool]:
    """Run and report; whether everything that ended is clean, and whether everything ended."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
    environment.pop("DFLASH_DEBUG", None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the tools are stopped below
    deadline, clean = time.monotonic() + limit, True
    running: dict[tuple[str, str], tuple[subprocess.Popen[bytes], float]] = {}

    def log_of(tool: str, group: str) -> Path:
        return out / f"{tool}.{group}.log"

    def report_of(tool: str, group: str) -> ToolReport:
        log = log_of(tool, group)
        return parse_log(log.read_text(errors="replace") if log.is_file() else "", [group])

    waiting = []
    for tool in tools:
        for group in groups:
            if go_on and is_clean(before := report_of(tool, group)):
                print_report(tool, before, False, 0)
            else:
                log_of(tool, group).unlink(missing_ok=True)
                waiting.append((tool, group))
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < jobs:
                tool, group = waiting.pop(0)
                with log_of(tool, group).open("w") as log:
                    process = subprocess.Popen(
                        tool_command(sanitizer, tool, group),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        start_new_session=True,
                    )
                running[tool, group] = process, time.monotonic()
            time.sleep(0.05)
            for (tool, group), (process, started) in list(running.items()):
                hangs = time.monotonic() - started > GROUP_LIMIT
                if process.poll() is not None or hangs:
                    stop(process)
                    del running[tool, group]
                    clean &= print_report(tool, report_of(tool, group), hangs, process.returncode)
    finally:
        for process, _ in running.values():
            stop(process)
    for tool, group in [*running, *waiting]:
        print_report(tool, report_of(tool, group), True, None)
    return clean, not (running or waiting)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Every CUDA kernel once under compute-sanitizer.")
    parser.add_argument("--out", type=Path, help="folder of the logs (default: they are not kept)")
    parser.add_argument("--tools", default=",".join(TOOLS), help="of memcheck, racecheck, synccheck")
    parser.add_argument("--groups", default=",".join(GROUPS), help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--time-limit", type=float, default=90.0, help="seconds of all (90)")
    jobs = max(1, min(6, (os.cpu_count() or 1) // 2))
    parser.add_argument("--jobs", type=int, default=jobs, help=f"tools and groups side by side (here {jobs})")
    parser.add_argument("--go-on", action="store_true", help="keep what is clean in DIR, from a call for the same code")
    parser.add_argument("--calls-only", action="store_true", help="make the calls, without a sanitizer")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="of --calls-only")
    arguments = parser.parse_args(argv)
    groups, tools = arguments.groups.split(","), arguments.tools.split(",")
    for name in [name for name in groups if name not in GROUPS] + [name for name in tools if name not in TOOLS]:
        parser.error(f"there is no {name!r}; groups: {', '.join(GROUPS)}; tools: {', '.join(TOOLS)}")
    if arguments.calls_only:
        return 1 if make_calls(groups, arguments.device) else 0
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "sanitize: compute-sanitizer is neither on the PATH nor under $CUDA_HOME or /usr/local/cuda",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        limits = arguments.time_limit, max(1, arguments.jobs)
        clean, whole = run_tools(sanitizer, tools, groups, out, *limits, arguments.go_on)
    print(f"sanitize: {'clean' if clean else 'NOT CLEAN'}{'' if whole else ', as far as the time went'}")
    return UNFINISHED if not whole else 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())

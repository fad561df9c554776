"""Gate on the machine code of the built library: one rule per kernel, both architectures, no GPU needed.

    python tools/sass_table.py dflash_kernels/_C.abi3.so

Reads the library with cuobjdump and nvdisasm (PyPI: nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or the CUDA
toolkit's), prints a row per kernel and architecture, and fails with a line per violation of tools/sass_rules.toml.
Always: no local memory (spills, indexed local arrays), no stack, launch bounds on every kernel, static shared memory
within 48 KB.

Exit codes: 0 fine; 1 a rule is violated; 2 the tools or the library are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

RULES = Path(__file__).with_name("sass_rules.toml")
ARCHS = ("sm_90a", "sm_100f")
# Local memory: a spill, or an array indexed at run time.
NEVER = ("LDL", "STL")
MAXIMUM_STATIC_SHARED = 48 * 1024


@dataclass
class Code:
    """What one instance of a kernel is made of, on one architecture."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    max_threads: int = 0  # of __launch_bounds__; 0: none given
    opcodes: Counter[str] = field(default_factory=Counter)  # "HMMA": 64, ...


@dataclass(frozen=True)
class Rule:
    """A kernel's entry in sass_rules.toml; all its instances must keep it."""

    registers: int
    must: tuple[str, ...] = ()
    must_not: tuple[str, ...] = ()
    archs: tuple[str, ...] = ARCHS
    stack: int = 0


# -- reading --------------------------------------------------------------------------------------------------------


def find_tools() -> str | None:
    """Directory of cuobjdump and nvdisasm: of the PyPI packages if they are there, else of PATH."""
    spec = importlib.util.find_spec("nvidia")
    candidates = [f"{place}/cu13/bin" for place in (spec.submodule_search_locations or () if spec else ())]
    on_path = shutil.which("cuobjdump")
    candidates += [str(Path(on_path).parent)] if on_path else []
    for candidate in candidates:
        if all(Path(candidate, tool).is_file() for tool in ("cuobjdump", "nvdisasm")):
            return candidate
    return None


def dump(tools: str, library: Path, what: str) -> list[str]:
    environment = {**os.environ, "PATH": f"{tools}:{os.environ.get('PATH', '')}"}
    command = [f"{tools}/cuobjdump", what, str(library)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


Key = tuple[str, str]  # architecture, mangled name


def parse_resources(lines: Iterable[str], codes: dict[Key, Code]) -> None:
    """`cuobjdump -res-usage`: registers, stack, static shared memory."""
    arch = name = ""
    for line in lines:
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif match := re.match(r" Function ([^:]+):", line):
            name = match[1]
        elif "REG:" in line and name:
            usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            code = codes.setdefault((arch, name), Code())
            code.registers = usage["REG"]
            code.stack = usage["STACK"] + usage["LOCAL"]
            code.shared = usage["SHARED"]
            name = ""


def parse_opcodes(lines: Iterable[str], codes: dict[Key, Code]) -> None:
    """`cuobjdump -sass`: how often each opcode occurs, without its suffixes."""
    arch = ""
    code = Code()
    for line in lines:
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif match := re.match(r"\s+Function : (\S+)", line):
            code = codes.setdefault((arch, match[1]), Code())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            code.opcodes[match[1]] += 1


def parse_launch_bounds(lines: Iterable[str], codes: dict[Key, Code]) -> None:
    """`cuobjdump -elf`: the attribute that __launch_bounds__ leaves in the kernel's .nv.info section."""
    arch = name = attribute = ""
    for line in lines:
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif line.startswith(".nv.info."):
            name = line.removeprefix(".nv.info.").strip()
        elif line.startswith("."):
            name = ""
        elif match := re.match(r"\s+Attribute:\s+(\w+)", line):
            attribute = match[1]
        elif attribute == "EIATTR_MAX_THREADS" and name and (match := re.match(r"\s+Value:\s+(.*)", line)):
            threads = 1
            for extent in match[1].split():
                threads *= int(extent, 16)
            codes.setdefault((arch, name), Code()).max_threads = threads
            attribute = ""


def kernel_name(demangled: str) -> str:
    """`void dflash::gemm::(anonymous namespace)::kernel<(int)1>(Params)` as `dflash::gemm::kernel`."""
    name = demangled.replace("(anonymous namespace)::", "")
    depth, kept = 0, []
    for character in name:
        depth += character == "<"
        if depth == 0:
            if character == "(":
                break
            kept.append(character)
        depth -= character == ">"
    return "".join(kept).split()[-1]


def read_library(tools: str, library: Path) -> dict[Key, Code]:
    codes: dict[Key, Code] = {}
    parse_resources(dump(tools, library, "-res-usage"), codes)
    parse_opcodes(dump(tools, library, "-sass"), codes)
    parse_launch_bounds(dump(tools, library, "-elf"), codes)
    return codes


def by_kernel(codes: Mapping[Key, Code]) -> dict[Key, list[Code]]:
    """Instances grouped by architecture and kernel name."""
    names = sorted({name for _, name in codes})
    command = ["c++filt"] if shutil.which("c++filt") else ["cu++filt"]
    demangled = subprocess.run(command, input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = {name: kernel_name(text) for name, text in zip(names, demangled.splitlines(), strict=True)}
    grouped: dict[Key, list[Code]] = {}
    for (arch, name), code in codes.items():
        grouped.setdefault((arch, short[name]), []).append(code)
    return grouped


def occurrences(code: Code, opcode: str) -> int:
    """How often an opcode of a rule occurs; "REDUX|CREDUX": either, architectures name things differently."""
    return sum(code.opcodes[name] for name in opcode.split("|"))


# -- judging --------------------------------------------------------------------------------------------------------


def load_rules(path: Path = RULES) -> dict[str, Rule]:
    rules = {}
    for name, entry in tomllib.loads(path.read_text()).items():
        unknown = set(entry) - {"registers", "must", "must_not", "archs", "stack"}
        if unknown:
            raise ValueError(f"{path.name}: {name}: unknown {', '.join(sorted(unknown))}")
        rules[name] = Rule(
            registers=entry["registers"],
            must=tuple(entry.get("must", ())),
            must_not=tuple(entry.get("must_not", ())),
            archs=tuple(entry.get("archs", ARCHS)),
            stack=entry.get("stack", 0),
        )
    return rules


def violations(grouped: Mapping[Key, list[Code]], rules: Mapping[str, Rule], archs: Iterable[str]) -> list[str]:
    """One line for each thing that a kernel has and must not, or must have and has not."""
    found = []
    for (arch, name), instances in sorted(grouped.items()):
        rule = rules.get(name)
        if rule is None:
            found.append(f"{arch} {name}: must have an entry in tools/sass_rules.toml, got none")
            continue
        for code in instances:
            for limit, value, what in (
                (rule.registers, code.registers, "registers"),
                (rule.stack, code.stack, "bytes of stack and local memory"),
                (MAXIMUM_STATIC_SHARED, code.shared, "bytes of static shared memory"),
            ):
                if value > limit:
                    found.append(f"{arch} {name}: must use at most {limit} {what}, got {value}")
            if not code.max_threads:
                found.append(f"{arch} {name}: must carry __launch_bounds__, got none")
            if not code.opcodes:
                found.append(f"{arch} {name}: must have machine code, got none")
            found += [f"{arch} {name}: must contain {op}, got none" for op in rule.must if not occurrences(code, op)]
            # A batch of wgmma has a fence before and a wait behind it. ptxas puts them around every single one where it
            # cannot prove the accumulators untouched, and says so in a remark that is no warning (C7510 to C7515).
            products, fences = occurrences(code, "HGMMA|QGMMA"), code.opcodes["WARPGROUP"]
            if products and fences >= products:
                found.append(f"{arch} {name}: must issue wgmma in batches, got {fences} fences for {products} products")
            found += [
                f"{arch} {name}: must not contain {op}, got {code.opcodes[op]}"
                for op in (*(() if rule.stack else NEVER), *rule.must_not)
                if code.opcodes[op]
            ]
    for name, rule in rules.items():
        found += [
            f"{arch} {name}: has a rule, but the library has no such kernel"
            for arch in archs
            if arch in rule.archs and (arch, name) not in grouped
        ]
    return list(dict.fromkeys(found))


def table(grouped: Mapping[Key, list[Code]], rules: Mapping[str, Rule]) -> list[str]:
    rows = [("kernel", "arch", "instances", "registers", "shared", "threads", "instructions", "of note")]
    for (arch, name), instances in sorted(grouped.items(), key=lambda item: (item[0][1], item[0][0])):
        notable = rules[name].must if name in rules else ()
        counts = " ".join(f"{op}:{min(occurrences(code, op) for code in instances)}" for op in notable)
        rows.append(
            (
                name.removeprefix("dflash::"),
                arch,
                str(len(instances)),
                str(max(code.registers for code in instances)),
                str(max(code.shared for code in instances)),
                str(max(code.max_threads for code in instances)),
                str(max(code.opcodes.total() for code in instances)),
                counts,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Gate on the machine code of the built library.")
    parser.add_argument("library", type=Path)
    parser.add_argument("--archs", default=",".join(ARCHS), help=f"must all be there; default: {','.join(ARCHS)}")
    args = parser.parse_args(argv)
    tools = find_tools()
    if tools is None:
        print("sass_table: cuobjdump and nvdisasm are needed: pip install '.[audit]'", file=sys.stderr)
        return 2
    if not args.library.is_file():
        print(f"sass_table: {args.library} is not there", file=sys.stderr)
        return 2
    archs = args.archs.split(",")
    rules = load_rules()
    grouped = by_kernel(read_library(tools, args.library))
    found = [f"{arch}: the library has no code for it" for arch in archs if not any(a == arch for a, _ in grouped)]
    found += violations(grouped, rules, archs)
    print("\n".join(table(grouped, rules)))
    for line in found:
        print(f"sass_table: {line}", file=sys.stderr)
    print(f"sass_table: {len(grouped)} kernels, {len(found)} violations")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

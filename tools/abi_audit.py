"""Gate on what the built library asks of its surroundings: torch's stable C shim, Python's stable ABI, libc, libstdc++.

    python tools/abi_audit.py dflash_kernels/_C.abi3.so

Fails with a line per violation: an undefined symbol outside the list, a CUDA shim that is not weak (the library would
not load beside a CPU-only torch), a library needed that is not on the list, a run path, an export beyond PyInit__C;
and, where torch-abi-audit (PyPI) is installed, what that finds: symbols outside Python's stable ABI, shims that came
after torch 2.11. Needs nm and readelf (binutils).

Exit codes: 0 fine; 1 a violation; 2 the tools or the library are missing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

MINIMUM_TORCH = (2, 11)
NEEDED = {
    "libtorch.so",
    "libtorch_cpu.so",
    "libc10.so",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libm.so.6",
    "libc.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
ALLOWED = re.compile(
    r"""
    (aoti_torch|torch)_\w+                               # the C shim
    | Py[A-Z_]\w+                                        # torch-abi-audit checks that they are of the stable ABI
    | \S+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+              # versioned symbols of the C and C++ run times
    | _Z(N|NK|T[ISTV]|TI)?(St|S[aosi])\w*                # those of libstdc++ that nm shows without a version
    | _ZT[ISV]N10__cxxabiv1\w+
    | _ITM_(de)?registerTMCloneTable | __gmon_start__    # the linker's own
    """,
    re.VERBOSE,
)
CUDA_SHIM = re.compile(r"(aoti_torch|torch)_\w*cuda\w*")
# Constants, which every build of torch has.
CUDA_CONSTANT = "aoti_torch_device_type_cuda"
# Beside the module's init: templates of the C++ library, weak everywhere, and some linkers' own marks.
EXPORTED = re.compile(r"PyInit__C|_Z\w*St\w*|__bss_start|_edata|_end")


def undefined_violations(lines: list[str]) -> list[str]:
    """`nm -D --undefined-only`: "                 U name@VERSION" or "w name"."""
    found = []
    for line in lines:
        kind, symbol = line.split()
        name = symbol.split("@")[0]
        if not ALLOWED.fullmatch(symbol.replace("@@", "@")):
            found.append(f"undefined symbol {symbol} is not of the stable surface")
        elif CUDA_SHIM.fullmatch(name) and name != CUDA_CONSTANT and kind != "w":
            found.append(f"CUDA shim {name} must be declared weak")
    return found


def exported_violations(lines: list[str]) -> list[str]:
    names = [line.split()[-1].split("@")[0] for line in lines if line.split()]
    found = [f"symbol {name} must not be exported" for name in names if not EXPORTED.fullmatch(name)]
    return found if "PyInit__C" in names else [*found, "PyInit__C must be exported"]


def dynamic_violations(lines: list[str]) -> list[str]:
    """`readelf -d`: needed libraries and run paths."""
    found = []
    for line in lines:
        value = line[line.find("[") + 1 : line.rfind("]")]
        if "(NEEDED)" in line and value not in NEEDED:
            found.append(f"needed library {value} is not on the list")
        elif "(RPATH)" in line or "(RUNPATH)" in line:
            found.append(f"a run path must not be set, got {value}")
    return found


def report_violations(report: dict[str, Any]) -> list[str]:
    """torch-abi-audit's report (`--json`) on one library."""
    (module,) = report["extensions"]
    torch, python = module["torch"], module["cpython"]
    found = [f"torch-abi-audit: {module['error']}"] if module["error"] else []
    found += [f"symbol {name} is not of torch's stable ABI" for name in torch["unstable_symbols"]]
    found += [f"shim {name} is not known to any release of torch" for name in torch["unknown_shim_symbols"]]
    found += [f"Python's stable ABI: {violation}" for violation in python["violations"]]
    needed = torch["min_torch_version"] or "0.0"
    if tuple(int(part) for part in needed.split(".")[:2]) > MINIMUM_TORCH:
        found.append(f"{', '.join(torch['version_defining_symbols'])} must be in torch 2.11, got {needed}")
    return found


def output(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Gate on the symbols and libraries that the built library needs.")
    parser.add_argument("library", type=Path)
    library = parser.parse_args(argv).library
    missing = [tool for tool in ("nm", "readelf") if shutil.which(tool) is None]
    if missing or not library.is_file():
        print(f"abi_audit: {', '.join(missing) or library} is not there", file=sys.stderr)
        return 2
    undefined = output("nm", "-D", "--undefined-only", str(library))
    found = undefined_violations(undefined)
    found += exported_violations(output("nm", "-D", "--defined-only", str(library)))
    found += dynamic_violations(output("readelf", "-d", str(library)))
    auditor = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent))
    if auditor is not None:
        found += report_violations(json.loads("".join(output(auditor, "--json", str(library)))))
    for line in found:
        print(f"abi_audit: {line}", file=sys.stderr)
    shims = sum("torch_" in line for line in undefined)
    without = "" if auditor else " (without torch-abi-audit)"
    print(f"abi_audit: {len(undefined)} undefined symbols, {shims} of torch's C shim, {len(found)} violations{without}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

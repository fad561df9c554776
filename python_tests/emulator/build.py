"""Builds a library that registers the CUDA side of the ops as `torch.ops.dflash_emulated`, for CPU tensors.

The kernels are the production sources of csrc/smxx, csrc/sm90 and csrc/sm100. Three spellings that only nvcc reads are
translated (`translate`); the rest is done by headers of this folder that come before the toolkit's and the project's.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"

# name<args><<<grid, threads, bytes, stream>>>(
_LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>\(", re.DOTALL)
_CLUSTER = re.compile(r"__cluster_dims__\(([^)]*)\)[^;{]*?(\w+)\(\w+ \w+", re.DOTALL)
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+) (\w+)\[\];")
_STATIC = re.compile(r"(?<!extern )__shared__ ([^;]+);")
_DECLARATION = re.compile(r"(.+?)\s+(\w+)((?:\[.*\])?)", re.DOTALL)

_TOOLKIT = Path("/usr/local/cuda/include")  # without nvcc on the path


def translate(source: str) -> str:
    """C++ for the emulator from the text of a .cu file."""
    clusters = {name: dims for dims, name in _CLUSTER.findall(source)}

    def launch(match: re.Match[str]) -> str:
        kernel, configuration = match.groups()
        cluster = clusters.get(kernel.split("<")[0], "")
        return f"::dflash::emulator::launcher({kernel}, dim3{{{cluster}}}, {configuration})("

    variables = 0

    def shared(match: re.Match[str]) -> str:
        nonlocal variables
        first, *others = match[1].split(",")
        declared = _DECLARATION.fullmatch(first)
        assert declared, first
        kind, lines = declared[1], []
        for name, dims in [(declared[2], declared[3]), *((other.strip(), "") for other in others)]:
            lines.append(f"auto& {name} = ::dflash::emulator::shared_variable<{kind}{dims}>({variables});")
            variables += 1
        return " ".join(lines)

    source = _DYNAMIC.sub(r"auto* \2 = reinterpret_cast<\1*>(::dflash::emulator::dynamic_shared());", source)
    source = _STATIC.sub(shared, source)
    return _LAUNCH.sub(launch, source)


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if compiler() is None:
        return "no C++ compiler"
    if toolkit() is None:
        return "no CUDA headers (cuda_runtime_api.h, cuda_bf16.h)"
    return None


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def toolkit() -> Path | None:
    """Folder of the CUDA toolkit's headers; the compiler is not needed."""
    folders = [_TOOLKIT]
    if nvcc := shutil.which("nvcc"):
        folders.insert(0, Path(nvcc).resolve().parents[1] / "include")
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


def build(folder: Path, changes: Mapping[str, tuple[str, str]] | None = None) -> Path:
    """The library, built in `folder`; objects and the library are used again where nothing has changed.

    Args:
        changes: csrc-relative file -> (text, replacement), to see a test fail. Of a header, only what includes it by
            itself sees the change.
    """
    changes = changes or {}
    include = Path(torch.__file__).parent / "include"
    cuda = toolkit()
    assert cuda, missing()
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-fvisibility=hidden"]
    sanitize = ["-fsanitize=address", "-g"] if os.environ.get("DFLASH_EMULATED_ASAN") == "1" else []
    flags += sanitize
    flags += [f"-I{HERE}", f"-I{CSRC}", "-isystem", str(cuda), "-isystem", str(include)]
    flags += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DDFLASH_WITH_CUDA=1"]
    flags += ["-DDFLASH_WITH_SM90=1", "-DDFLASH_WITH_SM100=1"]
    command = [*([ccache] if (ccache := shutil.which("ccache")) else []), str(compiler()), *flags]
    common = [path for path in sorted(HERE.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    common += sorted(path for suffix in ("h", "cuh") for path in CSRC.rglob(f"*.{suffix}"))
    state = hashlib.sha256("".join([*command, *(path.read_text() for path in common)]).encode())

    sources = [(path, ["-include", "api_on_cpu.h"]) for path in sorted(CSRC.glob("api/*.cpp"))]
    sources = [item for item in sources if item[0].name != "library.cpp"]  # the namespace `dflash` and the module
    sources += [(path, ["-include", "cuda_runtime.h"]) for path in sorted(CSRC.glob("sm*/*/*.cu"))]
    sources += [(path, []) for path in [*sorted(CSRC.glob("cpu/*.cpp")), HERE / "emulator.cpp"]]
    sources += [(HERE / "tensor_cores.cpp", ["-O3"])]  # much arithmetic

    def changed(text: str, name: str) -> str:
        old, new = changes[name]
        assert old in text, f"{name} has no {old!r}"
        return text.replace(old, new)

    headers = [name for name in changes if not name.endswith((".cu", ".cpp"))]
    used = set()

    def compile_one(item: tuple[Path, list[str]]) -> Path:
        path, options = item
        text = path.read_text()
        name = str(path.relative_to(CSRC)) if path.is_relative_to(CSRC) else ""
        if name in changes:
            used.add(name)
            text = changed(text, name)
        for header in headers:
            line = f'#include "{header}"'
            if line in text:
                used.add(header)
                text = text.replace(line, changed((CSRC / header).read_text(), header).replace("#pragma once", ""))
        if path.suffix == ".cu":
            text = f'#line 1 "{path}"\n' + translate(text)
        key = state.copy()
        key.update(f"{path.name} {options} {text}".encode())
        stem = folder / f"{path.parent.parent.name}-{path.parent.name}-{path.stem}-{key.hexdigest()[:16]}"
        made = stem.with_suffix(".o")
        if not made.exists():
            unit = stem.with_suffix(".cpp")
            unit.write_text(text)
            part = stem.with_suffix(".part")
            run([*command, *options, "-c", str(unit), "-o", str(part)])
            part.rename(made)
        return made

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sources))
    assert used == set(changes), f"no such source: {set(changes) - used}"
    names = hashlib.sha256(" ".join(made.name for made in objects).encode()).hexdigest()[:16]
    library = folder / f"emulated-{names}.so"
    if not library.exists():
        part = library.with_suffix(".part")
        libraries = [f"-L{include.parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        run([str(compiler()), *sanitize, "-shared", "-Wl,-Bsymbolic", "-o", str(part), *map(str, objects), *libraries])
        part.rename(library)
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}"[-6000:])

"""Builds dflash_kernels/_C.abi3.so with CMake and Ninja, and the optional pybind11 host module `_host`.

DFLASH_WITH_CUDA=0|1   build the CUDA kernels; default: 1 where nvcc is found
DFLASH_CUDA_ARCHS      default "90a;100f" ("90a;100a" with CUDA 12.8, which knows no family architectures)
MAX_JOBS               compile jobs at a time; default: the CPUs this process may use, 16 at most

torch's own CUDAExtension is of no use here: beside a CPU-only torch it forgets where CUDA is.
The functions are also used by tools/build_backend.py and by the tests, so importing this file builds nothing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
MINIMUM_CUDA = (12, 8)
# The first CUDA with family architectures (100f runs on every part of the sm_10x family).
FAMILY_CUDA = (12, 9)
MAXIMUM_LIBRARY_BYTES = 64 * 2**20


class Torch(NamedTuple):
    directory: Path
    version: str


class Nvcc(NamedTuple):
    path: str
    version: tuple[int, int]


def fail(message: str) -> NoReturn:
    sys.exit(f"dflash-kernels: {message}")


def version_tuple(text: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        fail(f"a version was expected, got {text!r}")
    return int(match[1]), int(match[2])


# -- torch ----------------------------------------------------------------------------------------------------------

_FIND_TORCH = """
import importlib.metadata, importlib.util
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin is not None:
    print(spec.origin)
    print(importlib.metadata.version("torch"))
"""


def find_torch() -> Torch | None:
    """The torch to build against, found without importing it; None: there is none.

    pip builds in an environment of its own, but runs the target environment's interpreter and hides its packages with
    PYTHONPATH only: asked in a process without that, the interpreter still finds the torch that will load the library.
    Front ends that make a whole environment (uv, build) see what pyproject.toml and tools/build_backend.py ask for.
    """
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    for environment in (dict(os.environ), {k: v for k, v in os.environ.items() if k not in hidden}):
        # -P: the current directory is this source tree, not a place to find torch in.
        run = subprocess.run([sys.executable, "-P", "-c", _FIND_TORCH], env=environment, capture_output=True, text=True)
        lines = run.stdout.splitlines()
        if run.returncode == 0 and len(lines) == 2:
            return Torch(Path(lines[0]).parent, lines[1])
    return None


def checked_torch(torch: Torch | None) -> Torch:
    if torch is None:
        fail("torch 2.11 or newer must be installed before building, found none")
    if version_tuple(torch.version) < MINIMUM_TORCH:
        fail(f"torch 2.11 or newer is needed, found {torch.version}")
    return torch


# -- compilers ------------------------------------------------------------------------------------------------------


def check_compiler() -> None:
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        fail(f"a C++17 compiler is needed, found no {command[0]} (Debian: apt install g++)")


def find_nvcc() -> Nvcc | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate and Path(candidate).is_file():
            text = subprocess.run([candidate, "--version"], capture_output=True, text=True).stdout
            release = re.search(r"release (\d+\.\d+)", text)
            if release is None:
                fail(f"{candidate} --version must name a release, got {text.strip()!r}; DFLASH_WITH_CUDA=0 skips CUDA")
            return Nvcc(candidate, version_tuple(release[1]))
    return None


def cuda_compiler(nvcc: Nvcc | None) -> Nvcc | None:
    """nvcc if the CUDA kernels are to be built, None for a CPU-only build."""
    wanted = os.environ.get("DFLASH_WITH_CUDA", "").lower()
    if wanted not in ("", "0", "off", "1", "on"):
        fail(f"DFLASH_WITH_CUDA must be 0 or 1, got {wanted}")
    if wanted in ("0", "off"):
        return None
    if nvcc is None:
        if wanted:
            fail("DFLASH_WITH_CUDA=1 needs nvcc of CUDA 12.8 or newer, found none")
        return None
    if nvcc.version < MINIMUM_CUDA:
        found = "{}.{}".format(*nvcc.version)
        fail(f"CUDA 12.8 or newer is needed, found {found} ({nvcc.path}); DFLASH_WITH_CUDA=0 builds for the CPU only")
    return nvcc


def cuda_archs(nvcc: Nvcc) -> str:
    """The architectures to build, as CMake wants them: "90a;100f"."""
    families = nvcc.version >= FAMILY_CUDA
    archs = os.environ.get("DFLASH_CUDA_ARCHS") or ("90a;100f" if families else "90a;100a")
    for arch in archs.split(";"):
        if re.fullmatch(r"\d{2,3}[af]?", arch) is None:
            fail(f'DFLASH_CUDA_ARCHS must be a list such as "90a;100f", got {archs!r}')
        if arch.endswith("f") and not families:
            fail(f"DFLASH_CUDA_ARCHS: {arch} needs CUDA 12.9 or newer, found {'{}.{}'.format(*nvcc.version)}")
    return archs


def compile_jobs() -> int:
    wanted = os.environ.get("MAX_JOBS") or str(min(len(os.sched_getaffinity(0)), 16))
    if not wanted.isdecimal() or int(wanted) < 1:
        fail(f"MAX_JOBS must be a number of at least 1, got {wanted}")
    return int(wanted)


def has_host_module() -> bool:
    return importlib.util.find_spec("pybind11") is not None and any(ROOT.glob("csrc/host/*.cpp"))


# -- build ----------------------------------------------------------------------------------------------------------


def build_library() -> Path:
    """Configure and compile what changed since the last call; returns the directory with the libraries."""
    torch = checked_torch(find_torch())
    check_compiler()
    nvcc = cuda_compiler(find_nvcc())
    build = ROOT / "build" / ("cuda" if nvcc else "cpu")
    options = [
        f"-DPython3_EXECUTABLE={sys.executable}",
        f"-DDFLASH_TORCH_DIR={torch.directory}",
        f"-DDFLASH_WITH_CUDA={'ON' if nvcc else 'OFF'}",
        f"-DDFLASH_WITH_HOST={'ON' if has_host_module() else 'OFF'}",
    ]
    if nvcc:
        options += [f"-DCMAKE_CUDA_COMPILER={nvcc.path}", f"-DDFLASH_CUDA_ARCHS={cuda_archs(nvcc)}"]
    # CMake's cache keeps what it found for another Python, torch or compiler: start afresh when one of them changed.
    stamp = build / "options.txt"
    fresh = ["--fresh"] if stamp.is_file() and stamp.read_text() != "\n".join(options) else []
    cmake = ["cmake", *fresh, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options]
    # Never from the cache: in an isolated build, ninja lies in a directory that is gone the next time.
    cmake += [f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or fail('ninja is needed, found none')}"]
    for command in (cmake, ["cmake", "--build", str(build), "-j", str(compile_jobs())]):
        if subprocess.run(command).returncode != 0:
            fail(f"the build failed at: {shlex.join(command)}")
        stamp.write_text("\n".join(options))
    return build


def check_library_size(library: Path) -> None:
    size = library.stat().st_size
    if size >= MAXIMUM_LIBRARY_BYTES:
        fail(f"{library.name} must be smaller than {MAXIMUM_LIBRARY_BYTES} bytes, got {size}")


class CMakeBuild(build_ext):
    def run(self) -> None:
        self.build_directory = build_library()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        built = self.build_directory / target.name
        check_library_size(built)
        # A new file, not new content: a process that has the old library mapped keeps it whole.
        target.unlink(missing_ok=True)
        shutil.copy2(built, target)

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("._C"):
            return str(Path(*fullname.split("."))) + ".abi3.so"
        return super().get_ext_filename(fullname)


class Abi3Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.py_limited_api = "cp311"


if __name__ == "__main__":
    extensions = [Extension("dflash_kernels._C", sources=[], py_limited_api=True)]
    if has_host_module():
        extensions.append(Extension("dflash_kernels._host", sources=[]))
    setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Abi3Wheel})

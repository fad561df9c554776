"""Builds dflash_kernels/_C.abi3.so with CMake and Ninja, and the optional pybind11 host module.

DFLASH_WITH_CUDA=0|1   build the CUDA kernels; default: 1 where nvcc 12.8 or newer is found
DFLASH_CUDA_ARCHS      default "90a;100f"

torch's own CUDAExtension is of no use here: beside a CPU-only torch it forgets where CUDA is.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
MINIMUM_CUDA = (12, 8)


def fail(message: str) -> None:
    sys.exit(f"dflash-kernels: {message}")


def version_tuple(text: str) -> tuple[int, int]:
    major, minor = re.match(r"(\d+)\.(\d+)", text).groups()  # type: ignore[union-attr]
    return int(major), int(minor)


def torch_dir() -> Path:
    """Where torch lies, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail("torch 2.11 or newer must be installed before building, found none")
    version = importlib.metadata.version("torch")
    if version_tuple(version) < MINIMUM_TORCH:
        fail(f"torch 2.11 or newer is needed, found {version}")
    return Path(spec.origin).parent


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate and Path(candidate).is_file():
            return candidate
    return None


def with_cuda(nvcc: str | None) -> bool:
    wanted = os.environ.get("DFLASH_WITH_CUDA")
    if wanted in ("0", "OFF", "off"):
        return False
    if nvcc is None:
        if wanted:
            fail("DFLASH_WITH_CUDA=1 needs nvcc 12.8 or newer, found none")
        return False
    found = re.search(r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if found is None or version_tuple(found[1]) < MINIMUM_CUDA:
        fail(f"CUDA 12.8 or newer is needed, found {found[1] if found else 'none'}; DFLASH_WITH_CUDA=0 builds for the CPU only")
    return True


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.name != "dflash_kernels._C":
            super().build_extension(ext)
            return
        torch = torch_dir()
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            fail("a C++17 compiler is needed, found none (Debian: apt install g++)")
        nvcc = find_nvcc()
        cuda = with_cuda(nvcc)
        build = ROOT / "build" / f"cmake-{'cuda' if cuda else 'cpu'}"
        options = [
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DDFLASH_TORCH_DIR={torch}",
            f"-DDFLASH_WITH_CUDA={'ON' if cuda else 'OFF'}",
        ]
        if cuda:
            options += [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
            options += [f"-DDFLASH_CUDA_ARCHS={os.environ.get('DFLASH_CUDA_ARCHS', '90a;100f')}"]
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *options], check=True)
        jobs = os.environ.get("MAX_JOBS", str(min(os.cpu_count() or 1, 16)))
        subprocess.run(["cmake", "--build", build, "-j", jobs], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "_C.abi3.so", target)

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == "_C":
            return str(Path(*fullname.split("."))) + ".abi3.so"
        return super().get_ext_filename(fullname)


class Abi3Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.py_limited_api = "cp311"


setup(
    ext_modules=[Extension("dflash_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Abi3Wheel},
)

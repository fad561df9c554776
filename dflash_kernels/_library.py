"""Finds and loads the shared library that registers `torch.ops.dflash`."""

from __future__ import annotations

from pathlib import Path

import torch

_MINIMUM_TORCH = (2, 11)


def library_path() -> Path:
    """Path of the compiled library; it may not exist."""
    return Path(__file__).parent / "_C.abi3.so"


def load_library() -> None:
    """Register the operators.

    Raises:
        ImportError: the library is missing, or torch is too old for it.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _MINIMUM_TORCH:
        raise ImportError(f"dflash-kernels needs torch >= 2.11, got {torch.__version__}")
    path = library_path()
    if not path.exists():
        raise ImportError(
            f"dflash-kernels: the compiled library {path.name} is not beside the package; "
            "install with `pip install .`, or run `make dev` in a source tree"
        )
    torch.ops.load_library(str(path))

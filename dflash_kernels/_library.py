"""Finds and loads the shared library that registers `torch.ops.dflash`."""

from __future__ import annotations

import struct
from pathlib import Path

_MINIMUM_TORCH = (2, 11)
_HOW_TO_INSTALL = "install with `pip install .`, or run `make dev` in a source tree"


def library_path() -> Path:
    """Path of the compiled library; it may not exist."""
    return Path(__file__).parent / "_C.abi3.so"


def check_torch() -> str:
    """Version of the installed torch.

    Raises:
        ImportError: torch is missing or too old for the library.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"dflash-kernels needs torch >= 2.11, which cannot be imported: {error}") from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < _MINIMUM_TORCH:
        raise ImportError(f"dflash-kernels needs torch >= 2.11, got {torch.__version__}")
    return str(torch.__version__)


def load_library() -> None:
    """Register the operators.

    Raises:
        ImportError: the library is missing or cannot be loaded, or torch is too old for it.
    """
    version = check_torch()
    path = library_path()
    if not path.exists():
        raise ImportError(
            f"dflash-kernels: the compiled library {path.name} is not beside the package; {_HOW_TO_INSTALL}"
        )
    _check_whole(path)
    import torch

    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"dflash-kernels: {path.name} does not load beside torch {version}: {error}; {_HOW_TO_INSTALL}"
        ) from error


def _check_whole(path: Path) -> None:
    """Loading a cut-off ELF file kills the process, so its length is compared with what its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        raise ImportError(f"dflash-kernels: {path.name} must be a 64-bit ELF library, got {size} other bytes")
    (sections_at,) = struct.unpack_from("<Q", header, 40)
    section_bytes, section_count = struct.unpack_from("<HH", header, 58)
    needed = sections_at + section_bytes * section_count
    if size < needed:
        raise ImportError(
            f"dflash-kernels: {path.name} must have {needed} bytes, got {size}: the file is cut off; {_HOW_TO_INSTALL}"
        )

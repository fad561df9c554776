"""CUDA kernels for DFlash block-diffusion speculative decoding, as torch custom ops.

Importing the package registers `torch.ops.dflash.*`; `dflash_kernels.ops` is their documented Python face.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflash_kernels._library import load_library

if TYPE_CHECKING:
    from dflash_kernels import ops

__version__ = "0.1.0"
__all__ = ["__version__", "ops"]


def _runs_as_command() -> bool:
    """Whether this process is `dflash-kernels` or `python -m dflash_kernels`."""
    as_module = any(pair == ("-m", __name__) for pair in zip(sys.orig_argv, sys.orig_argv[1:], strict=False))
    return as_module or Path(sys.argv[0] if sys.argv else "").stem == "dflash-kernels"


# Why the ops cannot be used. Importing raises it; only the command goes on, so that its `doctor` can say what to fix.
load_error: ImportError | None = None
try:
    load_library()
    importlib.import_module("dflash_kernels.ops")  # after the library: fakes need the registered schemas
except ImportError as error:
    load_error = error
except RuntimeError as error:  # torch's answer to a fake for an op that is not registered
    load_error = ImportError(f"dflash-kernels: the compiled library does not belong to this package: {error}")
if load_error is not None and not _runs_as_command():
    raise load_error


def __getattr__(name: str) -> Any:
    if name == "ops" and load_error is not None:
        raise ImportError(str(load_error)) from load_error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

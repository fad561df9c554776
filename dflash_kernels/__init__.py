"""CUDA kernels for DFlash block-diffusion speculative decoding, as torch custom ops.

Importing the package registers `torch.ops.dflash.*`; `dflash_kernels.ops` is their documented Python face. Where the
library cannot be loaded, importing warns and `dflash_kernels.ops` raises the reason, so that `dflash-kernels doctor`
still runs and says what to fix.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from dflash_kernels._library import load_library

if TYPE_CHECKING:
    from dflash_kernels import ops

__version__ = "0.1.0"
__all__ = ["__version__", "ops"]

load_error: ImportError | None = None
try:
    load_library()
    importlib.import_module("dflash_kernels.ops")  # after the library: fakes need the registered schemas
except ImportError as error:
    load_error = error
except RuntimeError as error:  # torch's answer to a fake for an op that is not registered
    load_error = ImportError(f"dflash-kernels: the compiled library does not belong to this package: {error}")
if load_error is not None:
    warnings.warn(f"{load_error} (`dflash-kernels doctor` checks the install)", RuntimeWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    if name == "ops" and load_error is not None:
        raise ImportError(str(load_error)) from load_error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

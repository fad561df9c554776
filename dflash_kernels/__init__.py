"""CUDA kernels for DFlash block-diffusion speculative decoding, as torch custom ops.

Importing the package registers `torch.ops.dflash.*`; `dflash_kernels.ops` is their documented Python face.
"""

from dflash_kernels._library import load_library

__version__ = "0.1.0"

load_library()

from dflash_kernels import ops  # noqa: E402  (the ops' fakes need the registered schemas)

__all__ = ["__version__", "ops"]

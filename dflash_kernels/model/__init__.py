"""Drafter configuration, checkpoint loading and the demo target.

`load_drafter` is the way in: config.json and safetensors of either published layout become a `Drafter` that the engine
binds to its target. `quantize_drafter` writes one with fp8 or 4-bit weights, which `load_drafter` reads as well.
"""

from dflash_kernels.formats import QuantizedWeight, WeightFormat
from dflash_kernels.model.config import DrafterConfig, load_config
from dflash_kernels.model.drafter import Drafter, load_drafter
from dflash_kernels.model.quantize import quantize_drafter
from dflash_kernels.model.rope import RopeConfig
from dflash_kernels.model.weights import DrafterWeights

__all__ = [
    "Drafter",
    "DrafterConfig",
    "DrafterWeights",
    "QuantizedWeight",
    "RopeConfig",
    "WeightFormat",
    "load_config",
    "load_drafter",
    "quantize_drafter",
]

"""The embedded engine: lossless DFlash generation with a Hugging Face target (see :class:`Engine`)."""

from dflash_kernels.engine.draft import DrafterLike
from dflash_kernels.engine.engine import Engine, GenerationResult, GenerationStream, TokenEvent, check_fit
from dflash_kernels.engine.kv_pool import DrafterKvPool
from dflash_kernels.engine.sampling import SamplingParams
from dflash_kernels.engine.stats import EngineStats, RequestStats
from dflash_kernels.engine.target import TargetOutput, TargetRunner, load_target

__all__ = [
    "DrafterKvPool",
    "DrafterLike",
    "Engine",
    "EngineStats",
    "GenerationResult",
    "GenerationStream",
    "RequestStats",
    "SamplingParams",
    "TargetOutput",
    "TargetRunner",
    "TokenEvent",
    "check_fit",
    "load_target",
]

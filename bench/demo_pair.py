"""The demo pair for end-to-end runs: SmolLM2-135M-Instruct and the drafter shipped with the package."""

from __future__ import annotations

import copy
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dflash_kernels.cli import DEMO_DRAFTER

__all__ = ["load_demo_pair"]


@cache
def _target() -> tuple[Any, Any]:
    """Target in fp32 on the CPU, and its tokenizer: read once, since reading takes longer than most rows."""
    from transformers.utils import logging

    from dflash_kernels.model.smollm2 import load_smollm2

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    where = os.environ.get("DFLASH_DEMO_GGUF")
    return load_smollm2(path=Path(where) if where else None)


def load_demo_pair(dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, Any]:
    """Target, tokenizer and drafter; the target's GGUF file is `DFLASH_DEMO_GGUF`, else that of the demo package.

    TF32 is switched off: fp32 means fp32, or passes of different shapes round differently.

    Raises:
        FileNotFoundError: the target or the drafter is not there.
    """
    from dflash_kernels.model.drafter import load_drafter

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if not (DEMO_DRAFTER / "config.json").is_file():
        raise FileNotFoundError(f"the demo drafter is not there: {DEMO_DRAFTER}")
    loaded, tokenizer = _target()
    model = copy.deepcopy(loaded).to(dtype)
    # The rotary frequencies stay in fp32, as transformers keeps them.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model = model.to(device)
    return model, tokenizer, load_drafter(DEMO_DRAFTER).bind(model)

"""What was measured to be best on this machine: a small file, read where the package would else take a default.

`python -m bench.tune` writes it. Everything in it changes speed only: how many blocks a streaming kernel has, whether a
drafter's layers are streamed at all, and from how many bytes of logits greedy verification skips rows. Another number
of blocks adds the same products up in another order, so bf16 results may differ in their last bit.

The file is JSON, machine -> parameter -> value::

    {"NVIDIA H100 80GB HBM3, 132 SMs, library 0123456789ab": {
        "verify_block": {"lazy_bytes": 100663296},
        "draft": {"L5 H4096 I12288 32/8x128 bf16": {"blocks": 132}}}}

`DFLASH_TUNING` is its path, or ``off``; without it ``dflash-kernels/tuning.json`` in the user's cache directory. A
machine is a card, its number of multiprocessors and the library's digest, so a rebuilt library is tuned anew. A file
that cannot be read, or a value that cannot be used, is left out with a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dflash_kernels._library import library_path
from dflash_kernels.formats import WeightFormat

__all__ = [
    "VARIABLE",
    "draft_shape",
    "forget",
    "head_shape",
    "inject_shape",
    "lazy",
    "machine",
    "path",
    "read",
    "save",
    "stream_blocks",
]

VARIABLE = "DFLASH_TUNING"
OFF = ("off", "0")


def path() -> Path | None:
    """Where the file is or would be; None where tuning is switched off."""
    named = os.environ.get(VARIABLE, "").strip()
    if named.lower() in OFF:
        return None
    if named:
        return Path(named)
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "dflash-kernels" / "tuning.json"


@cache
def library_digest() -> str:
    """Of the compiled library, 12 hexadecimal digits."""
    return hashlib.sha256(library_path().read_bytes()).hexdigest()[:12]


def machine(device: torch.device) -> str:
    """The file's key for a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.multi_processor_count} SMs, library {library_digest()}"


def draft_shape(
    layers: int, hidden: int, inner: int, heads: tuple[int, int], head_dim: int, weight_format: WeightFormat | None
) -> str:
    """The key of a drafter's layers."""
    kind = "bf16" if weight_format is None else str(weight_format)
    return f"L{layers} H{hidden} I{inner} {heads[0]}/{heads[1]}x{head_dim} {kind}"


def head_shape(vocab: int, hidden: int, weight_format: WeightFormat | None) -> str:
    """The key of an LM head."""
    return f"V{vocab} H{hidden} {'bf16' if weight_format is None else weight_format}"


def inject_shape(taps: int, hidden: int, num_heads: int, head_dim: int) -> str:
    """The key of an injection; ``num_heads`` = L * 2 * Hkv."""
    return f"K{taps} H{hidden} {num_heads}x{head_dim}"


def stream_blocks(kind: str, shape: str, device: torch.device, default: int | None = None) -> int:
    """Blocks of a streaming kernel: as measured, else `default`, else one a multiprocessor (1 without a GPU).

    Args:
        kind: "draft", "head" or "inject"; shape: its key.

    Returns:
        At least 1; of a "draft" also 0, where the chain of kernels was faster than the streaming one.
    """
    if device.type != "cuda":
        return 1
    most = torch.cuda.get_device_properties(device).multi_processor_count
    value = _entry(kind, device).get(shape)
    blocks = value.get("blocks") if isinstance(value, dict) else None
    if blocks is None:
        return most if default is None else default
    least = 0 if kind == "draft" else 1
    if not isinstance(blocks, int) or isinstance(blocks, bool) or not least <= blocks <= most:
        _warn(f"{kind} {shape}: blocks must be in {least}..{most}, got {blocks!r}")
        return most
    return blocks


def lazy(logits: torch.Tensor) -> int:
    """`verify_block`'s `lazy` for CUDA logits that are all to be read or not: 0 or 1 as measured, -1 by default."""
    limit = _lazy_bytes(logits.device)
    return -1 if limit is None else int(logits.nbytes >= limit)


@cache
def _lazy_bytes(device: torch.device) -> int | None:
    value = _entry("verify_block", device).get("lazy_bytes")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        _warn(f"verify_block: lazy_bytes must be a whole number, got {value!r}")
        return None
    return value


def forget() -> None:
    """Read the file anew at the next question."""
    _load.cache_clear()
    _lazy_bytes.cache_clear()


def save(where: Path, key: str, found: dict[str, Any]) -> None:
    """Put a machine's values into the file, beside those of other machines; whole or not at all.

    Raises:
        ValueError: the file holds something else than tuning.
        OSError: it cannot be written.
    """
    whole = read(where) if where.is_file() else {}
    whole[key] = {**whole.get(key, {}), **found}
    where.parent.mkdir(parents=True, exist_ok=True)
    partial = where.with_name(where.name + ".part")
    partial.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(where)
    forget()


def _entry(kind: str, device: torch.device) -> dict[str, Any]:
    where = path()
    if where is None or not where.is_file():
        return {}
    value = _load(where).get(machine(device), {}).get(kind, {})
    return value if isinstance(value, dict) else {}


@cache
def _load(where: Path) -> dict[str, dict[str, Any]]:
    try:
        return read(where)
    except (OSError, ValueError) as error:
        _warn(str(error))
        return {}


def read(where: Path) -> dict[str, dict[str, Any]]:
    """All machines of a file.

    Raises:
        ValueError: it is no JSON, or something else; OSError: it cannot be read.
    """
    try:
        whole = json.loads(where.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(whole, dict) or not all(isinstance(value, dict) for value in whole.values()):
        raise ValueError(f"{where} must hold an object of objects")
    return whole


def _warn(what: str) -> None:
    warnings.warn(f"dflash-kernels: tuning left out: {what}", stacklevel=3)

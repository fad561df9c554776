"""SGLang's Triton kernels, taken from the files of an installed SGLang as baselines.

SGLang itself cannot be imported without its whole GPU stack; the files of these kernels need torch and Triton alone.
Nothing is copied into this repository: what is not installed is not a baseline.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["assign_req_to_token_pool", "find", "version"]

_DFLASH = "kernels/ops/speculative/dflash.py"
# Where SGLang keeps each function (0.5.23; but for row_argmax, 0.5.16 too).
_FILES = {
    "_compute_dflash_accept_bonus_triton_unchecked": _DFLASH,
    "_prepare_dflash_draft_block_unchecked": _DFLASH,
    "_fused_norm_rope_stacked": "kernels/ops/speculative/fused_kv_materialize.py",
    "row_argmax": "kernels/ops/speculative/row_argmax.py",
    "get_last_loc_triton": "kernels/ops/memory/common.py",
    "alloc_extend_kernel": "kernels/ops/memory/allocator.py",
}


def version() -> str:
    """Version of the installed SGLang.

    Raises:
        ImportError: there is none.
    """
    return importlib.metadata.version("sglang")


def _root() -> Path:
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise ImportError("sglang is not installed")
    return Path(spec.origin).parent


@cache
def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sglang_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find(name: str) -> Any:
    """A function or kernel of SGLang by name.

    Raises:
        ImportError, AttributeError, OSError: SGLang, the file or the name is not there.
    """
    return getattr(_load(_root() / _FILES[name]), name)


@cache
def assign_req_to_token_pool() -> Callable[..., None]:
    """The launch that writes `req_to_token`. Its file needs all of SGLang, so the one kernel is loaded from a cutting.

    Raises:
        ImportError, OSError: SGLang, the file or the kernel is not there.
    """
    source = (_root() / "srt/mem_cache/allocation.py").read_text(encoding="utf-8")
    name = "assign_req_to_token_pool"
    node = next((n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name), None)
    if node is None:
        raise ImportError(name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = source.splitlines()[first - 1 : node.end_lineno]
    cutting = Path(tempfile.mkdtemp()) / f"{name}.py"  # Triton reads a kernel's source from its file
    cutting.write_text("\n".join(["import triton", "import triton.language as tl", *lines]) + "\n", encoding="utf-8")
    kernel = getattr(_load(cutting), name)

    def assign(rows: Any, table: Any, starts: Any, ends: Any, slots: Any, batch: int) -> None:
        kernel[(batch,)](rows, table, starts, ends, slots, table.shape[1], 1 << max(batch - 1, 0).bit_length())

    return assign

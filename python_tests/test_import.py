"""Importing the package, each time in an interpreter of its own: a mistake in a schema ends the process at load."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dflash_kernels
from dflash_kernels._library import library_path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(dflash_kernels.__file__).parent

REPORT = """
import json
import sys
import dflash_kernels
import torch
print(json.dumps({
    "schemas": [str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("dflash::")],
    "modules": sorted(m for m in sys.modules if m.split(".")[0] in ("transformers", "safetensors", "sglang", "rich")),
}))
"""


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def report() -> dict[str, list[str]]:
    run = python(REPORT, ROOT)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def public(report: dict[str, list[str]]) -> dict[str, str]:
    """Name with overload -> schema; not what only the package calls (`_name`), nor functions without tensors."""
    schemas = {schema.removeprefix("dflash::").split("(")[0]: schema for schema in report["schemas"]}
    return {name: schema for name, schema in schemas.items() if not name.startswith("_") and "Tensor" in schema}


def test_import_is_light(report: dict[str, list[str]]) -> None:
    """`import dflash_kernels` costs torch and the library, not the engine's dependencies."""
    assert report["modules"] == []


def test_every_schema_of_the_source_is_registered(report: dict[str, list[str]]) -> None:
    """Each `m.def("name(...` in csrc/api arrives in torch, with its overload."""
    defined = set()
    for path in (ROOT / "csrc" / "api").glob("*.cpp"):
        defined |= set(re.findall(r'\.def\(\s*"([\w.]+)\(', path.read_text()))
    registered = {schema.removeprefix("dflash::").split("(")[0] for schema in report["schemas"]}
    assert defined and defined <= registered


def test_every_op_has_implementations(public: dict[str, str]) -> None:
    """CPU and fake implementations of every overload: what runs without a GPU."""
    import torch

    for name in public:
        for key in ("CPU", "Meta"):
            keys = (key, "CompositeExplicitAutograd")
            found = [k for k in keys if torch._C._dispatch_has_kernel_for_dispatch_key(f"dflash::{name}", k)]
            assert found, f"{name} has no {key} implementation"


def test_every_op_has_a_documented_python_face(public: dict[str, str]) -> None:
    for name in {name.split(".")[0] for name in public}:
        assert name in dflash_kernels.ops.__all__
        documentation = getattr(dflash_kernels.ops, name).__doc__ or ""
        assert "Args:" in documentation and "Raises:" in documentation, f"docstring of ops.{name}"


def test_written_arguments_are_marked(public: dict[str, str]) -> None:
    """An op that returns nothing must say in its schema what it writes, or functionalisation drops the call."""
    for schema in public.values():
        assert "!)" in schema or not schema.endswith("-> ()"), schema


# -- what an incomplete installation says, with a torch of a few bytes in the place of the real one ------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's Python files without its library."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "assets")
    shutil.copytree(PACKAGE, tmp_path / "dflash_kernels", ignore=ignored)
    return tmp_path


def import_error(where: Path, torch: str | None) -> str:
    """What `import dflash_kernels` says there beside a torch of that version, or a broken one."""
    code = "raise ImportError('libcudart.so.13 is missing')" if torch is None else f"__version__ = {torch!r}"
    (where / "torch.py").write_text(code)
    run = python("import dflash_kernels", where)
    assert run.returncode == 1
    return run.stderr.splitlines()[-1]


NO_LIBRARY = (
    "ImportError: dflash-kernels: the compiled library _C.abi3.so is not beside the package; "
    "install with `pip install .`, or run `make dev` in a source tree"
)


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu130", "2.15.0a0+git1234567", "3.0"])
def test_missing_library_is_said(copy: Path, version: str) -> None:
    assert import_error(copy, version) == NO_LIBRARY


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1+cu128", "1.13.1"])
def test_old_torch_is_said(copy: Path, version: str) -> None:
    """Before the library is touched: loading it would end in missing symbols."""
    assert import_error(copy, version) == f"ImportError: dflash-kernels needs torch >= 2.11, got {version}"


def test_torch_that_does_not_import_is_said(copy: Path) -> None:
    message = "dflash-kernels needs torch >= 2.11, which cannot be imported: libcudart.so.13 is missing"
    assert import_error(copy, None) == f"ImportError: {message}"


def test_broken_library_is_said(copy: Path) -> None:
    library = copy / "dflash_kernels" / "_C.abi3.so"
    library.write_bytes(b"no library")
    assert "_C.abi3.so must be a 64-bit ELF library, got 10 other bytes" in import_error(copy, "2.13.0")
    whole = library_path().read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    message = import_error(copy, "2.13.0")
    assert f"must have {len(whole)} bytes, got {len(whole) // 2}: the file is cut off" in message


def test_library_is_an_importable_module() -> None:
    """Packaging tools import extension modules; after torch, whose libraries it needs, that must work."""
    run = python("import torch\nfrom dflash_kernels import _C\nprint(_C.__name__)", ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1].endswith("_C")

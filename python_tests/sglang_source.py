"""SGLang's own source for tests without its GPU stack: the wheels unpacked, and pieces of its modules compiled alone.

The wheels come from the package index, without what they depend on; ``DFLASH_SGLANG_WHEELS`` names a directory that has
them already.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

VERSIONS = ("0.5.16", "0.5.23")


def unpack_wheel(version: str, where: Path) -> Path:
    """Directory with the package ``sglang`` of that version."""
    given = os.environ.get("DFLASH_SGLANG_WHEELS")
    source = Path(given) if given else where
    if not given:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(where)]
        result = subprocess.run([*command, f"sglang=={version}"], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            if "No matching distribution" in result.stderr and "onnection" not in result.stderr:
                pytest.skip(f"the package index has no wheel of sglang {version} for this Python")
            pytest.fail(f"pip download sglang=={version}: {result.stderr[-600:]}")
    (wheel,) = source.glob(f"sglang-{version}-*.whl")
    unpacked = where / f"unpacked-{version}"
    with zipfile.ZipFile(wheel) as archive:
        names = [
            n for n in archive.namelist() if n.startswith(("sglang/srt/", "sglang/kernels/")) and n.endswith(".py")
        ]
        archive.extractall(unpacked, names)
    return unpacked


class Source:
    """One version's source tree."""

    def __init__(self, root: Path, version: str) -> None:
        self.root, self.version = root, version
        self._trees: dict[str, ast.Module] = {}

    def tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            path = self.root / (module.replace(".", "/") + ".py")
            self._trees[module] = ast.parse(path.read_text(encoding="utf-8"), str(path))
        return self._trees[module]

    def find(self, module: str, qualname: str) -> ast.AST | None:
        """The definition, followed through ``from X import name``."""
        body: Sequence[ast.stmt] = self.tree(module).body
        first, *rest = qualname.split(".")
        for node in body:
            if isinstance(node, ast.ImportFrom) and any(first == (a.asname or a.name) for a in node.names):
                assert node.module is not None and node.level == 0
                return self.find(node.module, qualname)
        found: ast.AST | None = None
        for part in (first, *rest):
            found = next((n for n in body if getattr(n, "name", None) == part), None)
            if found is None:
                return None
            body = getattr(found, "body", [])
        return found

    def compile(
        self, module: str, names: dict[str, tuple[str, ...] | None], namespace: dict[str, Any]
    ) -> dict[str, Any]:
        """Run the named definitions of a module in ``namespace``; of a class with a tuple, only these members."""
        kept: list[ast.stmt] = [
            ast.ImportFrom("__future__", [ast.alias("annotations")], 0),
        ]
        for name, members in names.items():
            node = self.find(module, name)
            assert node is not None, f"{module} of {self.version} has no {name}"
            assert isinstance(node, (ast.ClassDef, ast.FunctionDef))
            if members is not None:
                assert isinstance(node, ast.ClassDef)
                body = [n for n in node.body if _names(n) & set(members)]
                node = ast.ClassDef(node.name, node.bases, node.keywords, body, node.decorator_list, type_params=[])
            kept.append(node)
        tree = ast.fix_missing_locations(ast.Module(kept, type_ignores=[]))
        exec(compile(tree, f"{module} ({self.version})", "exec"), namespace)
        return namespace


def _names(node: ast.stmt) -> set[str]:
    """What one statement of a class body defines."""
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {getattr(node, "name", "")}


def calls_of(node: ast.AST, name: str) -> list[ast.Call]:
    """Calls of a global function by its plain name."""
    return [c for c in ast.walk(node) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name) and c.func.id == name]


def attributes_of(node: ast.AST) -> set[str]:
    """Names that ``self.<name> =`` sets, annotated or not, and that methods and class variables define."""
    found = set()
    for n in ast.walk(node):
        targets = n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []
        for target in targets:
            for leaf in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(leaf, ast.Attribute):
                    found.add(leaf.attr)
                elif isinstance(leaf, ast.Name):
                    found.add(leaf.id)
        if isinstance(n, ast.FunctionDef):
            found.add(n.name)
    return found


def bare_package(root: Path) -> types.ModuleType:
    """``sglang`` without its ``__init__``, which imports the whole engine; its submodules are the real ones."""
    package = types.ModuleType("sglang")
    package.__path__ = [str(root / "sglang")]
    return package


def make_module(name: str, contents: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    return module


def unavailable(what: str) -> Callable[..., Any]:
    """Stands where the engine's code has something that a test must not reach."""

    def reached(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{what} was reached")

    return reached

"""`info` and `doctor`: what they find on this machine, on a broken install, and in a binary."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import dflash_kernels
from dflash_kernels import cli, doctor, info
from dflash_kernels._library import library_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = cli.main(list(argv))
    return code, capsys.readouterr().out


def test_info_lists_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "info", "--json")
    found = json.loads(out)
    assert code == 0 and found["version"] == dflash_kernels.__version__
    assert found["library"]["error"] is None and found["packages"]["torch"]
    uses = {row["op"]: row["uses"] for row in found["ops"]}
    assert {"prepare_block", "inject_kv"} <= set(uses) <= set(dflash_kernels.ops.__all__)
    assert "none" not in uses.values() and not any(name.startswith("_") for name in uses)
    if found["device"] is None:
        assert all(use.startswith("CPU, ") for use in uses.values())
    code, text = run(capsys, "info")
    assert code == 0 and all(name in text for name in uses) and f"dflash-kernels {found['version']}" in text


def test_build_is_what_the_tree_holds() -> None:
    """The host module names every CUDA source of a CUDA build, with the architectures that its folder is for."""
    found = info.build()
    if found is None:
        pytest.skip("the host module is not built")
    csrc = Path(__file__).resolve().parent.parent / "csrc"
    sources = {str(file.relative_to(csrc)) for file in csrc.glob("sm*/*/*.cu")}
    archs = found["cuda_archs"].split(",") if found["cuda_archs"] else []
    assert set(found["kernels"]) == (sources if found["cuda"] else set()) and bool(archs) == bool(found["cuda"])
    for source, built in found["kernels"].items():
        folder = source.split("/")[0]
        assert built == [arch for arch in archs if folder == "smxx" or f"sm{arch[:-1]}" == folder]
    assert {f"sm_{arch}" for arch in archs} == set(info.binary_archs(library_path()))


def test_archs_of_a_binary(tmp_path: Path) -> None:
    """The containers of nvcc: kind, architecture and flags of each entry decide; PTX and other bytes do not count."""

    def entry(kind: int, arch: int, flags: int, body: bytes) -> bytes:
        head = bytearray(64)
        struct.pack_into("<HHIQ", head, 0, kind, 257, 64, len(body))
        struct.pack_into("<I", head, 28, arch)
        struct.pack_into("<Q", head, 40, flags)
        return bytes(head) + body

    def container(*entries: bytes) -> bytes:
        body = b"".join(entries)
        return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body

    file = tmp_path / "lib.so"
    first = container(entry(2, 90, 0x108011, b"x" * 24), entry(2, 100, 0x1208011, b"y" * 40))
    second = container(entry(2, 80, 0x8011, b"z" * 8), entry(1, 120, 0, b"ptx"))
    stray = struct.pack("<I", 0xBA55ED50) + b"\xff" * 80
    file.write_bytes(b"\x7fELF" + b"\0" * 100 + first + b"\0" * 3 + second + stray)
    assert info.binary_archs(file) == ["sm_80", "sm_90a", "sm_100f"]
    file.write_bytes(first[:70])
    assert info.binary_archs(file) == ["sm_90a"]
    file.write_bytes(b"no code")
    assert info.binary_archs(file) == []


def test_which_code_a_device_runs() -> None:
    archs = ["sm_80", "sm_90a", "sm_100f"]
    expected = {(8, 0): "sm_80", (8, 9): "sm_80", (9, 0): "sm_90a", (10, 0): "sm_100f", (10, 3): "sm_100f"}
    assert {c: info.runs_on(archs, c) for c in expected} == expected
    assert info.runs_on(archs, (12, 0)) is None and info.runs_on(archs, (7, 5)) is None
    assert info.runs_on([], (9, 0)) is None


def test_doctor_is_content_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "doctor", "--json")
    report = json.loads(out)
    faults = [finding for finding in report["findings"] if finding["status"] == "fault"]
    assert code == 0 and report["healthy"] and not faults
    assert {"torch", "library", "device", "ops"} <= {finding["check"] for finding in report["findings"]}
    code, text = run(capsys, "doctor")
    assert code == 0 and text.endswith("no fault found\n")


def test_every_problem_comes_with_a_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def outcome(check: str) -> doctor.Finding:
        return next(finding for finding in doctor.diagnose() if finding.check == check)

    h100 = {"name": "H100", "capability": [9, 0]}
    monkeypatch.setattr(info, "cuda_device", lambda: h100)
    for archs, status, part in (
        ([], "fault", "built without CUDA kernels"),
        (["sm_100f"], "fault", "has no kernels (it has sm_100f)"),
        (["sm_90a", "sm_100f"], "ok", "runs the sm_90a kernels"),
    ):
        monkeypatch.setattr(info, "binary_archs", lambda _path, archs=archs: archs)
        found = outcome("device")
        assert found.status == status and part in found.what and bool(found.fix) == (status != "ok")

    monkeypatch.setattr(info, "package_version", lambda name: None if name == "gguf" else "1")
    assert outcome("demo").status == "note" and "gguf not installed" in outcome("demo").what
    monkeypatch.setattr(doctor, "library_path", lambda: tmp_path / "_C.abi3.so")
    assert outcome("library").status == "fault" and "is missing" in outcome("library").what
    monkeypatch.setattr(dflash_kernels.ops, "prepare_block", lambda *args: 1 / 0)
    found = outcome("ops")
    assert found.status == "fault" and "ZeroDivisionError" in found.what


def test_doctor_looks_for_the_sglang_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "package_version", lambda name: "0.5.16")
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda group: [])
    finding = doctor._check_sglang()
    assert finding.status == "note" and "does not see the plugin" in finding.what and finding.fix
    point = doctor.importlib.metadata.EntryPoint("x", "dflash_kernels.integrations.sglang:activate", "g")
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda group: [point])
    assert doctor._check_sglang().status == "ok"


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_doctor_runs_where_the_library_does_not_load(tmp_path: Path, damage: str) -> None:
    """A copy of the package with no library, or half of one: a fault with its fix, exit code 1."""
    package = tmp_path / "dflash_kernels"
    shutil.copytree(Path(dflash_kernels.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "assets"))
    if damage == "truncated":
        (package / library_path().name).write_bytes(library_path().read_bytes()[:4096])
    elif damage == "foreign":
        (package / library_path().name).write_bytes(b"MZ" * 100)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "dflash_kernels", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1 and findings["library"]["status"] == "fault" and findings["library"]["fix"]
    assert "Traceback" not in done.stderr
    assert {"missing": "missing", "truncated": "cut off", "foreign": "ELF"}[damage] in findings["library"]["what"]
    if damage != "missing":
        return
    command = [*command[:3], "generate", "a prompt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("dflash-kernels generate: dflash-kernels: ")
    assert done.stderr.count("\n") == 1

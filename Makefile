# Builds the library in place: needs an environment with torch, cmake and ninja (PYTHON names its interpreter).
PYTHON ?= python3

dev:
	cmake -G Ninja -S . -B build -DPython3_EXECUTABLE=$$(command -v $(PYTHON))
	cmake --build build -j 2
	cp build/_C.abi3.so dflash_kernels/_C.abi3.so

.PHONY: dev

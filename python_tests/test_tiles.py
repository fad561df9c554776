"""Quantised weights in tiles: nothing is lost, and the device code finds in them the fragments of the bf16 weights."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from emulator import build as emulator
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_kernels.formats import QuantizedWeight, WeightFormat, join_nibbles
from dflash_kernels.reference import formats as reference
from dflash_kernels.stream import pack_tiles
from dflash_kernels.tiles import pack_quantized_tiles, tile_columns, tile_nbytes, unpack_quantized_tiles

FORMATS = {
    "fp8": "Fp8",
    "int4-g64": "Int4<64>",
    "int4-g128": "Int4<128>",
    "e2m1-g64": "E2m1<64>",
    "e2m1-g128": "E2m1<128>",
}

INT4_FACTORS = torch.tensor([64.0, 4.0, 64.0, 4.0])  # of the registers: the scales make up for it

# stdin: words to convert, or a tile; stdout: pairs of bf16, or fragments and scales, in the order of the loops.
PROGRAM = """
#include <cuda_runtime.h>
#include <cstdio>
#include <cstring>
#include <vector>
#include "smxx/stream/format.cuh"
#include "smxx/stream/quantized_format.cuh"
using namespace dflash;
using namespace dflash::stream;

template <typename Format>
void fragments(const unsigned char* tile) {
  for (int step = 0; step < Format::kSteps; ++step)
    for (int part = 0; part < 4; ++part)
      for (int half = 0; half < 2; ++half)
        for (int lane = 0; lane < 32; ++lane) {
          uint32_t a[2][2][4];
          std::memset(a, 0xee, sizeof(a));
          Format::load(tile, step, part, half, lane, a);
          std::fwrite(a, sizeof(a), 1, stdout);
        }
}
template <typename Format>
void scales(const unsigned char* tile) {
  for (int step = 0; step < Format::kSteps; ++step)
    for (int part = 0; part < 4; ++part)
      for (int lane = 0; lane < 32; ++lane) {
        float scale[2][2] = {{-7, -7}, {-7, -7}};
        Format::load_scale(tile, step, part, lane, scale);
        std::fwrite(scale, sizeof(scale), 1, stdout);
      }
}
template <typename Format>
int quantized(const std::vector<unsigned char>& in) {
  if (in.size() != Format::kBytes) return 3;
  fragments<Format>(in.data());
  scales<Format>(in.data());
  return 0;
}
int convert(const std::vector<unsigned char>& in, const char* what) {
  for (size_t i = 0; i + 4 <= in.size(); i += 4) {
    uint32_t word, a[4] = {};
    std::memcpy(&word, &in[i], 4);
    if (!std::strcmp(what, "e4m3")) dequantize_e4m3(word, a[0], a[1]);
    if (!std::strcmp(what, "int4")) dequantize_int4(word, a);
    if (!std::strcmp(what, "e2m1")) dequantize_e2m1(word, a);
    std::fwrite(a, sizeof(a), 1, stdout);
  }
  return 0;
}
int main(int, char** argv) {
  alignas(16) static unsigned char storage[1 << 20];
  const size_t size = std::fread(storage, 1, sizeof(storage), stdin);
  std::vector<unsigned char> in(storage, storage + size);
  if (!std::strcmp(argv[1], "convert")) return convert(in, argv[2]);
  if (!std::strcmp(argv[2], "Bf16")) return fragments<Bf16>(in.data()), 0;
  if (!std::strcmp(argv[2], "Fp8")) return quantized<Fp8>(in);
  if (!std::strcmp(argv[2], "Int4<64>")) return quantized<Int4<64>>(in);
  if (!std::strcmp(argv[2], "Int4<128>")) return quantized<Int4<128>>(in);
  if (!std::strcmp(argv[2], "E2m1<64>")) return quantized<E2m1<64>>(in);
  if (!std::strcmp(argv[2], "E2m1<128>")) return quantized<E2m1<128>>(in);
  return 2;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := emulator.missing():
        pytest.skip(f"device code cannot be compiled for the host: {reason}")
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "main.cpp").write_text(PROGRAM)
    command = [str(emulator.compiler()), "-std=c++17", "-O1", "-w", f"-I{emulator.HERE}", f"-I{emulator.CSRC}"]
    command += ["-isystem", str(emulator.toolkit()), str(folder / "main.cpp"), "-o", str(folder / "main")]
    emulator.run(command)
    return folder / "main"


def ask(program: Path, mode: str, what: str, data: torch.Tensor) -> bytes:
    sent = data.contiguous().view(torch.uint8).numpy().tobytes()
    return subprocess.run([str(program), mode, what], input=sent, capture_output=True, check=True).stdout


def random_weight(weight_format: WeightFormat, rows: int, columns: int, seed: int) -> QuantizedWeight:
    """Any codes but NaN, any scales."""
    f, generator = weight_format, torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << f.bits, (rows, columns), generator=generator, dtype=torch.uint8)
    if f.kind == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 3
    scale = (torch.rand(rows, f.scale_columns(columns), generator=generator) + 0.5).to(f.scale_dtype)
    return QuantizedWeight(f, codes if f.bits == 8 else join_nibbles(codes), scale)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 300), groups=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_packing_loses_nothing(name: str, rows: int, groups: int, seed: int) -> None:
    f = WeightFormat.parse(name)
    columns = groups * (f.group_size or 64)
    weight = random_weight(f, rows, columns, seed)
    tiles = pack_quantized_tiles(weight)
    assert list(tiles.shape) == [-(-rows // 128), -(-columns // tile_columns(f)), tile_nbytes(f)]
    back = unpack_quantized_tiles(tiles, rows, columns, f)
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.scale, weight.scale)


@pytest.mark.parametrize("name", FORMATS)
def test_edges_are_zeros(name: str) -> None:
    f = WeightFormat.parse(name)
    weight = random_weight(f, 5, f.group_size or 64, 1)
    whole = unpack_quantized_tiles(pack_quantized_tiles(weight), 128, tile_columns(f), f)
    dense = whole.values()
    assert torch.equal(dense[:5, : weight.shape[1]], weight.values())
    dense[:5, : weight.shape[1]] = 0
    assert not dense.any() and not whole.scale[5:].any()


def test_bytes_that_are_streamed() -> None:
    """16 KB of codes a tile, and 3 % or less of scales but for the 4-bit groups of 64."""
    sizes = {name: tile_nbytes(WeightFormat.parse(name)) for name in FORMATS}
    assert sizes == {"fp8": 16896, "int4-g64": 17408, "int4-g128": 16896, "e2m1-g64": 17408, "e2m1-g128": 16896}
    assert all(size % 16 == 0 for size in sizes.values())  # what a bulk copy moves


def pairs(output: bytes) -> torch.Tensor:
    """float32 [words, 4 registers, 2 halves]"""
    return torch.frombuffer(bytearray(output), dtype=torch.bfloat16).float().view(-1, 4, 2)


def test_every_e4m3_code_in_every_byte(program: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    table = torch.tensor([reference.decode_e4m3(code) for code in range(256)])
    table[0x7F], table[0xFF] = 480.0, -480.0
    for byte in range(4):
        for others in (0x00, 0xFF, 0x5A):
            words = torch.full((256, 4), others, dtype=torch.uint8)
            words[:, byte] = codes
            got = pairs(ask(program, "convert", "e4m3", words))[:, :2].transpose(1, 2).flatten(1)
            want = table[words.long()]
            assert torch.equal(got, want) and torch.equal(torch.signbit(got), torch.signbit(want)), (byte, others)


def test_every_int4_code_in_every_nibble(program: Path) -> None:
    for nibble in range(8):
        for others in (0, 15, 5):
            codes = torch.full((16, 8), others, dtype=torch.uint8)
            codes[:, nibble] = torch.arange(16, dtype=torch.uint8)
            got = pairs(ask(program, "convert", "int4", join_nibbles(codes))).transpose(1, 2).flatten(1)
            assert torch.equal(got, (codes.float() - 8) / INT4_FACTORS.repeat(2)), (nibble, others)


def test_every_e2m1_code_in_every_place(program: Path) -> None:
    """The bits of a code by the table in dequant.cuh, written out once more."""
    table = torch.tensor([reference.decode_e2m1(code) for code in range(16)])
    bits = {0: (15, 8, 7, 6), 1: (12, 5, 4, 3), 2: (9, 2, 1, 0), 3: (11, 14, 13, 10)}
    for half in range(2):
        for register in range(4):
            for others in (0, 15, 9):
                codes = torch.full((16, 4, 2), others)
                codes[:, register, half] = torch.arange(16)
                words = torch.zeros(16, dtype=torch.int64)
                for r, places in bits.items():
                    for h in range(2):
                        for bit, place in zip((3, 2, 1, 0), places, strict=True):
                            words |= (codes[:, r, h] >> bit & 1) << (place + 16 * h)
                data = torch.stack([words >> (8 * i) & 255 for i in range(4)], dim=1).to(torch.uint8)
                got, want = pairs(ask(program, "convert", "e2m1", data)), table[codes]
                assert torch.equal(got, want) and torch.equal(torch.signbit(got), torch.signbit(want))


@pytest.mark.parametrize("name", FORMATS)
def test_fragments_are_those_of_the_bf16_weights(program: Path, name: str) -> None:
    """A tile gives the tensor cores, bit for bit, what the bf16 tiles of the codes' values give them.

    int4: a part of it, a power of two, which the scale of the row puts right.
    """
    f = WeightFormat.parse(name)
    columns = tile_columns(f)
    weight = random_weight(f, 256, 2 * columns, 9)
    tiles, dense = pack_quantized_tiles(weight), pack_tiles(weight.values().bfloat16())
    row, k = 1, 1
    steps = columns // 64
    size = steps * 4 * 2 * 32 * 16 * 4
    output = ask(program, "tile", FORMATS[name], tiles[row, k])
    want = b"".join(ask(program, "tile", "Bf16", dense[row, k * steps + s]) for s in range(steps))
    factors = INT4_FACTORS if f.kind == "int4" else torch.ones(4)
    fragments = torch.frombuffer(bytearray(want), dtype=torch.bfloat16).view(-1, 4, 2) / factors[:, None].bfloat16()
    assert len(want) == size and output[:size] == fragments.view(torch.uint8).numpy().tobytes()
    # Scales of the lane's rows in every step.
    got = torch.frombuffer(bytearray(output[size:]), dtype=torch.float32).view(steps, 4, 8, 4, 2, 2)
    full = weight.scale.float().repeat_interleave(2 * columns // weight.scale.shape[1], dim=1)
    part = full[128:, columns::64].view(4, 2, 2, 8, steps) * factors[:2, None, None]  # part i e row step
    assert torch.equal(got, part.permute(4, 0, 3, 1, 2)[:, :, :, None].expand(got.shape))

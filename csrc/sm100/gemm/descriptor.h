// How tcgen05.mma is told where its operands are and what they are (PTX ISA 9.0, 9.7.16.4: matrix descriptor and
// instruction descriptor of .kind::f16, .kind::f8f6f4 and .kind::mxf4nvf4).
//
// Operand in shared memory, 64 bits:
//    0..13  address >> 4
//   16..29  leading dimension byte offset >> 4; not used by swizzled K-major operands whose K fits the swizzle
//   32..45  stride dimension byte offset >> 4: from 8 rows to the next 8
//   46..48  0b001
//   49..51  base offset: 0, where swizzle patterns begin at multiples of their size (1024 bytes)
//   52      leading dimension is an offset (0)
//   53..60  0
//   61..63  swizzle: 0 none, 1 128 bytes in atoms of 32, 2 128 bytes, 4 64 bytes, 6 32 bytes
//
// Instruction, 32 bits:
//    0..1   sparsity selector      2  sparse      3  saturate (integers)
//    4..5   type of D: 0 f16, 1 f32, 2 s32
//    7..9   type of A, 10..12 of B: .kind::f16: 0 f16, 1 bf16; .kind::f8f6f4: 0 e4m3, 1 e5m2, 3 e2m3, 4 e3m2, 5 e2m1
//   13, 14  negate A, B           15, 16  A, B transposed: 0, K-major
//   17..22  N >> 3                24..28  M >> 4
//   30..31  shift (.ws only)
//
// of .kind::mxf4nvf4 (D is f32, operands are K-major), where it differs:
//    4..5   byte of B's scales in their word, 29..30 of A's: 0 where a product has four (.scale_vec::4X)
//    7..9   type of A, 10..12 of B: 1 e2m1
//   23      type of scales: 0 ue4m3, 1 ue8m0
//   31      K: 0 64, 1 96
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dflash::sm100 {

enum class Swizzle : uint64_t { kNone = 0, k128Atom32 = 1, k128 = 2, k64 = 4, k32 = 6 };
enum class F16Type : uint32_t { kF16 = 0, kBf16 = 1 };
enum class F8Type : uint32_t { kE4m3 = 0, kE5m2 = 1 };
enum class AccumulatorType : uint32_t { kF16 = 0, kF32 = 1 };

// A K-major operand whose rows are 128 bytes, swizzled by 128 bytes: 8 rows are 1024 bytes, and 1024 bytes
// apart. Address 1024-aligned plus the offset along K; 32 bytes (16 bf16, 32 e4m3) further: + 2. The swizzle is a
// function of the address, so that the offset along K stays inside the pattern.
DFLASH_HOST_DEVICE constexpr uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t kFixed =
      static_cast<uint64_t>(Swizzle::k128) << 61 | uint64_t{1} << 46 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16;
  return kFixed | (address & 0x3ffffu) >> 4;
}

// A block of scales for tcgen05.cp: 32 rows of 16 bytes behind each other, not swizzled. Address 16-aligned; 512 bytes
// further: + 32.
DFLASH_HOST_DEVICE constexpr uint64_t scale_descriptor(uint32_t address) {
  constexpr uint64_t kFixed =
      static_cast<uint64_t>(Swizzle::kNone) << 61 | uint64_t{1} << 46 | uint64_t{8 * 16 >> 4} << 32;
  return kFixed | (address & 0x3ffffu) >> 4;
}

// a and b: F16Type of .kind::f16, F8Type of .kind::f8f6f4.
template <typename Type>
DFLASH_HOST_DEVICE constexpr uint32_t instruction_descriptor(AccumulatorType d, Type a, Type b, uint32_t m,
                                                             uint32_t n) {
  return static_cast<uint32_t>(d) << 4 | static_cast<uint32_t>(a) << 7 | static_cast<uint32_t>(b) << 10 | n >> 3 << 17 |
         m >> 4 << 24;
}

// Elements of 2 bytes: bf16; of 1: e4m3. M = 128, one block: row m is lane m of tensor memory, column n the n-th column
// from the address on. M = 256, two blocks: rows 128 .. 255 are the second one's lanes.
template <int kElementBytes, int M, int N>
DFLASH_HOST_DEVICE constexpr uint32_t instruction() {
  static_assert(kElementBytes == 2 || kElementBytes == 1, "bf16 or e4m3");
  static_assert(M == 128 || M == 256, "one block or two");
  static_assert(N % (M / 8) == 0 && N <= 256, "a shape that .kind::f16 and .kind::f8f6f4 have");
  return kElementBytes == 2 ? instruction_descriptor(AccumulatorType::kF32, F16Type::kBf16, F16Type::kBf16, M, N)
                            : instruction_descriptor(AccumulatorType::kF32, F8Type::kE4m3, F8Type::kE4m3, M, N);
}

// .kind::mxf4nvf4: e2m1 with scales in ue4m3. M and N as above.
template <int M, int N>
DFLASH_HOST_DEVICE constexpr uint32_t nvfp4_instruction() {
  static_assert(M == 128 || M == 256, "one block or two");
  static_assert(N % (M / 16) == 0 && N <= 256, "a shape that .kind::mxf4nvf4 has");
  constexpr uint32_t kE2m1 = 1;
  return kE2m1 << 7 | kE2m1 << 10 | N >> 3 << 17 | M >> 4 << 24;
}

// The fields one by one, against the tables above.
constexpr uint64_t field(uint64_t descriptor, int first, int last) {
  return descriptor >> first & ((uint64_t{1} << (last - first + 1)) - 1);
}
static_assert(field(operand_descriptor(0x2fc60), 0, 13) == 0x2fc6);
static_assert(field(operand_descriptor(0x2fc60), 14, 15) == 0 && field(operand_descriptor(0x2fc60), 30, 31) == 0);
static_assert(field(operand_descriptor(0), 32, 45) * 16 == 8 * 128);
static_assert(field(operand_descriptor(0), 46, 48) == 0b001 && field(operand_descriptor(0), 49, 60) == 0);
static_assert(field(operand_descriptor(0), 61, 63) == 2);
static_assert(operand_descriptor(1024 + 32) == operand_descriptor(1024) + 2, "16 columns further");
static_assert(field(instruction<2, 128, 256>(), 0, 3) == 0 && field(instruction<2, 128, 256>(), 4, 5) == 1);
static_assert(field(instruction<2, 128, 256>(), 7, 9) == 1 && field(instruction<2, 128, 256>(), 10, 12) == 1);
static_assert(field(instruction<2, 128, 256>(), 13, 16) == 0 && field(instruction<2, 128, 256>(), 23, 23) == 0);
static_assert(field(instruction<2, 128, 256>(), 17, 22) == 256 / 8);
static_assert(field(instruction<2, 128, 160>(), 17, 22) == 160 / 8);
static_assert(field(instruction<2, 128, 160>(), 24, 28) == 128 / 16);
static_assert(field(instruction<2, 128, 160>(), 29, 31) == 0);
static_assert(field(instruction<2, 256, 160>(), 24, 28) == 256 / 16);
static_assert(field(instruction<1, 256, 192>(), 0, 3) == 0 && field(instruction<1, 256, 192>(), 4, 5) == 1);
static_assert(field(instruction<1, 256, 192>(), 6, 16) == 0 && field(instruction<1, 256, 192>(), 17, 22) == 192 / 8);
static_assert(field(instruction<1, 256, 192>(), 24, 28) == 256 / 16);

static_assert(field(scale_descriptor(0x2fc40), 0, 13) == 0x2fc4 && field(scale_descriptor(0), 14, 31) == 0);
static_assert(field(scale_descriptor(0), 32, 45) * 16 == 8 * 16 && field(scale_descriptor(0), 46, 63) == 1);
static_assert(scale_descriptor(1024 + 512) == scale_descriptor(1024) + 32, "the next block");
static_assert(field(nvfp4_instruction<256, 128>(), 0, 6) == 0 && field(nvfp4_instruction<256, 128>(), 7, 9) == 1);
static_assert(field(nvfp4_instruction<256, 128>(), 10, 12) == 1 && field(nvfp4_instruction<256, 128>(), 13, 16) == 0);
static_assert(field(nvfp4_instruction<256, 128>(), 17, 22) == 128 / 8 &&
              field(nvfp4_instruction<256, 128>(), 23, 23) == 0);
static_assert(field(nvfp4_instruction<256, 128>(), 24, 28) == 256 / 16);
static_assert(field(nvfp4_instruction<128, 128>(), 24, 31) == 128 / 16);

}  // namespace dflash::sm100

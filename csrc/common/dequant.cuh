// Codes of quantised weights to pairs of bf16, the registers of mma.sync's A fragments. Scales stay out of it: a
// product with bare codes is summed in float32 and scaled there, exactly and with fewer instructions.
//
// All three put a code's bits where bf16 has its own (sign at 15, exponent from 7 up) in both halves of a register at
// once. What a smaller exponent bias makes too small by a power of two, one multiplication puts right; it also makes
// the small format's subnormal numbers right, because bf16's own are exact in it.
//
// sm_90 code for a lane's 8 codes, without loads: fp8 14 integer operations + 4 multiplications, int4 5 + 4 with an
// addition, e2m1 11 + 4. Packing is done in dflash_kernels/tiles.py.
#pragma once

#include <cstdint>

#include "common/half_bits.h"
#include "common/host_device.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#endif

namespace dflash {

// On the host. The results that are needed here have few significant bits, so cutting is exact.
inline uint32_t bf16_pair(float low, float high) {
  uint32_t a, b;
  std::memcpy(&a, &low, sizeof(a));
  std::memcpy(&b, &high, sizeof(b));
  return a >> 16 | (b & 0xffff0000u);
}

// Each half of a pair times the same half of another (plus that of a third).
DFLASH_HOST_DEVICE uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  const __nv_bfloat162 product =
      __hmul2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(product);
#else
  return bf16_pair(float_from_bits(a << 16) * float_from_bits(b << 16),
                   float_from_bits(a & 0xffff0000u) * float_from_bits(b & 0xffff0000u));
#endif
}
DFLASH_HOST_DEVICE uint32_t multiply_add_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  const __nv_bfloat162 sum =
      __hfma2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b),
              reinterpret_cast<const __nv_bfloat162&>(c));
  return reinterpret_cast<const uint32_t&>(sum);
#else
  return bf16_pair(
      float_from_bits(a << 16) * float_from_bits(b << 16) + float_from_bits(c << 16),
      float_from_bits(a & 0xffff0000u) * float_from_bits(b & 0xffff0000u) + float_from_bits(c & 0xffff0000u));
#endif
}

// Four e4m3 codes. Bytes 0 and 2 are the halves of `even`, 1 and 3 those of `odd`. NaN codes become +-480: files that
// hold them are refused.
DFLASH_HOST_DEVICE void dequantize_e4m3(uint32_t word, uint32_t& even, uint32_t& odd) {
  constexpr uint32_t kSign = 0x80008000u, kRest = 0x07f007f0u, kScale = 0x7b807b80u;  // 2^120: biases 127 and 7
  const uint32_t up = word << 8;
  even = multiply_bf16x2((up & kSign) | (up >> 4 & kRest), kScale);
  odd = multiply_bf16x2((word & kSign) | (word >> 4 & kRest), kScale);
}

// Eight int4 codes, each value + 8. Nibbles i and i + 4 are the halves of a[i]: value / 64 for even i, value / 4 for
// odd. A code in the last eight bits of bf16, where subnormal numbers end and the first normal ones go on in equal
// steps, is a multiple of 2^-133 or 2^-129 as it stands; 2^127 is the largest power of two there is to multiply it
// with.
DFLASH_HOST_DEVICE void dequantize_int4(uint32_t word, uint32_t (&a)[4]) {
  constexpr uint32_t kLow = 0x000f000fu, kHigh = 0x00f000f0u, kScale = 0x7f007f00u;  // 2^127
  constexpr uint32_t kLowOffset = 0xbe00be00u, kHighOffset = 0xc000c000u;            // -8 / 64 and -8 / 4
  a[0] = multiply_add_bf16x2(word & kLow, kScale, kLowOffset);
  a[1] = multiply_add_bf16x2(word & kHigh, kScale, kHighOffset);
  a[2] = multiply_add_bf16x2(word >> 8 & kLow, kScale, kLowOffset);
  a[3] = multiply_add_bf16x2(word >> 8 & kHigh, kScale, kHighOffset);
}
constexpr int kInt4Even = 64, kInt4Odd = 4;  // what makes up for it

// Eight e2m1 codes, sign and three bits; in each half of the word one for each register, so that one shift serves sign
// and rest of three of them:
//   bit   15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
//   code  0s 3e 3e 1s 3s 3m 2s 0e 0e 0m 1e 1e 1m 2e 2e 2m
DFLASH_HOST_DEVICE void dequantize_e2m1(uint32_t word, uint32_t (&a)[4]) {
  constexpr uint32_t kCode = 0x81c081c0u, kScale = 0x7e807e80u;  // 2^126: biases 127 and 1
  a[0] = multiply_bf16x2(word & kCode, kScale);
  a[1] = multiply_bf16x2(word << 3 & kCode, kScale);
  a[2] = multiply_bf16x2(word << 6 & kCode, kScale);
  const uint32_t last = (word >> 6 & 0x01800180u) | (word >> 4 & 0x00400040u) | (word << 4 & 0x80008000u);
  a[3] = multiply_bf16x2(last, kScale);
}

}  // namespace dflash

// Pairs of bf16 in 32 bits, the first in the low half, and how the four lanes of a quad that hold a row of an
// accumulator exchange them.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace dflash {

__device__ __forceinline__ float2 pair_of(uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

__device__ __forceinline__ uint32_t rounded(float2 value) {
  const __nv_bfloat162 pair = __float22bfloat162_rn(value);
  return static_cast<uint32_t>(__bfloat16_as_ushort(pair.x)) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y))
                                                                   << 16;
}

// 4-byte aligned.
__device__ __forceinline__ float2 load_pair(const uint16_t* from) {
  return pair_of(*reinterpret_cast<const uint32_t*>(from));
}

// v[i] of lane q of each four lanes goes to v[q] of lane i: pairs 8 i + 2 q .. of a row become 8 neighbouring elements
// from 8 q on, and the other way round.
__device__ __forceinline__ void transpose_4x4(uint32_t (&v)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? v[i] : v[i + 1], 1);
    (odd ? v[i] : v[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? v[i] : v[i + 2], 2);
    (high ? v[i] : v[i + 2]) = got;
  }
}

}  // namespace dflash

// Parts of a row of bf16 that the threads of a block hold, 16 bytes each, to codes of e4m3.
#pragma once

#include <cstdint>

#include "common/bf16_pairs.cuh"
#include "common/ptx.cuh"
#include "common/row_scale.h"

namespace dflash::quantize {

// The larger of `largest` and the magnitudes of eight bf16; NaN counts for nothing.
__device__ __forceinline__ float largest_of(uint4 part, float largest) {
  const uint32_t pairs[] = {part.x, part.y, part.z, part.w};
#pragma unroll
  for (const uint32_t pair : pairs) {
    const float2 v = pair_of(pair);
    largest = fmaxf(largest, fmaxf(fabsf(v.x), fabsf(v.y)));
  }
  return largest;
}

// Of the whole block of 32 * kWarps threads; `partial` is in shared memory. The one barrier in it is for all threads.
template <int kWarps>
__device__ __forceinline__ float largest_of_block(float largest, float (&partial)[kWarps]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, partial[w]);
  return largest;
}

// Codes of eight bf16, in their order.
__device__ __forceinline__ uint2 codes_of(uint4 part, float inverse) {
  const auto two = [inverse](uint32_t pair) {
    const float2 v = pair_of(pair);
    return e4m3_pair(__fmul_rn(v.x, inverse), __fmul_rn(v.y, inverse));
  };
  return make_uint2(two(part.x) | two(part.y) << 16, two(part.z) | two(part.w) << 16);
}

}  // namespace dflash::quantize

// Parts of a row of bf16 that the threads of a block hold, 16 bytes each, to codes of e4m3.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/bf16_pairs.cuh"
#include "common/ptx.cuh"
#include "common/row_scale.h"

namespace dflash::quantize {

// Both halves: the larger of that of `largest` and the magnitudes of four bf16; NaN counts for nothing. In bf16, as the
// values themselves kept in float32 would take twice the registers.
__device__ __forceinline__ __nv_bfloat162 largest_of(uint4 part, __nv_bfloat162 largest) {
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&part);
#pragma unroll
  for (int e = 0; e < 4; ++e) largest = __hmax2(largest, __habs2(pairs[e]));
  return largest;
}

// Of the whole block of 32 * kWarps threads; `partial` is in shared memory. The one barrier in it is for all threads.
template <int kWarps>
__device__ __forceinline__ float largest_of_block(__nv_bfloat162 pair, float (&partial)[kWarps]) {
  float largest = fmaxf(__low2float(pair), __high2float(pair));
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

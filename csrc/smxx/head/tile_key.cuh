// 32-bit keys of bf16-rounded logits inside one tile of the vocabulary: order in the upper 16 bits, column below.
//
// A logit has only 16 bits, so value and column fit one word, whose unsigned maximum is torch.argmax's answer within
// the tile: the largest value, the first column among equals, NaN above all. 0 stands for "no column" and is below
// every key.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/order_key.h"

namespace dflash::head {

__device__ __forceinline__ uint32_t tile_key(float logit, int column) {
  uint32_t bits = __bfloat16_as_ushort(__float2bfloat16_rn(logit));
  if (bits == 0x8000u) bits = 0;  // -0.0 -> +0.0
  uint32_t order = (bits & 0x8000u) ? ~bits & 0xffffu : bits | 0x8000u;
  if (logit != logit) order = 0xffffu;
  return order << 16 | (0xffffu - static_cast<uint32_t>(column));
}

__device__ __forceinline__ int tile_key_column(uint32_t key) { return static_cast<int>(0xffffu - (key & 0xffffu)); }

__device__ __forceinline__ float tile_key_value(uint32_t key) {
  const uint32_t order = key >> 16;
  const uint32_t bits = (order & 0x8000u) ? order ^ 0x8000u : ~order & 0xffffu;  // 0xffff -> 0x7fff, a NaN
  return __uint_as_float(bits << 16);
}

// The same key among all of the vocabulary; first_column is that of the tile.
__device__ __forceinline__ uint64_t vocab_key(uint32_t key, int64_t first_column) {
  return argmax_key(tile_key_value(key), static_cast<uint32_t>(first_column) + tile_key_column(key));
}

// The value packed by argmax_key.
__device__ __forceinline__ float vocab_key_value(uint64_t key) {
  const uint32_t order = argmax_order_key(key);
  return __uint_as_float((order & 0x80000000u) ? order ^ 0x80000000u : ~order);  // the NaN key -> 0x7fffffff
}

}  // namespace dflash::head

// Plain parameters of the drafter's attention: a block of T queries a request over its paged context and itself.
//
//   out[q, h] = sum_k softmax_k( scale * <Q[q, h], K[k, h / G]> ) V[k, h / G]          G = Hq / Hkv, fp32 softmax
//
// Keys visible to the query at position q (window 0: none):
//   context  k < prefix_len,  window == 0 or q - k < window                  read from the caches through req_to_token
//   block    key position k,  (not causal or k <= q), window == 0 or |q - k| < window            read from qkv itself
//
// bf16 data is passed as uint16_t, so that no CUDA header is needed here.
#pragma once

#include <cstdint>

#include "common/int_view.h"

namespace dflash::attention {

constexpr int kMaxBlockSize = 32;
constexpr int kMaxSplits = 64;
constexpr int kRowTile = 64;  // query rows of one block of threads; a row is a (token, head of the group) pair

struct BlockAttentionParams {
  const uint16_t* qkv = nullptr;      // [B * T, (Hq + 2 * Hkv) * D], contiguous; q and k normed and rotated
  const uint16_t* k_cache = nullptr;  // [S, Hkv, D], slots strided
  const uint16_t* v_cache = nullptr;
  int64_t k_slot_stride = 0;  // elements, a multiple of 8, below 2^31
  int64_t v_slot_stride = 0;
  int64_t num_slots = 0;     // S; a slot outside [0, S) reads as zeros
  IntView positions;         // [B, T]
  IntView prefix_lens;       // [B]
  IntView req_pool_indices;  // [B]
  IntView req_to_token;      // [rows, width]
  int64_t rows = 0;
  int64_t width = 0;
  int64_t batch = 0;
  int block_size = 0;  // T
  int q_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;  // D: 32, 64, 96, 128 or 256
  int window = 0;    // 0: none
  bool causal = false;
  float scale = 1.0f;
  int num_splits = 1;              // parts the keys of a request are cut into
  float* partial_out = nullptr;    // [B, Hkv, num_splits, T * G, D], not yet divided by the sum
  float* partial_stats = nullptr;  // [B, Hkv, num_splits, T * G, 2]: maximum (times log2 e), sum
  uint16_t* out = nullptr;         // [B * T, Hq * D], contiguous
};

inline bool is_head_dim_supported(int64_t head_dim) {
  return head_dim == 32 || head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

}  // namespace dflash::attention

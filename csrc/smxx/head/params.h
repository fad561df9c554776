// Plain parameters of the LM head ops; filled by csrc/api/head.cpp and head_fp8.cpp.
//
//   logit[n, v] = bf16( sum_h hidden[n, h] * weight[v, h] + bias[v] )       fp32 accumulation, rounded once
//
//   argmax: ids[n] = vocab_start + the v of the largest logit, values[n] = that logit
//   top-k:  the k largest, descending
//
// In fp8 (argmax only) hidden and weight are e4m3 codes; the sum is multiplied by hidden_scale[n] * weight_scale[v].
//
// The order is that of common/order_key.h: the smallest v among equals, NaN above everything. Logits are never stored.
#pragma once

#include <cstdint>

#include "smxx/gemm/params.h"

namespace dflash::head {

constexpr int kTileColumns = 128;  // vocabulary rows that one block scores
constexpr int kMaxTopK = 64;       // <= kTileColumns

// Blocks over the vocabulary; top-k leaves k candidates of each.
DFLASH_HOST_DEVICE int64_t num_tiles(int64_t vocab_size) { return (vocab_size + kTileColumns - 1) / kTileColumns; }

// Greedy verification of the rows' argmax, by the launch that found it. candidates.data == nullptr: none.
struct VerifyParams {
  int64_t batch = 0;                // B; rows are B * T
  int block_size = 0;               // T
  IntView candidates;               // [B, T]
  IntView prefix_lens;              // [B]
  int32_t* accept_lens = nullptr;   // [B]
  int32_t* commit_lens = nullptr;   // [B]
  int64_t* bonus_ids = nullptr;     // [B]
  int64_t* out_tokens = nullptr;    // [B, T]
  int64_t* new_seq_lens = nullptr;  // [B]
};

struct HeadParams {
  gemm::GemmParams gemm;  // A = hidden [N, H], W = weight [V, H], bias [V]; c is unused
  int64_t vocab_start = 0;
  int k = 1;
  int64_t* ids = nullptr;   // [N] or [N, k]; not written with verify
  float* values = nullptr;  // [N] or [N, k]; not written with verify
  // argmax: [1 + N], a ticket counter and each row's best key, zero before and after the launch.
  // top-k:  [N, num_tiles, k] candidate keys, descending in each tile; any content.
  unsigned long long* workspace = nullptr;
  VerifyParams verify;
};

}  // namespace dflash::head

// Plain parameters of chain verification; filled by csrc/api/verify.cpp, read by the CPU and CUDA implementations.
#pragma once

#include <cstdint>

#include "common/int_view.h"

namespace dflash::verify {

enum class LogitType : int { kFloat32, kBFloat16, kFloat16 };

// Target logits [B, T, V]; the vocabulary is contiguous, strides in elements.
struct Logits {
  const void* data = nullptr;
  int64_t stride_request = 0;
  int64_t stride_row = 0;
  LogitType type = LogitType::kFloat32;
};

struct Outputs {
  int32_t* accept_lens = nullptr;   // [B]
  int32_t* commit_lens = nullptr;   // [B]
  int64_t* bonus_ids = nullptr;     // [B]
  int64_t* out_tokens = nullptr;    // [B, T]
  int64_t* new_seq_lens = nullptr;  // [B]
};

struct BlockParams {
  int64_t batch = 0;
  int block_size = 0;    // T
  int vocab_size = 0;    // V; 0 when target_ids is given
  IntView candidates;    // [B, T]
  IntView target_ids;    // [B, T], or data == nullptr: take the argmax of logits
  Logits logits;         // [B, T, V]
  IntView prefix_lens;   // [B]
  Outputs out;
};

struct SampledParams {
  int64_t batch = 0;
  int block_size = 0;  // T
  int vocab_size = 0;  // V
  IntView candidates;  // [B, T]
  Logits logits;       // [B, T, V]
  IntView prefix_lens;  // [B]
  const float* temperature = nullptr;  // [B]; 0: greedy
  IntView top_k;                       // [B]; <= 0 or >= V: off
  const float* top_p = nullptr;        // [B]; >= 1: off
  const float* min_p = nullptr;        // [B]; <= 0: off
  const int64_t* seeds = nullptr;      // [B]
  const int64_t* offsets = nullptr;    // [B]
  // The draft's distribution q, sparse: draft_width (id, probability) pairs for each of the T - 1 draft tokens.
  // draft_probs == nullptr: all mass on the candidate.
  int draft_width = 0;                 // Kd
  IntView draft_ids;                   // rows b * (T - 1) + j, columns k
  const float* draft_probs = nullptr;  // [B, T - 1, Kd] contiguous
  const int32_t* token_bitmask = nullptr;  // [B, T, ceil(V / 32)] contiguous; bit 1: allowed
  const float* logit_bias = nullptr;       // [B, V] contiguous
  bool block_rule = false;
  Outputs out;
};

}  // namespace dflash::verify

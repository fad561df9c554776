// Plain parameters of select_path and grouped_conv; filled by csrc/api/dflash2.cpp, read by the CPU and CUDA
// implementations. Strides are in elements; last dimensions are contiguous.
#pragma once

#include <cstdint>

#include "common/int_view.h"

namespace dflash::dflash2 {

constexpr int kMaxSlots = 32;   // G: a warp's lane holds one slot
constexpr int kMaxTopK = 32;    // Kd: a warp's lane holds one candidate
constexpr int kMaxRank = 256;   // R: 32 lanes x 8 elements
constexpr int kRankVector = 8;  // elements a lane holds

// A [B, G, last] tensor with free strides over requests and slots.
struct SlotStrides {
  int64_t request = 0;
  int64_t slot = 0;
};

struct SelectParams {
  int64_t batch = 0;
  int slots = 0;           // G = T - 1
  int top_k = 0;           // Kd
  int rank = 0;            // R
  int64_t vocab_size = 0;  // V, rows of the codebooks
  bool is_bf16 = true;     // hidden and codebooks: bfloat16, else float32 (CPU only)
  IntView candidate_ids;   // [B, G, Kd] as one flat vector; read through candidate_at
  SlotStrides candidate_strides;
  const float* base_logits = nullptr;  // [B, G, Kd]
  SlotStrides logit_strides;
  const void* hidden = nullptr;  // [B, G, R]
  SlotStrides hidden_strides;
  IntView anchor_ids;                  // [B]
  const void* predecessors = nullptr;  // [V, R] contiguous
  const void* successors = nullptr;    // [V, R] contiguous
  const float* temperature = nullptr;  // [B], or nullptr: all greedy
  const float* uniforms = nullptr;     // [B, G] contiguous; given iff temperature is
  int64_t* path_ids = nullptr;         // [B, G]
  float* draft_probs = nullptr;        // [B, G, Kd]

  DFLASH_HOST_DEVICE int64_t candidate_at(int64_t b, int j, int c) const {
    return candidate_ids.at(b * candidate_strides.request + j * candidate_strides.slot + c);
  }
  DFLASH_HOST_DEVICE float logit_at(int64_t b, int j, int c) const {
    return base_logits[b * logit_strides.request + j * logit_strides.slot + c];
  }
  DFLASH_HOST_DEVICE int64_t hidden_offset(int64_t b, int j) const {
    return b * hidden_strides.request + j * hidden_strides.slot;
  }
};

struct ConvParams {
  int64_t rows = 0;     // N = B * T
  int hidden_size = 0;  // H
  int taps = 0;
  int group_size = 0;
  int block_size = 0;       // T
  bool is_bf16 = true;      // else float32 (CPU only)
  const void* x = nullptr;  // [N, H]
  int64_t x_stride = 0;
  const void* delta = nullptr;  // [N, taps, H / group_size]
  int64_t delta_row_stride = 0;
  int64_t delta_tap_stride = 0;
  const void* base = nullptr;  // [taps, H] contiguous
  void* out = nullptr;         // [N, H] contiguous
};

}  // namespace dflash::dflash2

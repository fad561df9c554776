// Plain parameters of one drafter forward pass, from token ids to the final norm. Shapes in the letters of DESIGN.md,
// weights contiguous and stacked over the L layers.
#pragma once

#include <cstdint>
#include <vector>

#include "common/int_view.h"
#include "smxx/draft/plan.h"

namespace dflash::draft {

struct LayerCache {
  const uint16_t* k = nullptr;  // [S, Hkv, D], slots strided
  const uint16_t* v = nullptr;
  int64_t k_slot_stride = 0;  // elements
  int64_t v_slot_stride = 0;
  int64_t num_slots = 0;
  int64_t window = 0;  // 0: none
  bool causal = false;
};

struct DraftParams {
  DraftSizes sizes;
  int64_t vocab = 0;
  int64_t rotary_dim = 0;
  int64_t max_positions = 0;  // rows of cos_sin
  int64_t rows = 0;           // of req_to_token
  int64_t width = 0;

  IntView block_ids;         // [B, T]
  IntView positions;         // [B, T]
  IntView prefix_lens;       // [B]
  IntView req_pool_indices;  // [B]
  IntView req_to_token;      // [rows, width]
  std::vector<LayerCache> layers;

  const uint16_t* embed_weight = nullptr;    // [V, H]
  const uint16_t* input_norm = nullptr;      // [L, H]
  const uint16_t* qkv_weight = nullptr;      // [L, (Hq + 2 * Hkv) * D, H]
  const uint16_t* qkv_bias = nullptr;        // [L, (Hq + 2 * Hkv) * D] or nullptr
  const uint16_t* q_norm = nullptr;          // [L, D] or nullptr
  const uint16_t* k_norm = nullptr;          // [L, D] or nullptr
  const uint16_t* o_weight = nullptr;        // [L, H, Hq * D]
  const uint16_t* o_bias = nullptr;          // [L, H] or nullptr
  const uint16_t* post_norm = nullptr;       // [L, H]
  const uint16_t* gate_up_weight = nullptr;  // [L, 2 * I, H]
  const uint16_t* down_weight = nullptr;     // [L, H, I]
  const uint16_t* final_norm = nullptr;      // [H]
  // In fp8 the four weights are e4m3, a byte each, in nvfp4 e2m1, two a byte, and have a scale for each of their rows.
  const float* qkv_scale = nullptr;      // [L, (Hq + 2 * Hkv) * D]
  const float* o_scale = nullptr;        // [L, H]
  const float* gate_up_scale = nullptr;  // [L, 2 * I]
  const float* down_scale = nullptr;     // [L, H]
  // nvfp4: scales of groups [L, blocks along N, ceil(K / 64), 512], in the order of gemm_nvfp4; gate_up's gated.
  const uint8_t* qkv_blocks = nullptr;
  const uint8_t* o_blocks = nullptr;
  const uint8_t* gate_up_blocks = nullptr;
  const uint8_t* down_blocks = nullptr;
  const float* cos_sin = nullptr;  // [max_positions, rotary_dim]: cosines, then sines
  float eps = 1e-6f;
  float softmax_scale = 1.0f;

  uint16_t* out = nullptr;             // [B * T, H]
  unsigned char* workspace = nullptr;  // plan_workspace(sizes).bytes, 16-byte aligned
};

// Per-head RMSNorm (where there are weights; rounded to bf16) and rotation of q and k, in place.
//   (x[i], x[i + R / 2]) -> (x[i] cos - x[i + R / 2] sin, x[i + R / 2] cos + x[i] sin)       i < R / 2, R = rotary_dim
struct RotateParams {
  uint16_t* qkv = nullptr;  // [B * T, (Hq + 2 * Hkv) * D]
  int64_t tokens = 0;       // B * T
  int block_size = 0;
  int q_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;                  // at most 256
  const uint16_t* q_norm = nullptr;  // [D] or nullptr
  const uint16_t* k_norm = nullptr;
  IntView positions;               // [B, T]
  const float* cos_sin = nullptr;  // [max_positions, rotary_dim]
  int rotary_dim = 0;
  int64_t max_positions = 0;  // positions outside the table are taken to its ends
  float eps = 1e-6f;
};

// x[n] = embed_weight[ids[n]]; an id outside [0, vocab) gives zeros.
struct EmbedParams {
  IntView ids;  // [B, T]
  int64_t tokens = 0;
  int block_size = 0;
  const uint16_t* embed_weight = nullptr;
  int64_t vocab = 0;
  int64_t hidden = 0;  // a multiple of 8
  uint16_t* x = nullptr;
};

}  // namespace dflash::draft

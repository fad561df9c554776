// Plain parameters of inject_kv; filled by csrc/api/inject.cpp, read by the CPU and CUDA implementations.
//
//   t_k = taps_k, or bf16( taps_k * rsqrt(mean(taps_k^2) + eps) * tap_norm_k )                            k = 0..K-1
//   f = bf16( [t_0 | .. | t_{K-1}] fc_weight^T )
//   x = bf16( f * rsqrt(mean(f^2) + eps) * hidden_norm )
//   k_l | v_l = bf16( x kv_weight_l^T + kv_bias_l )                    l = 0..L-1, one GEMM with N = L * 2 * Hkv * D
//   k = k_l * rsqrt(mean_D(k_l^2) + eps) * k_norm_l                    per head, fp32, not rounded
//   k_caches[l][slots[n]] = bf16( rope(k, positions[n]) ),   v_caches[l][slots[n]] = bf16( v_l * value_scale )
//
// or, in caches of e4m3, e4m3( rope(k, ..) / k_scale_l ) and e4m3( bf16( v_l * value_scale ) / v_scale_l ), saturating.
// Inside the formulas fp32; "bf16" stands for the dtype of the weights (fp32 on the CPU rounds nothing).
//
// The first two lines alone (f goes to memory) and all but these (f comes from there, in shards of columns) are for fc
// sharded by output rows.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/int_view.h"
#include "common/live_rows.h"

namespace dflash::inject {

constexpr int kMaxLayers = 16;
constexpr int kMaxTaps = 8;
constexpr int kMaxHeadDim = 256;

// Elements of the workspace: a header, then for each row of a chunk f or x [H] and k|v [L * 2 * Hkv * D]; where rows
// are gathered, also their taps [K * H], and the token that the row stands for (int32).
constexpr int64_t kHeaderElements = 8;
constexpr int64_t kOrderElements = 2;
constexpr int64_t kGatherRows = 64;  // more rows than this are gathered; up to here all are one tile anyway

// One layer's K or V cache [S, Hkv, D], of bf16 or e4m3; D is contiguous, strides in elements.
struct CacheView {
  void* data = nullptr;
  int64_t slot_stride = 0;
  int64_t head_stride = 0;
};

// The last step: K-norm, RoPE and the paged write of all layers.
struct WriteParams {
  const void* kv = nullptr;        // [M, L, 2, Hkv, D], contiguous
  int64_t rows = 0;                // M = N
  int layers = 0;                  // L
  int kv_heads = 0;                // Hkv
  int head_dim = 0;                // D
  int rotary_dim = 0;              // even, <= D
  const void* k_norm = nullptr;    // [L, D], contiguous; nullptr: K is not normed
  const float* cos_sin = nullptr;  // [P, rotary_dim]: cosines, then sines
  int64_t cos_sin_stride = 0;
  int64_t max_positions = 0;       // P
  int64_t pool_size = 0;           // S
  IntView positions;               // [N]
  IntView slots;                   // [N]
  const int32_t* order = nullptr;  // [M]: token n of row m; nullptr: m itself
  LiveRows live;
  int64_t batch = 0;  // B; 0 without commit_lens
  float eps = 1e-6f;
  float value_scale = 1.0f;
  bool is_fp8 = false;             // the caches hold e4m3
  const float* k_scale = nullptr;  // [L]; nullptr: 1
  const float* v_scale = nullptr;
  CacheView k[kMaxLayers];
  CacheView v[kMaxLayers];
};

struct InjectParams {
  // fc; num_taps = 0: not done, f comes from `shards`.
  const uint16_t* taps[kMaxTaps] = {};  // K x [N, W], bf16
  int64_t tap_stride[kMaxTaps] = {};    // elements between rows
  int num_taps = 0;                     // K
  int64_t tap_width = 0;                // W
  const uint16_t* tap_norm = nullptr;   // [K, W]; nullptr: taps are not normed
  const uint16_t* fc_weight = nullptr;  // [H, K * W]
  int64_t hidden = 0;                   // H
  uint16_t* fused = nullptr;            // [N, H]: f of live rows goes here, and that is all; nullptr: all is done
  int64_t fused_stride = 0;             // elements between rows
  // The rest.
  const uint16_t* shards[kMaxTaps] = {};  // R x [N, H / R], with num_taps = 0
  int64_t shard_stride = 0;               // elements between rows
  int num_shards = 0;                     // R
  const uint16_t* hidden_norm = nullptr;  // [H]
  const uint16_t* kv_weight = nullptr;    // [L * 2 * Hkv * D, H]
  const uint16_t* kv_bias = nullptr;      // [L * 2 * Hkv * D]; nullptr: none
  uint16_t* workspace = nullptr;
  int64_t workspace_elements = 0;
  WriteParams write;  // kv left empty; rows, live and eps count for fc too
};

// How rows go through. Gathered: live rows are listed and what they are made of (taps or shards) put together.
struct Chunks {
  bool gather = false;
  int64_t rows = 0;      // at once, whole requests; 0 where the workspace does not hold one
  int64_t elements = 0;  // of the workspace that one row takes
};

inline Chunks plan_chunks(const InjectParams& p) {
  const int64_t room = p.workspace_elements - kHeaderElements, request = p.write.live.rows_per_request;
  const int64_t kv_width = int64_t{2} * p.write.layers * p.write.kv_heads * p.write.head_dim;
  const int64_t plain = p.fused == nullptr ? p.hidden + kv_width : 0;
  const int64_t gathered = plain + p.num_taps * p.tap_width + kOrderElements;
  const bool must = p.num_taps > 0 && p.tap_norm != nullptr;
  const bool may = p.write.live.commit_lens.data != nullptr && p.write.rows > kGatherRows;
  if (must || (may && room >= gathered * request)) return {true, room / gathered / request * request, gathered};
  if (plain == 0) return {false, p.write.rows, 0};
  return {false, room / plain / request * request, plain};
}

// Heads that head.cuh can finish: rotated whole, in caches whose rows begin at multiples of 8 elements.
inline bool takes_whole_heads(const WriteParams& p) {
  if ((p.head_dim != 64 && p.head_dim != 128 && p.head_dim != 256) || p.rotary_dim != p.head_dim) return false;
  if (p.max_positions > INT32_MAX) return false;
  const auto aligned = [](const void* data, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; };
  if (!aligned(p.cos_sin, 8) || p.cos_sin_stride % 2 != 0 || !aligned(p.k_norm, 4)) return false;
  for (int layer = 0; layer < p.layers; ++layer) {
    for (const CacheView& cache : {p.k[layer], p.v[layer]}) {
      if (!aligned(cache.data, p.is_fp8 ? 8 : 16) || cache.slot_stride % 8 != 0 || cache.head_stride % 8 != 0)
        return false;
    }
  }
  return true;
}

enum class Fault : int { kNone, kCommitLen, kSlot, kPosition };

// Values that would be written out of bounds: an error on the CPU and under DFLASH_DEBUG=1, else the row is skipped.
// A bad commit length is reported by the first row of its request; the kernels read it as 0..T.
DFLASH_HOST_DEVICE Fault find_fault(const WriteParams& p, int64_t row) {
  if (p.live.commit_lens.data != nullptr && row % p.live.rows_per_request == 0) {
    const int64_t length = p.live.commit_lens.at(row / p.live.rows_per_request);
    if (length < 0 || length > p.live.rows_per_request) return Fault::kCommitLen;
  }
  if (!p.live.at(row)) return Fault::kNone;
  const int64_t slot = p.slots.at(row);
  if (slot < 0 || slot >= p.pool_size) return Fault::kSlot;
  const int64_t position = p.positions.at(row);
  if (position < 0 || position >= p.max_positions) return Fault::kPosition;
  return Fault::kNone;
}

}  // namespace dflash::inject

// One head of context K or V, as a quad of lanes holds it: K-norm, RoPE, and its row of the paged cache. Formula in
// params.h. For heads of 64, 128 or 256 that are rotated whole, and caches whose rows begin at multiples of 8
// elements.
//
// Lane q of the quad holds elements 8 j + 2 q + {0, 1}, j = 0 .. D / 8 - 1: the layout of mma.sync's and wgmma's
// accumulators, so that a GEMM's epilogue can go on from there. The rotation pairs j with j + D / 16: both are the
// lane's own. All lanes of a warp call these functions; of a quad that is not live nothing is loaded or stored.
#pragma once

#include "common/bf16_pairs.cuh"
#include "common/ptx.cuh"
#include "smxx/inject/params.h"

namespace dflash::inject {

// Where a row's K and V go: slot -1 for nowhere, because the row is not live or its slot or position are out of range.
struct RowPlace {
  int64_t slot = -1;
  int32_t position = 0;
  __device__ __forceinline__ bool live() const { return slot >= 0; }
};

// Row m of the workspace.
__device__ __forceinline__ RowPlace find_place(const WriteParams& p, int64_t row, bool live) {
  RowPlace place;
  if (!live) return place;
  const int64_t token = p.order == nullptr ? row : p.order[row];
  const int64_t slot = p.slots.at(token), position = p.positions.at(token);
  if (slot < 0 || slot >= p.pool_size || position < 0 || position >= p.max_positions) return place;
  place.slot = slot;
  place.position = static_cast<int32_t>(position);
  return place;
}

// The n-th head of kv [L, 2, Hkv, D].
struct HeadPlace {
  int layer, head;
  bool is_value;
  __device__ __forceinline__ HeadPlace(const WriteParams& p, int n)
      : layer(n / (2 * p.kv_heads)), head(n % (2 * p.kv_heads)), is_value(head >= p.kv_heads) {
    if (is_value) head -= p.kv_heads;
  }
};

template <int kDim>
__device__ __forceinline__ void norm_and_rotate(const WriteParams& p, float2 (&x)[kDim / 8], int layer,
                                                const RowPlace& place) {
  constexpr int kHalf = kDim / 16;
  const int q = threadIdx.x % 4;
  if (p.k_norm != nullptr) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) sum += x[j].x * x[j].x + x[j].y * x[j].y;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float scale = rsqrtf(sum / static_cast<float>(kDim) + p.eps);
    const uint16_t* weight = static_cast<const uint16_t*>(p.k_norm) + layer * kDim + 2 * q;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      const float2 w = load_pair(weight + 8 * j);
      x[j] = make_float2(x[j].x * scale * w.x, x[j].y * scale * w.y);
    }
  }
  if (!place.live()) return;
  const float* row = p.cos_sin + int64_t{place.position} * p.cos_sin_stride + 2 * q;
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    const float2 cosine = *reinterpret_cast<const float2*>(row + 8 * j);
    const float2 sine = *reinterpret_cast<const float2*>(row + kDim / 2 + 8 * j);
    const float2 a = x[j], b = x[j + kHalf];
    x[j] = make_float2(a.x * cosine.x - b.x * sine.x, a.y * cosine.y - b.y * sine.y);
    x[j + kHalf] = make_float2(b.x * cosine.x + a.x * sine.x, b.y * cosine.y + a.y * sine.y);
  }
}

// What codes of e4m3 are multiplied with, inverted.
__device__ __forceinline__ float inverse_scale(const WriteParams& p, int layer, bool is_value) {
  const float* scales = is_value ? p.v_scale : p.k_scale;
  return scales == nullptr ? 1.0f : 1.0f / scales[layer];
}

// x: rounded to bf16, biased; K is normed and rotated on the way, V scaled.
template <int kDim>
__device__ __forceinline__ void finish_head(const WriteParams& p, float2 (&x)[kDim / 8], const HeadPlace& head,
                                            const RowPlace& place) {
  if (!head.is_value) {
    norm_and_rotate<kDim>(p, x, head.layer, place);
  } else if (p.value_scale != 1.0f) {
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      x[j] = pair_of(rounded(make_float2(x[j].x * p.value_scale, x[j].y * p.value_scale)));
    }
  }
  const CacheView& cache = head.is_value ? p.v[head.layer] : p.k[head.layer];
  const int64_t at = place.slot * cache.slot_stride + head.head * cache.head_stride + 8 * (threadIdx.x % 4);
  const float inverse = p.is_fp8 ? inverse_scale(p, head.layer, head.is_value) : 1.0f;
#pragma unroll
  for (int g = 0; g < kDim / 32; ++g) {
    uint32_t v[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float2 value = x[4 * g + r];
      v[r] = p.is_fp8 ? e4m3_pair(value.x * inverse, value.y * inverse) : rounded(value);
    }
    transpose_4x4(v);
    if (!place.live()) continue;
    if (p.is_fp8) {
      uint8_t* out = static_cast<uint8_t*>(cache.data) + at + 32 * g;
      *reinterpret_cast<uint2*>(out) = make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
    } else {
      uint16_t* out = static_cast<uint16_t*>(cache.data) + at + 32 * g;
      *reinterpret_cast<uint4*>(out) = make_uint4(v[0], v[1], v[2], v[3]);
    }
  }
}

}  // namespace dflash::inject

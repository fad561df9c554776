// The epilogue that stores C = A * W^T (* scales) (+ bias) (+ residual | gating) in bf16; formulas and rounding in
// smxx/gemm/params.h, fragments and what an epilogue is in kernel.cuh.
//
// The four lanes that hold a row transpose their accumulators, so that each has 8 neighbouring columns and loads and
// stores 16 bytes.
#pragma once

#include <cuda_bf16.h>

#include "common/bf16_pairs.cuh"
#include "smxx/many_rows/kernel.cuh"

namespace dflash::many_rows {

__device__ __forceinline__ float2 sum(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// Groups of 32 columns of C, of 32 + 32 of W's when gated.
template <int BN, bool kGated_, bool kScaled = false>
class Store {
 public:
  static constexpr bool kGated = kGated_;
  static constexpr int kColumns = BN / (kGated ? 2 : 1);  // of C
  static constexpr int kGroups = kColumns / 32;

  explicit __device__ __forceinline__ Store(const GemmParams& p) : p_(p) {}

  static __device__ __forceinline__ constexpr int group_of(int j) { return (kGated ? j % (BN / 16) : j) / 4; }

  // Scales and the residual are on their way to L1 while the products run.
  __device__ __forceinline__ void begin(int64_t row0, int64_t live_rows, int column_tile) {
    row0_ = row0;
    live_rows_ = live_rows;
    const int lane = threadIdx.x % 32;
    const int64_t width = kGated ? p_.n / 2 : p_.n;
    const int64_t column0 = static_cast<int64_t>(column_tile) * kColumns;
    if constexpr (kScaled) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = row0 + lane / 4 + 8 * half;
        a_scale_[half] = row < live_rows ? p_.a_scale[row] : 0.0f;
      }
      const int64_t column = column0 + 32 * lane;  // of each a line
      if (lane < kColumns / 32 && column < width) {
        prefetch_l1(p_.w_scale + column);
        if constexpr (kGated) prefetch_l1(p_.w_scale + width + column);
      }
    }
    if constexpr (!kGated) {
      if (p_.residual != nullptr) {
        for (int i = lane; i < 16 * (kColumns / 32); i += 32) {
          const int64_t row = row0 + i % 16, column = column0 + 32 * (i / 16);
          if (row < live_rows && column < width) prefetch_l1(p_.residual + row * p_.residual_stride + column);
        }
      }
    }
  }

  __device__ __forceinline__ void finish(const float (&acc)[BN / 2], int column_tile, int splits, int split) const {
    const int lane = threadIdx.x % 32, q = lane % 4;
    const int64_t width = kGated ? p_.n / 2 : p_.n;
    const int64_t column0 = static_cast<int64_t>(column_tile) * kColumns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0_ + lane / 4 + 8 * half;
      const bool live = row < live_rows_;
      uint16_t* const c = p_.c + (live && p_.c_rows != nullptr ? p_.c_rows[row] : row) * p_.c_stride;
      // C may be the residual, so that no load moves over a store: four groups' loads, then their stores.
      constexpr int kBatch = kGroups % 4 == 0 ? 4 : kGroups;
      static_assert(kGroups % kBatch == 0, "whole batches");
#pragma unroll
      for (int g0 = 0; g0 < kGroups; g0 += kBatch) {
        uint4 residual[kBatch];
        if constexpr (!kGated) {
          if (p_.residual != nullptr) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              const int64_t column = column0 + 32 * (g0 + i) + 8 * q;
              residual[i] = make_uint4(0, 0, 0, 0);
              if (live && column < width && (g0 + i) % splits == split) {
                residual[i] = *reinterpret_cast<const uint4*>(p_.residual + row * p_.residual_stride + column);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int g = g0 + i;
          if (g % splits != split) continue;
          uint32_t v[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int j = 4 * g + r;
            const int64_t column = column0 + 8 * j + 2 * q;
            float2 value = make_float2(acc[4 * j + 2 * half], acc[4 * j + 2 * half + 1]);
            if constexpr (kScaled) {
              if (column < width) value = scaled(value, a_scale_[half], p_.w_scale + column);
            }
            if (p_.bias != nullptr && column < width) value = sum(value, load_pair(p_.bias + column));
            v[r] = rounded(value);
            if constexpr (kGated) {
              const int u = j + BN / 16;
              float2 up = make_float2(acc[4 * u + 2 * half], acc[4 * u + 2 * half + 1]);
              if constexpr (kScaled) {
                if (column < width) up = scaled(up, a_scale_[half], p_.w_scale + width + column);
              }
              if (p_.bias != nullptr && column < width) up = sum(up, load_pair(p_.bias + width + column));
              const float2 g_rounded = pair_of(v[r]), u_rounded = pair_of(rounded(up));
              v[r] = rounded(make_float2(silu(g_rounded.x) * u_rounded.x, silu(g_rounded.y) * u_rounded.y));
            }
          }
          transpose_4x4(v);
          const int64_t column = column0 + 32 * g + 8 * q;
          if (!live || column >= width) continue;  // the width is a multiple of 8
          if constexpr (!kGated) {
            if (p_.residual != nullptr) {
              v[0] = rounded(sum(pair_of(v[0]), pair_of(residual[i].x)));
              v[1] = rounded(sum(pair_of(v[1]), pair_of(residual[i].y)));
              v[2] = rounded(sum(pair_of(v[2]), pair_of(residual[i].z)));
              v[3] = rounded(sum(pair_of(v[3]), pair_of(residual[i].w)));
            }
          }
          *reinterpret_cast<uint4*>(c + column) = make_uint4(v[0], v[1], v[2], v[3]);
        }
      }
    }
    __syncwarp();
  }

 private:
  static __device__ __forceinline__ float2 scaled(float2 value, float a_scale, const float* w_scale) {
    // 8-byte aligned: columns are even. Read-only, so that loads move over the stores of C.
    const float2 w = __ldg(reinterpret_cast<const float2*>(w_scale));
    return make_float2(value.x * a_scale * w.x, value.y * a_scale * w.y);
  }

  const GemmParams& p_;
  int64_t row0_ = 0, live_rows_ = 0;
  float a_scale_[2] = {};  // of this thread's rows, where there are scales
};

// Launches launch_tiles<BN, kGated>(.., operands, ..) of `Launcher` for the tiles of the plan. False, with nothing
// launched, where the operands ask for what these kernels have not.
template <typename Launcher>
bool launch_store(const GemmParams& p, int num_sms, const Rates& rates, const Launcher& launcher) {
  const auto is_aligned = [](const uint16_t* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
  };
  const int64_t width = p.gated ? p.n / 2 : p.n;
  if (width % 8 != 0 || !is_aligned(p.c, p.c_stride)) return false;
  if (p.residual != nullptr && !is_aligned(p.residual, p.residual_stride)) return false;
  Operands of;
  constexpr int kWidest = Launcher::kWidest;
  if (!prepare(&of, p, p.gated ? 64 : 32, num_sms, rates, Launcher::kNarrowest, kWidest)) return false;
  switch (of.plan.columns) {
    case 64:
      if constexpr (Launcher::kNarrowest <= 64) {
        p.gated ? launcher.template launch<64, true>(of) : launcher.template launch<64, false>(of);
      }
      break;
    case 96:
      if constexpr (Launcher::kNarrowest <= 64) launcher.template launch<96, false>(of);
      break;
    case 128:
      p.gated ? launcher.template launch<128, true>(of) : launcher.template launch<128, false>(of);
      break;
    case 192:
      if constexpr (kWidest >= 192) {
        p.gated ? launcher.template launch<192, true>(of) : launcher.template launch<192, false>(of);
      }
      break;
    case 256:
      if constexpr (kWidest >= 256) {
        p.gated ? launcher.template launch<256, true>(of) : launcher.template launch<256, false>(of);
      }
      break;
    default:
      if constexpr (kWidest >= 160) launcher.template launch<160, false>(of);
  }
  return true;
}

}  // namespace dflash::many_rows

// C = A * W^T (+ bias) (+ residual | gating) in bf16 for many rows on Hopper; formulas and rounding in
// smxx/gemm/params.h, the kernel in kernel.cuh.
//
// Epilogue: the four lanes that hold a row transpose their accumulators, so that each has 8 neighbouring columns and
// loads and stores 16 bytes.
#include <cuda_bf16.h>

#include "common/bf16_pairs.cuh"
#include "sm90/gemm/kernel.cuh"
#include "sm90/gemm/launch.h"

namespace dflash::sm90::gemm {
namespace {

__device__ __forceinline__ float2 sum(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// Groups of 32 columns of C, of 32 + 32 of W's when gated.
template <int BN, bool kGated_>
class Store {
 public:
  static constexpr bool kGated = kGated_;
  static constexpr int kGroups = BN / (kGated ? 64 : 32);

  explicit __device__ __forceinline__ Store(const GemmParams& p) : p_(p) {}

  static __device__ __forceinline__ constexpr int group_of(int j) { return (kGated ? j % (BN / 16) : j) / 4; }

  __device__ __forceinline__ void begin(int64_t row0, int64_t live_rows) {
    row0_ = row0;
    live_rows_ = live_rows;
  }

  __device__ __forceinline__ void finish(const float (&acc)[BN / 2], int column_tile, int splits, int split) const {
    const int lane = threadIdx.x % 32, q = lane % 4;
    const int64_t width = kGated ? p_.n / 2 : p_.n;
    const int64_t column0 = static_cast<int64_t>(column_tile) * (kGated ? BN / 2 : BN);
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
            if (p_.bias != nullptr && column < width) value = sum(value, load_pair(p_.bias + column));
            v[r] = rounded(value);
            if constexpr (kGated) {
              const int u = j + BN / 16;
              float2 up = make_float2(acc[4 * u + 2 * half], acc[4 * u + 2 * half + 1]);
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
  const GemmParams& p_;
  int64_t row0_ = 0, live_rows_ = 0;
};

template <int BN, bool kGated>
__global__ void __launch_bounds__(Tiles<BN>::kConsumers + kProducers, 1)
    gemm_bf16_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ SourceMaps a_maps,
                     const __grid_constant__ CUtensorMap w_map, const __grid_constant__ Schedule schedule) {
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[2 * Tiles<BN>::kStages];
  run<BN>(p, a_maps, &w_map, schedule, shared_bytes, barriers, Store<BN, kGated>(p));
}

template <int BN, bool kGated>
void launch_store(const GemmParams& p, const Operands& of, int num_sms, cudaStream_t stream) {
  launch<BN>(gemm_bf16_kernel<BN, kGated>, p, of.a_maps, of.w_map, of.plan, num_sms, stream, "gemm_bf16");
}

template <bool kGated>
void launch_store(const GemmParams& p, const Operands& of, int num_sms, cudaStream_t stream) {
  switch (of.plan.columns) {
    case 128:
      return launch_store<128, kGated>(p, of, num_sms, stream);
    case 192:
      return launch_store<192, kGated>(p, of, num_sms, stream);
    case 256:
      return launch_store<256, kGated>(p, of, num_sms, stream);
    default:
      if constexpr (!kGated) return launch_store<160, kGated>(p, of, num_sms, stream);
  }
}

bool is_aligned(const uint16_t* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

}  // namespace

bool launch_gemm_bf16(const GemmParams& p, int num_sms, cudaStream_t stream) {
  const int64_t width = p.gated ? p.n / 2 : p.n;
  if (width % 8 != 0 || !is_aligned(p.c, p.c_stride)) return false;
  if (p.residual != nullptr && !is_aligned(p.residual, p.residual_stride)) return false;
  Operands operands;
  if (!prepare(&operands, p, p.gated ? 64 : 32, num_sms)) return false;
  if (p.gated) {
    launch_store<true>(p, operands, num_sms, stream);
  } else {
    launch_store<false>(p, operands, num_sms, stream);
  }
  return true;
}

}  // namespace dflash::sm90::gemm

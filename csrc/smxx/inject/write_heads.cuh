// The epilogue of the KV projection: K-norm, RoPE and the paged write, so that K and V go from the accumulators to the
// caches. Formula and rounding in params.h, fragments and what an epilogue is in smxx/many_rows/kernel.cuh.
//
// A tile's columns are whole heads (one to four of 128 or 64), a row of one lies in a quad of lanes: see head.cuh. Not
// heads of 256: 64 registers of a row's head beside 128 accumulators spill. With K in parts, part s finishes the heads
// n with n % splits == s. Row numbers, slots and positions are looked up before the products, so that their latency
// does not show.
#pragma once

#include <cuda_bf16.h>

#include "common/bf16_pairs.cuh"
#include "smxx/inject/head.cuh"
#include "smxx/many_rows/kernel.cuh"

namespace dflash::inject {

template <int BN, int kDim>
class WriteHeads {
 public:
  static constexpr bool kGated = false;
  static constexpr int kHeads = BN / kDim, kEights = kDim / 8;
  static_assert(BN % kDim == 0, "whole heads");

  __device__ __forceinline__ WriteHeads(const uint16_t* bias, const WriteParams& write) : bias_(bias), write_(write) {}

  static __device__ __forceinline__ constexpr int group_of(int j) { return j / kEights; }

  __device__ __forceinline__ void begin(int64_t row0, int64_t live_rows, int /*column_tile*/) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + threadIdx.x % 32 / 4 + 8 * half;
      place_[half] = find_place(write_, row, row < live_rows);
    }
  }

  __device__ __forceinline__ void finish(const float (&acc)[BN / 2], int column_tile, int splits, int split) const {
    const int heads = 2 * write_.layers * write_.kv_heads;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int n = column_tile * kHeads + h;
      if (h % splits != split || n >= heads) continue;
      const HeadPlace head(write_, n);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 x[kEights];
#pragma unroll
        for (int j = 0; j < kEights; ++j) {
          const int i = 4 * (h * kEights + j) + 2 * half;
          float2 value = make_float2(acc[i], acc[i + 1]);
          if (bias_ != nullptr) {
            const float2 bias = load_pair(bias_ + int64_t{n} * kDim + 8 * j + 2 * (threadIdx.x % 4));
            value = make_float2(value.x + bias.x, value.y + bias.y);
          }
          x[j] = pair_of(rounded(value));
        }
        finish_head<kDim>(write_, x, head, place_[half]);
      }
    }
    __syncwarp();
  }

 private:
  const uint16_t* bias_;
  const WriteParams& write_;
  RowPlace place_[2];
};

// Launches launch<BN, kDim>(operands) of `Launcher` for the tiles of the plan. False, with nothing launched, where the
// operands ask for what these kernels have not.
template <typename Launcher>
bool launch_write_heads(const gemm::GemmParams& p, const WriteParams& write, int num_sms, const many_rows::Rates& rates,
                        const Launcher& launcher) {
  constexpr int kNarrowest = 128;  // tile below
  many_rows::Operands of;
  if (write.head_dim != 64 && write.head_dim != 128) return false;
  if (!many_rows::prepare(&of, p, write.head_dim, num_sms, rates, kNarrowest)) return false;
  const bool wide = of.plan.columns == 256;
  if (write.head_dim == 64) {
    if (wide) {
      launcher.template launch<256, 64>(of);
    } else if (of.plan.columns == 192) {
      launcher.template launch<192, 64>(of);
    } else {
      launcher.template launch<128, 64>(of);
    }
  } else if (wide) {
    launcher.template launch<256, 128>(of);
  } else {
    launcher.template launch<128, 128>(of);
  }
  return true;
}

}  // namespace dflash::inject

// The KV projection of all drafter layers, with K-norm, RoPE and the paged write as its epilogue: K and V go from the
// accumulators to the caches. Formula and rounding in smxx/inject/params.h, the GEMM in sm90/gemm/kernel.cuh.
//
// Floor: that of the GEMM; what is saved is 2 * M * L * 2 * Hkv * D * 2 bytes through L2 and a launch.
//
// A tile's columns are whole heads (one to four of 128 or 64), a row of one lies in a quad of lanes: see
// smxx/inject/head.cuh. Not heads of 256: 64 registers of a row's head beside 128 accumulators spill. With K in parts,
// part s finishes the heads n with n % splits == s. Row numbers, slots and positions are looked up before the products,
// so that their latency does not show.
#include <cuda_bf16.h>

#include "common/bf16_pairs.cuh"
#include "sm90/gemm/kernel.cuh"
#include "sm90/inject/launch.h"
#include "smxx/inject/head.cuh"

namespace dflash::sm90::inject {
namespace {

using dflash::gemm::GemmParams;
using dflash::inject::find_place;
using dflash::inject::finish_head;
using dflash::inject::HeadPlace;
using dflash::inject::RowPlace;
using dflash::inject::WriteParams;

template <int BN, int kDim>
class WriteHeads {
 public:
  static constexpr bool kGated = false;
  static constexpr int kHeads = BN / kDim, kEights = kDim / 8;
  static_assert(BN % kDim == 0, "whole heads");

  __device__ __forceinline__ WriteHeads(const uint16_t* bias, const WriteParams& write) : bias_(bias), write_(write) {}

  static __device__ __forceinline__ constexpr int group_of(int j) { return j / kEights; }

  __device__ __forceinline__ void begin(int64_t row0, int64_t live_rows) {
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

template <int BN, int kDim>
__global__ void __launch_bounds__(gemm::Tiles<BN>::kConsumers + gemm::kProducers, 1)
    project_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ gemm::SourceMaps a_maps,
                   const __grid_constant__ CUtensorMap w_map, const __grid_constant__ gemm::Schedule schedule,
                   const __grid_constant__ WriteParams write) {
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[2 * gemm::Tiles<BN>::kStages];
  gemm::run<BN>(p, a_maps, &w_map, schedule, shared_bytes, barriers, WriteHeads<BN, kDim>(p.bias, write));
}

template <int BN, int kDim>
void launch_tiles(const GemmParams& p, const WriteParams& write, const gemm::Operands& of, int num_sms,
                  cudaStream_t stream) {
  gemm::launch<BN>(project_kernel<BN, kDim>, p, of.a_maps, of.w_map, of.plan, num_sms, stream, "inject_kv", write);
}

}  // namespace

bool launch_project(const GemmParams& p, const WriteParams& write, cudaStream_t stream) {
  int device = 0, major = 0, num_sms = 0;
  cuda_check(cudaGetDevice(&device), "inject_kv");
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "inject_kv");
  cuda_check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device), "inject_kv");
  gemm::Operands operands;
  if (major != 9 || (write.head_dim != 64 && write.head_dim != 128)) return false;
  if (!gemm::prepare(&operands, p, write.head_dim, num_sms)) return false;
  const bool wide = operands.plan.columns == 256;
  if (write.head_dim == 64) {
    if (wide) {
      launch_tiles<256, 64>(p, write, operands, num_sms, stream);
    } else if (operands.plan.columns == 192) {
      launch_tiles<192, 64>(p, write, operands, num_sms, stream);
    } else {
      launch_tiles<128, 64>(p, write, operands, num_sms, stream);
    }
  } else if (wide) {
    launch_tiles<256, 128>(p, write, operands, num_sms, stream);
  } else {
    launch_tiles<128, 128>(p, write, operands, num_sms, stream);
  }
  return true;
}

}  // namespace dflash::sm90::inject

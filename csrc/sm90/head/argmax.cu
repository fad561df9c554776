// lm_head_argmax and verify_block_from_hidden for more than 128 rows on Hopper; formulas in smxx/head/params.h.
//
// Floor: 2 * N * V * H flops of the tensor cores, which wgmma alone can feed; the weights pass L2 once for every two
// row tiles that run together. The mainloop is sm90/gemm/mainloop.cuh.
//
// Partition: tile t of a cluster is the row pair t % pairs and the 256 vocabulary rows t / pairs, so clusters that run
// together share weights. A warp holds 16 whole rows of its tile: the maximum of a row's keys is two shuffles away from
// one lane, which adds it to the workspace with a 64-bit atomicMax. Tickets and the end as in smxx/head/argmax.cu; the
// consumers of a block draw one ticket for all its tiles.
#include <algorithm>

#include "common/cuda_check.h"
#include "sm90/gemm/mainloop.cuh"
#include "sm90/gemm/tensor_map.h"
#include "sm90/head/launch.h"
#include "smxx/head/finish.cuh"

namespace dflash::sm90::head {
namespace {

using dflash::head::HeadParams;
using dflash::head::tile_key;
using dflash::head::vocab_key;

using Tiles = Mainloop<256, 4>;
constexpr int kThreads = Tiles::kConsumers + 32;  // and a producer warp
constexpr int kClusterSize = 2;                   // one pair

struct Schedule {
  int row_pairs;  // pairs of row tiles
  int tiles;      // row_pairs * column tiles
  int k_tiles;
};

__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;\n" ::"n"(Tiles::kConsumers) : "memory");
}

// Keys of the warp's rows, added to the workspace.
__device__ __forceinline__ void add_keys(const HeadParams& p, const float (&acc)[128], int64_t row0, int64_t column0) {
  const int lane = threadIdx.x % 32;
  const auto* bias = p.gemm.bias;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t best = 0;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + 2 * (lane % 4) + e;
        if (column0 + column < p.gemm.n) {
          float logit = acc[4 * j + 2 * half + e];
          if (bias != nullptr) logit += __bfloat162float(__ushort_as_bfloat16(bias[column0 + column]));
          best = max(best, tile_key(logit, column));
        }
      }
    }
    best = max(best, __shfl_xor_sync(0xffffffffu, best, 1));
    best = max(best, __shfl_xor_sync(0xffffffffu, best, 2));
    const int64_t row = row0 + 8 * half + lane / 4;
    if (lane % 4 == 0 && row < p.gemm.m) {
      atomicMax(p.workspace + 1 + row, static_cast<unsigned long long>(vocab_key(best, column0)));
    }
  }
}

__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    argmax_kernel(const __grid_constant__ HeadParams p, const __grid_constant__ CUtensorMap hidden_map,
                  const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ Schedule schedule) {
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[2 * Tiles::kStages];
  __shared__ bool last;
  const Pair pair{kClusterSize, 0, cluster_rank()};
  const int cluster = static_cast<int>(blockIdx.x) / kClusterSize;
  const int clusters = static_cast<int>(gridDim.x) / kClusterSize;
  const Pipeline<Tiles> pipe = make_pipeline<Tiles>(shared_bytes, barriers, kClusterSize);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  PipelineState<Tiles> state;

  if (warp == Tiles::kConsumers / 32) {
    if (threadIdx.x % 32 == 0) {
      for (int tile = cluster; tile < schedule.tiles; tile += clusters) {
        const int row0 = (tile % schedule.row_pairs * 2 + static_cast<int>(pair.index)) * Tiles::BM;
        const int column0 = tile / schedule.row_pairs * Tiles::BN;
        for (int k = 0; k < schedule.k_tiles; ++k) {
          barrier_wait(pipe.empty(state.stage), state.parity ^ 1);
          barrier_arrive_expect(pipe.full(state.stage), Tiles::kStageBytes);
          tma_load(pipe.a(state.stage), &hidden_map, k * Tiles::BK, row0, pipe.full(state.stage));
          load_w(pipe, state.stage, &weight_map, k * Tiles::BK, column0, column0 + Tiles::BN / 2, pair);
          state.advance();
        }
      }
    }
    __syncwarp();
  } else {
    for (int tile = cluster; tile < schedule.tiles; tile += clusters) {
      const int64_t row0 = (tile % schedule.row_pairs * int64_t{2} + pair.index) * Tiles::BM;
      const int64_t column0 = tile / schedule.row_pairs * int64_t{Tiles::BN};
      float acc[128];
      multiply_tile(pipe, state, warp / 4, schedule.k_tiles, pair, acc);
      add_keys(p, acc, row0 + 16 * warp, column0);  // 64 rows a warpgroup, 16 a warp
    }
    __threadfence();
    consumers_sync();
    if (threadIdx.x == 0) {
      last = atomicAdd(p.workspace, 1ull) == gridDim.x - 1;
      __threadfence();
    }
    consumers_sync();
    if (last) dflash::head::finish_argmax(p, Tiles::kConsumers, consumers_sync);
  }
  cluster_sync();
}

}  // namespace

bool launch_argmax(const HeadParams& p, int num_sms, cudaStream_t stream) {
  if (p.gemm.a_stride[0] < p.gemm.k) return false;
  CUtensorMap hidden_map, weight_map;
  if (!make_tensor_map(&hidden_map, p.gemm.a[0], p.gemm.m, p.gemm.k, p.gemm.a_stride[0], Tiles::BM) ||
      !make_tensor_map(&weight_map, p.gemm.w, p.gemm.n, p.gemm.k, p.gemm.k, Tiles::BN / 2)) {
    return false;
  }
  const auto tiles_of = [](int64_t size, int64_t tile) { return static_cast<int>((size + tile - 1) / tile); };
  Schedule schedule;
  schedule.row_pairs = tiles_of(p.gemm.m, 2 * Tiles::BM);
  schedule.tiles = schedule.row_pairs * tiles_of(p.gemm.n, Tiles::BN);
  schedule.k_tiles = tiles_of(p.gemm.k, Tiles::BK);
  const int clusters = std::min(schedule.tiles, num_sms / kClusterSize);
  cuda_check(cudaFuncSetAttribute(argmax_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tiles::kSharedBytes),
             "lm_head_argmax");
  argmax_kernel<<<clusters * kClusterSize, kThreads, Tiles::kSharedBytes, stream>>>(p, hidden_map, weight_map,
                                                                                    schedule);
  cuda_check_launch("lm_head_argmax");
  return true;
}

}  // namespace dflash::sm90::head

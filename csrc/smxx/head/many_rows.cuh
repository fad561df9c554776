// lm_head_argmax and verify_block_from_hidden for more than 128 rows, as far as it is the same with wgmma (sm90/head)
// and tcgen05 (sm100/head); formulas in params.h, the ring and fragments in smxx/many_rows.
//
// Floor: 2 * N * V * H flops of the tensor cores; the weights pass L2 once for every two row tiles that run together.
//
// Partition: tile t of a cluster is the row pair t % pairs and the 256 vocabulary rows t / pairs, so clusters that run
// together share weights. A warp holds 16 whole rows of its tile: the maximum of a row's keys is two shuffles away from
// one lane, which adds it to the workspace with a 64-bit atomicMax. Tickets and the end as in argmax.cu; the 256
// threads with accumulators draw one ticket for all tiles of their block.
#pragma once

#include <algorithm>

#include "common/cuda_check.h"
#include "common/ptx.cuh"
#include "smxx/head/finish.cuh"
#include "smxx/many_rows/ring.cuh"
#include "smxx/many_rows/tensor_map.h"

namespace dflash::head {

using Tiles = many_rows::Tiles<256>;
constexpr int kClusterSize = 2;  // one pair

struct Schedule {
  int row_pairs;  // pairs of row tiles
  int tiles;      // row_pairs * column tiles
  int k_tiles;
};

// This block's part of the cluster's tiles.
struct TilePlace {
  many_rows::Pair pair{kClusterSize, 0, cluster_rank()};
  int cluster = static_cast<int>(blockIdx.x) / kClusterSize, clusters = static_cast<int>(gridDim.x) / kClusterSize;
  __device__ __forceinline__ int64_t row0(const Schedule& schedule, int tile) const {
    return (tile % schedule.row_pairs * int64_t{2} + pair.index) * Tiles::BM;
  }
  static __device__ __forceinline__ int64_t column0(const Schedule& schedule, int tile) {
    return tile / schedule.row_pairs * int64_t{Tiles::BN};
  }
};

// One thread: all loads of this block.
template <typename C>
__device__ __forceinline__ void produce(const many_rows::Pipeline<C>& pipe, const CUtensorMap* hidden_map,
                                        const CUtensorMap* weight_map, const Schedule& schedule,
                                        const TilePlace& place) {
  many_rows::PipelineState<C> state;
  for (int tile = place.cluster; tile < schedule.tiles; tile += place.clusters) {
    const int row0 = static_cast<int>(place.row0(schedule, tile));
    const int column0 = static_cast<int>(place.column0(schedule, tile));
    for (int k = 0; k < schedule.k_tiles; ++k) {
      barrier_wait(pipe.empty(state.stage), state.parity ^ 1);
      C::Loader::announce(pipe.full(state.stage), C::kStageBytes, place.pair);
      C::Loader::load(pipe.a(state.stage), hidden_map, k * Tiles::BK, row0, pipe.full(state.stage), place.pair);
      load_w(pipe, state.stage, weight_map, k * Tiles::BK, column0, column0 + Tiles::BN / 2, place.pair);
      state.advance();
    }
  }
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

__device__ __forceinline__ void keys_sync() { named_barrier(1, Tiles::kConsumers); }

// Threads 0 .. 255, when all keys of the block are added: the last block to come here writes the outputs. `last` is
// shared.
__device__ __forceinline__ void finish_block(const HeadParams& p, bool& last) {
  __threadfence();
  keys_sync();
  if (threadIdx.x == 0) {
    last = atomicAdd(p.workspace, 1ull) == gridDim.x - 1;
    __threadfence();
  }
  keys_sync();
  if (last) finish_argmax(p, Tiles::kConsumers, keys_sync);
}

// False where TMA cannot describe the operands.
inline bool make_maps(CUtensorMap* hidden_map, CUtensorMap* weight_map, const HeadParams& p) {
  return p.gemm.a_stride[0] >= p.gemm.k &&
         many_rows::make_tensor_map(hidden_map, p.gemm.a[0], 2, p.gemm.m, p.gemm.k, p.gemm.a_stride[0], Tiles::BM) &&
         many_rows::make_tensor_map(weight_map, p.gemm.w, 2, p.gemm.n, p.gemm.k, p.gemm.k, Tiles::BN / 2);
}

inline Schedule make_schedule(const HeadParams& p) {
  const auto tiles_of = [](int64_t size, int64_t tile) { return static_cast<int>((size + tile - 1) / tile); };
  Schedule schedule;
  schedule.row_pairs = tiles_of(p.gemm.m, 2 * Tiles::BM);
  schedule.tiles = schedule.row_pairs * tiles_of(p.gemm.n, Tiles::BN);
  schedule.k_tiles = tiles_of(p.gemm.k, Tiles::BK);
  return schedule;
}

inline int num_blocks(const Schedule& schedule, int num_sms) {
  return std::min(schedule.tiles, num_sms / kClusterSize) * kClusterSize;
}

}  // namespace dflash::head

// C = A * W^T (+ bias) (+ residual | gating) in bf16 for many rows on Hopper; formulas and rounding in
// smxx/gemm/params.h, the mainloop in mainloop.cuh, the choice of tiles in plan.h.
//
// Floors: 2 * M * N * K flops of the tensor cores with M live rows, and W once from DRAM. Between 65 and some 300 rows
// both are alike, and the path from L2 to the SMs, which carries A and W once for every tile, is as narrow: hence pairs
// of row tiles that share W, and tiles as wide as still fill the SMs.
//
// Partition: tile t of a cluster is the row tile (or pair of them) t % pairs and the BN columns t / pairs, so clusters
// that run together share W. How many row tiles are live is read on the device. Few tiles: K is cut over up to 4 blocks
// (or pairs) of a cluster. At the end of a tile they put their accumulators into their own pipeline memory, which is
// free by then, and each adds up its share in a fixed order; the producers wait meanwhile (two cluster barriers a
// tile).
//
// Block: two consumer warpgroups and a producer warpgroup. Gated: the first half of a tile's rows of W are gate's, the
// second half up's, so that a thread has both of a column. A from several sources: a step of K never straddles two; a
// source's last step is filled up with zeros. Gathered rows (a_rows): no TMA can follow a list, so all 128 producer
// threads copy A by cp.async into the same swizzled layout. Such a copy is ordinary memory to the tensor cores: the
// thread waits for it (kLag steps later), fences, and only then arrives at the full barrier, which expects 128 arrivals
// more.
//
// Epilogue: the four lanes that hold a row transpose their accumulators, so that each has 8 neighbouring columns and
// loads and stores 16 bytes.
#include <cooperative_groups.h>
#include <cuda_bf16.h>

#include <algorithm>

#include "common/cuda_check.h"
#include "common/dependent_launch.cuh"
#include "sm90/gemm/launch.h"
#include "sm90/gemm/mainloop.cuh"
#include "sm90/gemm/plan.h"
#include "sm90/gemm/tensor_map.h"

namespace dflash::sm90::gemm {
namespace {

namespace cg = cooperative_groups;

using dflash::gemm::GemmParams;
using dflash::gemm::kMaxSources;

constexpr int kProducers = 128;
// Of 168 registers at the start, the producers' go to the consumers: 2 * 216 + 72 = 3 * 168.
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
constexpr int kLag = 2;  // steps for which a gathered row may be under way before its arrival is due

template <int BN>
using Tiles = Mainloop<BN, BN == 256   ? 4
                           : BN == 192 ? 5
                                       : 6>;

struct SourceMaps {
  CUtensorMap map[kMaxSources];
};

struct Schedule {
  int pair_size;
  int splits;
  int column_tiles;
  int steps_per_source;
  int k_steps;
};

// What both roles know.
struct Work {
  int64_t live_rows;
  int pairs;  // live row tiles, or pairs of them
  int tiles;
  int first_step, num_steps;  // this block's part of K
};

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, 256;\n" ::: "memory"); }

// After the preceding kernel's end where there are commit lengths.
template <typename C>
__device__ __forceinline__ Work find_work(const GemmParams& p, const Schedule& schedule, int split) {
  Work work;
  work.live_rows = p.m;
  if (p.live.commit_lens.data != nullptr) work.live_rows = max(min(p.live.commit_lens.at(0), p.m), int64_t{0});
  const int pair_rows = C::BM * schedule.pair_size;
  work.pairs = static_cast<int>((work.live_rows + pair_rows - 1) / pair_rows);
  work.tiles = work.pairs * schedule.column_tiles;
  work.first_step = static_cast<int>(static_cast<int64_t>(schedule.k_steps) * split / schedule.splits);
  work.num_steps =
      static_cast<int>(static_cast<int64_t>(schedule.k_steps) * (split + 1) / schedule.splits) - work.first_step;
  return work;
}

// Position along K: source and column in it.
struct Position {
  int source, step, steps_per_source;
  __device__ __forceinline__ Position(int first, int steps_per_source)
      : source(first / steps_per_source), step(first % steps_per_source), steps_per_source(steps_per_source) {}
  __device__ __forceinline__ void advance() {
    if (++step == steps_per_source) {
      step = 0;
      ++source;
    }
  }
};

template <typename C, bool kGated>
__device__ __forceinline__ void load_w_step(const GemmParams& p, const Pipeline<C>& pipe, uint32_t stage,
                                            const CUtensorMap* w_map, int64_t source_k, const Position& at,
                                            int column_tile, const Pair& pair) {
  const int half = C::BN / 2;
  const int row0 = column_tile * (kGated ? half : C::BN);
  const int row1 = kGated ? row0 + static_cast<int>(p.n / 2) : row0 + half;
  load_w(pipe, stage, w_map, static_cast<int>(at.source * source_k) + at.step * C::BK, row0, row1, pair);
}

// The producer warpgroup while the accumulators of a tile lie in the pipeline's memory: see reduce_over_splits.
__device__ __forceinline__ void sit_out_reduction() {
  __syncwarp();
  cluster_sync();
  cluster_sync();
}

// All producer threads: the first issues all loads of this block, by TMA.
template <typename C, bool kGated>
__device__ __forceinline__ void produce(const GemmParams& p, const Pipeline<C>& pipe, const SourceMaps& a_maps,
                                        const CUtensorMap* w_map, const Schedule& schedule, const Pair& pair,
                                        int cluster, int clusters, int split) {
  const bool leader = threadIdx.x == C::kConsumers;
  const int64_t source_k = p.k / p.num_sources;
  const bool counted = p.live.commit_lens.data != nullptr;
  if (counted) grid_dependency_wait();
  const Work work = find_work<C>(p, schedule, split);
  const auto bytes_of = [&](int64_t row0) { return row0 < work.live_rows ? C::kStageBytes : C::kBytesW; };
  const auto row_of = [&](int tile) {
    return (static_cast<int64_t>(tile % work.pairs) * pair.size + pair.index) * C::BM;
  };
  int ahead = 0;  // stages whose W goes ahead of the wait
  if (!counted) {
    if (leader && cluster < work.tiles) {
      ahead = min(C::kStages, work.num_steps);
      Position at(work.first_step, schedule.steps_per_source);
      for (int s = 0; s < ahead; ++s) {  // a fresh stage is empty
        barrier_arrive_expect(pipe.full(s), bytes_of(row_of(cluster)));
        load_w_step<C, kGated>(p, pipe, s, w_map, source_k, at, cluster / work.pairs, pair);
        at.advance();
      }
    }
    grid_dependency_wait();
  }
  PipelineState<C> state;
  for (int tile = cluster; tile < work.tiles; tile += clusters) {
    if (leader) {
      const int64_t row0 = row_of(tile);
      Position at(work.first_step, schedule.steps_per_source);
      for (int k = 0; k < work.num_steps; ++k) {
        const uint32_t full = pipe.full(state.stage);
        if (ahead > 0) {
          --ahead;
        } else {
          barrier_wait(pipe.empty(state.stage), state.parity ^ 1);
          barrier_arrive_expect(full, bytes_of(row0));
          load_w_step<C, kGated>(p, pipe, state.stage, w_map, source_k, at, tile / work.pairs, pair);
        }
        if (row0 < work.live_rows) {
          tma_load(pipe.a(state.stage), &a_maps.map[at.source], at.step * C::BK, static_cast<int>(row0), full);
        }
        at.advance();
        state.advance();
      }
    }
    if (schedule.splits > 1) sit_out_reduction();
  }
}

// All producer threads: W by TMA, rows of A by cp.async.
template <typename C, bool kGated>
__device__ __forceinline__ void produce_gathered(const GemmParams& p, const Pipeline<C>& pipe, const CUtensorMap* w_map,
                                                 const Schedule& schedule, const Pair& pair, int cluster, int clusters,
                                                 int split) {
  constexpr int kPasses = C::BM * 8 / kProducers, kRowsPerPass = kProducers / 8;
  const int thread = static_cast<int>(threadIdx.x) - C::kConsumers;
  const int64_t source_k = p.k / p.num_sources;
  const int chunk = thread % 8;  // of 8 columns, 16 bytes
  const uint32_t to = static_cast<uint32_t>(thread / 8 * 128 + (chunk ^ thread / 8 % 8) * 16);
  grid_dependency_wait();
  const Work work = find_work<C>(p, schedule, split);
  PipelineState<C> state, published;
  int under_way = 0;
  const auto publish = [&] {
    async_proxy_fence();
    barrier_arrive(pipe.full(published.stage));
    published.advance();
    --under_way;
  };
  const auto publish_all = [&] {
    copy_async_wait<0>();
    while (under_way > 0) publish();
  };
  for (int tile = cluster; tile < work.tiles; tile += clusters) {
    const int64_t row0 = (static_cast<int64_t>(tile % work.pairs) * pair.size + pair.index) * C::BM;
    int32_t row[kPasses];  // -1: beyond the live ones
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int64_t m = row0 + thread / 8 + i * kRowsPerPass;
      row[i] = m < work.live_rows ? p.a_rows[m] : -1;
    }
    Position at(work.first_step, schedule.steps_per_source);
    for (int k = 0; k < work.num_steps; ++k) {
      barrier_wait(pipe.empty(state.stage), state.parity ^ 1);
      if (thread == 0) {
        barrier_arrive_expect(pipe.full(state.stage), C::kBytesW);
        load_w_step<C, kGated>(p, pipe, state.stage, w_map, source_k, at, tile / work.pairs, pair);
      }
      const int64_t column = int64_t{at.step} * C::BK + chunk * 8;
      const uint16_t* from = p.a[at.source] + column;
      const int64_t stride = p.a_stride[at.source];
      const bool inside = column < source_k;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const bool read = inside && row[i] >= 0;
        copy_async_16_to(pipe.a(state.stage) + to + i * (kRowsPerPass * 128), read ? from + row[i] * stride : p.a[0],
                         read ? 16 : 0);
      }
      copy_async_commit();
      at.advance();
      state.advance();
      if (++under_way > kLag) {
        copy_async_wait<kLag>();
        publish();
      }
    }
    if (schedule.splits > 1) {
      publish_all();
      sit_out_reduction();
    }
  }
  publish_all();
}

__device__ __forceinline__ float2 pair_of(uint32_t bits) {  // of bf16, the first in the low half
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

__device__ __forceinline__ uint32_t rounded(float2 value) {
  const __nv_bfloat162 pair = __float22bfloat162_rn(value);
  return static_cast<uint32_t>(__bfloat16_as_ushort(pair.x)) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y))
                                                                   << 16;
}

__device__ __forceinline__ float2 sum(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }

__device__ __forceinline__ float2 load_pair(const uint16_t* from) {
  return pair_of(*reinterpret_cast<const uint32_t*>(from));
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// v[i] of lane q of each four lanes goes to v[q] of lane i.
__device__ __forceinline__ void transpose_4x4(uint32_t (&v)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? v[i] : v[i + 1], 1);
    (odd ? v[i] : v[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? v[i] : v[i + 2], 2);
    (high ? v[i] : v[i + 2]) = got;
  }
}

// Groups of 32 columns of C (of 32 + 32 of W's when gated) are what the epilogue goes by, and what parts of K share
// out.
template <typename C, bool kGated>
constexpr int kGroups = C::BN / (kGated ? 64 : 32);

template <typename C, bool kGated>
__device__ __forceinline__ int group_of(int j) {  // j: eights of the tile's columns
  return (kGated ? j % (C::BN / 16) : j) / 4;
}

// Adds up the accumulators of the parts of K: part s ends with the sums of the groups g with g % splits == s.
template <typename C, bool kGated>
__device__ __forceinline__ void reduce_over_splits(float (&acc)[C::BN / 2], unsigned char* shared_tiles, int splits,
                                                   int split, const Pair& pair) {
  static_assert(C::BN / 8 * C::kConsumers * 16 <= C::kStages * C::kStageBytes, "the accumulators fit the pipeline");
  const cg::cluster_group cluster = cg::this_cluster();
  auto* mine = reinterpret_cast<float4*>(shared_tiles) + threadIdx.x;
  consumers_sync();  // both warpgroups are past their last product
#pragma unroll
  for (int j = 0; j < C::BN / 8; ++j) {
    mine[j * C::kConsumers] = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
  }
  cluster_sync();
#pragma unroll
  for (int j = 0; j < C::BN / 8; ++j) {
    if (group_of<C, kGated>(j) % splits != split) continue;
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int s = 0; s < splits; ++s) {
      const auto rank = static_cast<unsigned>(s) * pair.size + pair.index;
      const float4 part = *cluster.map_shared_rank(mine + j * C::kConsumers, rank);
      total = make_float4(total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w);
    }
    acc[4 * j] = total.x;
    acc[4 * j + 1] = total.y;
    acc[4 * j + 2] = total.z;
    acc[4 * j + 3] = total.w;
  }
  async_proxy_fence();  // TMA writes next where the accumulators were
  cluster_sync();
}

template <typename C, bool kGated>
__device__ __forceinline__ void store_tile(const GemmParams& p, const float (&acc)[C::BN / 2], int64_t row0,
                                           int64_t live_rows, int column_tile, int splits, int split) {
  const int lane = threadIdx.x % 32, q = lane % 4;
  const int64_t width = kGated ? p.n / 2 : p.n;
  const int64_t column0 = static_cast<int64_t>(column_tile) * (kGated ? C::BN / 2 : C::BN);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = row0 + lane / 4 + 8 * half;
    const bool live = row < live_rows;
    // C may be the residual, so that no load moves over a store: four groups' loads, then their stores.
    constexpr int kBatch = kGroups<C, kGated> % 4 == 0 ? 4 : kGroups<C, kGated>;
    static_assert(kGroups<C, kGated> % kBatch == 0, "whole batches");
#pragma unroll
    for (int g0 = 0; g0 < kGroups<C, kGated>; g0 += kBatch) {
      uint4 residual[kBatch];
      if constexpr (!kGated) {
        if (p.residual != nullptr) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const int64_t column = column0 + 32 * (g0 + i) + 8 * q;
            residual[i] = make_uint4(0, 0, 0, 0);
            if (live && column < width && (g0 + i) % splits == split) {
              residual[i] = *reinterpret_cast<const uint4*>(p.residual + row * p.residual_stride + column);
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
          if (p.bias != nullptr && column < width) value = sum(value, load_pair(p.bias + column));
          v[r] = rounded(value);
          if constexpr (kGated) {
            const int u = j + C::BN / 16;
            float2 up = make_float2(acc[4 * u + 2 * half], acc[4 * u + 2 * half + 1]);
            if (p.bias != nullptr && column < width) up = sum(up, load_pair(p.bias + width + column));
            const float2 g_rounded = pair_of(v[r]), u_rounded = pair_of(rounded(up));
            v[r] = rounded(make_float2(silu(g_rounded.x) * u_rounded.x, silu(g_rounded.y) * u_rounded.y));
          }
        }
        transpose_4x4(v);
        const int64_t column = column0 + 32 * g + 8 * q;
        if (!live || column >= width) continue;  // the width is a multiple of 8
        if constexpr (!kGated) {
          if (p.residual != nullptr) {
            v[0] = rounded(sum(pair_of(v[0]), pair_of(residual[i].x)));
            v[1] = rounded(sum(pair_of(v[1]), pair_of(residual[i].y)));
            v[2] = rounded(sum(pair_of(v[2]), pair_of(residual[i].z)));
            v[3] = rounded(sum(pair_of(v[3]), pair_of(residual[i].w)));
          }
        }
        *reinterpret_cast<uint4*>(p.c + row * p.c_stride + column) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }
  __syncwarp();
}

template <int BN, bool kGated>
__global__ void __launch_bounds__(Tiles<BN>::kConsumers + kProducers, 1)
    gemm_bf16_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ SourceMaps a_maps,
                     const __grid_constant__ CUtensorMap w_map, const __grid_constant__ Schedule schedule) {
  using C = Tiles<BN>;
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[2 * C::kStages];
  grid_dependency_launch();
  const int split = static_cast<int>(blockIdx.z);
  const int cluster = static_cast<int>(blockIdx.x) / schedule.pair_size;
  const int clusters = static_cast<int>(gridDim.x) / schedule.pair_size;
  Pair pair;
  pair.size = static_cast<uint32_t>(schedule.pair_size);
  pair.index = blockIdx.x % pair.size;
  pair.first = static_cast<uint32_t>(split) * pair.size;
  const bool gather = p.a_rows != nullptr;
  const Pipeline<C> pipe = make_pipeline<C>(shared_bytes, barriers, pair.size, gather ? 1 + kProducers : 1);
  const int warp = static_cast<int>(threadIdx.x) / 32;

  if (warp >= C::kConsumers / 32) {
    give_back_registers<kProducerRegisters>();
    if (gather) {
      produce_gathered<C, kGated>(p, pipe, &w_map, schedule, pair, cluster, clusters, split);
    } else {
      produce<C, kGated>(p, pipe, a_maps, &w_map, schedule, pair, cluster, clusters, split);
    }
    __syncwarp();
  } else {
    take_registers<kConsumerRegisters>();
    grid_dependency_wait();
    const Work work = find_work<C>(p, schedule, split);
    PipelineState<C> state;
    float acc[C::BN / 2];
    for (int tile = cluster; tile < work.tiles; tile += clusters) {
      const int64_t row0 =
          (static_cast<int64_t>(tile % work.pairs) * pair.size + pair.index) * C::BM + 16 * warp;  // of this warp
      multiply_tile(pipe, state, warp / 4, work.num_steps, pair, acc);
      if (schedule.splits > 1) reduce_over_splits<C, kGated>(acc, shared_bytes, schedule.splits, split, pair);
      store_tile<C, kGated>(p, acc, row0, work.live_rows, tile / work.pairs, schedule.splits, split);
    }
  }
  cluster_sync();
}

template <int BN, bool kGated>
void launch(const GemmParams& p, const SourceMaps& a_maps, const CUtensorMap& w_map, const Plan& plan, int num_sms,
            cudaStream_t stream) {
  using C = Tiles<BN>;
  constexpr auto kernel = gemm_bf16_kernel<BN, kGated>;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes), "gemm_bf16");
  Schedule schedule;
  schedule.pair_size = plan.pair;
  schedule.splits = plan.splits;
  schedule.column_tiles = static_cast<int>((p.n + BN - 1) / BN);
  schedule.steps_per_source = static_cast<int>((p.k / p.num_sources + C::BK - 1) / C::BK);
  schedule.k_steps = schedule.steps_per_source * p.num_sources;
  const int64_t pair_rows = int64_t{C::BM} * plan.pair;
  const int64_t clusters = std::min<int64_t>((p.m + pair_rows - 1) / pair_rows * schedule.column_tiles,
                                             std::max(num_sms / (plan.pair * plan.splits), 1));
  const dim3 grid(static_cast<unsigned>(clusters * plan.pair), 1, static_cast<unsigned>(plan.splits));
  const dim3 cluster(static_cast<unsigned>(plan.pair), 1, static_cast<unsigned>(plan.splits));
  launch_in_clusters(kernel, grid, C::kConsumers + kProducers, C::kSharedBytes, cluster, stream, p.early_start,
                     "gemm_bf16", p, a_maps, w_map, schedule);
}

template <bool kGated>
void launch(const GemmParams& p, const SourceMaps& a_maps, const CUtensorMap& w_map, const Plan& plan, int num_sms,
            cudaStream_t stream) {
  switch (plan.columns) {
    case 128:
      return launch<128, kGated>(p, a_maps, w_map, plan, num_sms, stream);
    case 192:
      return launch<192, kGated>(p, a_maps, w_map, plan, num_sms, stream);
    case 256:
      return launch<256, kGated>(p, a_maps, w_map, plan, num_sms, stream);
    default:
      if constexpr (!kGated) return launch<160, kGated>(p, a_maps, w_map, plan, num_sms, stream);
  }
}

bool is_aligned(const uint16_t* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
}

}  // namespace

bool launch_gemm_bf16(const GemmParams& p, int num_sms, cudaStream_t stream) {
  const int64_t source_k = p.k / p.num_sources, width = p.gated ? p.n / 2 : p.n;
  if (p.k == 0 || width % 8 != 0 || !is_aligned(p.c, p.c_stride)) return false;
  if (p.residual != nullptr && !is_aligned(p.residual, p.residual_stride)) return false;
  if (p.live.commit_lens.data != nullptr && p.live.rows_per_request < p.m) return false;
  const int64_t rows = p.expected_live > 0 ? p.expected_live : p.m;
  const int64_t k_steps = (source_k + 63) / 64 * p.num_sources;
  const Plan plan = choose_plan(rows, p.n, k_steps, p.gated, num_sms);
  SourceMaps a_maps = {};
  for (int s = 0; s < p.num_sources; ++s) {
    if (p.a_rows != nullptr) break;
    if (p.a_stride[s] < source_k ||
        !make_tensor_map(&a_maps.map[s], p.a[s], p.m, source_k, p.a_stride[s], Tiles<128>::BM)) {
      return false;
    }
  }
  CUtensorMap w_map;
  if (!make_tensor_map(&w_map, p.w, p.n, p.k, p.k, plan.columns / 2)) return false;
  if (p.gated) {
    launch<true>(p, a_maps, w_map, plan, num_sms, stream);
  } else {
    launch<false>(p, a_maps, w_map, plan, num_sms, stream);
  }
  return true;
}

}  // namespace dflash::sm90::gemm

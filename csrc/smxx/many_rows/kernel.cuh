// The persistent GEMM of many rows on Hopper and Blackwell: what sm90/gemm (wgmma) and sm100/gemm (tcgen05) share for
// kernels that store C or write K and V into the caches. The choice of tiles is in plan.h, the ring that feeds the
// tensor cores in ring.cuh; what multiplies, and run(), in <arch>/gemm/mainloop.cuh.
//
// Floors: 2 * M * N * K flops of the tensor cores with M live rows, and W once from DRAM. Between 65 and some 300 rows
// both are alike, and the path from L2 to the SMs, which carries A and W once for every tile, is as narrow: hence pairs
// of row tiles that share W, and tiles as wide as still fill the SMs.
//
// Partition: tile t of a cluster is the row tile (or pair of them) t % pairs and the BN columns (or two times BN, whose
// blocks share A) t / pairs, so clusters that run together share W. How many row tiles are live is read on the device.
// Few tiles: K is cut over up to 4 blocks (or pairs) of a cluster. At the end of a tile they put their accumulators
// into their own pipeline memory, which is free by then, and each adds up its share of the epilogue's groups of columns
// in a fixed order; all other warps wait meanwhile (two cluster barriers a tile).
//
// Block: threads 0 .. 255 end up with a tile's accumulators, 16 rows a warp; thread 256 issues all loads. Gated: the
// first half of a tile's rows of W are gate's, the second half up's, so that a thread has both of a column. A from
// several sources: a step of K never straddles two; a source's last step is filled up with zeros.
//
// Before the wait for the preceding kernel: a block's first stages of W, or, where the number of live rows is not known
// until then and with it the first tile, a prefetch of W into L2 for the tile that is likely the first.
//
// A fragment is what a thread holds of its warp's 16 rows: float acc[BN / 2]; for j = 0 .. BN / 8 - 1, lane l has
// columns 8 j + 2 * (l % 4) + {0, 1} of row l / 4 in acc[4 j + {0, 1}], and of row l / 4 + 8 in acc[4 j + {2, 3}].
// wgmma leaves it so in registers, tcgen05.ld.16x256b brings it so from tensor memory. An epilogue is a class with
//   kGated             W's rows are gate's and up's
//   group_of(j)        group of columns 8 j .. 8 j + 7 of the tile, alike for j = 4 i .. 4 i + 3; with K in parts, part
//                      s gets the groups g with g % splits == s
//   begin(row0, live, column_tile)  before the products of a tile: row0 is the first of this warp's 16 rows
//   finish(acc, column_tile, splits, split)
#pragma once

#include <cooperative_groups.h>

#include <algorithm>

#include "common/cuda_check.h"
#include "common/dependent_launch.cuh"
#include "common/ptx.cuh"
#include "smxx/gemm/params.h"
#include "smxx/many_rows/plan.h"
#include "smxx/many_rows/ring.cuh"
#include "smxx/many_rows/tensor_map.h"

namespace dflash::many_rows {

namespace cg = cooperative_groups;

using dflash::gemm::GemmParams;
using dflash::gemm::kMaxSources;

constexpr int kAheadSteps = 8;  // of W that go to L2 before the wait

struct SourceMaps {
  CUtensorMap map[kMaxSources];
};
// Block-scaled operands have one source; the maps of their scales are in the places of others.
constexpr int kScalesOfA = 1, kScalesOfW = 2;
constexpr int kScaleWords = 4 * kScaleBlock / 8;  // of such a map along K that a step takes

struct Schedule {
  int expected_pairs;  // live row tiles, or pairs of them, likely
  int pair_size;
  int across;  // column tiles that share A
  int splits;
  int column_groups;  // of column tiles that share A
  int steps_per_source;
  int k_steps;
  int box_rows;  // of A that one TMA load brings
  // The next kernel may start at once, and not only when this one's last loads are under way. A kernel of many small
  // blocks that starts early waits in crowds on the SMs that are free first, and then has only these; where there are
  // SMs without a tile, it has those.
  bool wakes_early;
  // Of part `split` of K. Unsigned and 32 bits: a division that is no call.
  __device__ __forceinline__ int first_step(int split) const {
    return static_cast<int>(static_cast<uint32_t>(k_steps * split) / static_cast<uint32_t>(splits));
  }
};

// What all roles know.
struct Work {
  int64_t live_rows;
  int pairs;                  // live row tiles, or pairs of them
  int tiles;                  // of clusters: pairs of row tiles times groups of column tiles
  int first_step, num_steps;  // this block's part of K
};

// This block's place among the blocks that share a tile, and the cluster's among all. pair_size, across: of the
// schedule.
struct Place {
  Pair pair;
  int split;
  int cluster, clusters;
  explicit __device__ __forceinline__ Place(int pair_size, int across = 1)
      : split(static_cast<int>(blockIdx.z)),
        cluster(static_cast<int>(blockIdx.x) / (pair_size * across)),
        clusters(static_cast<int>(gridDim.x) / (pair_size * across)) {
    pair.size = static_cast<uint32_t>(pair_size);
    pair.index = blockIdx.x % pair.size;
    pair.across = static_cast<uint32_t>(across);
    pair.column = blockIdx.x / pair.size % pair.across;
    pair.first = (static_cast<uint32_t>(split) * pair.across + pair.column) * pair.size;
  }
  // This block's share of tile `tile` of the cluster, with `pairs` pairs of row tiles: first row, column tile.
  template <typename C>
  __device__ __forceinline__ int64_t row0(int tile, int pairs) const {
    return (static_cast<int64_t>(tile % pairs) * pair.size + pair.index) * C::BM;
  }
  __device__ __forceinline__ int column_tile(int tile, int pairs) const {
    return tile / pairs * static_cast<int>(pair.across) + static_cast<int>(pair.column);
  }
};

template <typename C>
__device__ __forceinline__ void consumers_sync() {
  named_barrier(1, C::kConsumers);
}

// After the preceding kernel's end where there are commit lengths.
template <typename C>
__device__ __forceinline__ Work find_work(const GemmParams& p, const Schedule& schedule, const Place& place) {
  Work work;
  work.live_rows = p.m;
  if (p.live.commit_lens.data != nullptr) work.live_rows = max(min(p.live.commit_lens.at(0), p.m), int64_t{0});
  const auto row_tiles = static_cast<uint32_t>((work.live_rows + C::BM - 1) / C::BM);
  work.pairs = static_cast<int>((row_tiles + place.pair.size - 1) / place.pair.size);
  work.tiles = work.pairs * schedule.column_groups;
  work.first_step = schedule.first_step(place.split);
  work.num_steps = schedule.first_step(place.split + 1) - work.first_step;
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
                                            const SourceMaps& a_maps, const CUtensorMap* w_map, int64_t source_k,
                                            const Position& at, int column_tile, const Pair& pair) {
  const int half = C::BN / 2;
  const int row0 = column_tile * (kGated ? half : C::BN);
  const int row1 = kGated ? row0 + static_cast<int>(p.n / 2) : row0 + half;
  load_w(pipe, stage, w_map, static_cast<int>(at.source * source_k) + at.step * C::BK, row0, row1, pair);
  if constexpr (C::kBlockScaled) {  // each block of a pair has those of both halves
    C::Loader::load(pipe.scales_w(stage), &a_maps.map[kScalesOfW], at.step * kScaleWords, column_tile, pipe.full(stage),
                    pair);
  }
}

// W of a tile's first steps into L2.
template <typename C, bool kGated>
__device__ __forceinline__ void prefetch_w(const GemmParams& p, const CUtensorMap* w_map, const Schedule& schedule,
                                           const Place& place) {
  if (place.cluster >= schedule.expected_pairs * schedule.column_groups) return;
  const int column_tile = place.column_tile(place.cluster, schedule.expected_pairs);
  const int half = C::BN / 2;
  const int row0 = column_tile * (kGated ? half : C::BN);
  const int row1 = kGated ? row0 + static_cast<int>(p.n / 2) : row0 + half;
  Position at(schedule.first_step(place.split), schedule.steps_per_source);
  for (int s = 0; s < kAheadSteps && at.source < p.num_sources; ++s) {
    const int column = static_cast<int>(at.source * (p.k / p.num_sources)) + at.step * C::BK;
    if (place.pair.index == 0) tma_prefetch(w_map, column, row0);
    if (place.pair.index == place.pair.size - 1) tma_prefetch(w_map, column, row1);
    at.advance();
  }
}

// All other warps while the accumulators of a tile lie in the pipeline's memory: see reduce_over_splits.
__device__ __forceinline__ void sit_out_reduction() {
  __syncwarp();
  cluster_sync();
  cluster_sync();
}

// Whole warps: thread 256 issues all loads of this block, by TMA.
template <typename C, bool kGated>
__device__ __forceinline__ void produce(const GemmParams& p, const Pipeline<C>& pipe, const SourceMaps& a_maps,
                                        const CUtensorMap* w_map, const Schedule& schedule, const Place& place) {
  const Pair& pair = place.pair;
  const bool leader = threadIdx.x == C::kConsumers;
  const int64_t source_k = p.k / p.num_sources;
  const bool counted = p.live.commit_lens.data != nullptr;
  if (counted) {
    if (leader) prefetch_w<C, kGated>(p, w_map, schedule, place);
    grid_dependency_wait();
  }
  const Work work = find_work<C>(p, schedule, place);
  // Boxes of A with a live row; what the others would bring is not used.
  const uint32_t box_bytes = static_cast<uint32_t>(schedule.box_rows) * kRowBytes;
  const auto boxes_of = [&](int64_t row0) {
    const int64_t rows = min(work.live_rows - row0, int64_t{C::BM});
    return rows <= 0 ? 0 : static_cast<int>((rows + schedule.box_rows - 1) / schedule.box_rows);
  };
  const auto bytes_of = [&](int64_t row0) {
    const auto boxes = static_cast<uint32_t>(boxes_of(row0));
    return C::kBytesW + C::kScaleBytes + boxes * box_bytes + (boxes > 0 ? C::kScaleBytes : 0);
  };
  int ahead = 0;  // stages whose W goes ahead of the wait
  if (!counted) {
    if (leader && place.cluster < work.tiles) {
      ahead = min(C::kStages, work.num_steps);
      Position at(work.first_step, schedule.steps_per_source);
      const int64_t row0 = place.template row0<C>(place.cluster, work.pairs);
      const int column_tile = place.column_tile(place.cluster, work.pairs);
      for (int s = 0; s < ahead; ++s) {  // a fresh stage is empty
        C::Loader::announce(pipe.full(s), bytes_of(row0), pair);
        load_w_step<C, kGated>(p, pipe, s, a_maps, w_map, source_k, at, column_tile, pair);
        at.advance();
      }
    }
    grid_dependency_wait();
  }
  PipelineState<C> state;
  for (int tile = place.cluster; tile < work.tiles; tile += place.clusters) {
    if (leader) {
      const int64_t row0 = place.template row0<C>(tile, work.pairs);
      const int column_tile = place.column_tile(tile, work.pairs);
      const int boxes = boxes_of(row0);
      const uint32_t bytes = bytes_of(row0);
      Position at(work.first_step, schedule.steps_per_source);
      for (int k = 0; k < work.num_steps; ++k) {
        const uint32_t full = pipe.full(state.stage);
        if (ahead > 0) {
          --ahead;
        } else {
          barrier_wait(pipe.empty(state.stage), state.parity ^ 1);
          C::Loader::announce(full, bytes, pair);
          load_w_step<C, kGated>(p, pipe, state.stage, a_maps, w_map, source_k, at, column_tile, pair);
        }
        for (int i = static_cast<int>(pair.column); i < boxes; i += static_cast<int>(pair.across)) {
          C::Loader::load(pipe.a(state.stage) + i * box_bytes, &a_maps.map[at.source], at.step * C::BK,
                          static_cast<int>(row0) + i * schedule.box_rows, full, pair);
        }
        if constexpr (C::kBlockScaled) {
          if (boxes > 0) {
            C::Loader::load(pipe.scales_a(state.stage), &a_maps.map[kScalesOfA], at.step * kScaleWords,
                            static_cast<int>(row0 / C::BM), full, pair);
          }
        }
        at.advance();
        state.advance();
      }
    }
    if (schedule.splits > 1) sit_out_reduction();
  }
}

// Adds up the accumulators of the parts of K: part s ends with the sums of the groups g with g % splits == s.
template <typename C, typename Epilogue>
__device__ __forceinline__ void reduce_over_splits(float (&acc)[C::BN / 2], unsigned char* shared_tiles, int splits,
                                                   const Place& place) {
  static_assert(C::BN / 8 * C::kConsumers * 16 <= C::kStages * C::kStageBytes, "the accumulators fit the pipeline");
  const cg::cluster_group cluster = cg::this_cluster();
  auto* mine = reinterpret_cast<float4*>(shared_tiles) + threadIdx.x;
  consumers_sync<C>();  // all are past their last product
#pragma unroll
  for (int j = 0; j < C::BN / 8; ++j) {
    mine[j * C::kConsumers] = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
  }
  cluster_sync();
  constexpr int kBatch = 4;  // loads under way together; a batch lies in one group
#pragma unroll
  for (int j0 = 0; j0 < C::BN / 8; j0 += kBatch) {
    static_assert(C::BN / 8 % kBatch == 0, "whole batches");
    if (Epilogue::group_of(j0) % splits != place.split) continue;
    float4 total[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) total[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 2
    for (int s = 0; s < splits; ++s) {
      const auto rank =
          (static_cast<unsigned>(s) * place.pair.across + place.pair.column) * place.pair.size + place.pair.index;
      const float4* from = cluster.map_shared_rank(mine, rank);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float4 part = from[(j0 + i) * C::kConsumers];
        total[i] = make_float4(total[i].x + part.x, total[i].y + part.y, total[i].z + part.z, total[i].w + part.w);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      acc[4 * (j0 + i)] = total[i].x;
      acc[4 * (j0 + i) + 1] = total[i].y;
      acc[4 * (j0 + i) + 2] = total[i].z;
      acc[4 * (j0 + i) + 3] = total[i].w;
    }
  }
  async_proxy_fence();  // TMA writes next where the accumulators were
  cluster_sync();
}

// Where the last row tile is likely to be half empty, its dead rows are not fetched: A crosses from L2 to the SMs once
// for every column tile, which between 129 and some 300 rows is as much as W. Otherwise one load a tile.
inline int box_rows_of(const GemmParams& p, const Plan& plan) {
  return p.live.commit_lens.data != nullptr ? 32 : 128 / plan.across;
}

struct Operands {
  Plan plan;
  SourceMaps a_maps = {};
  CUtensorMap w_map;
};

// A kernel of (GemmParams, SourceMaps, CUtensorMap, Schedule, more ..) with blocks of `threads`, fed by the ring C.
template <typename C, typename Kernel, typename... More>
void launch(Kernel kernel, int threads, const GemmParams& p, const Operands& of, int num_sms, cudaStream_t stream,
            const char* what, const More&... more) {
  const Plan& plan = of.plan;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes), what);
  const int64_t pair_rows = int64_t{C::BM} * plan.pair;
  const auto pairs_of = [&](int64_t rows) { return (rows + pair_rows - 1) / pair_rows; };
  Schedule schedule;
  schedule.expected_pairs = static_cast<int>(pairs_of(p.expected_live > 0 ? p.expected_live : p.m));
  schedule.pair_size = plan.pair;
  schedule.splits = plan.splits;
  schedule.across = plan.across;
  const int64_t group = int64_t{C::BN} * plan.across;
  schedule.column_groups = static_cast<int>((p.n + group - 1) / group);
  schedule.steps_per_source = static_cast<int>((p.k / p.num_sources + C::BK - 1) / C::BK);
  schedule.k_steps = schedule.steps_per_source * p.num_sources;
  schedule.box_rows = box_rows_of(p, plan);
  const int64_t clusters =
      std::min<int64_t>(pairs_of(p.m) * schedule.column_groups, std::max(num_sms / plan.blocks(), 1));
  schedule.wakes_early = p.next_fetches || 4 * clusters * plan.blocks() <= 3 * int64_t{num_sms};
  const int wide = plan.pair * plan.across;
  const dim3 grid(static_cast<unsigned>(clusters * wide), 1, static_cast<unsigned>(plan.splits));
  const dim3 cluster(static_cast<unsigned>(wide), 1, static_cast<unsigned>(plan.splits));
  launch_in_clusters(kernel, grid, threads, C::kSharedBytes, cluster, stream, p.early_start, what, p, of.a_maps,
                     of.w_map, schedule, more...);
}

// The interface has no type of A and W: e4m3 comes with scales, as do bytes of nvfp4.
inline int element_bytes(const GemmParams& p) { return p.a_scale == nullptr ? 2 : 1; }

// Plan and tensor maps; groups of `granule` columns stay in one tile. False where the operands do not fit them, or the
// live rows are not the first ones.
inline bool prepare(Operands* operands, const GemmParams& p, int granule, int num_sms, const Rates& rates,
                    int narrowest, int widest = 256) {
  const int64_t source_k = p.k / p.num_sources;
  if (p.k == 0 || (p.live.commit_lens.data != nullptr && p.live.rows_per_request < p.m)) return false;
  const int64_t rows = p.expected_live > 0 ? p.expected_live : p.m;
  const int bytes = element_bytes(p);
  const int64_t k_steps = (source_k * bytes + kRowBytes - 1) / kRowBytes * p.num_sources;
  operands->plan =
      choose_plan(rows, p.n, k_steps, granule, num_sms, rates, narrowest, widest, p.live.commit_lens.data != nullptr);
  for (int s = 0; s < p.num_sources; ++s) {
    if (p.a_stride[s] < source_k || !make_tensor_map(&operands->a_maps.map[s], p.a[s], bytes, p.m, source_k,
                                                     p.a_stride[s], box_rows_of(p, operands->plan))) {
      return false;
    }
  }
  if (p.a_blocks != nullptr) {
    const int64_t k_blocks = (p.k + kProductBytes - 1) / kProductBytes;
    const int64_t w_blocks = p.gated ? (p.n / 2 + 63) / 64 : (p.n + 127) / 128;
    if (!make_scale_map(&operands->a_maps.map[kScalesOfA], p.a_blocks, (p.m + 127) / 128, k_blocks) ||
        !make_scale_map(&operands->a_maps.map[kScalesOfW], p.w_blocks, w_blocks, k_blocks)) {
      return false;
    }
  }
  return make_tensor_map(&operands->w_map, p.w, bytes, p.n, p.k, p.k, operands->plan.columns / 2);
}

}  // namespace dflash::many_rows

// Tiles [128, BN] of A [M, K] * W [N, K]^T by wgmma, bf16 or e4m3 in, fp32 in registers, from the ring of
// smxx/many_rows.
//
// Block: two consumer warpgroups, 64 rows of a tile each, and a producer warpgroup of which one thread issues the
// loads. Eight arrivals of a block empty a stage: its consumer warps.
#pragma once

#include "common/ptx.cuh"
#include "sm90/gemm/ptx.cuh"
#include "smxx/many_rows/kernel.cuh"

namespace dflash::sm90 {

using many_rows::Pair;
using many_rows::Pipeline;
using many_rows::PipelineState;

// Descriptor of a K-major operand in shared memory whose rows are 128 bytes, swizzled by 128 bytes: groups of 8 rows
// are 1024 bytes, and 1024 bytes apart. Address 1024-aligned plus the offset along K. 32 bytes further: + 2. The lower
// half has the address, in units of 16 bytes; sums of addresses and offsets in it stay below its other field.
__device__ __forceinline__ uint32_t descriptor_address(uint32_t address) { return (address & 0x3ffffu) >> 4; }
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t descriptor_address) {
  constexpr uint64_t kFixed = (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16);
  return kFixed + descriptor_address;
}

template <typename C>
__device__ __forceinline__ Pipeline<C> make_pipeline(void* shared_tiles, uint64_t* barriers, const Pair& pair) {
  return many_rows::make_pipeline<C>(shared_tiles, barriers, pair.writers() * C::kConsumers / 32);
}

// How a consumer warp gives stages back: lane i arrives at the empty barrier of the i-th block that writes into them.
template <typename C>
class Release {
 public:
  __device__ __forceinline__ Release(const Pipeline<C>& pipe, const Pair& pair)
      : arrives_(threadIdx.x % 32 < pair.writers()),
        empty_(barrier_at(pipe.empty(0), arrives_ ? pair.writer(threadIdx.x % 32) : pair.first)) {}
  __device__ __forceinline__ void operator()(uint32_t stage) const {
    if (arrives_) barrier_arrive_at(empty_ + stage * 8);
  }

 private:
  bool arrives_;
  uint32_t empty_;
};

// A consumer warpgroup (0 or 1): rows 64 * group .. of the tile.
template <typename C>
__device__ __forceinline__ void multiply_tile(const Pipeline<C>& pipe, PipelineState<C>& state, int group, int k_steps,
                                              const Pair& pair, float (&acc)[C::BN / 2]) {
  constexpr uint32_t kStage = C::kStageBytes / 16;
  const uint32_t first_a = same_in_warp(descriptor_address(pipe.a(0) + group * (64 * 128)));
  const uint32_t first_w = same_in_warp(descriptor_address(pipe.w(0)));
  const uint32_t full = same_in_warp(pipe.full(0));
  const Release<C> release(pipe, pair);
  uint32_t previous = 0;
  bool ready = false;
  for (int k = 0; k < k_steps; ++k) {
    if (!ready) barrier_wait(full + state.stage * 8, state.parity);
    const uint64_t a = operand_descriptor(first_a + state.stage * kStage);
    const uint64_t w = operand_descriptor(first_w + state.stage * kStage);
    pin_registers(acc);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < many_rows::kRowBytes / many_rows::kProductBytes; ++step) {
      wgmma<C::kElementBytes>(acc, a + 2 * step, w + 2 * step, k > 0 || step > 0);
    }
    wgmma_commit();
    const uint32_t current = state.stage;
    state.advance();
    ready = barrier_passed(full + state.stage * 8, state.parity);  // asked while the products run
    wgmma_wait<1>();
    if (k > 0) release(previous);  // whose products are done
    previous = current;
  }
  wgmma_wait<0>();
  pin_registers(acc);
  if (k_steps > 0) release(previous);
}

namespace gemm {

using dflash::gemm::GemmParams;
using many_rows::Place;
using many_rows::Schedule;
using many_rows::SourceMaps;
using many_rows::Tiles;
using many_rows::Work;

constexpr int kProducers = 128;
constexpr int kThreads = 256 + kProducers;
// Of 168 registers at the start, the producers' go to the consumers: 2 * 224 + 56 = 3 * 168.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
template <typename C>
constexpr int kBarriers = 2 * C::kStages;

// What a kernel of this kind does; the kernel itself only names its launch bounds and its epilogue.
template <typename C, typename Epilogue>
__device__ __forceinline__ void run(const GemmParams& p, const SourceMaps& a_maps, const CUtensorMap* w_map,
                                    const Schedule& schedule, unsigned char* shared_bytes, uint64_t* barriers,
                                    Epilogue epilogue) {
  if (schedule.wakes_early) grid_dependency_launch();
  const Place at(schedule.pair_size, schedule.across);
  const Pair& pair = at.pair;
  const Pipeline<C> pipe = make_pipeline<C>(shared_bytes, barriers, pair);
  const int warp = static_cast<int>(threadIdx.x) / 32;

  if (warp >= C::kConsumers / 32) {
    give_back_registers<kProducerRegisters>();
    many_rows::produce<C, Epilogue::kGated>(p, pipe, a_maps, w_map, schedule, at);
    __syncwarp();
    if (!schedule.wakes_early && warp == C::kConsumers / 32) grid_dependency_launch();
  } else {
    take_registers<kConsumerRegisters>();
    grid_dependency_wait();
    const Work work = many_rows::find_work<C>(p, schedule, at);
    PipelineState<C> state;
    float acc[C::BN / 2];
    for (int tile = at.cluster; tile < work.tiles; tile += at.clusters) {
      const int column_tile = at.column_tile(tile, work.pairs);
      epilogue.begin(at.template row0<C>(tile, work.pairs) + 16 * warp, work.live_rows, column_tile);
      multiply_tile(pipe, state, warp / 4, work.num_steps, pair, acc);
      if (schedule.splits > 1) many_rows::reduce_over_splits<C, Epilogue>(acc, shared_bytes, schedule.splits, at);
      epilogue.finish(acc, column_tile, schedule.splits, at.split);
    }
  }
  cluster_sync();
}

}  // namespace gemm
}  // namespace dflash::sm90

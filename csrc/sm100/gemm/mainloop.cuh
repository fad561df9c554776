// Tiles [128, BN] of A [M, K] * W [N, K]^T by tcgen05, bf16, e4m3 or nvfp4 in, fp32 in tensor memory, from the ring of
// smxx/many_rows. Never run on the hardware: compiled, disassembled, and executed by the emulator of python_tests.
//
// Block: warps 0 .. 7 finish tiles, warp 8 issues the loads, warp 9 allocates tensor memory and one thread of it issues
// the products; warps 10 and 11 are there because registers change hands by warpgroup. Tensor memory: two accumulators
// [128 lanes, BN columns], so that the products of a tile go on while the one before is finished. Block-scaled: behind
// them 32 columns for each stage of the ring, the scales of its A and W, which the thread that issues the products has
// copied there before them (tcgen05.cp; it and the products are done in their order); they are free when the stage is.
//
// A pair of blocks multiplies together (cta_group::2): products of M = 256, issued by one thread of the first block,
// read each block's A and half of W, and write each block's accumulator. So a block keeps half of W, and a step of K of
// [128, 256] costs shared memory 32 KB written and 32 read where a block by itself has 48 and 48, in 512 cycles of 128
// bytes. Loads of both blocks count towards the first one's full barriers. A block without a partner multiplies by
// itself (cta_group::1). Barriers of a stage: see ring.cuh; full has an arrival of each block's producer, empty the
// first block's commit, which arrives in both. Barriers of an accumulator:
//   full    1 arrival, in both blocks: the commit after a tile's last product
//   empty   8 arrivals of each block, in the first: the warps that have taken their rows out of it
//
// At work are (stages - 1) * 24 .. 48 KB from L2 or DRAM a block and SM, at least 144 KB; 7.3 TB/s for 148 SMs times 1
// us of latency ask for 49 KB.
#pragma once

#include <type_traits>

#include "common/ptx.cuh"
#include "sm100/gemm/descriptor.h"
#include "sm100/gemm/ptx.cuh"
#include "smxx/many_rows/kernel.cuh"

namespace dflash::sm100 {

using many_rows::Pair;
using many_rows::Pipeline;
using many_rows::PipelineState;

constexpr int kThreads = 384;
constexpr int kLoadWarp = 8, kMultiplyWarp = 9;
// Of 168 registers at the start, the last warpgroup's go to those who hold accumulators: 2 * 224 + 56 = 3 * 168.
constexpr int kFewRegisters = 56, kManyRegisters = 224;
constexpr int kAccumulators = 2;
constexpr uint32_t kBlockColumns = 4;   // of tensor memory, for a block of scales
constexpr uint32_t kTmemColumns = 512;  // all of an SM: a second block has no room in shared memory either

// How the operands of two blocks that multiply together get into their rings.
struct PairLoader {
  static constexpr int kParts = 2;
  static constexpr int kFullArrivals = 2;
  static __device__ __forceinline__ void announce(uint32_t full, uint32_t bytes, const Pair& pair) {
    barrier_arrive_expect_at(full, pair.first, bytes);
  }
  static __device__ __forceinline__ void load(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t full,
                                              const Pair& pair) {
    tma_load_pair(to, map, column, row, full, pair.first);
  }
  static __device__ __forceinline__ void load_w(uint32_t to, uint32_t /*half_bytes*/, const CUtensorMap* map, int k,
                                                int row0, int row1, uint32_t full, const Pair& pair) {
    load(to, map, k, pair.index == 0 ? row0 : row1, full, pair);
  }
};

template <int BN, int kElementBytes = 2, bool kBlockScaled = false>
using PairTiles = many_rows::Ring<BN,
                                  BN == 256   ? 6
                                  : BN == 192 ? 7
                                              : 8,
                                  kElementBytes, PairLoader, kBlockScaled>;

// Blocks that multiply together.
template <typename C>
constexpr int kGroup = C::Loader::kParts;
template <typename C>
constexpr int kBarriers = 2 * C::kStages + 2 * kAccumulators;

// All threads of all blocks of the cluster, once: allocates tensor memory. `barriers` [kBarriers<C>] and `tmem` are
// shared.
template <typename C>
__device__ __forceinline__ Pipeline<C> make_pipeline(void* shared_tiles, uint64_t* barriers, uint32_t* tmem) {
  if (threadIdx.x / 32 == kMultiplyWarp) {
    tmem_allocate<kGroup<C>>(shared_address(tmem), kTmemColumns);
    tmem_relinquish<kGroup<C>>();
    tcgen05_fence_before_signal();
  }
  if (threadIdx.x == 0) {
    const uint32_t own = shared_address(barriers + 2 * C::kStages);
    for (int i = 0; i < kAccumulators; ++i) {
      barrier_init(own + i * 8, 1);
      barrier_init(own + (kAccumulators + i) * 8, kGroup<C> * C::kConsumers / 32);
    }
  }
  const Pipeline<C> pipe = many_rows::make_pipeline<C>(shared_tiles, barriers, 1);  // ends with a barrier
  tcgen05_fence_after_wait();
  return pipe;
}

// All threads, as the last thing that they do.
template <typename C>
__device__ __forceinline__ void leave_together(const uint32_t* tmem) {
  tcgen05_fence_before_signal();
  cluster_sync();
  if (threadIdx.x / 32 == kMultiplyWarp) {
    tcgen05_fence_after_wait();
    tmem_free<kGroup<C>>(*tmem, kTmemColumns);
  }
}

// The accumulators of a block, and the one whose turn it is.
template <typename C>
class TensorMemory {
  static constexpr uint32_t kProducts = many_rows::kRowBytes / many_rows::kProductBytes;  // of a stage
  static constexpr uint32_t kScaleColumns = C::kBlockScaled ? kProducts * 2 * kBlockColumns : 0;
  static_assert(kAccumulators * C::BN + C::kStages * kScaleColumns <= kTmemColumns, "tensor memory of an SM");
  static_assert((C::kStages - 1) * C::kStageBytes >= 64 * 1024, "bytes under way");

 public:
  __device__ __forceinline__ TensorMemory(const uint64_t* barriers, const uint32_t* tmem)
      : address_(*tmem), barriers_(shared_address(barriers + 2 * C::kStages)) {}
  __device__ __forceinline__ uint32_t at() const { return address_ + index_ * C::BN; }
  // Scales of A for a product of a stage, and kBlockColumns further those of W.
  __device__ __forceinline__ uint32_t scales(uint32_t stage, int product) const {
    return address_ + kAccumulators * C::BN + stage * kScaleColumns + product * 2 * kBlockColumns;
  }
  __device__ __forceinline__ uint32_t full() const { return barriers_ + index_ * 8; }
  __device__ __forceinline__ uint32_t empty() const { return barriers_ + (kAccumulators + index_) * 8; }
  __device__ __forceinline__ uint32_t parity() const { return parity_; }
  __device__ __forceinline__ void advance() {
    if (++index_ == kAccumulators) {
      index_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  uint32_t address_;
  uint32_t barriers_;  // shared address of full[2], then empty[2]
  uint32_t index_ = 0, parity_ = 0;
};

// When all that this thread has issued is done: an arrival at the barrier at this place in each block that it is for.
template <typename C>
__device__ __forceinline__ void commit(uint32_t barrier, const Pair& pair) {
  if constexpr (kGroup<C> == 2) {
    tcgen05_commit_pair(barrier, static_cast<uint16_t>(0b11u << pair.first));
  } else {
    tcgen05_commit(barrier);
  }
}

// The scales of a stage from shared to tensor memory, of each block that multiplies.
template <typename C>
__device__ __forceinline__ void copy_scales(const Pipeline<C>& pipe, uint32_t stage, const TensorMemory<C>& memory) {
  const uint64_t a = scale_descriptor(pipe.scales_a(stage)), w = scale_descriptor(pipe.scales_w(stage));
#pragma unroll
  for (int step = 0; step < many_rows::kRowBytes / many_rows::kProductBytes; ++step) {
    tmem_copy_scales<kGroup<C>>(memory.scales(stage, step), a + step * many_rows::kScaleBlock / 16);
    tmem_copy_scales<kGroup<C>>(memory.scales(stage, step) + kBlockColumns, w + step * many_rows::kScaleBlock / 16);
  }
}

// One thread, always the same, of the first block of those that multiply together: the products of a tile.
template <typename C>
__device__ __forceinline__ void multiply_tile(const Pipeline<C>& pipe, PipelineState<C>& state,
                                              const TensorMemory<C>& memory, int k_steps, const Pair& pair) {
  constexpr uint32_t kInstruction = C::kBlockScaled ? nvfp4_instruction<kGroup<C> * C::BM, C::BN>()
                                                    : instruction<C::kElementBytes, kGroup<C> * C::BM, C::BN>();
  barrier_wait(memory.empty(), memory.parity() ^ 1);
#pragma unroll 1  // four products keep the tensor cores busy for 2 * BN cycles
  for (int k = 0; k < k_steps; ++k) {
    barrier_wait(pipe.full(state.stage), state.parity);
    tcgen05_fence_after_wait();
    const uint64_t a = operand_descriptor(pipe.a(state.stage)), w = operand_descriptor(pipe.w(state.stage));
    if constexpr (C::kBlockScaled) copy_scales(pipe, state.stage, memory);
#pragma unroll
    for (int step = 0; step < many_rows::kRowBytes / many_rows::kProductBytes; ++step) {
      if constexpr (C::kBlockScaled) {
        const uint32_t scales = memory.scales(state.stage, step);
        multiply_nvfp4<kGroup<C>>(memory.at(), a + 2 * step, w + 2 * step, scales, scales + kBlockColumns, kInstruction,
                                  k > 0 || step > 0);
      } else {
        multiply<C::kElementBytes, kGroup<C>>(memory.at(), a + 2 * step, w + 2 * step, kInstruction, k > 0 || step > 0);
      }
    }
    commit<C>(pipe.empty(state.stage), pair);
    state.advance();
  }
  commit<C>(memory.full(), pair);
}

// Rows of a tile that warp w (0 .. 7) takes: the 16 from here on. It reaches the lanes 32 * (w % 4) .. + 31.
__device__ __forceinline__ int first_row_of(int warp) { return 32 * (warp % 4) + 16 * (warp / 4); }

// A warp of the first eight: its fragment of the tile, and the accumulator is free again.
template <typename C>
__device__ __forceinline__ void take_tile(const TensorMemory<C>& memory, int warp, const Pair& pair,
                                          float (&acc)[C::BN / 2]) {
  barrier_wait(memory.full(), memory.parity());
  tcgen05_fence_after_wait();
  const uint32_t address = memory.at() + (static_cast<uint32_t>(first_row_of(warp)) << 16);
#pragma unroll
  for (int i = 0; i < C::BN / 32; ++i) tmem_load_16x32(acc + 16 * i, address + 32 * i);
  tmem_wait_loads();
  pin_registers(acc);
  tcgen05_fence_before_signal();
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    if constexpr (kGroup<C> == 2) {
      barrier_arrive_at(memory.empty(), pair.first);
    } else {
      barrier_arrive(memory.empty());
    }
  }
}

namespace gemm {

using dflash::gemm::GemmParams;
using many_rows::Place;
using many_rows::Schedule;
using many_rows::SourceMaps;
using many_rows::Work;

template <int BN, bool kPair, int kElementBytes = 2, bool kBlockScaled = false>
using Tiles = std::conditional_t<kPair, PairTiles<BN, kElementBytes, kBlockScaled>,
                                 many_rows::Tiles<BN, kElementBytes, kBlockScaled>>;

// What a kernel of this kind does; the kernel itself only names its launch bounds and its epilogue.
template <typename C, typename Epilogue>
__device__ __forceinline__ void run(const GemmParams& p, const SourceMaps& a_maps, const CUtensorMap* w_map,
                                    const Schedule& schedule, unsigned char* shared_bytes, uint64_t* barriers,
                                    uint32_t* tmem, Epilogue epilogue) {
  if (schedule.wakes_early) grid_dependency_launch();
  const Place at(kGroup<C>);
  const Pair& pair = at.pair;
  const Pipeline<C> pipe = make_pipeline<C>(shared_bytes, barriers, tmem);
  const int warp = static_cast<int>(threadIdx.x) / 32;

  if (warp < C::kConsumers / 32) {
    take_registers<kManyRegisters>();
    grid_dependency_wait();
    const Work work = many_rows::find_work<C>(p, schedule, at);
    TensorMemory<C> memory(barriers, tmem);
    float acc[C::BN / 2];
    for (int tile = at.cluster; tile < work.tiles; tile += at.clusters) {
      const int column_tile = at.column_tile(tile, work.pairs);
      epilogue.begin(at.template row0<C>(tile, work.pairs) + first_row_of(warp), work.live_rows, column_tile);
      take_tile(memory, warp, pair, acc);
      memory.advance();
      if (schedule.splits > 1) many_rows::reduce_over_splits<C, Epilogue>(acc, shared_bytes, schedule.splits, at);
      epilogue.finish(acc, column_tile, schedule.splits, at.split);
    }
  } else {
    give_back_registers<kFewRegisters>();
    if (warp == kLoadWarp) {
      many_rows::produce<C, Epilogue::kGated>(p, pipe, a_maps, w_map, schedule, at);
      __syncwarp();
      if (!schedule.wakes_early) grid_dependency_launch();
    } else {
      grid_dependency_wait();
      const Work work = many_rows::find_work<C>(p, schedule, at);
      const bool elected = warp == kMultiplyWarp && pair.index == 0 && elect_one();
      TensorMemory<C> memory(barriers, tmem);
      PipelineState<C> state;
      for (int tile = at.cluster; tile < work.tiles; tile += at.clusters) {
        if (elected) multiply_tile(pipe, state, memory, work.num_steps, pair);
        memory.advance();
        if (schedule.splits > 1) many_rows::sit_out_reduction();
      }
    }
    __syncwarp();
  }
  leave_together<C>(tmem);
}

}  // namespace gemm
}  // namespace dflash::sm100

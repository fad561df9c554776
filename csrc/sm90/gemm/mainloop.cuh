// The mainloop of large Hopper GEMMs: tiles [128, BN] of A [M, K] * W [N, K]^T, bf16 in, fp32 in registers.
//
// A pair of blocks of one cluster takes two row tiles (128 rows each) of the same BN columns. Each block has two
// consumer warpgroups, 64 rows each, and a producer of which one thread issues TMA loads. Blocks may be persistent: the
// producer runs ahead into the next tile while the consumers finish with theirs. Shared memory: kStages stages of K =
// 64: A [128, 64], then W [BN, 64], 128-byte rows swizzled by 128 bytes (for BN = 256: 16 + 32 KB). Of W each block
// loads BN / 2 rows and multicasts them into both: with BN = 256, 32 KB of L2 reads for 4.2 MFLOP, where 48 would be
// too many. A block without a partner (pair = 1) loads both halves itself. Barriers of a stage:
//   full   1 arrival (the producer, announcing the bytes) + the bytes: its own A, its own half of W, the other's half
//   empty  8 arrivals a block of the pair: its consumer warps, because the other block's producer writes here too
// A producer that is ahead signals bytes to a full barrier whose phase still lacks its block's own arrival, so no phase
// ends early; it cannot be a whole round ahead, because its own empty barrier needs the other block's consumers.
// Blocks leave together (cluster barrier): nobody signals or writes into a block that has gone.
// Edges: TMA fills what lies outside of A or W with zeros.
#pragma once

#include "sm90/gemm/ptx.cuh"

namespace dflash::sm90 {

template <int BN_, int STAGES_>
struct Mainloop {
  static constexpr int BM = 128, BN = BN_, BK = 64;
  static constexpr int kStages = STAGES_;
  static constexpr int kConsumers = 256;
  static constexpr uint32_t kBytesA = BM * BK * 2, kBytesW = BN * BK * 2, kStageBytes = kBytesA + kBytesW;
  static constexpr int kAlignment = 1024;  // of swizzled tiles
  static constexpr int kSharedBytes = kStages * static_cast<int>(kStageBytes) + kAlignment;
  static_assert(kSharedBytes + 1024 <= 232448, "shared memory of an SM");
  static_assert(BN % 32 == 0, "both halves of W consist of whole swizzle patterns (8 rows)");
};

// Stage and phase parity, kept alike by the producer and each consumer.
template <typename C>
struct PipelineState {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == C::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Which of the cluster's blocks share W.
struct Pair {
  uint32_t size;   // 1 or 2
  uint32_t first;  // rank in the cluster of the first of them
  uint32_t index;  // of this block: 0 .. size - 1
};

template <typename C>
struct Pipeline {
  uint32_t tiles;     // shared address of stage 0, 1024-aligned
  uint32_t barriers;  // shared address of full[kStages], then empty[kStages]
  __device__ __forceinline__ uint32_t a(uint32_t stage) const { return tiles + stage * C::kStageBytes; }
  __device__ __forceinline__ uint32_t w(uint32_t stage) const { return a(stage) + C::kBytesA; }
  __device__ __forceinline__ uint32_t full(uint32_t stage) const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const { return barriers + (C::kStages + stage) * 8; }
};

// All threads of all blocks of the cluster, once.
template <typename C>
__device__ __forceinline__ Pipeline<C> make_pipeline(void* shared_tiles, uint64_t* shared_barriers, uint32_t pair_size,
                                                     uint32_t full_arrivals = 1) {
  Pipeline<C> pipe;
  pipe.tiles = (shared_address(shared_tiles) + C::kAlignment - 1) / C::kAlignment * C::kAlignment;
  pipe.barriers = shared_address(shared_barriers);
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      barrier_init(pipe.full(s), full_arrivals);
      barrier_init(pipe.empty(s), pair_size * C::kConsumers / 32);
    }
    barrier_init_fence();
  }
  cluster_sync();
  return pipe;
}

// One thread: this block's share of W [BN, 64] at columns k.. of W; half h begins at row w_row[h]. Its bytes were
// announced.
template <typename C>
__device__ __forceinline__ void load_w(const Pipeline<C>& pipe, uint32_t stage, const CUtensorMap* w_map, int k,
                                       int w_row0, int w_row1, const Pair& pair) {
  const uint32_t full = pipe.full(stage);
  if (pair.size == 1) {
    tma_load(pipe.w(stage), w_map, k, w_row0, full);
    tma_load(pipe.w(stage) + C::kBytesW / 2, w_map, k, w_row1, full);
  } else {
    tma_load_multicast(pipe.w(stage) + pair.index * (C::kBytesW / 2), w_map, k, pair.index == 0 ? w_row0 : w_row1, full,
                       static_cast<uint16_t>(0b11u << pair.first));
  }
}

// A consumer warp gives a stage back to the producers of its pair.
template <typename C>
__device__ __forceinline__ void release_stage(const Pipeline<C>& pipe, uint32_t stage, const Pair& pair) {
  const uint32_t lane = threadIdx.x % 32;
  if (lane < pair.size) barrier_arrive_at(pipe.empty(stage), pair.first + lane);
}

// A consumer warpgroup (0 or 1): rows 64 * group .. of the tile.
template <typename C>
__device__ __forceinline__ void multiply_tile(const Pipeline<C>& pipe, PipelineState<C>& state, int group, int k_steps,
                                              const Pair& pair, float (&acc)[C::BN / 2]) {
  uint32_t previous = 0;
  for (int k = 0; k < k_steps; ++k) {
    barrier_wait(pipe.full(state.stage), state.parity);
    const uint64_t a = operand_descriptor(pipe.a(state.stage) + group * (64 * 128));
    const uint64_t w = operand_descriptor(pipe.w(state.stage));
    pin_registers(acc);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::BK / 16; ++step) {
      wgmma_k16(acc, a + 2 * step, w + 2 * step, k > 0 || step > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();  // the products of the previous stage are done
    if (k > 0) release_stage(pipe, previous, pair);
    previous = state.stage;
    state.advance();
  }
  wgmma_wait<0>();
  pin_registers(acc);
  if (k_steps > 0) release_stage(pipe, previous, pair);
}

}  // namespace dflash::sm90

// The mainloop of large Hopper GEMMs: tiles [128, 256] of A [M, K] * W [N, K]^T, bf16 in, fp32 in registers.
//
// A cluster of two blocks takes two row tiles (128 rows each) of the same 256 columns. Each block is 9 warps: two
// consumer warpgroups, 64 rows each, and a producer warp of which one thread issues TMA loads. Blocks are persistent:
// the producer runs ahead into the next tile while the consumers finish with theirs. Shared memory: kStages stages of K
// = 64: A [128, 64], then W [256, 64], 128-byte rows swizzled by 128 bytes (16 + 32 KB). Of W each block loads 128 rows
// and multicasts them into both: 32 KB of L2 reads for 4.2 MFLOP, where 48 would be too many. Barriers of a stage:
//   full   1 arrival (the producer, announcing 48 KB) + the bytes: its own A, its own half of W, the other block's half
//   empty  16 arrivals: the 8 consumer warps of both blocks, because the other block's producer writes here too
// A producer that is ahead signals bytes to a full barrier whose phase still lacks its block's own arrival, so no phase
// ends early; it cannot be a whole round ahead, because its own empty barrier needs the other block's consumers.
// Blocks leave together (cluster barrier): nobody signals or writes into a block that has gone.
// Edges: TMA fills what lies outside of A or W with zeros.
#pragma once

#include "sm90/gemm/ptx.cuh"

namespace dflash::sm90 {

struct Mainloop {
  static constexpr int BM = 128, BN = 256, BK = 64;
  static constexpr int kStages = 4;
  static constexpr int kConsumers = 256, kThreads = kConsumers + 32;
  static constexpr int kClusterSize = 2;
  static constexpr uint32_t kBytesA = BM * BK * 2, kBytesW = BN * BK * 2, kStageBytes = kBytesA + kBytesW;
  static constexpr int kAlignment = 1024;  // of swizzled tiles
  static constexpr int kSharedBytes = kStages * static_cast<int>(kStageBytes) + kAlignment;
  static_assert(kSharedBytes + 1024 <= 232448, "shared memory of an SM");
};

// Stage and phase parity, kept alike by the producer and each consumer.
struct PipelineState {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == Mainloop::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Pipeline {
  uint32_t tiles;     // shared address of stage 0, 1024-aligned
  uint32_t barriers;  // shared address of full[kStages], then empty[kStages]
  __device__ __forceinline__ uint32_t a(uint32_t stage) const { return tiles + stage * Mainloop::kStageBytes; }
  __device__ __forceinline__ uint32_t w(uint32_t stage) const { return a(stage) + Mainloop::kBytesA; }
  __device__ __forceinline__ uint32_t full(uint32_t stage) const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const { return barriers + (Mainloop::kStages + stage) * 8; }
};

// All threads of both blocks, once.
__device__ __forceinline__ Pipeline make_pipeline(void* shared_tiles, uint64_t* shared_barriers) {
  Pipeline pipe;
  pipe.tiles = (shared_address(shared_tiles) + Mainloop::kAlignment - 1) / Mainloop::kAlignment * Mainloop::kAlignment;
  pipe.barriers = shared_address(shared_barriers);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Mainloop::kStages; ++s) {
      barrier_init(pipe.full(s), 1);
      barrier_init(pipe.empty(s), Mainloop::kClusterSize * Mainloop::kConsumers / 32);
    }
    barrier_init_fence();
  }
  cluster_sync();
  return pipe;
}

// One thread: the loads of one tile.
__device__ __forceinline__ void load_tile(const Pipeline& pipe, PipelineState& state, const CUtensorMap* a_map,
                                          const CUtensorMap* w_map, int row0, int column0, int k_tiles, uint32_t rank) {
  constexpr int kHalf = Mainloop::BN / 2;
  for (int k = 0; k < k_tiles; ++k) {
    barrier_wait(pipe.empty(state.stage), state.parity ^ 1);
    const uint32_t full = pipe.full(state.stage);
    barrier_arrive_expect(full, Mainloop::kStageBytes);
    tma_load(pipe.a(state.stage), a_map, k * Mainloop::BK, row0, full);
    tma_load_multicast(pipe.w(state.stage) + rank * (Mainloop::kBytesW / 2), w_map, k * Mainloop::BK,
                       column0 + static_cast<int>(rank) * kHalf, full, 0b11);
    state.advance();
  }
}

// A consumer warpgroup (0 or 1): rows 64 * group .. of the tile.
__device__ __forceinline__ void multiply_tile(const Pipeline& pipe, PipelineState& state, int group, int k_tiles,
                                              float (&acc)[128]) {
  const uint32_t lane = threadIdx.x % 32;
  const auto release = [&](uint32_t stage) {
    if (lane < Mainloop::kClusterSize) barrier_arrive_at(pipe.empty(stage), lane);
  };
  uint32_t previous = 0;
  for (int k = 0; k < k_tiles; ++k) {
    barrier_wait(pipe.full(state.stage), state.parity);
    const uint64_t a = operand_descriptor(pipe.a(state.stage) + group * (64 * 128));
    const uint64_t w = operand_descriptor(pipe.w(state.stage));
    pin_registers(acc);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Mainloop::BK / 16; ++step) {
      wgmma_m64n256k16(acc, a + 2 * step, w + 2 * step, k > 0 || step > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();  // the products of the previous stage are done
    if (k > 0) release(previous);
    previous = state.stage;
    state.advance();
  }
  wgmma_wait<0>();
  pin_registers(acc);
  release(previous);
}

}  // namespace dflash::sm90

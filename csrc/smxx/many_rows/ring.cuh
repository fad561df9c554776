// What wgmma and tcgen05 multiply from: a ring of stages in shared memory, filled by TMA. Each holds a step of K, BK
// elements or 128 bytes (64 in bf16, 128 in e4m3), of a tile [128, BN] of A [M, K] * W [N, K]^T: A [128, BK], then W
// [BN, BK], rows of 128 bytes swizzled by 128 bytes. An instruction multiplies 32 bytes of a row, of either type.
// Block-scaled operands (nvfp4) are pairs of codes, so that K and BK count bytes as in e4m3; behind W come the scales
// of A's and of W's rows, 2 KB each, one for 8 bytes: four times (one an instruction) a block of 512 bytes in the order
// that tcgen05.cp takes (formats.py, scale_blocks).
//
// A pair of blocks of one cluster takes two row tiles (128 rows each) of the same BN columns. Each block has a producer
// of which one thread issues TMA loads. Blocks may be persistent: the producer runs ahead into the next tile while the
// others finish with theirs. Of W each block loads BN / 2 rows and multicasts them into both: with BN = 256, 32 KB of
// L2 reads for 4.2 MFLOP, where 48 would be too many. A block without a partner (pair = 1) loads both halves itself.
// Likewise blocks of two column tiles may share A: each loads every other box of it, for both.
// Barriers of a stage:
//   full   1 arrival (the producer, announcing the bytes) + the bytes: all of its A and W, whoever loads them
//   empty  as many as its tensor cores' side makes, from this block and from each that its producer writes to
// A producer that is ahead signals bytes to a full barrier whose phase still lacks its block's own arrival, so no phase
// ends early; it cannot be a whole round ahead, because its own empty barrier needs the other blocks' too.
// Blocks leave together (cluster barrier): nobody signals or writes into a block that has gone.
// Edges: TMA fills what lies outside of A or W with zeros.
#pragma once

#include "common/tma.cuh"

namespace dflash::many_rows {

// Which of the cluster's blocks share W, and which A.
struct Pair {
  uint32_t size;   // row tiles that share W: 1 or 2
  uint32_t first;  // rank in the cluster of the first of these blocks
  uint32_t index;  // of this block: 0 .. size - 1
  // Column tiles that share A: 1 or 2, each with `size` blocks, one after the other. This block's: 0 .. across - 1.
  uint32_t across = 1;
  uint32_t column = 0;
  // Of the blocks that write into this one's ring, this one included: size - 1 with W, across - 1 with A.
  __device__ __forceinline__ uint32_t writers() const { return size + across - 1; }
  __device__ __forceinline__ uint32_t writer(uint32_t i) const {
    if (i < size) return first + i;
    const uint32_t other = i - size;
    return first - column * size + (other + (other >= column ? 1 : 0)) * size + index;
  }
  // The blocks with this one's row tile.
  __device__ __forceinline__ uint16_t row_mask() const {
    return static_cast<uint16_t>((across == 1 ? 1u : 1u | 1u << size) << (first - column * size + index));
  }
};

// How a block's operands get into the ring, where every block keeps all of W. sm100/gemm has another way.
struct Multicast {
  static constexpr int kParts = 1;         // in which a pair keeps W
  static constexpr int kFullArrivals = 1;  // that announce a stage's bytes
  static __device__ __forceinline__ void announce(uint32_t full, uint32_t bytes, const Pair& /*pair*/) {
    barrier_arrive_expect(full, bytes);
  }
  static __device__ __forceinline__ void load(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t full,
                                              const Pair& pair) {
    if (pair.across == 1) {
      tma_load(to, map, column, row, full);
    } else {
      tma_load_multicast(to, map, column, row, full, pair.row_mask());
    }
  }
  // W [BN, BK] of columns k.., half h of which begins at row h.
  static __device__ __forceinline__ void load_w(uint32_t to, uint32_t half_bytes, const CUtensorMap* map, int k,
                                                int row0, int row1, uint32_t full, const Pair& pair) {
    if (pair.size == 1) {
      tma_load(to, map, k, row0, full);
      tma_load(to + half_bytes, map, k, row1, full);
    } else {
      tma_load_multicast(to + pair.index * half_bytes, map, k, pair.index == 0 ? row0 : row1, full,
                         static_cast<uint16_t>(0b11u << pair.first));
    }
  }
};

constexpr int kRowBytes = 128;     // of a step of K
constexpr int kProductBytes = 32;  // of those that an instruction takes

constexpr int kScaleBlock = 512;  // bytes: four scales along K of 128 rows

// kElementBytes: 2, bf16, or 1, e4m3 or, block-scaled, two of e2m1.
template <int BN_, int STAGES_, int kElementBytes_, typename Loader_ = Multicast, bool kBlockScaled_ = false>
struct Ring {
  using Loader = Loader_;
  static constexpr int kElementBytes = kElementBytes_;
  static constexpr bool kBlockScaled = kBlockScaled_;
  static constexpr int BM = 128, BN = BN_, BK = kRowBytes / kElementBytes;
  static constexpr int kStages = STAGES_;
  static constexpr int kConsumers = 256;  // threads that end up with the accumulators: 8 warps, 16 rows each
  static constexpr uint32_t kBytesA = BM * kRowBytes, kBytesW = BN / Loader::kParts * kRowBytes;
  static constexpr uint32_t kScaleBytes = kBlockScaled ? kRowBytes / kProductBytes * kScaleBlock : 0;  // of A, and of W
  static constexpr uint32_t kStageBytes = kBytesA + kBytesW + 2 * kScaleBytes;
  static constexpr int kAlignment = 1024;  // of swizzled tiles
  static constexpr int kSharedBytes = kStages * static_cast<int>(kStageBytes) + kAlignment;
  static_assert(kSharedBytes + 1024 <= 232448, "shared memory of an SM");
  static_assert(!kBlockScaled || (kElementBytes == 1 && BN == 128), "a tile has the rows of one block of scales");
  static_assert(BN % 32 == 0, "both halves of W consist of whole swizzle patterns (8 rows)");
};

// As many stages as fit.
template <int BN, int kElementBytes = 2, bool kBlockScaled = false>
using Tiles = Ring<BN, (232448 - 1024 - 1024) / ((128 + BN) * (kRowBytes + (kBlockScaled ? 16 : 0))), kElementBytes,
                   Multicast, kBlockScaled>;

// Stage and phase parity, kept alike by all who take part.
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

template <typename C>
struct Pipeline {
  uint32_t tiles;     // shared address of stage 0, 1024-aligned
  uint32_t barriers;  // shared address of full[kStages], then empty[kStages]
  __device__ __forceinline__ uint32_t a(uint32_t stage) const { return tiles + stage * C::kStageBytes; }
  __device__ __forceinline__ uint32_t w(uint32_t stage) const { return a(stage) + C::kBytesA; }
  __device__ __forceinline__ uint32_t scales_a(uint32_t stage) const { return w(stage) + C::kBytesW; }
  __device__ __forceinline__ uint32_t scales_w(uint32_t stage) const { return scales_a(stage) + C::kScaleBytes; }
  __device__ __forceinline__ uint32_t full(uint32_t stage) const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const { return barriers + (C::kStages + stage) * 8; }
};

// All threads of all blocks of the cluster, once. A stage is empty after `empty_arrivals`, of the whole pair.
template <typename C>
__device__ __forceinline__ Pipeline<C> make_pipeline(void* shared_tiles, uint64_t* shared_barriers,
                                                     uint32_t empty_arrivals) {
  Pipeline<C> pipe;
  pipe.tiles = (shared_address(shared_tiles) + C::kAlignment - 1) / C::kAlignment * C::kAlignment;
  pipe.barriers = shared_address(shared_barriers);
  if (threadIdx.x == 0) {
    for (int s = 0; s < C::kStages; ++s) {
      barrier_init(pipe.full(s), C::Loader::kFullArrivals);
      barrier_init(pipe.empty(s), empty_arrivals);
    }
    barrier_init_fence();
  }
  cluster_sync();
  return pipe;
}

// One thread: this block's share of W [BN, BK] at columns k.. of W; half h begins at row w_row[h]. Its bytes were
// announced.
template <typename C>
__device__ __forceinline__ void load_w(const Pipeline<C>& pipe, uint32_t stage, const CUtensorMap* w_map, int k,
                                       int w_row0, int w_row1, const Pair& pair) {
  C::Loader::load_w(pipe.w(stage), C::BN / 2 * kRowBytes, w_map, k, w_row0, w_row1, pipe.full(stage), pair);
}

}  // namespace dflash::many_rows

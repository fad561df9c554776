// The core of the kernels that read weights once for at most 64 tokens: products W [rows, K] * X [tokens, K]^T of
// several stages in one persistent kernel, driven by a schedule (schedule.h).
//
// What bounds it: the bytes of W at the read rate of the memory. An H100 SM gets 16 KB in 0.69 us, some 1200 cycles, so
// all that is done with a tile has to stay well below that, and W has to be in flight at all times: also while the
// tokens of the next stage are not there yet, since its weights do not depend on them.
//
// Partition: one block an SM, all resident (a cooperative launch). A stage's tiles, 128 rows x 16 KB, are split evenly
// over the blocks, cutting K where need be, so that every SM reads the same bytes to within a tile. 128 rows: a block
// reads the tokens' K range from L2 once for each row tile, which is 1/8 (16 tokens) to 1/2 (64 tokens) of W's bytes.
//   warps 0-7   consumers: warp w multiplies rows 32 (w % 4) .. + 31 by columns 32 (w / 4) .. + 31 of every 64 of K;
//               W is the M side (m16), tokens the N side (n8), so a block of 16 tokens is two n8 tiles and nothing is
//               padded. At a unit's end the two halves of K are added in shared memory, then the parts of other blocks,
//               in a fixed order, whatever arrives first: results do not depend on timing or on the number of tokens.
//   warps 8-10  loaders: global (L2) -> registers -> whatever the policy does with them -> shared memory, each warp one
//               8 KB buffer of tokens: 64 columns of 64 tokens, 128 of 32 or 256 of 16. Only they wait for other
//               blocks.
//   warp 11     producer: bulk copies of W into the ring, L2 evict-first.
//
// Shared memory: [kStages][16 KB] W | [3][8 KB] tokens | [64][132] fp32 finished block, [token][row] | Control.
// A token buffer: [64 columns of K][half of 32 columns][token][32 columns], tokens 2 i and 2 i + 1 swapped in the
// second half, so that a warp reads an n8 tile as 512 consecutive bytes and a row's stores fall on both halves of the
// banks.
//
// Barriers: weights_full 1 arrival + 16 KB; weights_empty 8 (consumer warps); tokens_full 1 (the loader warp);
// tokens_empty 8; named barriers 1: 256 consumers, 2: all 384 threads once, 3: 96 loaders (policies).
//
// Instructions for a tile and warp, 16 tokens: 4 + 2 loads of 16 bytes a lane, 8 mma, some 20 for the ring: 8 warps
// issue for about 70 cycles on each of the four schedulers. 64 tokens: 32 mma; shared memory is then the most used, 24
// KB written and 48 KB read, 580 cycles.
//
// A policy says what the stages are:
//   Params   with a member `StreamParams stream`;  Format  see format.cuh;  Shared  a struct of its own in shared
//   memory static void prepare(p, shared, thread)    352 threads, before anything else; a barrier follows static int
//   tokens(p, shared)              live tokens, 0..64; the same in all blocks class Loader(p, shared, lane) of one
//   loader warp:
//     void enter(unit)                        once a stage, by all loader warps, after its first wait
//     Source source(k)                        where columns k .. k + 7 come from
//     uint4 load(source, token)               the load only
//     Factor factor(k)                        what the columns are multiplied with, say
//     uint4 finish(factor, token, raw)        what goes to shared memory
//   static void finish(p, shared, unit, block, tokens, thread)     256 threads; block[token * kBlockPitch + row]
//   static void job(p, shared, unit, block, buffers, tokens, thread, wait)   the same for units without weights. Calls
//                                           wait() once and reads before that only what no stage of this launch writes.
//                                           buffers: those of the tokens, free if the block's next product waits for
//                                           this job
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.h"
#include "common/ptx.cuh"
#include "smxx/stream/format.cuh"
#include "smxx/stream/schedule.h"

namespace dflash::stream {

constexpr int kConsumerWarps = 8, kLoaderWarps = 3;  // 12 warps in all: 168 registers a thread
constexpr int kConsumers = 32 * kConsumerWarps, kLoaders = 32 * kLoaderWarps;
constexpr int kThreads = kConsumers + kLoaders + 32;
constexpr int kTokenBuffers = kLoaderWarps, kTokenBufferBytes = 8192;
constexpr int kBlockPitch = kTileRows + 4;  // floats; the 4 tokens x 8 rows that a warp stores at once fall on 32 banks
constexpr int kBlockBytes = kMaxTokens * kBlockPitch * 4;
constexpr int kMaxSharedBytes = 232448;
constexpr int kMostStages = 16;
constexpr int kConsumerBarrier = 1, kPreparedBarrier = 2, kLoaderBarrier = 3;

template <typename Policy>
struct Control {
  uint64_t weights_full[kMostStages], weights_empty[kMostStages];
  uint64_t tokens_full[kTokenBuffers], tokens_empty[kTokenBuffers];
  uint32_t launch;  // how many launches of this schedule came before
  uint32_t last;    // this block finishes the row tile
  typename Policy::Shared policy;
};

template <typename Policy>
struct Layout {
  static constexpr int kFixed = kTokenBuffers * kTokenBufferBytes + kBlockBytes + int(sizeof(Control<Policy>));
  static constexpr int kTile = Policy::Format::kBytes;
  static constexpr int kFree = (kMaxSharedBytes - kFixed) / kTile;
  static constexpr int kStages = kFree < kMostStages ? kFree : kMostStages;
  static constexpr int kTokens = kStages * kTile;
  static constexpr int kBlock = kTokens + kTokenBuffers * kTokenBufferBytes;
  static constexpr int kControl = kBlock + kBlockBytes;
  static constexpr int kBytes = kControl + int(sizeof(Control<Policy>));
  static_assert(kStages >= 8, "128 KB of weights in flight");
};

// Position in a ring of `size` buffers. `parity` is that of the phase to wait for.
template <int size>
struct Ring {
  int at = 0;
  uint32_t parity;
  __device__ __forceinline__ explicit Ring(uint32_t first_parity) : parity(first_parity) {}
  __device__ __forceinline__ void advance() {
    if (++at == size) {
      at = 0;
      parity ^= 1;
    }
  }
};

template <typename Policy>
class Stream {
 public:
  using Params = typename Policy::Params;
  using Format = typename Policy::Format;
  using Memory = Layout<Policy>;
  static constexpr int kStages = Memory::kStages, kTile = Memory::kTile;

  // All kThreads threads of all blocks.
  static __device__ __forceinline__ void run(const Params& p, unsigned char* shared) {
    Stream stream(p, shared);
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(&stream.control_.weights_full[i], 1);
        mbarrier_init(&stream.control_.weights_empty[i], kConsumerWarps);
      }
      for (int i = 0; i < kTokenBuffers; ++i) {
        mbarrier_init(&stream.control_.tokens_full[i], 1);
        mbarrier_init(&stream.control_.tokens_empty[i], kConsumerWarps);
      }
      mbarrier_init_fence();
    }
    __syncthreads();
    if (warp == kConsumerWarps + kLoaderWarps) {
      stream.produce();
      return;
    }
    if (threadIdx.x == 0) {
      // Nobody of the next launch starts before all blocks of this one have.
      auto* started = reinterpret_cast<unsigned long long*>(p.stream.counters);
      const unsigned long long before = atomicAdd(started, 1ull);
      stream.control_.launch = static_cast<uint32_t>(before / static_cast<unsigned>(p.stream.blocks));
    }
    Policy::prepare(p, stream.control_.policy, static_cast<int>(threadIdx.x));
    named_barrier(kPreparedBarrier, kThreads);
    const int tokens = Policy::tokens(p, stream.control_.policy);
    if (warp < kConsumerWarps) {
      if (tokens == 0) {
        stream.count_only();
      } else if (tokens <= 16) {
        stream.template consume<2>(tokens);
      } else if (tokens <= 32) {
        stream.template consume<4>(tokens);
      } else {
        stream.template consume<8>(tokens);
      }
    } else {
      if (tokens == 0) return;
      if (tokens <= 16) {
        stream.template load<2>(tokens);
      } else if (tokens <= 32) {
        stream.template load<4>(tokens);
      } else {
        stream.template load<8>(tokens);
      }
    }
  }

 private:
  const Params& p_;
  unsigned char* weights_;
  unsigned char* tokens_;
  float* block_;
  Control<Policy>& control_;

  __device__ __forceinline__ Stream(const Params& p, unsigned char* shared)
      : p_(p),
        weights_(shared),
        tokens_(shared + Memory::kTokens),
        block_(reinterpret_cast<float*>(shared + Memory::kBlock)),
        control_(*reinterpret_cast<Control<Policy>*>(shared + Memory::kControl)) {}

  __device__ __forceinline__ Unit unit(int i) const {
    if (i >= p_.stream.max_units) return Unit{0, 0, -1};
    const Unit* at = p_.stream.units + static_cast<int64_t>(blockIdx.x) * p_.stream.max_units + i;
    Unit result;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      reinterpret_cast<int4*>(&result)[j] = __ldcg(reinterpret_cast<const int4*>(at) + j);
    }
    return result;
  }

  // The value that a counter reaches in this launch.
  __device__ __forceinline__ uint32_t goal(int target) const {
    return (control_.launch + 1) * static_cast<uint32_t>(target);
  }

  __device__ __forceinline__ void wait_for_counter(int counter, int target) const {
    const uint32_t* at = p_.stream.counters + counter;
    const uint32_t value = goal(target);
    while (static_cast<int32_t>(load_acquire(at) - value) < 0) {
    }
  }

  // ---- producer --------------------------------------------------------------------------------------------------

  // All lanes. Fills the ring before it is known whether there are tokens.
  __device__ __forceinline__ void produce() {
    const int lane = threadIdx.x % 32;
    const uint64_t policy = evict_first_policy();
    Ring<kStages> ring(1);
    int started = 0;
    bool joined = false;
    const auto join = [&] {  // false: nobody will consume what is under way
      joined = true;
      named_barrier(kPreparedBarrier, kThreads);
      if (Policy::tokens(p_, control_.policy) > 0) return true;
      for (int i = 0; i < started; ++i) mbarrier_wait(&control_.weights_full[i], 0);
      return false;
    };
    for (int i = 0;; ++i) {
      const Unit u = unit(i);
      if (u.tiles < 0) break;
      const unsigned char* from = p_.stream.weights + static_cast<int64_t>(u.weight_tile) * kTile;
      for (int tile = 0; tile < u.tiles; ++tile, from += kTile) {
        if (started == kStages && !joined && !join()) return;
        mbarrier_wait(&control_.weights_empty[ring.at], ring.parity);
        if (lane == 0) {
          mbarrier_arrive_expect(&control_.weights_full[ring.at], kTile);
          copy_bulk(weights_ + ring.at * kTile, from, kTile, &control_.weights_full[ring.at], policy);
        }
        __syncwarp();
        ring.advance();
        if (started < kStages) ++started;
      }
    }
    if (!joined) join();
  }

  // ---- loaders ---------------------------------------------------------------------------------------------------

  template <int kTiles>  // n8 tiles
  __device__ __forceinline__ void load(int tokens) {
    constexpr int kColumns = 8 * kTiles;           // tokens, rounded up
    constexpr int kSteps = kMaxTokens / kColumns;  // of 64 columns of K in a buffer
    constexpr int kChunks = kColumns / 4;          // of a lane in a step: 8 lanes a token
    const int warp = static_cast<int>(threadIdx.x) / 32 - kConsumerWarps, lane = threadIdx.x % 32;
    typename Policy::Loader loader(p_, control_.policy, lane);
    unsigned char* buffer = tokens_ + warp * kTokenBufferBytes;
    const int piece = lane % 8, half = piece / 4, row = lane / 8;
    uint32_t parity = 1;
    int group = 0, stage = -1;
    for (int i = 0;; ++i) {
      const Unit u = unit(i);
      if (u.tiles < 0) break;
      if (u.tiles == 0) continue;
      int known = u.wait < 0 ? u.wait : u.wait + (u.k_tile >> u.wait_shift) - 1;  // counters that have been seen full
      const auto wait_for_tile = [&](int k_tile) {
        if (u.wait < 0) return;
        while (known < u.wait + (k_tile >> u.wait_shift)) wait_for_counter(++known, u.wait_target);
      };
      if (u.stage != stage) {
        stage = u.stage;
        wait_for_tile(u.k_tile);
        loader.enter(u);
      }
      const int steps = u.tiles * Format::kSteps;
      for (int first = 0; first < steps; first += kSteps) {
        if (group++ % kLoaderWarps != warp) continue;
        const int count = min(kSteps, steps - first);
        wait_for_tile(u.k_tile + (first + count - 1) / Format::kSteps);
        uint4 raw[kSteps][kChunks];
        const int k = 64 * (u.k_tile * Format::kSteps + first) + 8 * piece;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const auto source = loader.source(k + 64 * s);
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            if (s < count && 4 * c + row < tokens) raw[s][c] = loader.load(source, 4 * c + row);
          }
        }
        mbarrier_wait(&control_.tokens_empty[warp], parity);
        parity ^= 1;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const auto factor = loader.factor(k + 64 * s);
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            const int token = 4 * c + row;
            if (s >= count || token >= tokens) continue;
            unsigned char* to = buffer + s * (kColumns * 128) + half * (kColumns * 64) + (token ^ half) * 64;
            *reinterpret_cast<uint4*>(to + piece % 4 * 16) = loader.finish(factor, token, raw[s][c]);
          }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&control_.tokens_full[warp]);
      }
    }
  }

  // ---- consumers -------------------------------------------------------------------------------------------------

  template <int kTiles>
  __device__ __forceinline__ void consume(int tokens) {
    constexpr int kColumns = 8 * kTiles;
    constexpr int kSteps = kMaxTokens / kColumns;
    constexpr int kUnrolled = kTiles == 8 ? 1 : Format::kSteps;  // 64 sums leave no registers for two steps
    Ring<kStages> weights(0);
    Ring<kTokenBuffers> buffers(0);
    for (int i = 0;; ++i) {
      const int tiles = unit(i).tiles;
      if (tiles < 0) break;
      const int thread = opaque(threadIdx.x), lane = thread % 32, part = thread / 32 % 4, half = thread / 128;
      if (tiles == 0) {
        const Unit u = unit(i);
        const auto wait = [&] {
          if (u.wait < 0) return;
          if (thread == 0) wait_for_counter(u.wait, u.wait_target);
          named_barrier(kConsumerBarrier, kConsumers);
        };
        Policy::job(p_, control_.policy, u, block_, tokens_, tokens, thread, wait);
        end_unit(u);
        continue;
      }

      float sums[2][kTiles][4] = {};
      int step = 0;  // of the buffer of tokens
      for (int tile = 0; tile < tiles; ++tile) {
        mbarrier_wait(&control_.weights_full[weights.at], weights.parity);
#pragma unroll kUnrolled
        for (int s = 0; s < Format::kSteps; ++s) {
          if (step == 0) mbarrier_wait(&control_.tokens_full[buffers.at], buffers.parity);
          uint32_t a[2][2][4];
          [[maybe_unused]] float scale[2][2];
          Format::load(weights_ + weights.at * kTile, s, part, half, lane, a);
          if constexpr (Format::kScales == Scales::kOfGroups) {
            Format::load_scale(weights_ + weights.at * kTile, s, part, lane, scale);
          }
          const unsigned char* x = tokens_ + buffers.at * kTokenBufferBytes + step * (kColumns * 128) +
                                   half * (kColumns * 64) + (lane ^ half * 4) * 16;
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            const uint4 b = *reinterpret_cast<const uint4*>(x + j * 512);
            [[maybe_unused]] float codes[2][4] = {};
            constexpr bool kApart = Format::kScales == Scales::kOfGroups;
#pragma unroll
            for (int m = 0; m < 2; ++m) mma_m16n8k16(kApart ? codes[m] : sums[m][j], a[m][0], b.x, b.y);
#pragma unroll
            for (int m = 0; m < 2; ++m) mma_m16n8k16(kApart ? codes[m] : sums[m][j], a[m][1], b.z, b.w);
            if constexpr (kApart) {
#pragma unroll
              for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[m][j][e] += scale[m][e / 2] * codes[m][e];
            }
          }
          const bool last = tile == tiles - 1 && s == Format::kSteps - 1;
          if (++step == kSteps || last) {
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&control_.tokens_empty[buffers.at]);
            buffers.advance();
            step = 0;
          }
        }
        if constexpr (Format::kScales == Scales::kOfRows) {
          if (tile == tiles - 1) {
            float scale[2][2];
            Format::load_scale(weights_ + weights.at * kTile, 0, part, lane, scale);
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
              for (int j = 0; j < kTiles; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[m][j][e] *= scale[m][e / 2];
          }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&control_.weights_empty[weights.at]);
        weights.advance();
      }

      // block[token][row]: the second half of K, then the sum of both.
      const auto each = [&](auto&& change) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          __syncwarp();  // at most half of the loads in registers
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int token = 8 * j + 2 * (lane % 4) + e % 2;
              const int row = 32 * part + 16 * m + 8 * (e / 2) + lane / 4;
              change(block_[token * kBlockPitch + row], sums[m][j][e]);
            }
        }
      };
      if (half == 1) each([](float& at, float sum) { at = sum; });
      named_barrier(kConsumerBarrier, kConsumers);
      if (half == 0) each([](float& at, float sum) { at = sum + at; });
      named_barrier(kConsumerBarrier, kConsumers);
      const Unit u = unit(i);  // again: its 16 registers are not spared during the product
      if (u.contributors > 1 && !add_parts(u, tokens, kColumns)) continue;
      Policy::finish(p_, control_.policy, u, block_, tokens, thread);
      end_unit(u);
    }
  }

  // Leaves this block's part for the others; true in the block that came last, with all parts added in block_.
  __device__ __forceinline__ bool add_parts(const Unit& u, int tokens, int columns) {
    const int thread = threadIdx.x;
    constexpr int kPieces = kTileRows / 4;
    const int size = columns * kPieces;  // float4 of a slot
    float4* parts = reinterpret_cast<float4*>(p_.stream.partials) + static_cast<int64_t>(u.slot) * size;
    for (int i = thread; i < tokens * kPieces; i += kConsumers) {
      parts[u.rank * size + i] = *block_piece(i);
    }
    named_barrier(kConsumerBarrier, kConsumers);
    if (thread == 0) {
      control_.last = add_acquire_release(p_.stream.counters + u.ticket, 1) + 1 == goal(u.contributors);
    }
    named_barrier(kConsumerBarrier, kConsumers);
    if (!control_.last) return false;
    for (int i = thread; i < tokens * kPieces; i += kConsumers) {
      float4 sum = __ldcg(parts + i);
#pragma unroll 4
      for (int rank = 1; rank < u.contributors; ++rank) {
        const float4 part = __ldcg(parts + rank * size + i);
        sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
      }
      *block_piece(i) = sum;
    }
    named_barrier(kConsumerBarrier, kConsumers);
    return true;
  }

  // Four rows of a token; neighbours are neighbours in the row tile.
  __device__ __forceinline__ float4* block_piece(int i) const {
    constexpr int kPieces = kTileRows / 4;
    return reinterpret_cast<float4*>(block_ + i / kPieces * kBlockPitch) + i % kPieces;
  }

  __device__ __forceinline__ void end_unit(const Unit& u) {
    named_barrier(kConsumerBarrier, kConsumers);  // all have written; block_ may be reused
    if (threadIdx.x == 0 && u.signal >= 0) add_release(p_.stream.counters + u.signal, 1);
  }

  // No tokens: the counters move as in any launch.
  __device__ __forceinline__ void count_only() {
    if (threadIdx.x != 0) return;
    for (int i = 0;; ++i) {
      const Unit u = unit(i);
      if (u.tiles < 0) break;
      if (u.contributors > 1) {
        if (add_acquire_release(p_.stream.counters + u.ticket, 1) + 1 != goal(u.contributors)) continue;
      }
      if (u.signal >= 0) add_release(p_.stream.counters + u.signal, 1);
    }
  }
};

// Launches `kernel`, whose body is Stream<Policy>::run, so that all its blocks are resident.
template <typename Policy>
void launch_stream(void (*kernel)(const typename Policy::Params), const typename Policy::Params& p, cudaStream_t stream,
                   const char* what) {
  constexpr int kBytes = Layout<Policy>::kBytes;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), what);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.stream.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, p), what);
}

}  // namespace dflash::stream

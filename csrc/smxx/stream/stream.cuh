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
//   warps 8, 9  loaders: asynchronous copies of tokens from global memory (L2) to four buffers of 8 KB in turn, 64
//               columns of 64 tokens, 128 of 32 or 256 of 16. Only they wait for other blocks' counters.
//   warp 10     producer: bulk copies of W into the ring, L2 evict-first.
//
// The ring holds 10 tiles, 7 us of the memory's time: that much of a hand-off between stages costs nothing. But only
// kInFlight tiles are under way at a time. They are enough for the full rate, and all that is under way beyond that
// waits in queues, with everybody else's loads and atomics behind it; worse, a release (any fence of the device's
// scope) waits for what its SM has under way: with the whole ring under way it takes longer than the ring can hide
// (tools/probes/stream_latency.cu, bench/results/*/stream_latency.txt).
// For the same reason parts of sums are passed without a fence: words that are kNothing until they are written.
//
// Shared memory: [kStages][16 KB] W | [4][8 KB] tokens | [64][132] fp32 finished block, [token][row] | Control.
// A token buffer: [64 columns of K][half of 32 columns][token][32 columns], tokens 2 i and 2 i + 1 swapped in the
// second half, so that a warp reads an n8 tile as 512 consecutive bytes and a row's stores fall on both halves of the
// banks.
//
// mbarriers: weights_full 1 arrival + 16 KB; weights_empty 8 (consumer warps); tokens_full 32 (a loader warp's copies);
// tokens_empty 8; prepared 320, all but the producer. Named barrier: 1 of the 256 consumers.
//
// Instructions for a tile and warp, 16 tokens: 4 + 2 loads of 16 bytes a lane, 8 mma, some 20 for the ring: 8 warps
// issue for about 70 cycles on each of the four schedulers. 64 tokens: 32 mma; shared memory is then the most used, 24
// KB written and 48 KB read, 580 cycles.
//
// A policy says what the stages are:
//   Params    with a member `StreamParams stream`
//   Format    see format.cuh
//   Shared    a struct of its own in shared memory
//   static void prepare(p, shared, thread)    320 threads, before anything else; a barrier follows
//   static int tokens(p, shared)              live tokens, 0..64; the same in all blocks
//   class Loader(p, shared) of one loader warp:
//     void job(unit)                          for a unit without weights, maybe long before it runs: may prefetch
//     void enter(unit)                        once a stage, by all loader warps, after its first wait
//     void more()                             once a stage, too, if has_more(stage): what the tiles' ends need from
//                                             other blocks, written to `shared`; a warp does its share of it
//     Source source(k)                        where columns k .. k + 7 come from
//     const uint16_t* address(source, token)  nullptr: zeros
//   static bool has_more(stage)               no loader may enter the next such stage before this one's tiles are
//   finished static void expect(p, shared, unit, tokens, thread)            256 threads, before other blocks' parts are
//   waited
//                                           for: may prefetch what finish will read
//   static void finish(p, shared, unit, block, tokens, thread)     256 threads; block[token * kBlockPitch + row]
//   static void job(p, shared, unit, block, buffers, tokens, thread, wait)   the same for units without weights. Calls
//                                           wait() once and reads before that only what no stage of this launch writes.
//                                           buffers: those of the tokens, free if the block's next product waits for
//                                           this job
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/cuda_check.h"
#include "common/ptx.cuh"
#include "smxx/stream/format.cuh"
#include "smxx/stream/schedule.h"
#include "smxx/stream/trace.cuh"

namespace dflash::stream {

constexpr int kConsumerWarps = 8, kLoaderWarps = 2;  // 11 warps in all: 184 registers a thread
constexpr int kConsumers = 32 * kConsumerWarps, kLoaders = 32 * kLoaderWarps;
constexpr int kThreads = kConsumers + kLoaders + 32;
constexpr int kTokenBuffers = 4, kTokenBufferBytes = 8192;
constexpr int kBlockPitch = kTileRows + 4;  // floats; the 4 tokens x 8 rows that a warp stores at once fall on 32 banks
constexpr int kBlockBytes = kMaxTokens * kBlockPitch * 4;
constexpr int kMaxSharedBytes = 232448;
constexpr int kMostStages = 16;
constexpr int kInFlight = 3;  // tiles
constexpr int kConsumerBarrier = 1;

// A sum on its way to another block, and whether all words of some have arrived.
__device__ __forceinline__ uint32_t word(float sum) {
  const uint32_t bits = __float_as_uint(sum);
  return bits == kNothing ? kNothing >> 1 : bits;  // another NaN
}
__device__ __forceinline__ bool is_whole(const uint2& v) { return v.x != kNothing && v.y != kNothing; }
__device__ __forceinline__ bool is_whole(const uint4& v) {
  return v.x != kNothing && v.y != kNothing && v.z != kNothing && v.w != kNothing;
}

template <typename Policy>
struct Control {
  uint64_t weights_full[kMostStages], weights_empty[kMostStages];
  uint64_t tokens_full[kTokenBuffers], tokens_empty[kTokenBuffers];
  uint64_t prepared;
  uint64_t job_done;                  // a job has read what it put into the buffers of tokens
  uint32_t more_stage[kLoaderWarps];  // 1 + the last stage whose more() this warp has done
  uint32_t launch;                    // how many launches of this schedule came before
  int32_t unit[kConsumerWarps];       // that a consumer warp is at: neither products nor jobs have a register for it
  typename Policy::Shared policy;
};

template <typename Policy>
struct Layout {
  static_assert(kTokenBuffers % kLoaderWarps == 0, "a buffer has one loader");
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

// Position in a ring of `size` buffers, and the parity of the phase to wait for: 16 bits of `state` from `shift` on, as
// the consumers have no register to spare.
template <int size, int shift = 0>
class Ring {
 public:
  __device__ __forceinline__ explicit Ring(uint32_t& state, uint32_t first_parity) : state_(state) {
    state_ |= first_parity << (shift + 8);
  }
  __device__ __forceinline__ int at() const { return static_cast<int>(state_ >> shift & 0xffu); }
  __device__ __forceinline__ uint32_t parity() const { return state_ >> (shift + 8) & 1u; }
  __device__ __forceinline__ void advance() {
    if (at() == size - 1) {
      state_ ^= (0x100u | (size - 1)) << shift;
    } else {
      state_ += 1u << shift;
    }
  }

 private:
  uint32_t& state_;
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
        mbarrier_init(&stream.control_.tokens_full[i], 32);
        mbarrier_init(&stream.control_.tokens_empty[i], kConsumerWarps);
      }
      for (int i = 0; i < kLoaderWarps; ++i) stream.control_.more_stage[i] = 0;
      mbarrier_init(&stream.control_.prepared, kThreads - 32);
      mbarrier_init(&stream.control_.job_done, kConsumers);
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
    mbarrier_arrive(&stream.control_.prepared);
    mbarrier_wait(&stream.control_.prepared, 0);
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

  // Through the L1: a unit is looked at several times, and the next one is on its way there.
  __device__ __forceinline__ Unit unit(int i) const {
    const Unit* at = p_.stream.units + opaque(static_cast<int>(blockIdx.x)) * int64_t{p_.stream.max_units} + i;
    Unit result;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      reinterpret_cast<int4*>(&result)[j] = __ldca(reinterpret_cast<const int4*>(at) + j);
    }
    return result;
  }

  __device__ __forceinline__ int unit_here() const { return control_.unit[opaque(threadIdx.x) / 32]; }

  __device__ __forceinline__ void prefetch_unit(int i) const {
    const Unit* at = p_.stream.units + opaque(static_cast<int>(blockIdx.x)) * int64_t{p_.stream.max_units} + i;
    prefetch_l1(at);
    prefetch_l1(reinterpret_cast<const char*>(at) + 32);
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
    uint32_t rings = 0;
    Ring<kStages> ring(rings, 1);
    Ring<kStages, 16> landed(rings, 0);
    int started = 0;
    [[maybe_unused]] int number = 0;  // of the tile
    bool joined = false;
    const auto join = [&] {  // false: nobody will consume what is under way
      joined = true;
      mbarrier_wait(&control_.prepared, 0);
      if (Policy::tokens(p_, control_.policy) > 0) return true;
      for (int i = 0; i < started; ++i) mbarrier_wait(&control_.weights_full[i], 0);
      return false;
    };
    for (int i = 0;; ++i) {
      const Unit u = unit(i);
      if (u.tiles < 0) break;
      prefetch_unit(i + 1);
      const unsigned char* from = p_.stream.weights + static_cast<int64_t>(u.weight_tile) * kTile;
      trace(i, kProducerBegins, lane == 0);
      for (int tile = 0; tile < u.tiles; ++tile, from += kTile) {
        if (started == kStages && !joined && !join()) return;
        if (started >= kInFlight) {
          mbarrier_wait(&control_.weights_full[landed.at()], landed.parity());
          trace_landed(number - kInFlight, lane == 0);
          landed.advance();
        }
        mbarrier_wait(&control_.weights_empty[ring.at()], ring.parity());
        if (lane == 0) {
          mbarrier_arrive_expect(&control_.weights_full[ring.at()], kTile);
          copy_bulk(weights_ + ring.at() * kTile, from, kTile, &control_.weights_full[ring.at()], policy);
        }
        if (tile == 0) trace(i, kFirstIssued, lane == 0);
        if (tile == u.tiles - 1) trace(i, kLastIssued, lane == 0);
        __syncwarp();
        ring.advance();
        ++number;
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
    typename Policy::Loader loader(p_, control_.policy);
    const int piece = lane % 8, half = piece / 4, row = lane / 8;
    int group = 0, stage = -1;
    uint32_t job_parity = 0;
    for (int i = 0;; ++i) {
      const Unit u = unit(i);
      if (u.tiles < 0) break;
      prefetch_unit(i + 1);
      if (u.tiles == 0) {
        loader.job(u);
        mbarrier_wait(&control_.job_done, job_parity);
        job_parity ^= 1;
        continue;
      }
      int known = u.wait < 0 ? u.wait : u.wait + (u.k_tile >> u.wait_shift) - 1;  // counters that have been seen full
      const auto wait_for_tile = [&](int k_tile) {
        if (u.wait < 0) return;
        while (known < u.wait + (k_tile >> u.wait_shift)) wait_for_counter(++known, u.wait_target);
      };
      bool more = false;
      const auto do_more = [&] {
        if (!more) return;
        more = false;
        loader.more();
        __syncwarp();
        if (lane == 0) store_release_shared(&control_.more_stage[warp], static_cast<uint32_t>(u.stage) + 1);
      };
      if (u.stage != stage) {
        stage = u.stage;
        trace(i, kLoaderBegins, threadIdx.x == kConsumers);
        wait_for_tile(u.k_tile);
        trace(i, kCounterSeen, threadIdx.x == kConsumers);
        loader.enter(u);
        more = Policy::has_more(u.stage);
      }
      const int steps = u.tiles * Format::kSteps;
      for (int first = 0; first < steps; first += kSteps) {
        const int here = group++, at = here % kTokenBuffers;
        if (here % kLoaderWarps != warp) continue;
        const int count = min(kSteps, steps - first);
        wait_for_tile(u.k_tile + (first + count - 1) / Format::kSteps);
        mbarrier_wait(&control_.tokens_empty[at], here / kTokenBuffers % 2 == 0 ? 1 : 0);
        const int k = 64 * (u.k_tile * Format::kSteps + first) + 8 * piece;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const auto source = loader.source(k + 64 * s);
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            const int token = 4 * c + row;
            if (s >= count || token >= tokens) continue;
            unsigned char* to =
                tokens_ + at * kTokenBufferBytes + s * (kColumns * 128) + half * (kColumns * 64) + (token ^ half) * 64;
            const uint16_t* from = loader.address(source, token);
            const void* any = p_.stream.units;
            copy_async_16(to + piece % 4 * 16, from != nullptr ? from : any, from != nullptr ? 16 : 0);
          }
        }
        copy_async_arrive(&control_.tokens_full[at]);
        if (first == 0) trace(i, kTokensStored, lane == 0);
        do_more();
      }
      do_more();
    }
  }

  // Of a job.
  struct Wait {
    const Stream& stream;
    __device__ __forceinline__ void operator()() const {
      const Unit u = stream.unit(stream.unit_here());
      if (u.wait < 0) return;
      if (threadIdx.x == 0) stream.wait_for_counter(u.wait, u.wait_target);
      named_barrier(kConsumerBarrier, kConsumers);
      mark(kFirstTokens);
    }
    __device__ __forceinline__ void mark(int event) const { trace(stream.unit_here(), event, threadIdx.x == 0); }
  };

  // ---- consumers -------------------------------------------------------------------------------------------------

  template <int kTiles>
  __device__ __forceinline__ void consume(int tokens) {
    constexpr int kColumns = 8 * kTiles;
    constexpr int kSteps = kMaxTokens / kColumns;
    constexpr int kUnrolled = kTiles == 8 ? 1 : Format::kSteps;  // 64 sums leave no registers for two steps
    // Tiles whose weights are in registers together, so that the loads of one and the products of the other overlap.
    constexpr int kAtOnce = kTiles == 2 && Format::kSteps == 1 ? 2 : 1;
    uint32_t rings = 0;
    Ring<kStages> weights(rings, 0);
    Ring<kTokenBuffers, 16> buffers(rings, 0);
    for (int i = 0;; ++i) {
      const int tiles = unit(i).tiles;
      if (tiles < 0) break;
      prefetch_unit(opaque(i) + 1);
      trace(i, kUnitBegins, threadIdx.x == 0);
      const int here = opaque(threadIdx.x), lane = here % 32, part = here / 32 % 4, half = here / 128;
      if (lane == 0) control_.unit[here / 32] = i;
      __syncwarp();
      if (tiles == 0) {
        Policy::job(p_, control_.policy, unit(i), block_, tokens_, tokens, opaque(threadIdx.x), Wait{*this});
        i = unit_here();
        trace(i, kFinished, threadIdx.x == 0);
        end_unit(unit(i));
        mbarrier_arrive(&control_.job_done);
        trace(i, kSignalled, threadIdx.x == 0);
        continue;
      }

      float sums[2][kTiles][4] = {};
      int step = 0;  // of the buffer of tokens
      // Multiplies kCount tiles from `tile` on.
      const auto multiply = [&](auto count_of, int tile) {
        constexpr int kCount = decltype(count_of)::value;
        [[maybe_unused]] int places[kCount];  // in the ring; one tile's has no register to spare
        uint32_t a[kCount][2][2][4];
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
          mbarrier_wait(&control_.weights_full[weights.at()], weights.parity());
          if constexpr (kCount > 1) {
            places[n] = weights.at();
            weights.advance();
            Format::load(weights_ + places[n] * kTile, 0, part, half, lane, a[n]);
          }
        }
        const auto place = [&](int n) {
          if constexpr (kCount > 1) return places[n];
          return weights.at();
        };
        if (tile == 0) trace(unit_here(), kFirstWeights, threadIdx.x == 0);
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
#pragma unroll kUnrolled
          for (int s = 0; s < Format::kSteps; ++s) {
            if (step == 0) mbarrier_wait(&control_.tokens_full[buffers.at()], buffers.parity());
            if (tile == 0 && n == 0 && s == 0) trace(unit_here(), kFirstTokens, threadIdx.x == 0);
            [[maybe_unused]] float scale[2][2];
            if constexpr (kCount == 1) Format::load(weights_ + place(n) * kTile, s, part, half, lane, a[n]);
            if constexpr (Format::kScales == Scales::kOfGroups) {
              Format::load_scale(weights_ + place(n) * kTile, s, part, lane, scale);
            }
            const unsigned char* x = tokens_ + buffers.at() * kTokenBufferBytes + step * (kColumns * 128) +
                                     half * (kColumns * 64) + (lane ^ half * 4) * 16;
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
              const uint4 b = *reinterpret_cast<const uint4*>(x + j * 512);
              [[maybe_unused]] float codes[2][4] = {};
              constexpr bool kApart = Format::kScales == Scales::kOfGroups;
#pragma unroll
              for (int m = 0; m < 2; ++m) mma_m16n8k16(kApart ? codes[m] : sums[m][j], a[n][m][0], b.x, b.y);
#pragma unroll
              for (int m = 0; m < 2; ++m) mma_m16n8k16(kApart ? codes[m] : sums[m][j], a[n][m][1], b.z, b.w);
              if constexpr (kApart) {
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                  for (int e = 0; e < 4; ++e) sums[m][j][e] += scale[m][e / 2] * codes[m][e];
              }
            }
            const bool last = tile + n == tiles - 1 && s == Format::kSteps - 1;
            if (++step == kSteps || last) {
              __syncwarp();
              if (lane == 0) mbarrier_arrive(&control_.tokens_empty[buffers.at()]);
              buffers.advance();
              step = 0;
            }
          }
          if constexpr (Format::kScales == Scales::kOfRows) {
            if (tile + n == tiles - 1) {
              float scale[2][2];
              Format::load_scale(weights_ + place(n) * kTile, 0, part, lane, scale);
#pragma unroll
              for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int j = 0; j < kTiles; ++j)
#pragma unroll
                  for (int e = 0; e < 4; ++e) sums[m][j][e] *= scale[m][e / 2];
            }
          }
          __syncwarp();
          if (lane == 0) mbarrier_arrive(&control_.weights_empty[place(n)]);
        }
        if constexpr (kCount == 1) weights.advance();
      };
      int tile = 0;
      if constexpr (kAtOnce > 1) {
        for (; tile + kAtOnce <= tiles; tile += kAtOnce) multiply(std::integral_constant<int, kAtOnce>{}, tile);
      }
      for (; tile < tiles; ++tile) multiply(std::integral_constant<int, 1>{}, tile);

      trace(unit_here(), kLastTile, threadIdx.x == 0);
      const int after = opaque(threadIdx.x);
      // block[token][row]: the second half of K, then the sum of both.
      const auto each = [&](auto&& change) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          __syncwarp();  // at most half of the loads in registers
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int token = 8 * j + 2 * (after % 4) + e % 2;
              const int row = 32 * (after / 32 % 4) + 16 * m + 8 * (e / 2) + after % 32 / 4;
              change(block_[token * kBlockPitch + row], sums[m][j][e]);
            }
        }
      };
      if (after >= kConsumers / 2) each([](float& at, float sum) { at = sum; });
      named_barrier(kConsumerBarrier, kConsumers);
      if (after < kConsumers / 2) each([](float& at, float sum) { at = sum + at; });
      named_barrier(kConsumerBarrier, kConsumers);
      const Unit u = unit(unit_here());  // again: its 16 registers are not spared during the product
      trace(unit_here(), kAddedHalves, threadIdx.x == 0);
      if (u.rank > 0) {
        leave_part(u, tokens, kColumns);
        trace(unit_here(), kLeftPart, threadIdx.x == 0);
        continue;
      }
      Policy::expect(p_, control_.policy, u, tokens, opaque(threadIdx.x));
      if (u.contributors > 1) add_parts(u, tokens, kColumns);
      trace(unit_here(), kAddedParts, threadIdx.x == 0);
      if (Policy::has_more(u.stage)) {
        for (int w = 0; w < kLoaderWarps; ++w) {
          while (load_acquire_shared(&control_.more_stage[w]) != static_cast<uint32_t>(u.stage) + 1) {
          }
        }
      }
      Policy::finish(p_, control_.policy, u, block_, tokens, opaque(threadIdx.x));
      trace(unit_here(), kFinished, threadIdx.x == 0);
      end_unit(u);
      trace(unit_here(), kSignalled, threadIdx.x == 0);
    }
  }

  static constexpr int kPieces = kTileRows / 4;  // float4 of a token

  __device__ __forceinline__ uint4* part(const Unit& u, int rank, int columns) const {
    return reinterpret_cast<uint4*>(p_.stream.partials) + static_cast<int64_t>(u.slot + rank) * (columns * kPieces);
  }

  // Leaves this block's part for rank 0.
  __device__ __forceinline__ void leave_part(const Unit& u, int tokens, int columns) {
    uint4* to = part(u, u.rank, columns);
    for (int i = opaque(threadIdx.x); i < tokens * kPieces; i += kConsumers) {
      const float4 v = *block_piece(i);
      store_relaxed(to + i, make_uint4(word(v.x), word(v.y), word(v.z), word(v.w)));
    }
    named_barrier(kConsumerBarrier, kConsumers);  // block_ may be reused
  }

  // Adds the parts of ranks 1.. to block_; the words of two pieces and kRanks ranks are on their way at a time.
  __device__ __forceinline__ void add_parts(const Unit& u, int tokens, int columns) {
    constexpr int kRanks = 4;
    const uint4 nothing = make_uint4(kNothing, kNothing, kNothing, kNothing);
    const int slot = columns * kPieces, pieces = tokens * kPieces;
#pragma unroll 1
    for (int i = opaque(threadIdx.x); i < pieces; i += 2 * kConsumers) {
      uint4* from = part(u, 1, columns) + i;
      float4 sum[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (i + k * kConsumers < pieces) sum[k] = *block_piece(i + k * kConsumers);
      }
#pragma unroll 1
      for (int left = u.contributors - 1; left > 0; left -= kRanks, from += kRanks * slot) {
        uint4 v[2][kRanks];
        bool whole;
        do {
          whole = true;
#pragma unroll
          for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int r = 0; r < kRanks; ++r) {
              v[k][r] = make_uint4(0u, 0u, 0u, 0u);
              if (r < left && i + k * kConsumers < pieces) v[k][r] = load_relaxed(from + r * slot + k * kConsumers);
            }
#pragma unroll
          for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int r = 0; r < kRanks; ++r) whole &= is_whole(v[k][r]);
        } while (!whole);
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int r = 0; r < kRanks; ++r) {
            if (r >= left || i + k * kConsumers >= pieces) break;
            sum[k].x += __uint_as_float(v[k][r].x), sum[k].y += __uint_as_float(v[k][r].y);
            sum[k].z += __uint_as_float(v[k][r].z), sum[k].w += __uint_as_float(v[k][r].w);
            store_relaxed(from + r * slot + k * kConsumers, nothing);
          }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (i + k * kConsumers < pieces) *block_piece(i + k * kConsumers) = sum[k];
      }
    }
    named_barrier(kConsumerBarrier, kConsumers);
  }

  // Four rows of a token; neighbours are neighbours in the row tile.
  __device__ __forceinline__ float4* block_piece(int i) const {
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
      if (u.rank == 0 && u.signal >= 0) add_release(p_.stream.counters + u.signal, 1);
    }
  }
};

// Launches `kernel`, whose body is Stream<Policy>::run, so that all its blocks are resident. Not cooperative: the
// caller knows that nothing keeps them from it for ever.
template <typename Policy>
void launch_stream(void (*kernel)(const typename Policy::Params), const typename Policy::Params& p, cudaStream_t stream,
                   const char* what, bool cooperative = true) {
  constexpr int kBytes = Layout<Policy>::kBytes;
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), what);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative ? 1 : 0;
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

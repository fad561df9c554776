// Times of what a streaming kernel does, unit by unit, for tools/stream_trace.py. Compiled to nothing unless
// DFLASH_STREAM_TRACE is defined (cmake -DDFLASH_STREAM_TRACE=ON).
#pragma once

#include <cstdint>

namespace dflash::stream {

// A unit's events, in the order of tools/stream_trace.py. An attention unit notes of its first tile of keys: K and Q
// there (kFirstWeights), scores (kLastTile), weights (kAddedHalves), V there (kLeftPart), and the end of its last tile
// (kAddedParts).
enum Event {
  kLoaderBegins,  // loaders: stage entered
  kCounterSeen,
  kTokensStored,  // first buffer of tokens
  kUnitBegins,    // consumers
  kFirstWeights,
  kFirstTokens,  // of a job: what it waits for is there
  kLastTile,
  kAddedHalves,
  kLeftPart,    // for rank 0
  kAddedParts,  // rank 0
  kFinished,
  kSignalled,
  kProducerBegins,  // producer
  kFirstIssued,
  kLastIssued,
  kEvents
};

#ifdef DFLASH_STREAM_TRACE
constexpr int kTraceBlocks = 160, kTraceUnits = 256;
static __device__ uint32_t trace_times[kTraceBlocks * kTraceUnits * kEvents];  // ns

__device__ __forceinline__ void trace(int unit, int event, bool here) {
  if (!here || unit >= kTraceUnits || blockIdx.x >= kTraceBlocks) return;
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  trace_times[(blockIdx.x * kTraceUnits + unit) * kEvents + event] = static_cast<uint32_t>(now);
}

// When each of a block's tiles had arrived.
constexpr int kTraceTiles = 2048;
static __device__ uint32_t landed_times[kTraceBlocks * kTraceTiles];

__device__ __forceinline__ void trace_landed(int tile, bool here) {
  if (!here || blockIdx.x >= kTraceBlocks || tile >= kTraceTiles) return;
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  landed_times[blockIdx.x * kTraceTiles + tile] = static_cast<uint32_t>(now);
}
#else
__device__ __forceinline__ void trace(int, int, bool) {}
__device__ __forceinline__ void trace_landed(int, bool) {}
#endif

}  // namespace dflash::stream

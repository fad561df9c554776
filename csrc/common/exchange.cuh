// Words that ranks write into each other's memory. Each says by itself that it has come: its place held kNoWord before,
// and its one reader puts that back. No fences, no flags.
#pragma once

#include <cstdint>

#include "common/exchange.h"
#include "common/ptx.cuh"

namespace dflash {

// What is sent for `bits`, never kNoWord.
__device__ __forceinline__ uint32_t word_of(uint32_t bits) {
  return bits == kNoWord ? kNoWord >> 1 : bits;  // of floats another NaN
}

__device__ __forceinline__ bool has_come(const uint2& v) { return v.x != kNoWord && v.y != kNoWord; }
__device__ __forceinline__ bool has_come(const uint4& v) {
  return v.x != kNoWord && v.y != kNoWord && v.z != kNoWord && v.w != kNoWord;
}

// Calls write(memory of a peer) for each of them, the rank behind this one first, so that not all write to the same.
template <typename Vector, typename Write>
__device__ __forceinline__ void for_peers(const Peers& peers, const Write& write) {
#pragma unroll 1
  for (int i = 1; i < peers.world; ++i) {
    const int peer = peers.rank + i;
    write(reinterpret_cast<Vector*>(peers.exchange[peer < peers.world ? peer : peer - peers.world]));
  }
}

template <typename Vector>
__device__ __forceinline__ Vector* own_exchange(const Peers& peers) {
  return reinterpret_cast<Vector*>(peers.exchange[peers.rank]);
}

// A peer that never comes ends the launch with an error.
class Patience {
 public:
  __device__ __forceinline__ void look(const Peers& peers) {
    if (++looks_ % 1024 != 0) return;
    const unsigned long long now = global_timer();
    if (since_ == 0) since_ = now;
    if (now - since_ > peers.patience) trap();
  }

 private:
  uint32_t looks_ = 0;
  unsigned long long since_ = 0;
};

}  // namespace dflash

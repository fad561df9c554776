// The best (id, value) of each row over all ranks, each of which has the best of its part of the vocabulary: every rank
// writes its pairs into the others' memory and looks for theirs, 8 bytes a row and peer, one block. What bounds it: a
// store over NVLink and the look that finds it, some 2 us; a gather by NCCL and the kernels around it take ten times
// that.
//
// Why no pair is lost or taken for another launch's: there are two sets of places, taken in turn. A rank writes pairs
// of launch n + 1 after its launch n ended, for which each other rank wrote pairs of launch n, which it did after its
// launch n - 1 ended: it has read and cleared the places of launch n - 1, those of n + 1.
#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "common/exchange.cuh"
#include "common/order_key.h"
#include "smxx/verify/launch.h"

namespace dflash::verify {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) merge_vocab_ranks_kernel(const __grid_constant__ MergeRanksParams p) {
  const int world = p.peers.world, rank = p.peers.rank;
  // Launches so far, less one: behind the places, which were filled with the same.
  uint32_t* launches = own_exchange<uint32_t>(p.peers) + merge_exchange_words(world) - kMergeCounterWords;
  const uint32_t launch = *launches;
  __syncthreads();
  if (threadIdx.x == 0) *launches = launch + 1;
  const int first = static_cast<int>(launch % 2) * world * kMostMergedRows;

  for (int n = threadIdx.x; n < p.rows; n += kThreads) {
    const uint2 words = make_uint2(word_of(__float_as_uint(p.values[n])), static_cast<uint32_t>(p.ids[n]));
    for_peers<uint2>(
        p.peers, [&](uint2* exchange) { store_relaxed_system(exchange + first + rank * kMostMergedRows + n, words); });
  }
  Patience patience;
  for (int n = threadIdx.x; n < p.rows; n += kThreads) {
    float value = p.values[n];
    int64_t id = p.ids[n];
    for (int other = 0; other < world; ++other) {
      if (other == rank) continue;
      uint2* place = own_exchange<uint2>(p.peers) + first + other * kMostMergedRows + n;
      uint2 words;
      do {
        words = load_relaxed_system(place);
        patience.look(p.peers);
      } while (!has_come(words));
      store_relaxed_system(place, make_uint2(kNoWord, kNoWord));
      const float theirs = __uint_as_float(words.x);
      const uint32_t key = order_key(theirs), best = order_key(value);
      if (key > best || (key == best && words.y < id)) value = theirs, id = words.y;
    }
    p.out_ids[n] = id;
    p.out_values[n] = value;
  }
}

}  // namespace

void launch_merge_vocab_ranks(const MergeRanksParams& p, cudaStream_t stream) {
  merge_vocab_ranks_kernel<<<1, kThreads, 0, stream>>>(p);
  cuda_check_launch("merge_vocab_ranks");
}

}  // namespace dflash::verify

// Greedy verification, and the row argmax of a vocabulary shard.
//
//   top1[j] = argmax_v logits[b, j, v]        (torch.argmax's order, first index among equals)
//   accept_len = the longest prefix with top1[j] == candidates[b, j + 1];  bonus = top1[accept_len]
//
// Floors. From logits: B*T*V elements read once, nothing else of size: 4.9 MB for one block of 16 rows of V = 151936 in
// bfloat16, 1.6 us at a measured read bandwidth of 3.1 TB/s; 50 us for 32 blocks. One maximum for each element: with
// packed maxima about two instructions for eight elements of 16 bits, far from a limit. From top-1 ids: some hundred
// bytes a request; the floor is the launch.
//
// Partition. A row is cut into spans of whole 1024-vector tiles (16 KB: four 16-byte loads of 256 threads, all in
// flight at once); a CTA takes one span. Few rows: spans of one tile, so that one block alone (304 CTAs) fills the
// card. Many rows: longer spans, about 16 CTAs an SM in all, which bounds the cost of starting CTAs and the loss at the
// end. CTAs meet in the workspace: atomicMax of argmax_key joins the spans of a row (a maximum of integers: no order of
// arrival changes it), the arrival counter of the request tells the last CTA, which accepts and clears the words.
//
// Lazy. Rows past the first mismatch decide nothing. CTAs are numbered row-major over the block position (all requests'
// row 0 first) and the hardware starts them about in that order; the CTA that completes a row compares it with the
// candidate and records a mismatch; later CTAs look before they read. A skipped row leaves words that nobody uses,
// because every row up to the first mismatch is read in full; so the result is the one of the full pass.
// Fewer CTAs at a time (kLazySharedBytes) keep the read front narrow.
#include <algorithm>

#include "common/cuda_check.h"
#include "common/order_key.h"
#include "smxx/verify/finish.cuh"
#include "smxx/verify/launch.h"
#include "smxx/verify/merge.h"
#include "smxx/verify/row_reader.cuh"

namespace dflash::verify {
namespace {

constexpr int kSpanThreads = 256;
constexpr int kTileVectors = 4 * kSpanThreads;
constexpr int kCtasPerSm = 16;
// Dynamic shared memory nobody touches: with 46 KB, four CTAs fit in an SM's 228 KB (64 KB of loads in flight, thrice
// what the latency needs), so that the CTAs in flight cover about two block positions of 32 requests. Together with
// the static part it stays below the 48 KB that need no opt-in.
constexpr int kLazySharedBytes = 46 * 1024;
// B*T*V from which skipping pays: below, nearly all CTAs are in flight before the first row is complete.
constexpr int64_t kLazyElements = int64_t{1} << 25;

constexpr int kTop1Threads = 128;
constexpr int kMergeThreads = 128;

// How rows are cut: `splits` spans of `span` elements each, the last one shorter.
struct Cut {
  int splits;
  int span;
};

int sm_count() {
  int device = 0, sms = 0;
  cuda_check(cudaGetDevice(&device), "verify_block");
  cuda_check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "verify_block");
  return sms;
}

Cut cut_rows(int64_t rows, int vocab_size, int per_vector, int ctas_per_sm) {
  const int64_t tile = int64_t{kTileVectors} * per_vector;
  const int64_t tiles = (vocab_size + tile - 1) / tile;
  const int64_t wanted = int64_t{sm_count()} * ctas_per_sm;
  const int64_t tiles_per_split = std::min(tiles, std::max<int64_t>(1, rows * tiles / wanted));
  const int64_t splits = (tiles + tiles_per_split - 1) / tiles_per_split;
  return Cut{static_cast<int>(splits), static_cast<int>(std::min<int64_t>(tiles_per_split * tile, vocab_size))};
}

// argmax_key of span `split` of a row; valid in thread 0.
template <LogitType kType>
__device__ uint64_t span_argmax(const typename Element<kType>::Bits* row, int vocab_size, const Cut& cut, int split) {
  const int begin = split * cut.span;
  const int count = min(cut.span, vocab_size - begin);
  uint64_t best = 0;
  float best_value = __int_as_float(0x7fffffff);  // NaN: the first comparison lets anything pass
  const auto take = [&](int i, float value) {
    const uint64_t key = argmax_key(value, static_cast<uint32_t>(begin + i));
    best = key > best ? key : best;
  };
  visit_span<kType>(row + begin, count, threadIdx.x, kSpanThreads, take, [&](int i, const uint4& v) {
    const float top = Element<kType>::max_of(v);
    // A thread sees its elements in ascending order: an equal value later on cannot win.
    if (top <= best_value) return;
    float x[Element<kType>::kPerVector];
    Element<kType>::unpack(v, x);
    int place = 0;
#pragma unroll
    for (int e = Element<kType>::kPerVector - 1; e >= 0; --e) {
      if (x[e] == top || x[e] != x[e]) place = e;
    }
    take(i + place, top);
    best_value = top;
  });

  __shared__ uint64_t warp_best[kSpanThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_down_sync(kFullWarp, best, offset);
    best = other > best ? other : best;
  }
  if (threadIdx.x % 32 == 0) warp_best[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kSpanThreads / 32; ++warp) best = max(best, warp_best[warp]);
  }
  return best;
}

// One more arrival at `counter`; true for the last of `expected`. What earlier arrivals wrote may be read after it.
__device__ bool arrive(unsigned long long* counter, unsigned long long expected) {
  __threadfence();
  const bool last = atomicAdd(counter, 1ull) == expected - 1;
  __threadfence();
  return last;
}

template <LogitType kType, bool kLazy>
__global__ void __launch_bounds__(kSpanThreads, 4) verify_logits_kernel(BlockParams p, Cut cut) {
  __shared__ bool skip, last;
  const int block_size = p.block_size;
  const int64_t unit = blockIdx.x;
  const int split = static_cast<int>(unit % cut.splits);
  const int64_t row = unit / cut.splits;
  const int64_t b = kLazy ? row % p.batch : row / block_size;
  const int j = static_cast<int>(kLazy ? row / p.batch : row % block_size);
  if (kLazy) {
    if (threadIdx.x == 0) {
      skip = __ldcg(p.workspace.stop(b)) > static_cast<unsigned long long>(block_size - j);
    }
    __syncthreads();
  }
  uint64_t key = 0;
  if (!kLazy || !skip) key = span_argmax<kType>(logits_row<kType>(p.logits, b, j), p.vocab_size, cut, split);
  if (threadIdx.x == 0) {
    unsigned long long* words = p.workspace.row(b, j);
    if (!kLazy || !skip) atomicMax(words, static_cast<unsigned long long>(key));
    if (kLazy && j < block_size - 1 && arrive(words + 1, cut.splits)) {
      const uint64_t row_key = __ldcg(words);
      if (static_cast<int64_t>(argmax_index(row_key)) != p.candidates.at(b, j + 1)) {
        atomicMax(p.workspace.stop(b), static_cast<unsigned long long>(block_size - j));
      }
    }
    last = arrive(p.workspace.arrivals(b), static_cast<unsigned long long>(cut.splits) * block_size);
  }
  __syncthreads();
  if (!last || threadIdx.x >= 32) return;
  const int lane = threadIdx.x;
  const int64_t target = lane < block_size ? argmax_index(__ldcg(p.workspace.row(b, lane))) : 0;
  const Accepted accepted = accept_warp(p.candidates, block_size, b, lane, target);
  write_outputs(p.out, p.candidates, p.prefix_lens, block_size, b, lane, accepted);
  clear_workspace(p.workspace, b, lane);
}

template <LogitType kType>
__global__ void __launch_bounds__(kSpanThreads, 4) argmax_logits_kernel(ArgmaxParams p, Cut cut) {
  const int split = static_cast<int>(blockIdx.x % cut.splits);
  const int64_t n = blockIdx.x / cut.splits;
  const auto* row = logits_row<kType>(p.logits, n, 0);
  const uint64_t key = span_argmax<kType>(row, p.vocab_size, cut, split);
  if (threadIdx.x != 0) return;
  unsigned long long* words = p.workspace.row(n, 0);
  atomicMax(words, static_cast<unsigned long long>(key));
  if (!arrive(p.workspace.arrivals(n), cut.splits)) return;
  const uint32_t index = argmax_index(__ldcg(words));
  p.ids[n] = p.vocab_start + index;
  p.values[n] = Element<kType>::value(row[index]);
  *words = 0;
  *p.workspace.arrivals(n) = 0;
}

// One warp a request.
__global__ void __launch_bounds__(kTop1Threads) verify_top1_kernel(BlockParams p) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kTop1Threads / 32) + threadIdx.x / 32;
  if (b >= p.batch) return;
  const int lane = threadIdx.x % 32;
  const int64_t target = lane < p.block_size ? p.target_ids.at(b, lane) : 0;
  const Accepted accepted = accept_warp(p.candidates, p.block_size, b, lane, target);
  write_outputs(p.out, p.candidates, p.prefix_lens, p.block_size, b, lane, accepted);
}

__global__ void __launch_bounds__(kMergeThreads) merge_vocab_shards_kernel(MergeParams p) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (n < p.rows) merge_shards(p, n);
}

unsigned blocks_for(int64_t items, int per_block) { return static_cast<unsigned>((items + per_block - 1) / per_block); }

template <LogitType kType>
void launch_logits(const BlockParams& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.block_size;
  const bool lazy = p.lazy == Lazy::kAuto ? rows * p.vocab_size >= kLazyElements : p.lazy == Lazy::kOn;
  const Cut cut = cut_rows(rows, p.vocab_size, Element<kType>::kPerVector, lazy ? 2 * kCtasPerSm : kCtasPerSm);
  const auto grid = static_cast<unsigned>(rows * cut.splits);
  if (lazy) {
    verify_logits_kernel<kType, true><<<grid, kSpanThreads, kLazySharedBytes, stream>>>(p, cut);
  } else {
    verify_logits_kernel<kType, false><<<grid, kSpanThreads, 0, stream>>>(p, cut);
  }
}

template <LogitType kType>
void launch_argmax(const ArgmaxParams& p, cudaStream_t stream) {
  const Cut cut = cut_rows(p.rows, p.vocab_size, Element<kType>::kPerVector, kCtasPerSm);
  argmax_logits_kernel<kType><<<static_cast<unsigned>(p.rows * cut.splits), kSpanThreads, 0, stream>>>(p, cut);
}

}  // namespace

void launch_verify_block(const BlockParams& p, cudaStream_t stream) {
  if (p.target_ids.data != nullptr) {
    verify_top1_kernel<<<blocks_for(p.batch, kTop1Threads / 32), kTop1Threads, 0, stream>>>(p);
  } else {
    dispatch_logit_type(p.logits.type, [&](auto type) { launch_logits<decltype(type)::value>(p, stream); });
  }
  cuda_check_launch("verify_block");
}

void launch_argmax_logits(const ArgmaxParams& p, cudaStream_t stream) {
  dispatch_logit_type(p.logits.type, [&](auto type) { launch_argmax<decltype(type)::value>(p, stream); });
  cuda_check_launch("argmax_logits");
}

void launch_merge_vocab_shards(const MergeParams& p, cudaStream_t stream) {
  merge_vocab_shards_kernel<<<blocks_for(p.rows, kMergeThreads), kMergeThreads, 0, stream>>>(p);
  cuda_check_launch("merge_vocab_shards");
}

}  // namespace dflash::verify

// Greedy verification, and the row argmax of a vocabulary shard.
//
//   top1[j] = argmax_v logits[b, j, v]        (torch.argmax's order, first index among equals)
//   accept_len = the longest prefix with top1[j] == candidates[b, j + 1];  bonus = top1[accept_len]
//
// Here: from top-1 ids, and from logits when all rows are read. verify_block_lazy.cu: from logits, only the rows that
// matter; launch_logits chooses.
//
// Floors. From logits: B*T*V elements read once, nothing else of size: 4.9 MB for one block of 16 rows of V = 151936 in
// bfloat16, 1.6 us at a measured read bandwidth of 3.1 TB/s; 50 us for 32 blocks. About two instructions an element in
// the loop, a third of what an SM issues in the time its bytes take. What is left is a fixed cost a call, about 4 us:
// the launch, the way to memory and back, and at the end one maximum, one arrival and one look at the rows' words, each
// a trip to L2. From top-1 ids: some hundred bytes a request; the floor is the launch.
//
// Partition. A row is cut into tiles of 4 KB, a 16-byte vector a thread; all tiles of all rows, in order, are dealt out
// in equal spans to CTAs that stay, two an SM. So a CTA reads the end of one row, whole rows, the beginning of another;
// one block alone is 4 to 5 tiles a CTA.
//
// Pipeline. A thread copies its own vectors to its own places in shared memory and reads nobody else's: a ring of
// kStages tiles (128 KB an SM in flight) without a barrier, which runs on across the ends of rows. At the end of each
// part of a row: warp maxima, one barrier, and warp 0 joins the eight of them while the other warps go on.
//
// CTAs meet in the workspace: atomicMax of argmax_key joins the parts of a row (a maximum of integers: no order of
// arrival changes it); one arrival a CTA and request, which releases those maxima, tells the last of the request's
// CTAs; it accepts, and clears the words.
#include <algorithm>
#include <limits>

#include "common/cuda_check.h"
#include "common/order_key.h"
#include "common/ptx.cuh"
#include "smxx/verify/finish.cuh"
#include "smxx/verify/launch.h"
#include "smxx/verify/merge.h"
#include "smxx/verify/row_argmax.cuh"
#include "smxx/verify/row_reader.cuh"

namespace dflash::verify {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kCtasPerSm = 2;
constexpr int kStages = 16;
constexpr int kRingBytes = kStages * kThreads * static_cast<int>(sizeof(uint4));
static_assert(kCtasPerSm * (kRingBytes + 2048) <= 228 * 1024, "the CTAs of an SM share its memory");

// Bytes of logits from which verify_block_lazy.cu is taken unasked. By measurement (H100, T 16, V 151936, 6.5 of 16
// committed) it is slower than a full read at B 8 and at B 32, 156 MB: never, so far.
constexpr int64_t kLazyBytes = std::numeric_limits<int64_t>::max();

constexpr int kTop1Threads = 128;
constexpr int kMergeThreads = 128;

// `tiles` a row; CTA c has `share` of them in all, one more if c < `longer`.
struct Cut {
  int tiles;
  int share;
  int longer;

  __device__ int begin(int cta) const { return cta * share + min(cta, longer); }
  // The CTA that has tile n.
  __device__ int cta_of(int n) const {
    const int in_longer = longer * (share + 1);
    return n < in_longer ? n / (share + 1) : longer + (n - in_longer) / share;
  }
};

// Reads this CTA's span. row_at(n): row n, a Row. part(n, key, ends): called by warp 0 with the argmax_key of a part of
// row n, the same in all lanes; `ends`: the last part of this CTA.
template <LogitType kType, typename RowAt, typename Part>
__device__ __forceinline__ void read_span(const Cut& cut, int vocab_size, RowAt row_at, Part part) {
  extern __shared__ uint4 ring[];
  __shared__ uint64_t warp_best[2][kWarps];  // of even and odd parts
  const int thread = threadIdx.x;
  const int begin = cut.begin(blockIdx.x), end = cut.begin(blockIdx.x + 1);

  int n = begin / cut.tiles, tile = begin % cut.tiles;  // what is read next
  Row<kType> row = row_at(n);
  int copies = begin, copy_n = n, copy_tile = tile;  // what is copied next
  Row<kType> copy_row = row;
  const auto copy = [&](int stage) {
    if (copies < end) {
      const int i = copy_tile * kThreads + thread;
      if (i < copy_row.vectors) copy_async_16(ring + stage * kThreads + thread, copy_row.vector(i), 16);
      if (++copies < end && ++copy_tile == cut.tiles) {
        copy_tile = 0;
        copy_row = row_at(++copy_n);
      }
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) copy(stage);

  Best<kType> best;
  int stage = 0, parity = 0, first = tile * kThreads + thread;  // `first` vector of this part
  best.start(first);
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    copy_async_wait<kStages - 1>();
    const int vector = tile * kThreads + thread;
    if (vector < row.vectors) best.take(ring[stage * kThreads + thread], vector);
    copy(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    ++tile;
    const bool row_ends = tile == cut.tiles, ends = i + 1 == end;
    if (!row_ends && !ends) continue;
    uint64_t key = first < row.vectors ? best.key(row.head) : 0;
    if (first == thread) key = row.template with_scalars<true>(key, vocab_size, thread);
    if (row_ends) key = row.template with_scalars<false>(key, vocab_size, thread);
    key = warp_max(key);
    if (thread % 32 == 0) warp_best[parity][thread / 32] = key;
    __syncthreads();
    if (thread < 32) part(n, warp_max(thread < kWarps ? warp_best[parity][thread] : 0), ends);
    if (ends) break;
    parity ^= 1;
    tile = 0;
    row = row_at(++n);
    first = thread;
    best.start(first);
  }
}

// Called by warp 0 once its parts of rows [first_row, first_row + rows) are in the workspace by lane 0's hand: true in
// all lanes for the last CTA that has a part of them. Then the other CTAs' words may be read.
__device__ __forceinline__ bool arrive(unsigned long long* arrivals, const Cut& cut, int first_row, int rows) {
  const int first_tile = first_row * cut.tiles;
  const int others = cut.cta_of(first_tile + rows * cut.tiles - 1) - cut.cta_of(first_tile);
  bool last = false;
  if (threadIdx.x == 0) last = atomic_add_release(arrivals, 1) == static_cast<unsigned long long>(others);
  last = __shfl_sync(kFullWarp, last, 0);
  if (last) fence_device();
  return last;
}

template <LogitType kType>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) verify_logits_kernel(BlockParams p, Cut cut) {
  const int lane = threadIdx.x, block_size = p.block_size;
  const auto row_at = [&](int n) { return Row<kType>(p.logits, n / block_size, n % block_size, p.vocab_size); };
  read_span<kType>(cut, p.vocab_size, row_at, [&](int n, uint64_t key, bool ends) {
    const int b = n / block_size, j = n % block_size;
    if (lane == 0) atomicMax(p.workspace.row(b, j), static_cast<unsigned long long>(key));
    if (j < block_size - 1 && !ends) return;
    const Request request = load_request(p.candidates, p.prefix_lens, block_size, b, lane);
    if (!arrive(p.workspace.arrivals(b), cut, b * block_size, block_size)) return;
    const int64_t target = lane < block_size ? argmax_index(__ldcg(p.workspace.row(b, lane))) : 0;
    const Accepted accepted = accept_warp(request, block_size, lane, target);
    write_outputs(p.out, request, block_size, b, lane, accepted);
    clear_workspace(p.workspace, b, lane);
  });
}

template <LogitType kType>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) argmax_logits_kernel(ArgmaxParams p, Cut cut) {
  const auto row_at = [&](int n) { return Row<kType>(p.logits, n, 0, p.vocab_size); };
  read_span<kType>(cut, p.vocab_size, row_at, [&](int n, uint64_t key, bool) {
    unsigned long long* word = p.workspace.row(n, 0);
    if (threadIdx.x == 0) atomicMax(word, static_cast<unsigned long long>(key));
    if (!arrive(p.workspace.arrivals(n), cut, n, 1) || threadIdx.x != 0) return;
    const uint32_t index = argmax_index(__ldcg(word));
    p.ids[n] = p.vocab_start + index;
    p.values[n] = Element<kType>::value(row_at(n).data[index]);
    *word = 0;
    *p.workspace.arrivals(n) = 0;
  });
}

// One warp a request.
__global__ void __launch_bounds__(kTop1Threads) verify_top1_kernel(BlockParams p) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kTop1Threads / 32) + threadIdx.x / 32;
  if (b >= p.batch) return;
  const int lane = threadIdx.x % 32;
  const int64_t target = lane < p.block_size ? p.target_ids.at(b, lane) : 0;
  const Request request = load_request(p.candidates, p.prefix_lens, p.block_size, b, lane);
  const Accepted accepted = accept_warp(request, p.block_size, lane, target);
  write_outputs(p.out, request, p.block_size, b, lane, accepted);
}

__global__ void __launch_bounds__(kMergeThreads) merge_vocab_shards_kernel(MergeParams p) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (n < p.rows) merge_shards(p, n);
}

unsigned blocks_for(int64_t items, int per_block) { return static_cast<unsigned>((items + per_block - 1) / per_block); }

// Launches kernel(params, cut) on `rows` rows of p.logits.
template <LogitType kType, typename Params>
void launch_rows(void (*kernel)(Params, Cut), const Params& p, int64_t rows, const char* op, cudaStream_t stream) {
  constexpr int kElements = kThreads * Element<kType>::kPerVector;
  static_assert(kElements >= kTileElements);
  const int tiles = (p.vocab_size - 1) / kElements + 1;
  const auto all = static_cast<int>(rows * tiles);  // fits: kMaxTiles
  const int ctas = std::min(all, kCtasPerSm * sm_count(op));
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes), op);
  kernel<<<static_cast<unsigned>(ctas), kThreads, kRingBytes, stream>>>(p, Cut{tiles, all / ctas, all % ctas});
}

template <LogitType kType>
void launch_logits(const BlockParams& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.block_size;
  const int64_t bytes = rows * p.vocab_size * static_cast<int64_t>(sizeof(typename Element<kType>::Bits));
  if (p.lazy == Lazy::kOn || (p.lazy == Lazy::kAuto && bytes >= kLazyBytes)) {
    launch_verify_block_lazy(p, stream);
  } else {
    launch_rows<kType>(verify_logits_kernel<kType>, p, rows, "verify_block", stream);
  }
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
  dispatch_logit_type(p.logits.type, [&](auto type) {
    constexpr LogitType kType = decltype(type)::value;
    launch_rows<kType>(argmax_logits_kernel<kType>, p, p.rows, "argmax_logits", stream);
  });
  cuda_check_launch("argmax_logits");
}

void launch_merge_vocab_shards(const MergeParams& p, cudaStream_t stream) {
  merge_vocab_shards_kernel<<<blocks_for(p.rows, kMergeThreads), kMergeThreads, 0, stream>>>(p);
  cuda_check_launch("merge_vocab_shards");
}

}  // namespace dflash::verify

// Greedy verification, and the row argmax of a vocabulary shard.
//
//   top1[j] = argmax_v logits[b, j, v]        (torch.argmax's order, first index among equals)
//   accept_len = the longest prefix with top1[j] == candidates[b, j + 1];  bonus = top1[accept_len]
//
// From top-1 ids, and from logits: all rows, or lazily, rows behind a request's first mismatch left out once it is
// known.
//
// Floors. All rows: B*T*V elements read once, nothing else of size: 4.9 MB for one block of 16 rows of V = 151936 in
// bfloat16, 1.6 us at a measured read bandwidth of 3.1 TB/s; 50 us for 32 blocks. Lazily, 6.5 tokens of 16 committed on
// average: 208 of 512 rows, 20 us. About two instructions an element, a quarter of what an SM issues in the time its
// bytes take. What is left is a fixed cost a call, some 4 us: the launch, the way to memory and back, and at the end
// the last slice's reduction and four trips to L2, two for the row's word and two for the request's. From top-1 ids:
// some hundred bytes a request; the floor is the launch.
//
// Partition. A row is cut into equal slices of at most 7 KB, if possible so many that they divide the number of SMs or
// are a multiple of it: 44 for V = 151936 in bfloat16 and 132 SMs. All slices of all rows, in order, are units 0, 1, 2,
// ..; unit n belongs to block n % gridDim, one block an SM. So block c has the same slice of every third row: all
// blocks get the same number of bytes, also of the rows that a lazy pass leaves over, without a word between them. What
// is read at one time is one front that moves through memory; its order is request by request for all rows, so that
// requests end one after another, and lazily row 0 of all requests, then row 1, ..
//
// Pipeline. A warp holds a whole slice in registers, 14 vectors a lane: it starts all of its loads at once, reduces the
// slice alone, starts the loads of its next unit and only then reports. Nothing goes through shared memory but a
// counter, off which warps take the block's units, the first ones by their number; they meet nowhere. Sixteen warps
// keep some 100 KB under way or being reduced, more than what the memory's full rate takes; more would only queue, and
// everything else an SM asks of memory, the reports, would queue behind it (with 128 KB under way an atomic takes ten
// times as long). Bulk copies of the same slices into shared memory are a little slower (bench/NOTES.md).
//
// Reports. A release or a fence waits for what its SM has under way, so there is none. One word carries all that is
// known of a row, the largest key so far and the number of slices that it is of (join): two atomics a slice, without a
// second try whoever else comes, and who makes the count full goes on with the row's argmax. The rows of a request meet
// in the same way in a word of the request, and who completes it writes the outputs. Taking the word away and putting
// it back joined was dropped: simulated, slices that land together contend for it for 5 to 20 us. Results do not depend
// on the order of arrival. All words are zero between calls.
//
// Lazily what counts is how long after a mismatch rows behind it are still asked for: all the requests' rows go by in
// the time a few slices take. So it is not the complete row that tells: any slice whose best element beats the logit of
// the draft's token is proof, and the first of a row, which its atomic's answer tells, says so at once, in half a word
// of the request. One warp of a block does nothing but listen: it copies these half words into shared memory, where the
// others look before they ask for a slice. What makes this fast is that few ask and few tell: all of them lie in one
// line. When each warp looked for itself, and each slice told, half of the SMs waited 10 us for every answer. A slice
// of a dead row is not reported. What dead rows leave in their words is cleared by the last block to leave; here is the
// one fence, when nothing is under way. (Rows of millions of elements need more bits than a word has: they are joined
// by a maximum and a released count.)
#include <algorithm>

#include "common/cuda_check.h"
#include "common/divisor.h"
#include "common/order_key.h"
#include "common/ptx.cuh"
#include "smxx/verify/finish.cuh"
#include "smxx/verify/launch.h"
#include "smxx/verify/merge.h"
#include "smxx/verify/row_argmax.cuh"
#include "smxx/verify/row_reader.cuh"
#include "smxx/verify/trace.cuh"

namespace dflash::verify {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kLazyWarps = 15;  // and one that listens
constexpr int kLazyThreads = 32 * (kLazyWarps + 1);
constexpr int kHeld = 14;                     // vectors of a lane
constexpr int kSliceBytes = 32 * 16 * kHeld;  // at most

// Bytes of logits from which rows are left out unasked: at B 8 of V 151936, 39 MB, that gains nothing; at B 32 it takes
// two thirds of the time, and a twentieth more if all tokens are committed (H200, bench/NOTES.md).
constexpr int64_t kLazyBytes = int64_t{64} << 20;

constexpr int kMostHeard = 8192;        // requests of which a lazy block has a word each in shared memory
constexpr unsigned kListenPause = 500;  // ns

constexpr int kTop1Threads = 128;
constexpr int kMergeThreads = 128;

struct Slices {
  uint32_t units;   // of all rows
  int vectors;      // of a slice; the last of a row may have fewer
  Divisor per_row;  // slices
  Divisor inner;    // all rows: T; lazily: B
  // Of the word of a row: count_bits for the number of slices, 32 - count_bits for an index. 0: no such split is
  // enough.
  int count_bits;
};

struct Unit {
  int row;  // kNone: there is none
  int slice;
};
constexpr int kNone = -1;

// What is loaded of a unit.
struct Span {
  const uint4* from;
  int count;
};

// Unit k of this block.
__device__ __forceinline__ Unit unit_of(const Slices& slices, unsigned k) {
  const uint32_t n = blockIdx.x + gridDim.x * k;
  if (n >= slices.units) return Unit{kNone, 0};
  const uint32_t row = slices.per_row.divide(n);
  return Unit{static_cast<int>(row), static_cast<int>(n - row * slices.per_row.value)};
}

// Reads the units of this block. job.row(n): row n, a Row; job.report(n, key): the argmax_key of a slice of row n, the
// same in all lanes of a warp. If Job::kSkips: job.is_wanted(n): whether row n still matters, by what this block has
// heard; job.guess(n): the token that row n is compared with, whose key job.report gets, too. And the last warp of the
// block does not read, but calls job.listen() all the time.
template <LogitType kType, typename Job>
__device__ __forceinline__ void read_units(const Slices& slices, int vocab_size, const Job& job, Trace& trace) {
  __shared__ unsigned next;  // unit of this block
  constexpr int kReaders = Job::kSkips ? kLazyWarps : kWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint64_t policy = evict_first_policy();

  const auto span_of = [&](const Unit& unit) {
    if (unit.row == kNone) return Span{nullptr, 0};
    const Row<kType> row = job.row(unit.row);
    const int first = unit.slice * slices.vectors, count = max(min(slices.vectors, row.vectors - first), 0);
    return Span{row.vector(first), count};
  };
  Held<kType, kHeld> held;
  const auto load = [&](const Span& span) {
    if (span.count > 0) held.load(span.from, span.count, lane, policy);
  };
  const auto take = [&] {
    unsigned k = 0;
    if (lane == 0) k = atomicAdd(&next, 1u);
    return __shfl_sync(kFullWarp, k, 0);
  };
  // Whether unit k + lane is worth reading. There is no end to what lies behind the last one.
  const auto is_wanted = [&](unsigned k) {
    if constexpr (Job::kSkips) {
      const Unit unit = unit_of(slices, k + static_cast<unsigned>(lane));
      if (unit.row != kNone) return job.is_wanted(unit.row);
    }
    return true;
  };

  if (threadIdx.x == 0) next = kReaders;
  if constexpr (Job::kSkips) job.forget();
  const bool listens = Job::kSkips && warp == kReaders;
  Unit now{kNone, 0};
  uint32_t guess = 0;  // of the row that is being read
  if (!listens) {
    now = unit_of(slices, static_cast<unsigned>(warp));
    load(span_of(now));
    if constexpr (Job::kSkips) {
      if (now.row != kNone) guess = job.guess(now.row);
    }
  }
  __syncthreads();  // `next` is there
  if constexpr (Job::kSkips) {
    if (listens) {
      const auto is_more = [&] { return unit_of(slices, load_relaxed_shared(&next)).row != kNone; };
      while (__ballot_sync(kFullWarp, is_more()) != 0) job.listen();
      return;
    }
  }

#pragma unroll 1
  while (now.row != kNone) {
    const Row<kType> row = job.row(now.row);
    const int first = now.slice * slices.vectors, count = min(slices.vectors, row.vectors - first);
    // Worked out while the data is on its way, so that the slot stays empty for a short time only.
    unsigned k = take();
    Unit following = unit_of(slices, k);
    Span span = span_of(following);
    typename Element<kType>::Bits rival = 0;  // the guess's logit
    const bool has_rival = Job::kSkips && guess < static_cast<uint32_t>(vocab_size);
    if (has_rival) rival = row.data[guess];

    Best<kType> best;
    if (count > 0) best.take(held, count, lane);
    trace.mark(Event::kReduced, now.row);
    const auto key_of_slice = [&] {
      uint64_t key = count > 0 ? best.key(first, row.head) : 0;
      const bool is_last = now.slice + 1 == static_cast<int>(slices.per_row.value);
      const int scalar = row.scalar(vocab_size, lane, now.slice == 0, is_last);
      if (scalar >= 0) {
        key = max(key, argmax_key(Element<kType>::value(row.data[scalar]), static_cast<uint32_t>(scalar)));
      }
      return warp_max(key);
    };

    uint64_t key;
    if constexpr (Job::kSkips) {
      const bool matters = __ballot_sync(kFullWarp, job.is_wanted(now.row)) != 0;
      while (true) {
        const unsigned needed = __ballot_sync(kFullWarp, is_wanted(k));  // bit i: unit k + i
        if ((needed & 1) != 0) break;
        // For the whole block: nobody has to look at the dead ones again.
        const unsigned from = k, dead = needed == 0 ? 32 : static_cast<unsigned>(__ffs(needed)) - 1;
        if (lane == 0) atomicMax(&next, from + dead);
        k = take();
        following = unit_of(slices, k);
        span = span_of(following);
        if (k - from < 32 && (needed >> (k - from) & 1) != 0) break;
      }
      load(span);
      trace.mark(Event::kAsked, following.row);
      key = key_of_slice();
      const uint64_t bar = has_rival ? argmax_key(Element<kType>::value(rival), guess) : 0;
      if (following.row != kNone) guess = job.guess(following.row);
      if (matters) job.report(now.row, key, bar);
    } else {
      load(span);
      trace.mark(Event::kAsked, following.row);
      key = key_of_slice();
      job.report(now.row, key);
    }
    trace.mark(Event::kReported, now.row);
    now = following;
  }
}

// What one word says after a join.
struct Joined {
  unsigned long long before, after;
};

// Called by lane 0 of a warp. A word holds the largest `high` so far above the sum of all `low` so far, `low_bits` of
// it. A larger `high` wipes out the sum; who brought it adds what was there to its own. So the sum may fall for a while
// but is never too large, and with the last addition both are complete: two atomics a part, none is tried twice, and
// all that is to be known is in one word, which needs no order with another. on_found(others): the largest `high`
// before this one.
template <typename OnFound>
__device__ __forceinline__ Joined join(unsigned long long* word, uint64_t high, unsigned long long low, int low_bits,
                                       OnFound on_found) {
  if (high != 0) {
    const unsigned long long mine = high << low_bits, others = atomicMax(word, mine);
    on_found(others >> low_bits);
    if (mine > others) low += others & ((1ull << low_bits) - 1);
  }
  const unsigned long long before = atomicAdd(word, low);
  return Joined{before, before + low};
}

__device__ __forceinline__ Joined join(unsigned long long* word, uint64_t high, unsigned long long low, int low_bits) {
  return join(word, high, low, low_bits, [](uint64_t) {});
}

// The join of a row's word, which is left as it is when it is complete. The second word counts the slices of rows of
// some millions of elements, the first one holds their argmax_key.
struct RowWord {
  unsigned long long* words;
  const Slices& slices;

  // The sum of the slices, one each, is all of them.
  __device__ __forceinline__ bool is_complete(unsigned long long word) const {
    return (word & ((1ull << slices.count_bits) - 1)) == slices.per_row.value;
  }

  __device__ __forceinline__ uint32_t index(unsigned long long word) const {
    return ~static_cast<uint32_t>(word >> slices.count_bits) & ((1u << (32 - slices.count_bits)) - 1);
  }

  // As the word holds it.
  __device__ __forceinline__ uint64_t high_of(uint64_t key) const {
    const int index_bits = 32 - slices.count_bits;
    const uint32_t low = ~argmax_index(key) & ((1u << index_bits) - 1);
    return static_cast<uint64_t>(argmax_order_key(key)) << index_bits | low;
  }

  // Called by lane 0 with a slice's argmax_key: true with the last one to arrive; `index` is the row's argmax then.
  // on_first(): this is the first one above `bar`.
  template <typename OnFirst>
  __device__ __forceinline__ bool add(uint64_t key, uint64_t bar, OnFirst on_first, uint32_t& row_index) const {
    if (slices.count_bits > 0) {
      const uint64_t high = high_of(key), bar_high = bar == 0 ? 0 : high_of(bar);
      const Joined joined = join(words, high, 1, slices.count_bits, [&](uint64_t others) {
        if (high > bar_high && others <= bar_high) on_first();
      });
      row_index = index(joined.after);
      return is_complete(joined.after);
    }
    const unsigned long long others = atomicMax(words, static_cast<unsigned long long>(key));
    if (key > bar && others <= bar) on_first();
    if (atomic_add_release(words + 1, 1) != slices.per_row.value - 1) return false;
    fence_device();
    row_index = argmax_index(__ldcg(words));
    return true;
  }

  // The argmax of a row that is known to be complete, though perhaps not seen to be so here yet.
  __device__ __forceinline__ uint32_t await() const {
    if (slices.count_bits > 0) {
      while (true) {
        const unsigned long long word = load_relaxed(words);
        if (is_complete(word)) return index(word);
      }
    }
    while (load_relaxed(words + 1) != slices.per_row.value) {
    }
    fence_device();
    return argmax_index(__ldcg(words));
  }

  __device__ __forceinline__ void clear() const { words[0] = words[1] = 0; }
};

// Called by a warp with the argmax_key of one slice of a row, the same in all lanes: true in all lanes with the last
// one to arrive, and `index` is the row's argmax.
template <typename OnFirst>
__device__ __forceinline__ bool add_to_row(const RowWord& row, uint64_t key, uint64_t bar, OnFirst on_first,
                                           uint32_t& index) {
  bool complete = false;
  index = 0;
  if (threadIdx.x % 32 == 0) complete = row.add(key, bar, on_first, index);
  complete = __shfl_sync(kFullWarp, complete, 0);
  index = __shfl_sync(kFullWarp, index, 0);
  return complete;
}

__device__ __forceinline__ bool add_to_row_and_clear(const RowWord& row, uint64_t key, uint32_t& index) {
  const bool complete = add_to_row(row, key, ~uint64_t{0}, [] {}, index);
  if (complete && threadIdx.x % 32 == 0) row.clear();
  return complete;
}

// Rows in the order of requests. A request's word: T - j and the target's token of the first row j that ends the
// prefix, above the number of rows.
template <LogitType kType>
struct ReadAll {
  static constexpr bool kSkips = false;
  static constexpr int kTokenBits = 31, kCountBits = 6;
  static_assert(kMaxBlockSize < 1 << kCountBits);
  const BlockParams& p;
  const Slices& slices;
  Trace& trace;

  __device__ __forceinline__ int request(int n) const {
    return static_cast<int>(slices.inner.divide(static_cast<uint32_t>(n)));
  }

  __device__ __forceinline__ Row<kType> row(int n) const {
    const int b = request(n);
    return Row<kType>(p.logits, b, n - b * p.block_size, p.vocab_size);
  }

  __device__ __forceinline__ void report(int n, uint64_t key) const {
    const int lane = threadIdx.x % 32, block_size = p.block_size, b = request(n), j = n - b * block_size;
    uint32_t index;
    if (!add_to_row_and_clear(RowWord{p.workspace.row(b, j), slices}, key, index)) return;
    trace.mark(Event::kRow, n);
    const Request request = load_request(p.candidates, p.prefix_lens, block_size, b, lane);
    const int64_t guess = __shfl_sync(kFullWarp, request.guess, j);
    const bool ends = j == block_size - 1 || static_cast<int64_t>(index) != guess;
    uint64_t first = ends ? static_cast<uint64_t>(block_size - j) << kTokenBits | index : 0;
    bool complete = false;
    if (lane == 0) {
      const Joined joined = join(p.workspace.state(b), first, 1, kCountBits);
      complete = static_cast<int>(joined.after & ((1 << kCountBits) - 1)) == block_size;
      first = joined.after >> kCountBits;
      if (complete) *p.workspace.state(b) = 0;
    }
    if (!__shfl_sync(kFullWarp, complete, 0)) return;
    first = __shfl_sync(kFullWarp, first, 0);
    const auto token = static_cast<int64_t>(first & ((1u << kTokenBits) - 1));
    const Accepted accepted{block_size - static_cast<int>(first >> kTokenBits), token};
    write_outputs(p.out, request, block_size, b, lane, accepted);
    trace.mark(Event::kRequest, n);
  }
};

template <LogitType kType>
__global__ void __launch_bounds__(kThreads, 1)
    verify_logits_kernel(const __grid_constant__ BlockParams p, const __grid_constant__ Slices slices) {
  Trace trace;
  trace.mark(Event::kStart);
  read_units<kType>(slices, p.vocab_size, ReadAll<kType>{p, slices, trace}, trace);
  trace.mark(Event::kEnd);
}

// ---- lazily ------------------------------------------------------------------------------------------------------

// What is known of a request's rows, in its word. Low half: bit j: row j is complete. High half: T - j of the first
// complete row j that ends the prefix (it mismatches, or is the last); 0: none.
struct State {
  static constexpr int kRowBits = 32;

  static __device__ __forceinline__ int end(unsigned long long state, int block_size) {
    return block_size - static_cast<int>(state >> kRowBits);
  }
  // All rows up to the one that ends the prefix are complete. From then on no other can take its place.
  static __device__ __forceinline__ bool is_decided(unsigned long long state, int block_size) {
    if (state >> kRowBits == 0) return false;
    const unsigned up_to_end = 2u * (1u << end(state, block_size)) - 1u;
    return (static_cast<unsigned>(state) & up_to_end) == up_to_end;
  }
};

// Row 0 of all requests, then row 1, and so on.
template <LogitType kType>
struct ReadNeeded {
  static constexpr bool kSkips = true;
  const BlockParams& p;
  const Slices& slices;
  uint32_t* heard;  // shared: known_end of the requests as they were when last looked at
  Trace& trace;

  __device__ __forceinline__ int position(int n) const {
    return static_cast<int>(slices.inner.divide(static_cast<uint32_t>(n)));
  }
  __device__ __forceinline__ int request(int n, int j) const { return n - j * static_cast<int>(slices.inner.value); }

  __device__ __forceinline__ Row<kType> row(int n) const {
    const int j = position(n);
    return Row<kType>(p.logits, request(n, j), j, p.vocab_size);
  }

  __device__ __forceinline__ bool is_wanted(int n) const {
    const int j = position(n);
    return load_relaxed_shared(heard + request(n, j)) <= static_cast<uint32_t>(p.block_size - j);
  }

  __device__ __forceinline__ void forget() const {
    for (int b = threadIdx.x; b < p.batch; b += kLazyThreads) heard[b] = 0;
  }

  // Called by a warp.
  __device__ __forceinline__ void listen() const {
    for (int b = threadIdx.x % 32; b < p.batch; b += 32) {
      store_relaxed_shared(heard + b, load_relaxed(p.workspace.known_end(b)));
    }
    pause(kListenPause);
  }

  // The lower half of the draft's token, any for the last row. With a token outside the vocabulary every element would
  // be proof of a mismatch, so it does no harm if its lower half is another's.
  __device__ __forceinline__ uint32_t guess(int n) const {
    const int j = position(n);
    const int64_t offset = request(n, j) * p.candidates.stride0 + min(j + 1, p.block_size - 1) * p.candidates.stride1;
    return static_cast<const uint32_t*>(p.candidates.data)[p.candidates.is_int64 ? 2 * offset : offset];
  }

  // `bar`: the key of the draft's token, which a larger one proves wrong.
  __device__ __forceinline__ void report(int n, uint64_t key, uint64_t bar) const {
    const int lane = threadIdx.x % 32, block_size = p.block_size, j = position(n), b = request(n, j);
    const auto end_here = [&] {
      if (j < block_size - 1) atomicMax(p.workspace.known_end(b), static_cast<uint32_t>(block_size - j));
    };
    uint32_t index;
    if (!add_to_row(RowWord{p.workspace.row(b, j), slices}, key, bar, end_here, index)) return;
    trace.mark(Event::kRow, n);
    const Request request = load_request(p.candidates, p.prefix_lens, block_size, b, lane);
    const int64_t guess = __shfl_sync(kFullWarp, request.guess, j);
    const bool ends = j == block_size - 1 || static_cast<int64_t>(index) != guess;
    int accept_len = -1;  // not decided, or not by this
    uint32_t bonus = 0;
    if (lane == 0) {
      const uint64_t end = ends ? static_cast<uint64_t>(block_size - j) : 0;
      const Joined joined = join(p.workspace.state(b), end, 1ull << j, State::kRowBits);
      if (!State::is_decided(joined.before, block_size) && State::is_decided(joined.after, block_size)) {
        accept_len = State::end(joined.after, block_size);
        bonus = accept_len == j ? index : RowWord{p.workspace.row(b, accept_len), slices}.await();
      }
    }
    accept_len = __shfl_sync(kFullWarp, accept_len, 0);
    if (accept_len < 0) return;
    bonus = __shfl_sync(kFullWarp, bonus, 0);
    write_outputs(p.out, request, block_size, b, lane, Accepted{accept_len, bonus});
    trace.mark(Event::kRequest, n);
  }
};

template <LogitType kType>
__global__ void __launch_bounds__(kLazyThreads, 1)
    verify_lazy_kernel(const __grid_constant__ BlockParams p, const __grid_constant__ Slices slices) {
  extern __shared__ uint32_t heard[];
  __shared__ bool last;
  Trace trace;
  trace.mark(Event::kStart);
  read_units<kType>(slices, p.vocab_size, ReadNeeded<kType>{p, slices, heard, trace}, trace);
  __syncthreads();
  if (threadIdx.x == 0) last = add_acquire_release(p.workspace.blocks_left(), 1) == gridDim.x - 1;
  __syncthreads();
  if (last) {
    const int64_t words = Workspace::size(p.batch, p.block_size);
    for (int64_t i = threadIdx.x; i < words; i += kLazyThreads) p.workspace.words[i] = 0;
  }
  trace.mark(Event::kEnd);
}

// ---- vocabulary shards -------------------------------------------------------------------------------------------

template <LogitType kType>
struct ReadShard {
  static constexpr bool kSkips = false;
  const ArgmaxParams& p;
  const Slices& slices;

  __device__ __forceinline__ Row<kType> row(int n) const { return Row<kType>(p.logits, n, 0, p.vocab_size); }

  __device__ __forceinline__ void report(int n, uint64_t key) const {
    uint32_t index;
    if (!add_to_row_and_clear(RowWord{p.workspace.row(n, 0), slices}, key, index) || threadIdx.x % 32 != 0) return;
    p.ids[n] = p.vocab_start + index;
    p.values[n] = Element<kType>::value(row(n).data[index]);
  }
};

template <LogitType kType>
__global__ void __launch_bounds__(kThreads, 1)
    argmax_logits_kernel(const __grid_constant__ ArgmaxParams p, const __grid_constant__ Slices slices) {
  Trace trace;
  read_units<kType>(slices, p.vocab_size, ReadShard<kType>{p, slices}, trace);
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

// How `rows` rows of `vocab_size` elements, `per_vector` of them in 16 bytes, are cut for `sms` blocks.
Slices cut_rows(int64_t rows, int64_t inner, int64_t vocab_size, int64_t per_vector, int64_t sms) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  int index_bits = 0;
  while ((vocab_size - 1) >> index_bits != 0) ++index_bits;
  const int64_t most_counted = (int64_t{1} << (32 - index_bits)) - 1;
  const int64_t vectors_of_row = std::max<int64_t>(vocab_size / per_vector, 1);
  const int64_t fewest = ceil_div(vectors_of_row, kSliceBytes / 16);
  int64_t count = fewest;  // fits, as rows * count does in 31 bits: kMaxTiles
  for (int64_t even = fewest; even <= 2 * fewest && even <= most_counted && rows * even <= kMaxTiles; ++even) {
    if (sms % even != 0 && even % sms != 0) continue;
    count = even;
    break;
  }
  const int64_t vectors = ceil_div(ceil_div(vectors_of_row, count), 8) * 8;  // lines of 128 bytes
  count = ceil_div(vectors_of_row, vectors);
  return Slices{static_cast<uint32_t>(rows * count), static_cast<int>(vectors), Divisor(count), Divisor(inner),
                count <= most_counted ? 32 - index_bits : 0};
}

// Launches kernel(params, slices) on `rows` rows of p.logits.
template <LogitType kType, typename Params>
void launch_rows(void (*kernel)(Params, Slices), const Params& p, int64_t rows, int64_t inner, const char* op,
                 cudaStream_t stream, int threads = kThreads, size_t shared_bytes = 0) {
  constexpr int kPerVector = Element<kType>::kPerVector, kBytes = static_cast<int>(sizeof(uint4));
  static_assert(kSliceBytes / kBytes * kPerVector >= kTileElements);
  const int sms = sm_count(op);
  const Slices slices = cut_rows(rows, inner, p.vocab_size, kPerVector, sms);
  kernel<<<std::min(slices.units, static_cast<uint32_t>(sms)), threads, shared_bytes, stream>>>(p, slices);
}

template <LogitType kType>
void launch_logits(const BlockParams& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.block_size;
  const int64_t bytes = rows * p.vocab_size * static_cast<int64_t>(sizeof(typename Element<kType>::Bits));
  const bool lazy = p.lazy == Lazy::kOn || (p.lazy == Lazy::kAuto && bytes >= kLazyBytes);
  if (lazy && p.batch <= kMostHeard) {
    launch_rows<kType>(verify_lazy_kernel<kType>, p, rows, p.batch, "verify_block", stream, kLazyThreads,
                       static_cast<size_t>(p.batch) * sizeof(uint32_t));
  } else {
    launch_rows<kType>(verify_logits_kernel<kType>, p, rows, p.block_size, "verify_block", stream);
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
    launch_rows<kType>(argmax_logits_kernel<kType>, p, p.rows, 1, "argmax_logits", stream);
  });
  cuda_check_launch("argmax_logits");
}

void launch_merge_vocab_shards(const MergeParams& p, cudaStream_t stream) {
  merge_vocab_shards_kernel<<<blocks_for(p.rows, kMergeThreads), kMergeThreads, 0, stream>>>(p);
  cuda_check_launch("merge_vocab_shards");
}

}  // namespace dflash::verify

#ifdef DFLASH_TRACE
static_assert(dflash::verify::kWarps <= dflash::verify::kTracedWarps);

// Moves the stamps to `host`, as many bytes as there are (0: too few given), and forgets them.
extern "C" __attribute__((visibility("default"))) size_t dflash_verify_trace(void* host, size_t bytes) {
  void* stamps = nullptr;
  constexpr size_t kBytes = sizeof(dflash::verify::trace_stamps);
  if (bytes < kBytes || cudaGetSymbolAddress(&stamps, dflash::verify::trace_stamps) != cudaSuccess) return 0;
  if (cudaMemcpy(host, stamps, kBytes, cudaMemcpyDeviceToHost) != cudaSuccess) return 0;
  return cudaMemset(stamps, 0, kBytes) == cudaSuccess ? kBytes : 0;
}
#endif

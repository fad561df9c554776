// Block preparation and the device page allocator.
//
// prepare_block: one thread for each of the B*T tokens.
//
// reserve / release / reserve_and_prepare: one launch of one thread-block cluster, 1..8 CTAs of 512 threads.
//
// 1. look. Everything whose address is an argument is loaded at entry, all at once: the ring, row and length of this
//    thread's request, row and length of its token. The second trip to memory follows: what the request's row holds,
//    the table entry under the token, the free page of the first entry that this thread will move. Ids and positions
//    are stored meanwhile.
// 2. plan. Every CTA works out the same plan for the whole batch: a block-wide scan of the page counts gives every
//    request its place in the ring. That costs a CTA no more than its own share would, and spares a second trip through
//    the cluster. One barrier: shared memory holds the scan of each warp's requests and the sums of the warps, and who
//    needs a place adds the two.
// 3. arrive on the cluster barrier: this CTA has read all of alloc_lens and ring that it will ever read.
// 4. move. The table entries of all pages that change hands are one flat index range dealt over all threads of the
//    cluster, so that one long row does not hold up the others. Who writes a fresh entry has its slot in hand, and
//    stores the block's slot too; the token's own thread stores a slot that was in the table before, or the dummy. So
//    no token waits for a free page, wherever the scan puts it.
// 5. wait on the barrier: now everybody has read, so alloc_lens and ring may be written, by the first CTA.
//
// A launch for which the ring has too few pages (or, giving back, too little room: only a broken state can cause that)
// moves nothing; every CTA sees the same total and so decides alike.
//
// Two builds of each kernel: a decode step has at most 512 requests, one a thread, whose pages are counted in 32 bits;
// whatever is larger has a run of requests a thread and 64-bit sums.
//
// Shared memory, sized by the batch: what is known of a request (16 bytes) and the scan (4), 5 KB at B 256.
//
// Why a cluster: one CTA needs about 1 us only to store the 98 KB of outputs of B 256, T 16. CTAs without a barrier
// need a ticket in memory, an atomic's round trip before the last of them may commit. The cluster barrier is in
// hardware, and between its two halves lies the whole of step 4.
//
// Floor: latency. Two dependent trips to memory (row index; alloc_lens, free page or table entry) and a launch; the
// bytes of B 256, T 16 (8 KB in, 98 KB + 16 KB out) take 0.04 us at 3 TB/s. A release has a third: the page under the
// entry that is cleared.
#include <cuda_runtime.h>

#include <type_traits>

#include "common/cuda_check.h"
#include "common/ptx.cuh"
#include "smxx/alloc/launch.h"

namespace dflash::alloc {
namespace {

constexpr int kPrepareThreads = 128;
constexpr int kPageThreads = 512;
constexpr int kWarps = kPageThreads / 32;
constexpr int kMaxCluster = 8;  // the largest size every device can schedule

// An entry of an index vector as it was loaded: without a branch on the type, so that the loads of several vectors are
// in flight together, and nothing waits before value().
struct Index {
  uint32_t low = 0;
  uint32_t high = 0;
  bool is_int64 = false;

  __device__ __forceinline__ int64_t value() const {
    const int64_t narrow = static_cast<int32_t>(low);
    return is_int64 ? static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low) : narrow;
  }
};

__device__ __forceinline__ Index load_index(const IntView& view, unsigned i) {
  const auto* words = static_cast<const uint32_t*>(view.data) + ((view.stride0 * i) << (view.is_int64 ? 1 : 0));
  Index index;
  index.is_int64 = view.is_int64;
  index.low = words[0];
  index.high = words[view.is_int64 ? 1 : 0];
  return index;
}

__global__ void __launch_bounds__(kPrepareThreads) prepare_block_kernel(const __grid_constant__ BlockParams p) {
  const unsigned i = blockIdx.x * kPrepareThreads + threadIdx.x;
  if (i >= static_cast<unsigned>(p.batch) * p.block_size) return;
  const unsigned b = p.per_block.divide(i);
  const unsigned j = i - b * p.block_size;
  const Index length = load_index(p.prefix_lens, b);
  const Index row_index = load_index(p.req_pool_indices, b);
  const Index anchor = load_index(p.anchor_ids, b);  // by all, rather than in a branch that splits the loads
  const int64_t position = length.value() + j;
  const int64_t row = row_index.value();
  const bool mapped = position >= 0 && position < p.width && row >= 0 && row < p.rows;
  const int64_t slot = mapped ? p.req_to_token.at(row, position) : 0;
  p.block_ids[i] = j == 0 ? anchor.value() : p.mask_token_id;
  p.positions[i] = position;
  p.slots[i] = slot;
}

// What the plan knows of a request.
struct alignas(16) Request {
  int32_t row = -1;   // -1: takes no part
  int32_t first = 0;  // pages first .. first + count of the row move
  int32_t count = 0;
  int32_t prefix = 0;  // committed tokens of the block, clamped to what moves could touch
};
constexpr size_t kRequestBytes = sizeof(Request) + sizeof(int32_t);  // and its place in the scan

// What one barrier makes known to the CTA.
template <typename Sum>
struct Books {
  alignas(16) Sum sums[kWarps];  // pages that the requests of a warp move
  int64_t head;                  // of the ring, as the launch found it
  int64_t count;
};

// Row and length of a request or token, on their way.
struct Loads {
  Index row, length, active;
};

__device__ __forceinline__ Loads load_request(const PageParams& p, unsigned b) {
  Loads loads;
  loads.row = load_index(p.req_pool_indices, b);
  loads.length = load_index(p.lens, b);
  loads.active.low = 1;
  if (p.active.data != nullptr) loads.active = load_index(p.active, b);
  return loads;
}

// As row_of.
__device__ __forceinline__ int32_t row_of(const PageParams& p, const Loads& loads) {
  const int64_t row = loads.row.value();
  return loads.active.value() != 0 && row >= 0 && row < p.rows ? static_cast<int32_t>(row) : -1;
}

template <bool kReserve>
__device__ __forceinline__ Request plan_request(const PageParams& p, int32_t row, int64_t length, int32_t alloc_len) {
  Request request;
  request.row = row;
  if (row < 0) return request;
  const PageMove move = page_move<kReserve>(held_pages(p, alloc_len), asked_pages(p, length));
  request.first = static_cast<int32_t>(move.first);
  request.count = static_cast<int32_t>(move.count);
  request.prefix = static_cast<int32_t>(clamp(length, -kMaxBlockSize, p.width));
  return request;
}

// Entry `index` of the ring counted from `from`; both are below 2 P.
__device__ __forceinline__ int64_t wrap(int64_t from, int64_t index, int64_t num_pages) {
  const int64_t place = from + index;
  return place < num_pages ? place : place - num_pages;
}

// The free page for entry `e` of all that move. Asked for before it is known how many move: beyond the ring, anything.
__device__ __forceinline__ int32_t load_free_page(const PageParams& p, int64_t head, unsigned e) {
  const int64_t place = wrap(head, p.per_page.divide(e), p.num_pages);
  return place >= 0 && place < p.num_pages ? p.free_pages[place] : 0;
}

// Loops are not unrolled (`unroll 1`) where a decode step goes round once: the kernel runs once a step, with its code
// out of the instruction cache, and each unrolled copy is more of it to fetch.

// The request that moves page `index` of the launch, and the page's place among those that this request moves.
struct Mover {
  int request;
  int32_t nth;
};

template <typename Sum>
__device__ __forceinline__ Mover find_mover(const Books<Sum>& books, const int32_t* before, int batch, int run,
                                            int32_t index) {
  // The warp that planned it, then by halves among its requests.
  const int per_warp = 32 * run;
  Sum sum = 0;
  Sum offset = 0;
  int warp = 0;
#pragma unroll 1
  for (int start = 0; start * per_warp < batch; start += 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (sum <= index) {
        warp = start + k;
        offset = sum;
      }
      sum += books.sums[start + k];
    }
  }
  index -= static_cast<int32_t>(offset);
  int low = warp * per_warp;
  int high = min(low + per_warp, batch);
#pragma unroll 1
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (before[middle] <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return {low, index - before[low]};
}

// Token i of the batch, loaded as far as it can be without the plan.
struct Token {
  unsigned b, j;
  int64_t position;
  bool mapped = false;  // within the table
  int32_t entry = 0;    // of the table
};

__device__ __forceinline__ Token load_token(const PageParams& p, const BlockParams& block, unsigned i, unsigned b,
                                            const Loads& loads) {
  Token token;
  token.b = b;
  token.j = i - b * block.block_size;
  token.position = loads.length.value() + token.j;
  const int32_t row = row_of(p, loads);
  token.mapped = row >= 0 && token.position >= 0 && token.position < p.width;
  // An entry that this launch writes may be read before or after: it is not used then.
  if (token.mapped) token.entry = p.req_to_token[row * p.req_to_token_stride + token.position];
  return token;
}

__device__ __forceinline__ void store_id(const BlockParams& block, unsigned i, const Token& token,
                                         const Index& anchor) {
  block.block_ids[i] = token.j == 0 ? anchor.value() : block.mask_token_id;
  block.positions[i] = token.position;
}

// The slot, unless the thread that writes the table entry stores it.
__device__ __forceinline__ void store_slot(const PageParams& p, const BlockParams& block, unsigned i,
                                           const Token& token, const Request& request, bool refused) {
  const auto page = static_cast<int32_t>(p.per_page.divide(static_cast<uint32_t>(token.position)));
  const bool held = token.mapped && page < request.first;
  const bool fresh = token.mapped && !held && !refused && page - request.first < request.count;
  if (!fresh) block.slots[i] = held ? token.entry : 0;
}

template <bool kReserve>
__device__ __forceinline__ void commit(const PageParams& p, const Request& request) {
  if (request.count == 0) return;
  p.alloc_lens[request.row] = (request.first + (kReserve ? request.count : 0)) * p.page_size;
}

// Grid = one cluster. Barriers: __syncthreads once; the cluster barrier once, by all threads. kOneEach: at most one
// request a thread, and the batch cannot ask for 2^31 pages.
template <bool kReserve, bool kPrepare, bool kOneEach>
__device__ __forceinline__ void move_pages(const PageParams& p, const BlockParams& block) {
  static_assert(kReserve || !kPrepare, "a block is prepared with its reservation");
  using Sum = std::conditional_t<kOneEach, int32_t, int64_t>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Books<Sum> books;
  const unsigned thread = blockIdx.x * kPageThreads + threadIdx.x;
  const unsigned threads = gridDim.x * kPageThreads;
  const int batch = static_cast<int>(p.batch);
  auto* const requests = reinterpret_cast<Request*>(memory);                          // [B]
  auto* const before = reinterpret_cast<int32_t*>(memory + batch * sizeof(Request));  // [B]: pages of earlier requests
                                                                                      // of the same warp
  const int run = kOneEach ? 1 : (batch + kPageThreads - 1) / kPageThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * run, batch);
  const int end = min(begin + run, batch);

  // The first trip.
  int64_t head = kReserve || threadIdx.x == 0 ? p.ring[kHead] : 0;
  int64_t count = threadIdx.x == 0 ? p.ring[kCount] : 0;
  const int64_t missing = thread == 0 ? p.ring[kMissing] : 0;
  const int64_t calls = thread == 0 ? p.ring[kCalls] : 0;
  // By all threads, clamped: in a branch, the compiler lets these loads wait for the ring's.
  Loads own;
  if (kOneEach) own = load_request(p, min(begin, batch - 1));
  const unsigned tokens = kPrepare ? static_cast<unsigned>(batch * block.block_size) : 0;
  const unsigned token_request = kPrepare ? block.per_block.divide(min(thread, tokens - 1)) : 0;
  Loads token_loads;
  Index anchor;
  if (kPrepare) {
    token_loads = load_request(p, token_request);
    anchor = load_index(block.anchor_ids, token_request);
  }

  // The second trip. Without the line below the compiler puts the free page's load, and so the wait for the ring's
  // head, before the other loads of the first.
  __syncwarp();
  int32_t row = -1;
  int32_t alloc_len = 0;
  if (kOneEach && begin < end) {
    row = row_of(p, own);
    if (row >= 0) alloc_len = p.alloc_lens[row];
  }
  int32_t page = kReserve ? load_free_page(p, head, thread) : 0;
  Token token;
  if (kPrepare && thread < tokens) {
    token = load_token(p, block, thread, token_request, token_loads);
    store_id(block, thread, token, anchor);
  }

  // The plan. Not only the pages that this thread found, but all of alloc_lens and ring that it read, for itself or for
  // the others, is in shared memory or has been used for an address before the barrier.
  Request request;
  Sum mine = 0;
  if constexpr (kOneEach) {
    if (begin < end) {
      request = plan_request<kReserve>(p, row, own.length.value(), alloc_len);
      requests[begin] = request;
      mine = request.count;
    }
  } else {
#pragma unroll 2
    for (int b = begin; b < end; ++b) {
      const Loads loads = load_request(p, b);
      row = row_of(p, loads);
      const Request planned = plan_request<kReserve>(p, row, loads.length.value(), row < 0 ? 0 : p.alloc_lens[row]);
      requests[b] = planned;
      mine += planned.count;
    }
  }
  const int lane = threadIdx.x % 32;
  Sum sum = mine;  // inclusive over the warp
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Sum other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) books.sums[threadIdx.x / 32] = sum;
  Sum offset = sum - mine;
#pragma unroll 1
  for (int b = begin; b < end; ++b) {
    before[b] = static_cast<int32_t>(offset);
    if (!kOneEach) offset += requests[b].count;
  }
  if (threadIdx.x == 0) {
    books.head = head;
    books.count = count;
  }
  __syncthreads();
  // Relaxed, which spares a fence of some hundred cycles: no CTA reads what another writes. Only this CTA's reads must
  // be over, and they are: see above.
  cluster_arrive_relaxed();
  if (!kReserve) head = books.head;
  count = books.count;
  Sum total = 0;
#pragma unroll 1
  for (int start = 0; start * 32 * run < batch; start += 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k) total += books.sums[start + k];
  }
  const int64_t available = kReserve ? count : p.num_pages - count;
  const bool refused = total > available;

  if constexpr (kPrepare) {
    if (thread < tokens) store_slot(p, block, thread, token, requests[token_request], refused);
#pragma unroll 1
    for (unsigned i = thread + threads; i < tokens; i += threads) {
      const unsigned b = block.per_block.divide(i);
      const Token later = load_token(p, block, i, b, load_request(p, b));
      store_id(block, i, later, load_index(block.anchor_ids, b));
      store_slot(p, block, i, later, requests[b], refused);
    }
  }

  // At most P pages move and P * page_size <= 2^31 (checked): 32 bits are enough.
  const unsigned page_size = p.page_size;
  const unsigned entries = refused ? 0 : static_cast<unsigned>(total) * page_size;
  const int64_t tail = wrap(head, count, p.num_pages);
#pragma unroll 1
  for (unsigned e = thread; e < entries;) {
    const auto index = static_cast<int32_t>(p.per_page.divide(e));
    const auto within = static_cast<int32_t>(e - index * page_size);
    const Mover mover = find_mover(books, before, batch, run, index);
    const Request& moving = requests[mover.request];
    const int64_t place = static_cast<int64_t>(moving.first + mover.nth) * page_size + within;
    if (place < p.width) {  // the last page of a row may reach beyond the table
      int32_t* entry = p.req_to_token + moving.row * p.req_to_token_stride + place;
      if (kReserve) {
        const int32_t slot = page * p.page_size + within;
        *entry = slot;
        if constexpr (kPrepare) {
          const auto j =
              static_cast<uint32_t>(place) - static_cast<uint32_t>(moving.prefix);  // wraps: not of the block
          const auto block_size = static_cast<uint32_t>(block.block_size);
          if (j < block_size) block.slots[mover.request * block_size + j] = slot;
        }
      } else {
        // The page's id is its first entry's, which no other thread touches.
        if (within == 0) p.free_pages[wrap(tail, index, p.num_pages)] = *entry / p.page_size;
        *entry = 0;
      }
    }
    e += threads;
    if (kReserve && e < entries) page = load_free_page(p, head, e);
  }

  cluster_wait();
  if (blockIdx.x == 0 && !refused) {
    if constexpr (kOneEach) {
      commit<kReserve>(p, request);
    } else {
#pragma unroll 1
      for (int b = begin; b < end; ++b) commit<kReserve>(p, requests[b]);
    }
  }
  if (thread == 0) {
    p.ring[kCalls] = calls + 1;
    if (refused) {
      const int64_t lacking = total - available;
      p.ring[kMissing] = lacking > missing ? lacking : missing;
    } else {
      if (kReserve) p.ring[kHead] = wrap(head, total, p.num_pages);
      p.ring[kCount] = kReserve ? count - total : count + total;
    }
  }
}

template <bool kOneEach>
__global__ void __launch_bounds__(kPageThreads, 1) reserve_kv_slots_kernel(const __grid_constant__ PageParams p) {
  move_pages<true, false, kOneEach>(p, BlockParams{});
}

template <bool kOneEach>
__global__ void __launch_bounds__(kPageThreads, 1) release_kv_slots_kernel(const __grid_constant__ PageParams p) {
  move_pages<false, false, kOneEach>(p, BlockParams{});
}

template <bool kOneEach>
__global__ void __launch_bounds__(kPageThreads, 1)
    reserve_and_prepare_block_kernel(const __grid_constant__ PageParams p, const __grid_constant__ BlockParams block) {
  move_pages<true, true, kOneEach>(p, block);
}

// CTAs for so many tokens: enough that a thread has one, as a power of two.
unsigned cluster_size(int64_t tokens) {
  unsigned size = 1;
  while (size < kMaxCluster && static_cast<int64_t>(size) * kPageThreads < tokens) size *= 2;
  return size;
}

// One request a thread, and no batch of rows of this width can ask for 2^31 pages.
bool is_one_each(const PageParams& p) {
  return p.batch <= kPageThreads && p.batch * pages_of(p, p.width) < (1ll << 31);
}

template <typename... Params>
void launch_cluster(const char* op, void (*kernel)(PageParams, Params...), int64_t tokens, cudaStream_t stream,
                    const PageParams& p, const Params&... params) {
  const size_t bytes = p.batch * kRequestBytes;
  static_assert(kPageThreads * kRequestBytes + sizeof(Books<int32_t>) <= 48 * 1024, "no leave to ask for");
  static_assert(kMaxBatch * kRequestBytes + sizeof(Books<int64_t>) <= 232448, "shared memory of a CTA");
  if (p.batch > kPageThreads) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxBatch * kRequestBytes),
               op);
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster_size(tokens);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster.val.clusterDim.x);
  config.blockDim = dim3(kPageThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, p, params...), op);
}

// Table entries that a request of a decode step moves, about: sizes the cluster where no block tells.
constexpr int64_t kTypicalEntries = 16;

}  // namespace

void launch_prepare_block(const BlockParams& params, cudaStream_t stream) {
  const int64_t tokens = params.batch * params.block_size;
  const auto blocks = static_cast<unsigned>((tokens + kPrepareThreads - 1) / kPrepareThreads);
  prepare_block_kernel<<<blocks, kPrepareThreads, 0, stream>>>(params);
  cuda_check_launch("prepare_block");
}

void launch_reserve_kv_slots(const PageParams& params, cudaStream_t stream) {
  const auto kernel = is_one_each(params) ? reserve_kv_slots_kernel<true> : reserve_kv_slots_kernel<false>;
  launch_cluster("reserve_kv_slots", kernel, params.batch * kTypicalEntries, stream, params);
}

void launch_release_kv_slots(const PageParams& params, cudaStream_t stream) {
  const auto kernel = is_one_each(params) ? release_kv_slots_kernel<true> : release_kv_slots_kernel<false>;
  launch_cluster("release_kv_slots", kernel, params.batch * kTypicalEntries, stream, params);
}

void launch_reserve_and_prepare_block(const PageParams& params, const BlockParams& block, cudaStream_t stream) {
  const auto kernel =
      is_one_each(params) ? reserve_and_prepare_block_kernel<true> : reserve_and_prepare_block_kernel<false>;
  launch_cluster("reserve_and_prepare_block", kernel, params.batch * block.block_size, stream, params, block);
}

}  // namespace dflash::alloc

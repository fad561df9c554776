// Block preparation and the device page allocator.
//
// prepare_block: one thread for each of the B*T tokens.
//
// reserve / release / reserve_and_prepare: one launch of one thread-block cluster, 1..8 CTAs of 512 threads.
//
// 1. plan. Every CTA works out the same plan for the whole batch: thread t takes requests t, t + 512, ..., looks up
// what
//    the row holds and what is asked, and a block-wide scan of the page counts gives every request its place in the
//    ring. That costs a CTA no more than its own share would (at B <= 512 a thread has one request), and spares a
//    second trip through the cluster.
// 2. arrive on the cluster barrier: this CTA has read all of alloc_lens and ring that it will ever read.
// 3. move. The table entries of all pages that change hands, and ids, positions and slots of B*T tokens: two flat index
//    ranges dealt over all threads of the cluster, so that one long row does not hold up the others. A thread's first
//    slot is loaded before the table is written and stored after it: one trip to memory instead of two.
// 4. wait on the barrier: now everybody has read, so alloc_lens and ring may be written.
//
// A launch for which the ring has too few pages (or, giving back, too little room: only a broken state can cause that)
// moves nothing; every CTA sees the same total and so decides alike.
//
// Why a cluster: one CTA needs about 1 us only to store the 98 KB of outputs of B 256, T 16. CTAs without a barrier
// need a ticket in memory, an atomic's round trip before the last of them may commit. The cluster barrier is in
// hardware, and between its two halves lies the whole of step 3.
//
// Floor: latency. Three dependent trips to memory (row index; alloc_lens of the row; free page or table entry) and a
// launch; the bytes of B 256, T 16 (8 KB in, 98 KB + 16 KB out) take 0.04 us at 3 TB/s.
#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "common/ptx.cuh"
#include "smxx/alloc/launch.h"

namespace dflash::alloc {
namespace {

constexpr int kPrepareThreads = 128;
constexpr int kPageThreads = 512;
constexpr int kWarps = kPageThreads / 32;
constexpr int kMaxCluster = 8;  // the largest size every device can schedule
constexpr int kBatched = 2;     // requests whose loads a thread has in flight together

static_assert(kMaxBatch <= kPageThreads * kMaxCluster, "a thread of the cluster commits one request");

// [b, j] of the block, given the slot.
__device__ __forceinline__ void store_token(const BlockParams& p, unsigned i, unsigned b, unsigned j, int64_t position,
                                            int64_t slot) {
  p.block_ids[i] = j == 0 ? p.anchor_ids.at(b) : p.mask_token_id;
  p.positions[i] = position;
  p.slots[i] = slot;
}

__global__ void __launch_bounds__(kPrepareThreads) prepare_block_kernel(const __grid_constant__ BlockParams p) {
  const unsigned i = blockIdx.x * kPrepareThreads + threadIdx.x;
  if (i >= p.batch * p.block_size) return;
  const unsigned b = i / static_cast<unsigned>(p.block_size);
  const unsigned j = i - b * p.block_size;
  const int64_t position = p.prefix_lens.at(b) + j;
  const int64_t row = p.req_pool_indices.at(b);
  const bool mapped = position >= 0 && position < p.width && row >= 0 && row < p.rows;
  store_token(p, i, b, j, position, mapped ? p.req_to_token.at(row, position) : 0);
}

struct Plan {
  int32_t before[kMaxBatch + 1];  // pages moved by the requests before this one; [B]: by all
  int32_t first[kMaxBatch];       // first page of the row that moves
  int64_t warp_sums[kWarps];
  int64_t head;  // of the ring, as the launch found it
  int64_t count;
};
static_assert(sizeof(Plan) <= 48 * 1024, "static shared memory");

// Loops are not unrolled (`unroll 1`) where a decode step goes round once: the kernel runs once a step, with its code
// out of the instruction cache, and each unrolled copy is more of it to fetch.
//
// Fills the plan; returns the pages moved by the whole batch, to every thread. `before` is only meaningful if that
// number fits the ring. All of alloc_lens and ring that this CTA reads, but for thread 0's own fields, was read and
// went through shared memory before the first barrier.
template <bool kReserve>
__device__ int64_t make_plan(const PageParams& p, Plan& plan) {
  const int batch = static_cast<int>(p.batch);
  const int64_t head = threadIdx.x == 0 ? p.ring[kHead] : 0;
  const int64_t count = threadIdx.x == 0 ? p.ring[kCount] : 0;
#pragma unroll 1
  for (int start = threadIdx.x; start < batch; start += kPageThreads * kBatched) {
    int64_t row[kBatched];
    int64_t asked[kBatched];
#pragma unroll
    for (int k = 0; k < kBatched; ++k) {
      const int b = start + k * kPageThreads;
      row[k] = b < batch ? row_of(p, b) : -1;
      asked[k] = b < batch ? asked_pages(p, b) : 0;
    }
    int32_t alloc_len[kBatched];
#pragma unroll
    for (int k = 0; k < kBatched; ++k) alloc_len[k] = row[k] < 0 ? 0 : p.alloc_lens[row[k]];
#pragma unroll
    for (int k = 0; k < kBatched; ++k) {
      const int b = start + k * kPageThreads;
      if (b >= batch) break;
      const PageMove move = page_move<kReserve>(held_pages(p, alloc_len[k]), asked[k]);
      plan.before[b] = row[k] < 0 ? 0 : static_cast<int32_t>(move.count);
      plan.first[b] = static_cast<int32_t>(move.first);
    }
  }
  if (threadIdx.x == 0) {
    plan.head = head;
    plan.count = count;
  }
  __syncthreads();

  // Exclusive scan of `before` in place: a run of requests a thread, then across the warp, then across warps.
  const int run = (batch + kPageThreads - 1) / kPageThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * run, batch);
  const int end = min(begin + run, batch);
  int64_t mine = 0;
#pragma unroll 1
  for (int b = begin; b < end; ++b) mine += plan.before[b];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int64_t sum = mine;  // inclusive over the warp
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) plan.warp_sums[warp] = sum;
  __syncthreads();
  int64_t total = 0;
  int64_t offset = sum - mine;  // exclusive over the CTA
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int64_t value = plan.warp_sums[w];
    offset += w < warp ? value : 0;
    total += value;
  }
#pragma unroll 1
  for (int b = begin; b < end; ++b) {
    const int32_t count = plan.before[b];
    plan.before[b] = static_cast<int32_t>(offset);
    offset += count;
  }
  if (threadIdx.x == 0) plan.before[batch] = static_cast<int32_t>(total);
  __syncthreads();
  return total;
}

// The request that moves page `index` of the launch: before[b] <= index < before[b + 1].
__device__ __forceinline__ int request_of(const Plan& plan, int batch, int32_t index) {
  int low = 0;
  int high = batch;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (plan.before[middle] <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Entry `index` of the ring counted from `from`; both are below 2 P.
__device__ __forceinline__ int64_t wrap(int64_t from, int64_t index, int64_t num_pages) {
  const int64_t place = from + index;
  return place < num_pages ? place : place - num_pages;
}

// Token i of the batch, and where its slot is found before the table is written.
struct Token {
  unsigned i, b, j;
  int64_t position;
  const int32_t* entry = nullptr;  // a free page or a table entry; nullptr: unmapped
  int32_t scale = 1;               // slot = *entry * scale + offset
  int32_t offset = 0;
};

__device__ __forceinline__ Token find_token(const PageParams& p, const BlockParams& block, const Plan& plan,
                                            int64_t head, bool refused, unsigned i) {
  Token token;
  token.i = i;
  token.b = i / static_cast<unsigned>(block.block_size);
  token.j = i - token.b * block.block_size;
  token.position = block.prefix_lens.at(token.b) + token.j;
  const int64_t row = row_of(p, token.b);
  if (row < 0 || token.position < 0 || token.position >= p.width) return token;
  const int page = static_cast<unsigned>(token.position) / static_cast<unsigned>(p.page_size);
  const int fresh = page - plan.first[token.b];  // plan.first: the pages that the row held before
  if (fresh < 0) {
    token.entry = p.req_to_token + row * p.req_to_token_stride + token.position;
  } else if (!refused && fresh < plan.before[token.b + 1] - plan.before[token.b]) {
    token.entry = p.free_pages + wrap(head, plan.before[token.b] + fresh, p.num_pages);
    token.scale = p.page_size;
    token.offset = static_cast<int>(token.position) - page * p.page_size;
  }
  return token;
}

__device__ __forceinline__ int32_t load_entry(const Token& token) { return token.entry == nullptr ? 0 : *token.entry; }

__device__ __forceinline__ void store_found(const BlockParams& block, const Token& token, int32_t entry) {
  store_token(block, token.i, token.b, token.j, token.position,
              static_cast<int64_t>(entry) * token.scale + token.offset);
}

// Grid = one cluster. Barriers: __syncthreads inside make_plan only; the cluster barrier once, by all threads.
template <bool kReserve, bool kPrepare>
__device__ __forceinline__ void move_pages(const PageParams& p, const BlockParams& block) {
  static_assert(kReserve || !kPrepare, "a block is prepared with its reservation");
  __shared__ Plan plan;
  const unsigned thread = blockIdx.x * kPageThreads + threadIdx.x;
  const unsigned threads = gridDim.x * kPageThreads;
  const int batch = static_cast<int>(p.batch);
  const int64_t calls = thread == 0 ? p.ring[kCalls] : 0;
  const int64_t missing = thread == 0 ? p.ring[kMissing] : 0;
  const int64_t total = make_plan<kReserve>(p, plan);
  const int64_t head = plan.head;
  const int64_t count = plan.count;
  const int64_t available = kReserve ? count : p.num_pages - count;
  const bool refused = total > available;
  // Relaxed, which spares a fence of some hundred cycles: no CTA reads what another writes. Only this CTA's reads must
  // be over, and they are: their values have been in shared memory since make_plan's first barrier.
  cluster_arrive_relaxed();

  // The first token of this thread: loaded here, stored after the table.
  const unsigned tokens = kPrepare ? static_cast<unsigned>(batch * block.block_size) : 0;
  Token token;
  int32_t entry = 0;
  if constexpr (kPrepare) {
    if (thread < tokens) {
      token = find_token(p, block, plan, head, refused, thread);
      entry = load_entry(token);
    }
  }

  // At most P pages move and P * page_size <= 2^31 (checked): 32 bits are enough.
  const unsigned page_size = p.page_size;
  const unsigned entries = refused ? 0 : static_cast<unsigned>(total) * page_size;
  const int64_t tail = wrap(head, count, p.num_pages);
#pragma unroll 1
  for (unsigned e = thread; e < entries; e += threads) {
    const auto index = static_cast<int32_t>(e / page_size);
    const auto within = static_cast<int32_t>(e - index * page_size);
    const int request = request_of(plan, batch, index);
    const int64_t page = plan.first[request] + (index - plan.before[request]);
    const int64_t place = page * p.page_size + within;
    if (place >= p.width) continue;  // the last page of a row may reach beyond the table
    int32_t* slot = p.req_to_token + p.req_pool_indices.at(request) * p.req_to_token_stride + place;
    if (kReserve) {
      *slot = p.free_pages[wrap(head, index, p.num_pages)] * p.page_size + within;
    } else {
      // The page's id is its first entry's, which no other thread touches.
      if (within == 0) p.free_pages[wrap(tail, index, p.num_pages)] = *slot / p.page_size;
      *slot = 0;
    }
  }

  if constexpr (kPrepare) {
    if (thread < tokens) store_found(block, token, entry);
#pragma unroll 1
    for (unsigned i = thread + threads; i < tokens; i += threads) {
      const Token later = find_token(p, block, plan, head, refused, i);
      store_found(block, later, load_entry(later));
    }
  }

  // What this thread commits: one request, since a launch has at least as many threads as requests.
  int32_t* alloc_len = nullptr;
  int32_t new_len = 0;
  if (!refused && thread < p.batch) {
    const int32_t moved = plan.before[thread + 1] - plan.before[thread];
    if (moved > 0) alloc_len = p.alloc_lens + p.req_pool_indices.at(thread);
    new_len = (plan.first[thread] + (kReserve ? moved : 0)) * p.page_size;
  }
  cluster_wait();
  if (alloc_len != nullptr) *alloc_len = new_len;
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

__global__ void __launch_bounds__(kPageThreads, 1) reserve_kv_slots_kernel(const __grid_constant__ PageParams p) {
  move_pages<true, false>(p, BlockParams{});
}

__global__ void __launch_bounds__(kPageThreads, 1) release_kv_slots_kernel(const __grid_constant__ PageParams p) {
  move_pages<false, false>(p, BlockParams{});
}

__global__ void __launch_bounds__(kPageThreads, 1)
    reserve_and_prepare_block_kernel(const __grid_constant__ PageParams p, const __grid_constant__ BlockParams block) {
  move_pages<true, true>(p, block);
}

// CTAs for so many tokens: enough that a thread has one, as a power of two.
unsigned cluster_size(int64_t tokens) {
  unsigned size = 1;
  while (size < kMaxCluster && static_cast<int64_t>(size) * kPageThreads < tokens) size *= 2;
  return size;
}

template <typename... Params>
void launch_cluster(const char* op, void (*kernel)(Params...), int64_t tokens, cudaStream_t stream,
                    const Params&... params) {
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster_size(tokens);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster.val.clusterDim.x);
  config.blockDim = dim3(kPageThreads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  cuda_check(cudaLaunchKernelEx(&config, kernel, params...), op);
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
  launch_cluster("reserve_kv_slots", reserve_kv_slots_kernel, params.batch * kTypicalEntries, stream, params);
}

void launch_release_kv_slots(const PageParams& params, cudaStream_t stream) {
  launch_cluster("release_kv_slots", release_kv_slots_kernel, params.batch * kTypicalEntries, stream, params);
}

void launch_reserve_and_prepare_block(const PageParams& params, const BlockParams& block, cudaStream_t stream) {
  launch_cluster("reserve_and_prepare_block", reserve_and_prepare_block_kernel, params.batch * block.block_size, stream,
                 params, block);
}

}  // namespace dflash::alloc

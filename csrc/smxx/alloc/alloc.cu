// Block preparation and the device page allocator.
//
// prepare_block: one thread for each of the B*T tokens.
// reserve / release: one CTA, so that the ring is only ever touched by one CTA of one launch; requests are walked in
// chunks of the CTA's size, a block-wide scan of the page counts gives every request its place in the ring.
#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "smxx/alloc/launch.h"

namespace dflash::alloc {
namespace {

constexpr int kPrepareThreads = 128;
constexpr int kPageThreads = 256;

__global__ void __launch_bounds__(kPrepareThreads) prepare_block_kernel(PrepareParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPrepareThreads + threadIdx.x;
  if (i >= p.batch * p.block_size) return;
  const int64_t b = i / p.block_size;
  const int64_t j = i % p.block_size;
  const int64_t position = p.prefix_lens.at(b) + j;
  const int64_t row = p.req_pool_indices.at(b);
  const bool mapped = position >= 0 && position < p.width && row >= 0 && row < p.rows;
  p.block_ids[i] = j == 0 ? p.anchor_ids.at(b) : p.mask_token_id;
  p.positions[i] = position;
  p.slots[i] = mapped ? p.req_to_token.at(row, position) : 0;
}

// Inclusive sum over the CTA; `shared` holds kPageThreads values. Ends with all threads past their reads.
__device__ int64_t inclusive_scan(int64_t value, int64_t* shared) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int step = 1; step < kPageThreads; step *= 2) {
    const int64_t other = threadIdx.x >= step ? shared[threadIdx.x - step] : 0;
    __syncthreads();
    shared[threadIdx.x] += other;
    __syncthreads();
  }
  const int64_t sum = shared[threadIdx.x];
  __syncthreads();
  return sum;
}

template <bool kReserve>
__device__ int64_t pages_moved(const PageParams& p, int64_t b) {
  const int64_t now = p.alloc_lens[p.req_pool_indices.at(b)];
  return (kReserve ? reserved_length(p, b) - now : now - released_length(p, b)) / p.page_size;
}

template <bool kReserve>
__global__ void __launch_bounds__(kPageThreads) move_pages_kernel(PageParams p) {
  __shared__ int64_t scan[kPageThreads];
  __shared__ int64_t before[kPageThreads];  // pages moved by the requests before this one
  __shared__ int64_t old_length[kPageThreads];
  __shared__ int64_t new_length[kPageThreads];
  __shared__ int64_t total;
  const int64_t head = p.ring[kHead];
  const int64_t count = p.ring[kCount];
  __syncthreads();  // everybody has read the ring before anybody writes it

  if (kReserve) {  // all or nothing: first count
    int64_t mine = 0;
    for (int64_t b = threadIdx.x; b < p.batch; b += kPageThreads) mine += pages_moved<kReserve>(p, b);
    const int64_t sum = inclusive_scan(mine, scan);
    if (threadIdx.x == kPageThreads - 1) total = sum;
    __syncthreads();
    if (total > count) {
      if (threadIdx.x == 0) {
        p.ring[kMissing] = total - count;
        p.ring[kCalls] += 1;
      }
      return;
    }
  }

  int64_t moved = 0;
  for (int64_t first = 0; first < p.batch; first += kPageThreads) {
    const int64_t b = first + threadIdx.x;
    const bool live = b < p.batch;
    const int64_t mine = live ? pages_moved<kReserve>(p, b) : 0;
    if (live) {
      old_length[threadIdx.x] = p.alloc_lens[p.req_pool_indices.at(b)];
      new_length[threadIdx.x] = kReserve ? reserved_length(p, b) : released_length(p, b);
    }
    const int64_t sum = inclusive_scan(mine, scan);
    before[threadIdx.x] = moved + sum - mine;
    if (threadIdx.x == kPageThreads - 1) total = sum;
    __syncthreads();
    const int64_t requests = p.batch - first < kPageThreads ? p.batch - first : kPageThreads;
    for (int64_t r = 0; r < requests; ++r) {
      const int64_t low = kReserve ? old_length[r] : new_length[r];
      const int64_t high = kReserve ? new_length[r] : old_length[r];
      int32_t* table = p.req_to_token + p.req_pool_indices.at(first + r) * p.req_to_token_stride;
      // A thread owns whole pages: on release the page id is read from its first entry before that is cleared.
      for (int64_t page = low / p.page_size + threadIdx.x; page < high / p.page_size; page += kPageThreads) {
        const int64_t place = before[r] + page - low / p.page_size;
        int64_t base = 0;
        if (kReserve) {
          base = static_cast<int64_t>(p.free_pages[(head + place) % p.num_pages]) * p.page_size;
        } else {
          p.free_pages[(head + count + place) % p.num_pages] =
              static_cast<int32_t>(table[page * p.page_size] / p.page_size);
        }
        for (int64_t j = 0; j < p.page_size; ++j) {
          const int64_t position = page * p.page_size + j;
          if (position < p.width) table[position] = kReserve ? static_cast<int32_t>(base + j) : 0;
        }
      }
    }
    if (live) p.alloc_lens[p.req_pool_indices.at(b)] = static_cast<int32_t>(new_length[threadIdx.x]);
    moved += total;
    __syncthreads();  // `before`, the lengths and `total` are rewritten by the next chunk
  }
  if (threadIdx.x == 0) {
    if (kReserve) {
      p.ring[kHead] = (head + moved) % p.num_pages;
      p.ring[kCount] = count - moved;
      p.ring[kMissing] = 0;
    } else {
      p.ring[kCount] = count + moved;
    }
    p.ring[kCalls] += 1;
  }
}

}  // namespace

void launch_prepare_block(const PrepareParams& params, cudaStream_t stream) {
  const int64_t tokens = params.batch * params.block_size;
  const auto blocks = static_cast<unsigned>((tokens + kPrepareThreads - 1) / kPrepareThreads);
  prepare_block_kernel<<<blocks, kPrepareThreads, 0, stream>>>(params);
  cuda_check_launch("prepare_block");
}

void launch_reserve_kv_slots(const PageParams& params, cudaStream_t stream) {
  move_pages_kernel<true><<<1, kPageThreads, 0, stream>>>(params);
  cuda_check_launch("reserve_kv_slots");
}

void launch_release_kv_slots(const PageParams& params, cudaStream_t stream) {
  move_pages_kernel<false><<<1, kPageThreads, 0, stream>>>(params);
  cuda_check_launch("release_kv_slots");
}

}  // namespace dflash::alloc

// CPU implementations of block preparation and of the page allocator: the order of csrc/smxx/alloc/alloc.cu, in loops.
#include "cpu/alloc.h"

namespace dflash::alloc {

void prepare_block_cpu(const PrepareParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t row = p.req_pool_indices.at(b);
    for (int64_t j = 0; j < p.block_size; ++j) {
      const int64_t position = p.prefix_lens.at(b) + j;
      const int64_t i = b * p.block_size + j;
      p.block_ids[i] = j == 0 ? p.anchor_ids.at(b) : p.mask_token_id;
      p.positions[i] = position;
      p.slots[i] = position < p.width ? p.req_to_token.at(row, position) : 0;
    }
  }
}

bool reserve_kv_slots_cpu(const PageParams& p, int64_t* missing) {
  int64_t needed = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    needed += (reserved_length(p, b) - p.alloc_lens[p.req_pool_indices.at(b)]) / p.page_size;
  }
  *missing = needed - p.ring[kCount];
  if (*missing > 0) return false;
  int64_t head = p.ring[kHead];
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t row = p.req_pool_indices.at(b);
    const int64_t end = reserved_length(p, b);
    int32_t* table = p.req_to_token + row * p.req_to_token_stride;
    for (int64_t start = p.alloc_lens[row]; start < end; start += p.page_size) {
      const int64_t base = static_cast<int64_t>(p.free_pages[head]) * p.page_size;
      head = (head + 1) % p.num_pages;
      for (int64_t j = 0; j < p.page_size && start + j < p.width; ++j) {
        table[start + j] = static_cast<int32_t>(base + j);
      }
    }
    p.alloc_lens[row] = static_cast<int32_t>(end);
  }
  p.ring[kHead] = head;
  p.ring[kCount] -= needed;
  p.ring[kMissing] = 0;
  p.ring[kCalls] += 1;
  return true;
}

void release_kv_slots_cpu(const PageParams& p) {
  int64_t tail = p.ring[kHead] + p.ring[kCount];
  int64_t freed = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t row = p.req_pool_indices.at(b);
    const int64_t kept = released_length(p, b);
    int32_t* table = p.req_to_token + row * p.req_to_token_stride;
    for (int64_t start = kept; start < p.alloc_lens[row]; start += p.page_size) {
      p.free_pages[(tail + freed) % p.num_pages] = static_cast<int32_t>(table[start] / p.page_size);
      ++freed;
      for (int64_t j = 0; j < p.page_size && start + j < p.width; ++j) table[start + j] = 0;
    }
    p.alloc_lens[row] = static_cast<int32_t>(kept);
  }
  p.ring[kCount] += freed;
  p.ring[kCalls] += 1;
}

}  // namespace dflash::alloc

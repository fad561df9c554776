// CPU implementations of block preparation and of the page allocator: the order of csrc/smxx/alloc/alloc.cu, in loops.
#include "cpu/alloc.h"

#include <algorithm>

namespace dflash::alloc {
namespace {

template <bool kReserve>
PageMove move_of(const PageParams& p, int64_t b) {
  const int64_t row = row_of(p, b);
  if (row < 0) return {};
  return page_move<kReserve>(held_pages(p, p.alloc_lens[row]), asked_pages(p, p.lens.at(b)));
}

template <bool kReserve>
int64_t pages_to_move(const PageParams& p) {
  int64_t pages = 0;
  for (int64_t b = 0; b < p.batch; ++b) pages += move_of<kReserve>(p, b).count;
  return pages;
}

template <bool kReserve>
void move_pages(const PageParams& p) {
  int64_t moved = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const PageMove move = move_of<kReserve>(p, b);
    if (move.count == 0) continue;
    const int64_t row = row_of(p, b);
    int32_t* table = p.req_to_token + row * p.req_to_token_stride;
    for (int64_t page = move.first; page < move.first + move.count; ++page, ++moved) {
      const int64_t start = page * p.page_size;
      const int64_t end = std::min(start + p.page_size, p.width);
      if (kReserve) {
        const int64_t base = static_cast<int64_t>(p.free_pages[(p.ring[kHead] + moved) % p.num_pages]) * p.page_size;
        for (int64_t i = start; i < end; ++i) table[i] = static_cast<int32_t>(base + i - start);
      } else {
        const int64_t place = (p.ring[kHead] + p.ring[kCount] + moved) % p.num_pages;
        p.free_pages[place] = table[start] / p.page_size;
        std::fill(table + start, table + end, 0);
      }
    }
    p.alloc_lens[row] = static_cast<int32_t>((kReserve ? move.first + move.count : move.first) * p.page_size);
  }
  if (kReserve && moved > 0) p.ring[kHead] = (p.ring[kHead] + moved) % p.num_pages;
  p.ring[kCount] += kReserve ? -moved : moved;
  p.ring[kCalls] += 1;
}

}  // namespace

void prepare_block_cpu(const BlockParams& p) {
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

int64_t pages_to_reserve(const PageParams& params) { return pages_to_move<true>(params); }
int64_t pages_to_release(const PageParams& params) { return pages_to_move<false>(params); }
void reserve_kv_slots_cpu(const PageParams& params) { move_pages<true>(params); }
void release_kv_slots_cpu(const PageParams& params) { move_pages<false>(params); }

void reserve_and_prepare_block_cpu(const PageParams& p, const BlockParams& block) {
  reserve_kv_slots_cpu(p);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t row = row_of(p, b);
    const int64_t covered = row < 0 ? 0 : std::min<int64_t>(p.alloc_lens[row], p.width);
    for (int64_t j = 0; j < block.block_size; ++j) {
      const int64_t position = block.prefix_lens.at(b) + j;
      const int64_t i = b * block.block_size + j;
      block.block_ids[i] = j == 0 ? block.anchor_ids.at(b) : block.mask_token_id;
      block.positions[i] = position;
      block.slots[i] = position >= 0 && position < covered ? block.req_to_token.at(row, position) : 0;
    }
  }
}

}  // namespace dflash::alloc

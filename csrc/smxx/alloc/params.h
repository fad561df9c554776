// Plain parameters of block preparation and of the page allocator; filled by csrc/api/alloc.cpp, read by the CPU and
// CUDA implementations, which share the arithmetic at the end of this file.
#pragma once

#include <cstdint>

#include "common/divisor.h"
#include "common/int_view.h"

namespace dflash::alloc {

constexpr int64_t kMaxBatch = 4096;              // requests of one allocator call
constexpr int64_t kMaxBlockSize = 1024;          // T, where the allocator prepares the block too
constexpr int64_t kMaxWidth = (1ll << 31) - 65;  // W: a row rounded up to whole pages is still an int32
constexpr int64_t kMaxRows = (1ll << 31) - 1;    // R of the allocator's table

// ids, positions and slots of B blocks of T tokens.
struct BlockParams {
  int64_t batch = 0;         // B
  int block_size = 0;        // T
  Divisor per_block;         // T
  IntView anchor_ids;        // [B]
  IntView prefix_lens;       // [B]
  IntView req_pool_indices;  // [B]
  IntView req_to_token;      // [R, W]
  int64_t rows = 0;          // R
  int64_t width = 0;         // W
  int64_t mask_token_id = 0;
  int64_t* block_ids = nullptr;  // [B, T]
  int64_t* positions = nullptr;  // [B, T]
  int64_t* slots = nullptr;      // [B, T]
};

// ring = {head, count, missing, calls}: pops take free_pages[(head + i) % P], pushes append at (head + count) % P.
// missing: pages that a refused call lacked (reserve) or had no room for (release); stays until the caller clears it.
enum RingField { kHead = 0, kCount = 1, kMissing = 2, kCalls = 3 };

struct PageParams {
  int64_t batch = 0;                // B
  int page_size = 1;                // 1..64
  Divisor per_page;                 // page_size
  int64_t num_pages = 0;            // P, the ring's capacity
  int64_t rows = 0;                 // R
  int64_t width = 0;                // W
  int32_t* req_to_token = nullptr;  // [R, W]
  int64_t req_to_token_stride = 0;
  int32_t* alloc_lens = nullptr;  // [R], whole pages
  int32_t* free_pages = nullptr;  // [P]
  int64_t* ring = nullptr;        // [4]
  IntView req_pool_indices;       // [B], distinct where active
  IntView lens;                   // [B]: tokens to cover (reserve) or to keep (release)
  int64_t extra_tokens = 0;       // added to lens
  IntView active;                 // [B], 0: the request takes no part; data == nullptr: all do
};

DFLASH_HOST_DEVICE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Pages that cover `length` tokens, 0 <= length <= W, which is checked to leave room for the rounding up.
DFLASH_HOST_DEVICE int64_t pages_of(const PageParams& p, int64_t length) {
  return p.per_page.divide(static_cast<uint32_t>(length) + p.page_size - 1);
}

// The row of request b, or -1: it takes no part. An index outside the table takes no part either, so that no input
// whatever makes the device touch memory outside its tensors.
DFLASH_HOST_DEVICE int64_t row_of(const PageParams& p, int64_t b) {
  if (p.active.data != nullptr && p.active.at(b) == 0) return -1;
  const int64_t row = p.req_pool_indices.at(b);
  return row >= 0 && row < p.rows ? row : -1;
}

// Pages that a request of that lens entry asks for (reserve) or may keep (release).
DFLASH_HOST_DEVICE int64_t asked_pages(const PageParams& p, int64_t length) {
  return pages_of(p, clamp(clamp(length, 0, p.width) + p.extra_tokens, 0, p.width));
}

// Pages that a row holds, given its alloc_lens entry.
DFLASH_HOST_DEVICE int64_t held_pages(const PageParams& p, int64_t alloc_len) {
  return p.per_page.divide(static_cast<uint32_t>(clamp(alloc_len, 0, p.width + p.page_size - 1)));
}

// Pages first .. first + count of a row change hands.
struct PageMove {
  int64_t first = 0;
  int64_t count = 0;
};

template <bool kReserve>
DFLASH_HOST_DEVICE PageMove page_move(int64_t held, int64_t asked) {
  const int64_t first = kReserve ? held : asked;
  const int64_t end = kReserve ? asked : held;
  return {first, end > first ? end - first : 0};
}

}  // namespace dflash::alloc

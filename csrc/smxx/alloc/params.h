// Plain parameters of block preparation and of the page allocator; filled by csrc/api/alloc.cpp.
#pragma once

#include <cstdint>

#include "common/int_view.h"

namespace dflash::alloc {

struct PrepareParams {
  int64_t batch = 0;
  int block_size = 0;         // T
  IntView anchor_ids;         // [B]
  IntView prefix_lens;        // [B]
  IntView req_pool_indices;   // [B]
  IntView req_to_token;       // [R, W]
  int64_t rows = 0;           // R
  int64_t width = 0;          // W
  int64_t mask_token_id = 0;
  int64_t* block_ids = nullptr;  // [B, T]
  int64_t* positions = nullptr;  // [B, T]
  int64_t* slots = nullptr;      // [B, T]
};

// ring = {head, count, missing, calls}: pops take free_pages[(head + i) % P], pushes append at (head + count) % P.
enum RingField { kHead = 0, kCount = 1, kMissing = 2, kCalls = 3 };

struct PageParams {
  int64_t batch = 0;
  int64_t page_size = 1;
  int64_t num_pages = 0;           // P, the ring's capacity
  int64_t rows = 0;                // R
  int64_t width = 0;               // W
  int32_t* req_to_token = nullptr;  // [R, W]
  int64_t req_to_token_stride = 0;
  int32_t* alloc_lens = nullptr;  // [R], whole pages
  int32_t* free_pages = nullptr;  // [P]
  int64_t* ring = nullptr;        // [4]
  IntView req_pool_indices;       // [B], distinct
  IntView lens;                   // [B]: lengths to cover (reserve) or to keep (release)
};

// Length covered by whole pages.
DFLASH_HOST_DEVICE int64_t round_to_pages(int64_t length, int64_t page_size) {
  return length <= 0 ? 0 : (length + page_size - 1) / page_size * page_size;
}

// What a row owns after the call.
DFLASH_HOST_DEVICE int64_t reserved_length(const PageParams& p, int64_t b) {
  const int64_t now = p.alloc_lens[p.req_pool_indices.at(b)];
  const int64_t wanted = round_to_pages(p.lens.at(b), p.page_size);
  return wanted > now ? wanted : now;
}

DFLASH_HOST_DEVICE int64_t released_length(const PageParams& p, int64_t b) {
  const int64_t now = p.alloc_lens[p.req_pool_indices.at(b)];
  const int64_t kept = round_to_pages(p.lens.at(b), p.page_size);
  return kept < now ? kept : now;
}

}  // namespace dflash::alloc

// Range checks of the index arguments: always on the CPU, under DFLASH_DEBUG=1 on CUDA.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/int_view.h"

namespace dflash::draft {

enum class Fault : int { kNone, kBlockId, kPosition, kPrefixLen, kPoolIndex, kSlot };

struct IndexFault {
  Fault fault = Fault::kNone;
  int64_t value = 0;
};

struct IndexParams {
  int64_t batch = 0;
  int64_t block_size = 0;
  IntView block_ids, positions;           // [B, T]
  IntView prefix_lens, req_pool_indices;  // [B]
  IntView req_to_token;                   // [rows, width]
  int64_t vocab = 0, max_positions = 0, rows = 0, width = 0;
  int64_t num_slots = 0;  // of the smallest cache
  int64_t window = 0;     // of the layer that looks back furthest; 0: some layer sees everything
};

DFLASH_HOST_DEVICE bool is_outside(int64_t value, int64_t end) { return value < 0 || value >= end; }

// Of request b: only slots that some layer reads are looked at.
DFLASH_HOST_DEVICE IndexFault find_fault(const IndexParams& p, int64_t b) {
  int64_t earliest = INT64_MAX;
  for (int64_t t = 0; t < p.block_size; ++t) {
    const int64_t id = p.block_ids.at(b, t), position = p.positions.at(b, t);
    if (is_outside(id, p.vocab)) return {Fault::kBlockId, id};
    if (is_outside(position, p.max_positions)) return {Fault::kPosition, position};
    earliest = position < earliest ? position : earliest;
  }
  const int64_t prefix = p.prefix_lens.at(b), row = p.req_pool_indices.at(b);
  if (is_outside(prefix, p.width + 1)) return {Fault::kPrefixLen, prefix};
  if (is_outside(row, p.rows)) return {Fault::kPoolIndex, row};
  int64_t first = 0;
  if (p.window > 0 && earliest - p.window + 1 > 0) first = earliest - p.window + 1;
  for (int64_t k = first; k < prefix; ++k) {
    const int64_t slot = p.req_to_token.at(row, k);
    if (is_outside(slot, p.num_slots)) return {Fault::kSlot, slot};
  }
  return {};
}

}  // namespace dflash::draft

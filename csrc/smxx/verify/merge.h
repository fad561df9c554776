// One row of merge_vocab_shards: the largest value in torch.argmax's order, the smallest id among equals.
#pragma once

#include "common/order_key.h"
#include "smxx/verify/params.h"

namespace dflash::verify {

DFLASH_HOST_DEVICE void merge_shards(const MergeParams& p, int64_t n) {
  int64_t best = n;  // offset of shard 0
  for (int64_t s = 1; s < p.shards; ++s) {
    const int64_t offset = s * p.rows + n;
    const uint32_t mine = order_key(p.shard_values[offset]), other = order_key(p.shard_values[best]);
    if (mine > other || (mine == other && p.shard_ids[offset] < p.shard_ids[best])) best = offset;
  }
  p.ids[n] = p.shard_ids[best];
  p.values[n] = p.shard_values[best];
}

}  // namespace dflash::verify

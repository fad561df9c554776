#pragma once

#include "smxx/alloc/params.h"

namespace dflash::alloc {

void prepare_block_cpu(const BlockParams& params);

// Pages that the call moves in all. Reads the index tensors and alloc_lens.
int64_t pages_to_reserve(const PageParams& params);
int64_t pages_to_release(const PageParams& params);

// The caller has checked the arguments, and that the ring has the pages or the room.
void reserve_kv_slots_cpu(const PageParams& params);
void release_kv_slots_cpu(const PageParams& params);

// Reserves, then prepares; params and block name the same batch and table.
void reserve_and_prepare_block_cpu(const PageParams& params, const BlockParams& block);

}  // namespace dflash::alloc

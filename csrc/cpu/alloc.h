#pragma once

#include "smxx/alloc/params.h"

namespace dflash::alloc {

void prepare_block_cpu(const PrepareParams& params);
// False, with ring[kMissing] untouched, when the free list is too short: nothing has changed then.
bool reserve_kv_slots_cpu(const PageParams& params, int64_t* missing);
void release_kv_slots_cpu(const PageParams& params);

}  // namespace dflash::alloc

#pragma once

#include <cuda_runtime_api.h>

#include "smxx/alloc/params.h"

namespace dflash::alloc {

// All: batch >= 1.
void launch_prepare_block(const BlockParams& params, cudaStream_t stream);
void launch_reserve_kv_slots(const PageParams& params, cudaStream_t stream);
void launch_release_kv_slots(const PageParams& params, cudaStream_t stream);
// params and block name the same batch and table.
void launch_reserve_and_prepare_block(const PageParams& params, const BlockParams& block, cudaStream_t stream);

}  // namespace dflash::alloc

#pragma once

#include <cuda_runtime_api.h>

#include "smxx/alloc/params.h"

namespace dflash::alloc {

void launch_prepare_block(const PrepareParams& params, cudaStream_t stream);
void launch_reserve_kv_slots(const PageParams& params, cudaStream_t stream);
void launch_release_kv_slots(const PageParams& params, cudaStream_t stream);

}  // namespace dflash::alloc

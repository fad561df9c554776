#pragma once

#include <cuda_runtime_api.h>

#include "smxx/attention/params.h"

namespace dflash::attention {

// Two kernels where num_splits > 1, both started early: positions, lengths, req_to_token and the caches must have been
// written before the stream's preceding kernel started (common/dependent_launch.cuh).
void launch_block_attention(const BlockAttentionParams& params, cudaStream_t stream);

}  // namespace dflash::attention

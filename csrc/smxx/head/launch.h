#pragma once

#include <cuda_runtime_api.h>

#include "smxx/head/params.h"

namespace dflash::head {

// hidden and weight are 16-byte aligned, H and hidden's row stride multiples of 8.
void launch_argmax(const HeadParams& params, cudaStream_t stream);
void launch_topk(const HeadParams& params, cudaStream_t stream);

}  // namespace dflash::head

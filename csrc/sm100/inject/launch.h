#pragma once

#include <cuda_runtime_api.h>

#include "smxx/gemm/params.h"
#include "smxx/inject/params.h"

namespace dflash::sm100::inject {

// Context KV of many rows x in one launch: k|v = x W^T + bias, K-norm, RoPE, and the paged write; C is not touched.
// Rows of `project` and `write` are the same. False, with nothing launched, for operands that the GEMM does not take.
// Only where takes_whole_heads(write).
bool launch_project(const dflash::gemm::GemmParams& project, const dflash::inject::WriteParams& write, int num_sms,
                    cudaStream_t stream);

}  // namespace dflash::sm100::inject

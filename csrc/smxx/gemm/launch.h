#pragma once

#include <cuda_runtime_api.h>

#include "smxx/gemm/params.h"

namespace dflash::gemm {

// Data pointers are 16-byte aligned (A, W) and 4-byte aligned (C, residual); C and residual strides are even.
void launch_gemm_bf16(const GemmParams& params, cudaStream_t stream);

}  // namespace dflash::gemm

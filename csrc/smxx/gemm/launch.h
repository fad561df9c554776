#pragma once

#include <cuda_runtime_api.h>

#include "smxx/gemm/params.h"

namespace dflash::gemm {

// Data pointers are 16-byte aligned (A, W) and 4-byte aligned (C, residual); C and residual strides are even.
void launch_gemm_bf16(const GemmParams& params, cudaStream_t stream);

// A and W in e4m3, for any number of rows; only where is_fp8_supported. All data pointers are 16-byte aligned, strides
// too; N (gated: N / 2) is a multiple of 8.
bool is_fp8_supported(int device);
void launch_gemm_fp8(const GemmParams& params, cudaStream_t stream);

// A and W in nvfp4, otherwise the same; only where is_nvfp4_supported.
bool is_nvfp4_supported(int device);
void launch_gemm_nvfp4(const GemmParams& params, cudaStream_t stream);

}  // namespace dflash::gemm

#pragma once

#include <cuda_runtime_api.h>

#include "smxx/gemm/params.h"

namespace dflash::sm100::gemm {

// C of many rows; parameters as of dflash::gemm::launch_gemm_bf16. False, with nothing launched, where the operands ask
// for what this kernel has not: live rows that are not the first ones, or rows of C or the residual that do not begin
// at multiples of 16 bytes.
bool launch_gemm_bf16(const dflash::gemm::GemmParams& params, int num_sms, cudaStream_t stream);

// The same in e4m3, as of dflash::gemm::launch_gemm_fp8.
bool launch_gemm_fp8(const dflash::gemm::GemmParams& params, int num_sms, cudaStream_t stream);

// The same in nvfp4, as of dflash::gemm::launch_gemm_nvfp4.
bool launch_gemm_nvfp4(const dflash::gemm::GemmParams& params, int num_sms, cudaStream_t stream);

}  // namespace dflash::sm100::gemm

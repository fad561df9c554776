#pragma once

#include <cuda_runtime_api.h>

#include "smxx/quantize/params.h"

namespace dflash::quantize {

// x starts at a multiple of 16 bytes, codes at one of 8.
void launch_quantize_rows(const QuantizeParams& params, cudaStream_t stream);

// The same in nvfp4; codes and blocks start at multiples of 4 bytes.
void launch_quantize_rows_nvfp4(const QuantizeParams& params, cudaStream_t stream);

}  // namespace dflash::quantize

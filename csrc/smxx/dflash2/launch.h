#pragma once

#include <cuda_runtime_api.h>

#include "smxx/dflash2/rules.h"

namespace dflash::dflash2 {

void launch_select_path(const SelectParams& params, cudaStream_t stream);
void launch_grouped_conv(const ConvParams& params, cudaStream_t stream);

// The first request with a fault, found on the device (DFLASH_DEBUG=1): allocates and synchronises.
SelectFault check_select_cuda(const SelectParams& params, cudaStream_t stream);

}  // namespace dflash::dflash2

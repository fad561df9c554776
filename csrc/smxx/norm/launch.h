#pragma once

#include <cuda_runtime_api.h>

#include "smxx/norm/params.h"

namespace dflash::norm {

void launch_rmsnorm(const RmsNormParams& params, cudaStream_t stream);

}  // namespace dflash::norm

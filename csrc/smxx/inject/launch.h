#pragma once

#include <cuda_runtime_api.h>

#include "smxx/inject/params.h"

namespace dflash::inject {

void launch_inject_kv(const InjectParams& params, cudaStream_t stream);

struct RowFault {
  Fault fault = Fault::kNone;
  int64_t row = 0;
};

// The first row with a fault, found on the device (DFLASH_DEBUG=1): synchronises; uses 8 bytes of the workspace.
// A capturing stream cannot be waited for: nothing is checked then.
RowFault check_inject_cuda(const WriteParams& params, void* scratch, cudaStream_t stream);

}  // namespace dflash::inject

#pragma once

#include <cuda_runtime_api.h>

#include "smxx/head/params.h"

namespace dflash::sm100::head {

// Argmax, with verification if asked for, of many rows. False, with nothing launched, where TMA cannot describe the
// operands (overlapping rows of hidden).
bool launch_argmax(const dflash::head::HeadParams& params, int num_sms, cudaStream_t stream);

// Argmax in e4m3 of any number of rows.
bool launch_argmax_fp8(const dflash::head::HeadParams& params, int num_sms, cudaStream_t stream);

}  // namespace dflash::sm100::head

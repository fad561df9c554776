#pragma once

#include <cuda_runtime_api.h>

#include "smxx/inject/params.h"

namespace dflash::inject {

constexpr int kMaxGatherRequests = 2048;  // of one launch

struct GatherParams {
  const uint16_t* taps[kMaxTaps] = {};  // K x [B * T, H], bf16
  int64_t tap_stride[kMaxTaps] = {};    // elements between rows; a multiple of 8
  int num_taps = 0;                     // K
  int hidden = 0;                       // H, a multiple of 8
  LiveRows live;
  int batch = 0;             // B
  uint16_t* rows = nullptr;  // [M, K * H]: the taps of the M live tokens, side by side
  int32_t* order = nullptr;  // [M]: their numbers
  int64_t* count = nullptr;  // M
};

void launch_gather(const GatherParams& params, cudaStream_t stream);

}  // namespace dflash::inject

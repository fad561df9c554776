#pragma once

#include <cuda_runtime_api.h>

#include "smxx/inject/params.h"

namespace dflash::inject {

constexpr int kMaxGatherRequests = 2048;  // of one launch

struct GatherParams {
  const uint16_t* taps[kMaxTaps] = {};  // K x [B * T, W], bf16
  int64_t tap_stride[kMaxTaps] = {};    // elements between rows; a multiple of 8
  int num_taps = 0;                     // K
  int width = 0;                        // W, a multiple of 8
  const uint16_t* norm = nullptr;       // [K, W]: RMSNorm of each tap; nullptr: none
  float eps = 1e-6f;                    // of it
  LiveRows live;                        // without commit lengths: one request
  int batch = 0;                        // B
  uint16_t* rows = nullptr;             // [M, K * W]: the taps of the M live tokens, side by side
  int32_t* order = nullptr;             // [M]: their numbers
  int64_t* count = nullptr;             // M
};

void launch_gather(const GatherParams& params, cudaStream_t stream);

}  // namespace dflash::inject

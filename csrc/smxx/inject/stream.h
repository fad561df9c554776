// inject_kv for at most 64 rows as one kernel over packed weights; see stream.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "smxx/inject/params.h"
#include "smxx/stream/schedule.h"

namespace dflash::inject {

constexpr int kMaxStreamHeadDim = 128;  // whole heads fit a tile

struct StreamInjectParams {
  stream::StreamParams stream;
  const uint16_t* taps[kMaxTaps] = {};    // K x [N, H], bf16, N <= 64
  int64_t tap_stride[kMaxTaps] = {};      // elements between rows
  int num_taps = 0;                       // K
  int hidden = 0;                         // H
  int fc_tiles = 0;                       // row tiles of stage 0
  const uint16_t* hidden_norm = nullptr;  // [H]
  const uint16_t* kv_bias = nullptr;      // [L * 2 * Hkv * D]; nullptr: none
  uint16_t* fused = nullptr;              // [64, H] scratch: f * hidden_norm
  float* squares = nullptr;               // [fc_tiles, 64] scratch: sums of f^2
  WriteParams write;                      // kv and order left empty
};

void launch_stream_inject_kv(const StreamInjectParams& params, cudaStream_t stream);

}  // namespace dflash::inject

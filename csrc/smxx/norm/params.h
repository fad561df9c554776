// Plain parameters of RMSNorm over rows.
//
//   out[r, c] = bf16( bf16?( x[r, c] * rsqrt(mean_c(x^2) + eps) ) * weight[c] )      fp32 math
//
// The inner rounding is Hugging Face's; off by default (one rounding at the end, as fused engines do). With `codes`
// those values of out go to e4m3 with a scale a row (common/row_scale.h), and out itself is not written.
#pragma once

#include <cstdint>

#include "common/live_rows.h"

namespace dflash::norm {

constexpr int64_t kMaxHeldColumns = 8192;  // of rows that a block holds in registers

struct RmsNormParams {
  const uint16_t* x = nullptr;       // [M, N] bf16, or [parts, M, N / parts]: column c of part c / (N / parts)
  int64_t x_stride = 0;              // elements between rows
  int parts = 1;                     // N / parts is even
  int64_t part_stride = 0;           // elements between parts
  const uint16_t* weight = nullptr;  // [N] bf16
  uint16_t* out = nullptr;           // [M, N] bf16; may be x itself, of one part
  int64_t out_stride = 0;            // elements between rows
  // Both or neither; codes wants columns and addresses at multiples of 8, at most kMaxHeldColumns, and rows in one
  // part.
  uint8_t* codes = nullptr;     // [M, N] e4m3, contiguous
  float* row_scales = nullptr;  // [M]
  int64_t m = 0;
  int64_t n = 0;  // even
  float eps = 1e-6f;
  bool round_before_weight = false;
  LiveRows live;             // dead rows are neither loaded nor stored
  bool early_start = false;  // programmatic dependent launch, see common/dependent_launch.cuh
};

}  // namespace dflash::norm

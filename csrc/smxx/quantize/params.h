// Plain parameters of the quantisation of rows; the formula is in common/row_scale.h.
#pragma once

#include <cstdint>

namespace dflash::quantize {

constexpr int64_t kMaxColumns = 32768;

struct QuantizeParams {
  const void* x = nullptr;   // [M, N] bf16 (on the CPU also float32), contiguous
  bool is_bf16 = true;       // false on the CPU only
  uint8_t* codes = nullptr;  // [M, N] e4m3
  float* scale = nullptr;    // [M]
  int64_t m = 0;
  int64_t n = 0;             // a multiple of 8, at most kMaxColumns
  bool early_start = false;  // programmatic dependent launch, see common/dependent_launch.cuh
};

}  // namespace dflash::quantize

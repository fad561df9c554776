// Plain parameters of the quantisation of rows; the formula is in common/row_scale.h, that of nvfp4 in
// quantize_rows_nvfp4.cu.
#pragma once

#include <cstdint>

namespace dflash::quantize {

constexpr int64_t kMaxColumns = 32768;

struct QuantizeParams {
  const void* x = nullptr;    // [M, N] bf16 (on the CPU also float32), contiguous
  bool is_bf16 = true;        // false on the CPU only
  uint8_t* codes = nullptr;   // [M, N] e4m3; nvfp4: [M, N / 2]
  uint8_t* blocks = nullptr;  // nvfp4: [ceil(M / 128), ceil(N / 64), 512], scales of groups
  float* scale = nullptr;     // [M]
  int64_t m = 0;
  int64_t n = 0;             // a multiple of 8 (nvfp4: 32), at most kMaxColumns
  bool early_start = false;  // programmatic dependent launch, see common/dependent_launch.cuh
};

}  // namespace dflash::quantize

// Plain parameters of the bf16 GEMM shared by the drafter's linear layers.
//
//   C[m, n] = bf16( sum_k A[m, k] * W[n, k] + bias[n] )          fp32 accumulation, rounded once
//   C[m, n] = bf16( C[m, n] + residual[m, n] )                   with a residual: rounded once more
//   C[m, i] = bf16( silu(g) * u )    gated: g = C[m, i], u = C[m, N / 2 + i] as above, C is [M, N / 2]
//
// In fp8 (launch_gemm_fp8) A and W are e4m3 codes with a scale for each row of A and each row of W:
//
//   C[m, n] = bf16( a_scale[m] * w_scale[n] * sum_k A[m, k] * W[n, k] + bias[n] )     then as above
//
// In nvfp4 (launch_gemm_nvfp4) codes are e2m1, two a byte, and 16 neighbours along K also share an e4m3 scale s:
//
//   C[m, n] = bf16( a_scale[m] * w_scale[n] * sum_g sA[m, g] * sW[n, g] * sum_{k in g} A[m, k] * W[n, k] + bias[n] )
//
// bf16 data is passed as uint16_t, so that no CUDA header is needed here.
#pragma once

#include <cstdint>

#include "common/live_rows.h"

namespace dflash::gemm {

constexpr int kMaxSources = 8;

struct GemmParams {
  // A [M, K] as num_sources matrices [M, K / num_sources], side by side along K. Columns are contiguous.
  const uint16_t* a[kMaxSources] = {};
  int64_t a_stride[kMaxSources] = {};  // elements between rows; a multiple of 8
  int num_sources = 1;
  const uint16_t* w = nullptr;  // [N, K], contiguous
  // fp8: `a` and `w` point to bytes, one source, a_stride in bytes and K multiples of 16; else nullptr.
  const float* a_scale = nullptr;  // [M]
  const float* w_scale = nullptr;  // [N]
  // nvfp4: as fp8 with two codes a byte, so that K and strides count bytes; 16-byte aligned blocks of scales as of
  // gemm_nvfp4 in dflash_kernels/ops/gemm.py. Else nullptr.
  const uint8_t* a_blocks = nullptr;
  const uint8_t* w_blocks = nullptr;
  const uint16_t* bias = nullptr;      // [N]; nullptr: none
  const uint16_t* residual = nullptr;  // [M, N]; may be c itself; nullptr: none
  int64_t residual_stride = 0;         // elements between rows
  uint16_t* c = nullptr;               // [M, N]; gated: [M, N / 2]
  int64_t c_stride = 0;                // elements between rows
  int64_t m = 0;
  int64_t n = 0;  // even
  int64_t k = 0;  // all sources together; K / num_sources is a multiple of 8
  LiveRows live;  // dead rows are not stored and change no live one; of a tile with a live row they may be loaded
  const int32_t* c_rows = nullptr;  // row of C that row m is stored to; nullptr: m itself
  int64_t expected_live = 0;        // rows likely to be live, to choose tiles by; 0: all
  bool gated = false;               // silu(first half of N) * second half; N / 2 is a multiple of 8, no residual
  // Programmatic dependent launch: the kernel starts while its predecessor on the stream still runs and fetches W, and
  // waits before it touches anything else. Only for W and bias written before that predecessor started.
  bool early_start = false;
  // The kernel behind this one fetches weights while it waits, and gains from an early start wherever it gets in.
  bool next_fetches = false;
};

}  // namespace dflash::gemm

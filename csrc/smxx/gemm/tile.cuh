// The mainloop shared by the plain GEMM and the LM head: one [BM, BN] tile of A [M, K] * W [N, K]^T in fp32.
//
// Partition: WARPS_M x WARPS_N warps, each a [BM / WARPS_M, BN / WARPS_N] sub-tile of m16n8k16 products.
// Shared memory: kStages buffers, each A [BM, BK] then W [BN, BK], bf16. Rows are padded by 8 elements: the row pitch
// of 144 bytes (BK = 64) moves every row by 4 banks, so the 8 rows of an ldmatrix touch all 32 banks once. Pipeline:
// cp.async, kStages - 1 tiles of K in flight; one __syncthreads per K tile, which both publishes tile i and frees the
// buffer of tile i - 1 for the next copy. Edges: rows of A that are dead or beyond M, rows of W beyond N and columns
// beyond K are filled with zeros and not read. K is a multiple of 8 elements, the width of one copy, so no copy
// straddles the end of a row or of a source of A. Gated: the tile's columns alternate between eights of the first half
// of W's rows and of the second, so that a thread's accumulators d[i][j] (gate) and d[i][j + 1] (up), j even, belong to
// the same output column.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/dependent_launch.cuh"
#include "common/ptx.cuh"
#include "smxx/gemm/params.h"

namespace dflash::gemm {

template <int BM_, int BN_, int WARPS_M_, int WARPS_N_, int STAGES_>
struct TileConfig {
  static constexpr int BM = BM_, BN = BN_, BK = 64;
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
  static constexpr int kStages = STAGES_;
  static constexpr int kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int kPitch = BK + 8;  // elements between rows in shared memory
  static constexpr int kStageElements = (BM + BN) * kPitch;
  static constexpr int kSharedBytes = kStages * kStageElements * 2;
  static constexpr int kTilesM = BM / WARPS_M / 16;  // m16 tiles of a warp
  static constexpr int kTilesN = BN / WARPS_N / 8;   // n8 tiles of a warp
  static constexpr int kCopiesPerRow = BK / 8;
  static_assert(BM % (16 * WARPS_M) == 0 && BN % (16 * WARPS_N) == 0, "warp tiles are 16 x 16 multiples");
  static_assert((BM * kCopiesPerRow) % kThreads == 0 && (BN * kCopiesPerRow) % kThreads == 0, "even copies");
  static_assert(kThreads % kCopiesPerRow == 0, "a thread copies one column of chunks");
  static_assert(kSharedBytes <= 232448, "shared memory of an SM");
};

template <typename C>
struct Accumulators {
  float d[C::kTilesM][C::kTilesN][4];
};

// Element (row, column) inside the block tile of accumulator d[i][j][e].
template <typename C>
struct TilePosition {
  int warp_row, warp_column, lane;
  __device__ __forceinline__ TilePosition() {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    warp_row = warp / C::WARPS_N * (C::BM / C::WARPS_M);
    warp_column = warp % C::WARPS_N * (C::BN / C::WARPS_N);
  }
  __device__ __forceinline__ int row(int i, int half) const { return warp_row + 16 * i + 8 * half + lane / 4; }
  __device__ __forceinline__ int column(int j) const { return warp_column + 8 * j + 2 * (lane % 4); }
};

// Ends with all warps past their last read of shared memory only after the caller's next __syncthreads.
// With p.early_start it waits for the preceding kernel before it reads A.
// Sums over part `split` of `splits` of K, cut at multiples of BK.
template <typename C, bool kGated = false>
__device__ __forceinline__ void compute_tile(const GemmParams& p, int64_t row0, int64_t column0, __nv_bfloat16* shared,
                                             Accumulators<C>& acc, int split = 0, int splits = 1) {
  constexpr int kRowsPerPass = C::kThreads / C::kCopiesPerRow;
  constexpr int kPassesA = C::BM / kRowsPerPass, kPassesW = C::BN / kRowsPerPass;
  const int copy_row = threadIdx.x / C::kCopiesPerRow;
  const int copy_column = threadIdx.x % C::kCopiesPerRow * 8;
  const int64_t source_k = p.k / p.num_sources;
  const int64_t all_tiles = (p.k + C::BK - 1) / C::BK;
  const int64_t first_tile = all_tiles * split / splits;
  const int num_tiles = static_cast<int>(all_tiles * (split + 1) / splits - first_tile);
  const int64_t first_column = first_tile * C::BK + copy_column;

  int64_t a_row[kPassesA];  // -1: dead
#pragma unroll
  for (int i = 0; i < kPassesA; ++i) {
    const int64_t row = row0 + copy_row + i * kRowsPerPass;
    a_row[i] = row < p.m && p.live.at(row) ? row : -1;
    if (p.a_rows != nullptr && a_row[i] >= 0) a_row[i] = p.a_rows[row];
  }

  // The source of A and the column in it that this thread copies next.
  int source = 0;
  int64_t source_column = first_column;
  int64_t a_column = first_column;
  auto copy_a = [&](int stage) {
    __nv_bfloat16* a_tile = shared + stage * C::kStageElements;
    while (source_column >= source_k && source < p.num_sources - 1) {
      source_column -= source_k;
      ++source;
    }
    const bool inside = a_column < p.k;
    const uint16_t* a = p.a[0];
    int64_t a_stride = p.a_stride[0];
#pragma unroll
    for (int s = 1; s < kMaxSources; ++s) {  // constant indices keep the pointers in the constant bank
      if (source == s) {
        a = p.a[s];
        a_stride = p.a_stride[s];
      }
    }
#pragma unroll
    for (int i = 0; i < kPassesA; ++i) {
      const int row = copy_row + i * kRowsPerPass;
      const bool read = inside && a_row[i] >= 0;
      const uint16_t* from = read ? a + a_row[i] * a_stride + source_column : p.w;
      copy_async_16(a_tile + row * C::kPitch + copy_column, from, read ? 16 : 0);
    }
    source_column += C::BK;
    a_column += C::BK;
  };
  int64_t w_column = first_column;
  auto copy_w = [&](int stage) {
    __nv_bfloat16* w_tile = shared + stage * C::kStageElements + C::BM * C::kPitch;
    const bool inside = w_column < p.k;
#pragma unroll
    for (int i = 0; i < kPassesW; ++i) {
      const int row = copy_row + i * kRowsPerPass;
      const bool read = inside && column0 + row < p.n;
      int64_t w_row = column0 + row;
      if (kGated) w_row = column0 / 2 + row / 16 * 8 + row % 8 + (row / 8 % 2 ? p.n / 2 : 0);
      const uint16_t* from = read ? p.w + w_row * p.k + w_column : p.w;
      copy_async_16(w_tile + row * C::kPitch + copy_column, from, read ? 16 : 0);
    }
    w_column += C::BK;
  };

#pragma unroll
  for (int i = 0; i < C::kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < C::kTilesN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc.d[i][j][e] = 0.0f;

  const TilePosition<C> at;
  if (p.early_start) {  // all of W's first stages, then the wait: they count as part of the first group
    for (int s = 0; s < C::kStages - 1; ++s) {
      if (s < num_tiles) copy_w(s);
    }
    grid_dependency_wait();
  }
  for (int s = 0; s < C::kStages - 1; ++s) {
    if (s < num_tiles) {
      copy_a(s);
      if (!p.early_start) copy_w(s);
    }
    copy_async_commit();  // an empty group where there is nothing to copy keeps the count
  }

  for (int tile = 0; tile < num_tiles; ++tile) {
    copy_async_wait<C::kStages - 2>();
    __syncthreads();
    if (tile + C::kStages - 1 < num_tiles) {
      copy_a((tile + C::kStages - 1) % C::kStages);
      copy_w((tile + C::kStages - 1) % C::kStages);
    }
    copy_async_commit();

    const __nv_bfloat16* a_tile = shared + tile % C::kStages * C::kStageElements;
    const __nv_bfloat16* w_tile = a_tile + C::BM * C::kPitch;
#pragma unroll
    for (int kk = 0; kk < C::BK; kk += 16) {
      // A: matrices (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 8-15).
      uint32_t a[C::kTilesM][4];
#pragma unroll
      for (int i = 0; i < C::kTilesM; ++i) {
        const int row = at.warp_row + 16 * i + at.lane % 16;
        load_matrix_x4(a[i], a_tile + row * C::kPitch + kk + at.lane / 16 * 8);
      }
      // W: matrices (n 0-7, k 0-7), (n 0-7, k 8-15), (n 8-15, k 0-7), (n 8-15, k 8-15): two n8 tiles at once.
#pragma unroll
      for (int j = 0; j < C::kTilesN; j += 2) {
        uint32_t b[4];
        const int row = at.warp_column + 8 * j + at.lane / 16 * 8 + at.lane % 8;
        load_matrix_x4(b, w_tile + row * C::kPitch + kk + at.lane / 8 % 2 * 8);
#pragma unroll
        for (int i = 0; i < C::kTilesM; ++i) {
          mma_m16n8k16(acc.d[i][j], a[i], b[0], b[1]);
          mma_m16n8k16(acc.d[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
}

}  // namespace dflash::gemm

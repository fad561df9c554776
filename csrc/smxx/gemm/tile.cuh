// The mainloop shared by the plain GEMM and the LM head: one [BM, BN] tile of A [M, K] * W [N, K]^T in fp32.
//
// Partition: WARPS_M x WARPS_N warps, each a [BM / WARPS_M, BN / WARPS_N] sub-tile of m16n8k16 products.
// Shared memory: kStages buffers, each A [BM, BK] then W [BN, BK], bf16. Rows are padded by 8 elements: the row pitch
// of 144 bytes (BK = 64) moves every row by 4 banks, so the 8 rows of an ldmatrix touch all 32 banks once. Pipeline:
// cp.async, kStages - 1 tiles of K in flight; one __syncthreads per K tile, which both publishes tile i and frees the
// buffer of tile i - 1 for the next copy. Edges: rows of A that are dead or beyond M and columns beyond a source of A
// are filled with zeros and not read; rows of W beyond N are copies of its first row, whose products nobody stores. A
// source takes whole steps of K and is a multiple of 8 elements wide, the width of one copy. Addresses: the inner loop
// adds a constant to one pointer for A and one for W; a copy adds its own 32-bit offset, in units of 16 bytes. Gated:
// the tile's columns alternate between eights of the first half of W's rows and of the second, so that a thread's
// accumulators d[i][j] (gate) and d[i][j + 1] (up), j even, belong to the same output column.
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
  static constexpr int kBytesA = BM * kPitch * 2, kStageBytes = kStageElements * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes;
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

// Steps of K that a source of A takes, at least one; the last may be partly beyond it.
template <typename C>
DFLASH_HOST_DEVICE int steps_of(int64_t source_k) {
  return source_k > C::BK ? static_cast<int>((source_k + C::BK - 1) / C::BK) : 1;
}

// Ends with all warps past their last read of shared memory only after the caller's next __syncthreads.
// With p.early_start it waits for the preceding kernel before it reads A.
// Sums over part `split` of `splits` of the steps of K.
template <typename C, bool kGated = false>
__device__ __forceinline__ void compute_tile(const GemmParams& p, int64_t row0, int64_t column0, __nv_bfloat16* shared,
                                             Accumulators<C>& acc, int split = 0, int splits = 1) {
  constexpr int kRowsPerPass = C::kThreads / C::kCopiesPerRow;
  constexpr int kPassesA = C::BM / kRowsPerPass, kPassesW = C::BN / kRowsPerPass;
  const int copy_row = threadIdx.x / C::kCopiesPerRow;
  const int copy_column = threadIdx.x % C::kCopiesPerRow * 8;
  const int64_t source_k = p.k / p.num_sources;
  const int steps_per_source = steps_of<C>(source_k);
  const int64_t all_steps = static_cast<int64_t>(steps_per_source) * p.num_sources;
  const int64_t first_step = all_steps * split / splits;
  const int num_steps = static_cast<int>(all_steps * (split + 1) / splits - first_step);
  const bool whole_end = copy_column < source_k - (steps_per_source - 1) * int64_t{C::BK};  // inside a last step too

  // What a thread copies lies at from + 16 bytes * offset; from moves along K, offsets stay: one register each.
  int32_t a_row[kPassesA];  // -1: dead
#pragma unroll
  for (int i = 0; i < kPassesA; ++i) {
    const int64_t row = row0 + copy_row + i * kRowsPerPass;
    a_row[i] = row < p.m && p.live.at(row) ? static_cast<int32_t>(row) : -1;
  }
  uint32_t w_offset[kPassesW];
#pragma unroll
  for (int i = 0; i < kPassesW; ++i) {
    const int row = copy_row + i * kRowsPerPass;
    int64_t w_row = column0 + row;
    if (kGated) w_row = column0 / 2 + row / 16 * 8 + row % 8 + (row / 8 % 2 ? p.n / 2 : 0);
    if (column0 + row >= p.n) w_row = 0;  // any: these columns are not stored
    w_offset[i] = static_cast<uint32_t>((w_row * p.k + copy_column) / 8);
  }

  int source = static_cast<int>(first_step / steps_per_source);
  const int first_in_source = static_cast<int>(first_step % steps_per_source);
  int a_left = steps_per_source - first_in_source, w_left = a_left;  // steps of the source, this one included
  const uint4* a_from;
  uint32_t a_offset[kPassesA];
  auto enter_source = [&](int step) {
    const uint16_t* a = p.a[0];
    int64_t a_stride = p.a_stride[0];
#pragma unroll
    for (int s = 1; s < kMaxSources; ++s) {  // constant indices keep the pointers in the constant bank
      if (source == s) {
        a = p.a[s];
        a_stride = p.a_stride[s];
      }
    }
    a_from = reinterpret_cast<const uint4*>(a) + step * (C::BK / 8);
#pragma unroll
    for (int i = 0; i < kPassesA; ++i) {
      a_offset[i] = a_row[i] < 0 ? 0 : static_cast<uint32_t>((a_row[i] * a_stride + copy_column) / 8);
    }
  };
  enter_source(first_in_source);
  const uint4* w_from = reinterpret_cast<const uint4*>(p.w + source * source_k) + first_in_source * (C::BK / 8);

  auto* const bytes = reinterpret_cast<unsigned char*>(shared);
  unsigned char* const copy_to = bytes + (copy_row * C::kPitch + copy_column) * 2;
  constexpr int kPassBytes = kRowsPerPass * C::kPitch * 2;
  auto copy_a = [&](int at) {
    const bool inside = a_left > 1 || whole_end;
#pragma unroll
    for (int i = 0; i < kPassesA; ++i) {
      copy_async_16(copy_to + at + i * kPassBytes, a_from + a_offset[i], inside && a_row[i] >= 0 ? 16 : 0);
    }
    a_from += C::BK / 8;
    if (--a_left == 0) {
      a_left = steps_per_source;
      if (++source < p.num_sources) enter_source(0);
    }
  };
  auto copy_w = [&](int at) {
    const bool inside = w_left > 1 || whole_end;
#pragma unroll
    for (int i = 0; i < kPassesW; ++i) {
      copy_async_16(copy_to + at + C::kBytesA + i * kPassBytes, w_from + w_offset[i], inside ? 16 : 0);
    }
    w_from += C::BK / 8;
    if (--w_left == 0) {
      w_left = steps_per_source;
      w_from += (source_k - steps_per_source * int64_t{C::BK}) / 8;  // back to where the next source begins
    }
  };

#pragma unroll
  for (int i = 0; i < C::kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < C::kTilesN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc.d[i][j][e] = 0.0f;

  if (p.early_start) {  // all of W's first stages, then the wait: they count as part of the first group
    for (int s = 0; s < C::kStages - 1; ++s) {
      if (s < num_steps) copy_w(s * C::kStageBytes);
    }
    grid_dependency_wait();
  }
  for (int s = 0; s < C::kStages - 1; ++s) {
    if (s < num_steps) {
      copy_a(s * C::kStageBytes);
      if (!p.early_start) copy_w(s * C::kStageBytes);
    }
    copy_async_commit();  // an empty group where there is nothing to copy keeps the count
  }

  // A: matrices (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 8-15).
  // W: matrices (n 0-7, k 0-7), (n 0-7, k 8-15), (n 8-15, k 0-7), (n 8-15, k 8-15): two n8 tiles at once.
  const TilePosition<C> at;
  const unsigned char* const a_read = bytes + ((at.warp_row + at.lane % 16) * C::kPitch + at.lane / 16 * 8) * 2;
  const unsigned char* const w_read =
      bytes + C::kBytesA + ((at.warp_column + at.lane / 16 * 8 + at.lane % 8) * C::kPitch + at.lane / 8 % 2 * 8) * 2;
  int read_at = 0, write_at = (C::kStages - 1) * C::kStageBytes;  // bytes of the stages
  for (int step = 0; step < num_steps; ++step) {
    copy_async_wait<C::kStages - 2>();
    __syncthreads();
    if (step + C::kStages - 1 < num_steps) {
      copy_a(write_at);
      copy_w(write_at);
    }
    copy_async_commit();

#pragma unroll
    for (int kk = 0; kk < C::BK; kk += 16) {
      uint32_t a[C::kTilesM][4];
#pragma unroll
      for (int i = 0; i < C::kTilesM; ++i) load_matrix_x4(a[i], a_read + read_at + (16 * i * C::kPitch + kk) * 2);
#pragma unroll
      for (int j = 0; j < C::kTilesN; j += 2) {
        uint32_t b[4];
        load_matrix_x4(b, w_read + read_at + (8 * j * C::kPitch + kk) * 2);
#pragma unroll
        for (int i = 0; i < C::kTilesM; ++i) {
          mma_m16n8k16(acc.d[i][j], a[i], b[0], b[1]);
          mma_m16n8k16(acc.d[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
    write_at = read_at;
    read_at = read_at == (C::kStages - 1) * C::kStageBytes ? 0 : read_at + C::kStageBytes;
  }
}

}  // namespace dflash::gemm

// Tile shapes of the LM head by number of rows, and the part of the epilogue that argmax and top-k share.
//
// 128 columns a block for every shape. Two blocks fit an SM and keep 2 * (stages - 1) * 16 KB = 64..96 KB of weights in
// flight there, several times what latency times bandwidth asks for. A tile of all rows (N <= 128) reads each weight
// once.
#pragma once

#include "smxx/gemm/tile.cuh"
#include "smxx/head/params.h"
#include "smxx/head/tile_key.cuh"

namespace dflash::head {

using Rows16 = gemm::TileConfig<16, kTileColumns, 1, 4, 4>;
using Rows32 = gemm::TileConfig<32, kTileColumns, 1, 4, 4>;
using Rows64 = gemm::TileConfig<64, kTileColumns, 2, 4, 4>;
using Rows128 = gemm::TileConfig<128, kTileColumns, 2, 4, 3>;

constexpr int kBlocksPerSm = 2;

// Key of accumulator (i, half, j, e) of this thread, 0 beyond the vocabulary.
template <typename C>
__device__ __forceinline__ uint32_t accumulator_key(const gemm::GemmParams& p, const gemm::Accumulators<C>& acc,
                                                    const gemm::TilePosition<C>& at, int64_t column0, int i, int half,
                                                    int j, int e) {
  const int column = at.column(j) + e;
  if (column0 + column >= p.n) return 0;
  float logit = acc.d[i][j][2 * half + e];
  if (p.bias != nullptr) {
    logit += __bfloat162float(__ushort_as_bfloat16(p.bias[column0 + column]));
  }
  return tile_key(logit, column);
}

}  // namespace dflash::head

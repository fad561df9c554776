// C = A * W^T (+ bias) (+ residual | gating) in bf16 with fp32 accumulation; see params.h for the exact rounding.
//
// Grid: x over M tiles, y over N tiles, z over parts of K. Blocks that share a tile of W run side by side, so W comes
// from DRAM once. What bounds a decode step (M <= 128) is the stream of W, and beside DRAM the path from L2 to the SMs,
// which carries W and A once for every tile: tiles are as wide as M is tall, so that A adds at most as much as W. That
// leaves few tiles: K is then cut over a cluster of up to 8 blocks, which add their accumulators through distributed
// shared memory, in a fixed order. Each SM keeps at least 32 KB of W in flight.
#include <cooperative_groups.h>

#include "common/bf16_pairs.cuh"
#include "common/cuda_check.h"
#include "common/dependent_launch.cuh"
#include "common/device.h"
#include "sm100/gemm/launch.h"
#include "sm90/gemm/launch.h"
#include "smxx/gemm/launch.h"
#include "smxx/gemm/tile.cuh"

namespace dflash::gemm {
namespace {

namespace cg = cooperative_groups;

using Rows16 = TileConfig<16, 32, 1, 2, 10>;
using Rows16Wide = TileConfig<16, 64, 1, 4, 6>;
using Rows64 = TileConfig<64, 64, 2, 2, 5>;
using Rows64Wide = TileConfig<64, 128, 2, 2, 4>;
using Rows128 = TileConfig<128, 128, 2, 2, 3>;

constexpr int kMaxSplits = 8;  // the portable size of a cluster
// Blocks that splitting aims at, at most: three an SM with 16 rows, whose few warps leave schedulers idle otherwise;
// else a little more than there are SMs.
template <typename C>
constexpr int64_t kOneWave = C::BM == 16 ? 396 : 160;
constexpr int64_t kMinTilesK = 8;  // steps of K that a part keeps, so that its pipeline fills
// More rows than these go to smxx/many_rows: measured for wgmma; for tcgen05 from what mma.sync gives beside it, and
// that is published only (bench/NOTES.md).
[[maybe_unused]] constexpr int64_t kTensorCoreRows = 32;
constexpr int64_t kWideTiles = 256;  // 64-column tiles from which 16 rows take them: two a SM

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// Gate and up of two neighbouring columns, both already biased.
__device__ __forceinline__ __nv_bfloat162 gated_pair(float2 gate, float2 up) {
  gate = __bfloat1622float2(__float22bfloat162_rn(gate));
  up = __bfloat1622float2(__float22bfloat162_rn(up));
  return __float22bfloat162_rn(make_float2(silu(gate.x) * up.x, silu(gate.y) * up.y));
}

// Two accumulators d[i][j], d[i][j + 1], j even, are one unit: gate and up of the same columns when gated.
template <typename C>
__device__ __forceinline__ int unit_of(int i, int j) {
  return i * (C::kTilesN / 2) + j / 2;
}

// Adds up the accumulators of a cluster: rank r ends with the sums of the units u with u % size == r, the other units
// keep partial sums. [unit accumulator, thread] float4, so that neighbouring threads touch neighbouring 16 bytes.
template <typename C>
__device__ __forceinline__ void reduce_over_cluster(Accumulators<C>& acc, unsigned char* shared_bytes) {
  static_assert(C::kTilesM * C::kTilesN * C::kThreads * 16 <= C::kSharedBytes, "the accumulators fit the pipeline");
  const cg::cluster_group cluster = cg::this_cluster();
  const int size = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  auto* mine = reinterpret_cast<float4*>(shared_bytes) + threadIdx.x;
  __syncthreads();  // all warps are past their last read of the pipeline's buffers
#pragma unroll
  for (int i = 0; i < C::kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < C::kTilesN; ++j) {
      const float (&d)[4] = acc.d[i][j];
      mine[(i * C::kTilesN + j) * C::kThreads] = make_float4(d[0], d[1], d[2], d[3]);
    }
  cluster.sync();
#pragma unroll
  for (int i = 0; i < C::kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < C::kTilesN; ++j) {
      if (unit_of<C>(i, j) % size != rank) continue;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int other = 0; other < size; ++other) {
        const float4 part = *cluster.map_shared_rank(mine + (i * C::kTilesN + j) * C::kThreads, other);
        sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
      }
      acc.d[i][j][0] = sum.x;
      acc.d[i][j][1] = sum.y;
      acc.d[i][j][2] = sum.z;
      acc.d[i][j][3] = sum.w;
    }
  cluster.sync();  // nobody leaves while its shared memory is being read
}

template <typename C, bool kGated>
__global__ void __launch_bounds__(C::kThreads) gemm_bf16_kernel(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * C::BM;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * C::BN;
  const int split = static_cast<int>(blockIdx.z), splits = static_cast<int>(gridDim.z);
  grid_dependency_launch();

  // A tile of dead rows only has nothing to do; that holds for the whole cluster.
  if (p.live.commit_lens.data != nullptr) {
    if (p.early_start) grid_dependency_wait();
    bool any = false;
    for (int i = threadIdx.x; i < C::BM; i += C::kThreads) any |= row0 + i < p.m && p.live.at(row0 + i);
    if (!__syncthreads_or(any)) return;
  }

  Accumulators<C> acc;
  compute_tile<C, kGated>(p, row0, column0, reinterpret_cast<__nv_bfloat16*>(shared_bytes), acc, split, splits);
  if (splits > 1) reduce_over_cluster<C>(acc, shared_bytes);

  const TilePosition<C> at;
  // C may be the residual, so that no load moves over a store: all loads come first.
  uint32_t residual[C::kTilesM][2][C::kTilesN];
  if constexpr (!kGated) {
    if (p.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < C::kTilesM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = row0 + at.row(i, half);
          const bool live = row < p.m && p.live.at(row);
#pragma unroll
          for (int j = 0; j < C::kTilesN; ++j) {
            const int64_t column = column0 + at.column(j);
            residual[i][half][j] = 0;
            if (live && column < p.n && (splits == 1 || unit_of<C>(i, j) % splits == split)) {
              residual[i][half][j] = *reinterpret_cast<const uint32_t*>(p.residual + row * p.residual_stride + column);
            }
          }
        }
    }
  }
#pragma unroll
  for (int i = 0; i < C::kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + at.row(i, half);
      if (row >= p.m || !p.live.at(row)) continue;
      uint16_t* const c = p.c + (p.c_rows == nullptr ? row : p.c_rows[row]) * p.c_stride;
#pragma unroll
      for (int j = 0; j < C::kTilesN; j += kGated ? 2 : 1) {
        if (splits > 1 && unit_of<C>(i, j) % splits != split) continue;
        float2 value = make_float2(acc.d[i][j][2 * half], acc.d[i][j][2 * half + 1]);
        if constexpr (kGated) {
          // Tile column 16 q + r, r < 8, is output column 8 q + r.
          const int64_t column = column0 / 2 + (at.warp_column + 8 * j) / 2 + 2 * (at.lane % 4);
          if (column >= p.n / 2) continue;
          float2 up = make_float2(acc.d[i][j + 1][2 * half], acc.d[i][j + 1][2 * half + 1]);
          if (p.bias != nullptr) {
            const float2 gate_bias = load_pair(p.bias + column), up_bias = load_pair(p.bias + p.n / 2 + column);
            value = make_float2(value.x + gate_bias.x, value.y + gate_bias.y);
            up = make_float2(up.x + up_bias.x, up.y + up_bias.y);
          }
          *reinterpret_cast<__nv_bfloat162*>(c + column) = gated_pair(value, up);
        } else {
          const int64_t column = column0 + at.column(j);
          if (column >= p.n) continue;  // N is even: pairs never straddle the edge
          if (p.bias != nullptr) {
            const float2 bias = load_pair(p.bias + column);
            value.x += bias.x;
            value.y += bias.y;
          }
          __nv_bfloat162 out = __float22bfloat162_rn(value);
          if (p.residual != nullptr) {
            const float2 rounded = __bfloat1622float2(out);
            const float2 add = pair_of(residual[i][half][j]);
            out = __float22bfloat162_rn(make_float2(rounded.x + add.x, rounded.y + add.y));
          }
          *reinterpret_cast<__nv_bfloat162*>(c + column) = out;
        }
      }
    }
  }
}

int64_t likely_rows(const GemmParams& p) { return p.expected_live > 0 ? p.expected_live : p.m; }

// Tiles with a live row, likely.
template <typename C>
int64_t num_tiles(const GemmParams& p) {
  return (likely_rows(p) + C::BM - 1) / C::BM * ((p.n + C::BN - 1) / C::BN);
}

// Parts of K, a power of two.
template <typename C>
int num_splits(const GemmParams& p) {
  const int64_t tiles = num_tiles<C>(p), tiles_k = int64_t{p.num_sources} * steps_of<C>(p.k / p.num_sources);
  int splits = 1;
  while (2 * splits <= kMaxSplits && tiles * 2 * splits <= kOneWave<C> && tiles_k / (2 * splits) >= kMinTilesK)
    splits *= 2;
  return splits;
}

template <typename C, bool kGated>
void launch(const GemmParams& p, cudaStream_t stream) {
  if (C::kSharedBytes > 48 * 1024) {
    cuda_check(
        cudaFuncSetAttribute(gemm_bf16_kernel<C, kGated>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
        "gemm_bf16");
  }
  const auto splits = static_cast<unsigned>(num_splits<C>(p));
  const dim3 grid(static_cast<unsigned>((p.m + C::BM - 1) / C::BM), static_cast<unsigned>((p.n + C::BN - 1) / C::BN),
                  splits);
  launch_cluster_kernel(gemm_bf16_kernel<C, kGated>, grid, C::kThreads, C::kSharedBytes, splits, stream, p.early_start,
                        "gemm_bf16", p);
}

template <typename C>
void launch(const GemmParams& p, cudaStream_t stream) {
  if (p.gated) {
    launch<C, true>(p, stream);
  } else {
    launch<C, false>(p, stream);
  }
}

}  // namespace

void launch_gemm_bf16(const GemmParams& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return;
  const int64_t rows = likely_rows(p);
  if (p.m > kTensorCoreRows) {
    [[maybe_unused]] const Device device = current_device("gemm_bf16");
#if DFLASH_WITH_SM90
    if (device.major == 9 && sm90::gemm::launch_gemm_bf16(p, device.num_sms, stream)) return;
#endif
#if DFLASH_WITH_SM100
    if (device.major == 10 && sm100::gemm::launch_gemm_bf16(p, device.num_sms, stream)) return;
#endif
  }
  if (rows <= 16) {
    return num_tiles<Rows16Wide>(p) >= kWideTiles ? launch<Rows16Wide>(p, stream) : launch<Rows16>(p, stream);
  }
  // The widest tile that, with K cut, still gives most SMs a block.
  constexpr int64_t kEnough = 80;
  if (rows > 64 && num_tiles<Rows128>(p) * num_splits<Rows128>(p) >= kEnough) return launch<Rows128>(p, stream);
  if (num_tiles<Rows64Wide>(p) * num_splits<Rows64Wide>(p) >= kEnough) return launch<Rows64Wide>(p, stream);
  launch<Rows64>(p, stream);
}

}  // namespace dflash::gemm

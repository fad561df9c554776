// C = A * W^T (+ bias) (+ residual | gating) in bf16 with fp32 accumulation; see params.h for the exact rounding.
//
// Grid: x over M tiles, y over N tiles: blocks that share a tile of W run side by side, so W comes from DRAM once.
// M <= 64 (a decode step: B * T rows) takes tiles of 32 columns, because N / 32 blocks are what keeps all SMs reading
// weights, and deep pipelines: N = 4096 gives about one block an SM, which alone must keep 36 KB of W in flight.
// Larger M takes 64 x 64 tiles, or 128 x 128 where there are enough of them to fill the machine: four times the reuse
// per byte read from L2.
#include "common/cuda_check.h"
#include "common/dependent_launch.cuh"
#include "smxx/gemm/launch.h"
#include "smxx/gemm/tile.cuh"

namespace dflash::gemm {
namespace {

using SmallM = TileConfig<16, 32, 1, 2, 10>;
using MediumM = TileConfig<64, 32, 2, 2, 7>;
using LargeM = TileConfig<64, 64, 2, 2, 4>;
using HugeM = TileConfig<128, 128, 2, 4, 3>;

constexpr int64_t kHugeTiles = 96;  // 128 x 128 tiles that make HugeM worth while: most of the SMs have one

__device__ __forceinline__ float2 load_pair(const uint16_t* from) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// Gate and up of two neighbouring columns, both already biased.
__device__ __forceinline__ __nv_bfloat162 gated_pair(float2 gate, float2 up) {
  gate = __bfloat1622float2(__float22bfloat162_rn(gate));
  up = __bfloat1622float2(__float22bfloat162_rn(up));
  return __float22bfloat162_rn(make_float2(silu(gate.x) * up.x, silu(gate.y) * up.y));
}

template <typename C, bool kGated>
__global__ void __launch_bounds__(C::kThreads) gemm_bf16_kernel(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * C::BM;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * C::BN;
  grid_dependency_launch();

  // A tile of dead rows only has nothing to do.
  if (p.live.commit_lens.data != nullptr) {
    if (p.early_start) grid_dependency_wait();
    bool any = false;
    for (int i = threadIdx.x; i < C::BM; i += C::kThreads) any |= row0 + i < p.m && p.live.at(row0 + i);
    if (!__syncthreads_or(any)) return;
  }

  Accumulators<C> acc;
  compute_tile<C, kGated>(p, row0, column0, reinterpret_cast<__nv_bfloat16*>(shared_bytes), acc);

  const TilePosition<C> at;
#pragma unroll
  for (int i = 0; i < C::kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + at.row(i, half);
      if (row >= p.m || !p.live.at(row)) continue;
#pragma unroll
      for (int j = 0; j < C::kTilesN; j += kGated ? 2 : 1) {
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
          *reinterpret_cast<__nv_bfloat162*>(p.c + row * p.c_stride + column) = gated_pair(value, up);
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
            const float2 residual = load_pair(p.residual + row * p.residual_stride + column);
            out = __float22bfloat162_rn(make_float2(rounded.x + residual.x, rounded.y + residual.y));
          }
          *reinterpret_cast<__nv_bfloat162*>(p.c + row * p.c_stride + column) = out;
        }
      }
    }
  }
}

template <typename C, bool kGated>
void launch(const GemmParams& p, cudaStream_t stream) {
  if (C::kSharedBytes > 48 * 1024) {
    cuda_check(
        cudaFuncSetAttribute(gemm_bf16_kernel<C, kGated>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
        "gemm_bf16");
  }
  const dim3 grid(static_cast<unsigned>((p.m + C::BM - 1) / C::BM), static_cast<unsigned>((p.n + C::BN - 1) / C::BN));
  launch_kernel(gemm_bf16_kernel<C, kGated>, grid, C::kThreads, C::kSharedBytes, stream, p.early_start, "gemm_bf16", p);
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
  const int64_t m = p.expected_live > 0 ? p.expected_live : p.m;
  const int64_t huge_tiles = (m + HugeM::BM - 1) / HugeM::BM * ((p.n + HugeM::BN - 1) / HugeM::BN);
  if (m <= 16) {
    launch<SmallM>(p, stream);
  } else if (m <= 64) {
    launch<MediumM>(p, stream);
  } else if (m <= 128 || huge_tiles < kHugeTiles) {
    launch<LargeM>(p, stream);
  } else {
    launch<HugeM>(p, stream);
  }
}

}  // namespace dflash::gemm

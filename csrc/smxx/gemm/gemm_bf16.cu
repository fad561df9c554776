// C = A * W^T (+ bias) (+ residual) in bf16 with fp32 accumulation; see params.h for the exact rounding.
//
// Grid: x over N tiles, y over M tiles. M <= 64 (a decode step: B * T rows) takes narrow 64 x 32 tiles, because N / 32
// blocks are what keeps all SMs reading weights; larger M takes 64 x 64 tiles, four times the reuse per byte read
// from L2. Deeper tuning belongs to the arch-specific kernels.
#include "common/cuda_check.h"
#include "smxx/gemm/launch.h"
#include "smxx/gemm/tile.cuh"

namespace dflash::gemm {
namespace {

using SmallM = TileConfig<16, 32, 1, 2, 4>;
using MediumM = TileConfig<64, 32, 2, 2, 4>;
using LargeM = TileConfig<64, 64, 2, 2, 3>;

__device__ __forceinline__ float2 load_pair(const uint16_t* from) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads) gemm_bf16_kernel(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * C::BM;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * C::BN;

  // A tile of dead rows only has nothing to do.
  bool any = false;
  for (int i = threadIdx.x; i < C::BM; i += C::kThreads) any |= row0 + i < p.m && p.live.at(row0 + i);
  if (!__syncthreads_or(any)) return;

  Accumulators<C> acc;
  compute_tile<C>(p, row0, column0, reinterpret_cast<__nv_bfloat16*>(shared_bytes), acc);

  const TilePosition<C> at;
#pragma unroll
  for (int i = 0; i < C::kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + at.row(i, half);
      if (row >= p.m || !p.live.at(row)) continue;
#pragma unroll
      for (int j = 0; j < C::kTilesN; ++j) {
        const int64_t column = column0 + at.column(j);
        if (column >= p.n) continue;  // N is even: pairs never straddle the edge
        float2 value = make_float2(acc.d[i][j][2 * half], acc.d[i][j][2 * half + 1]);
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

template <typename C>
void launch(const GemmParams& p, cudaStream_t stream) {
  if (C::kSharedBytes > 48 * 1024) {
    cuda_check(cudaFuncSetAttribute(gemm_bf16_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
               "gemm_bf16");
  }
  const dim3 grid(static_cast<unsigned>((p.n + C::BN - 1) / C::BN), static_cast<unsigned>((p.m + C::BM - 1) / C::BM));
  gemm_bf16_kernel<C><<<grid, C::kThreads, C::kSharedBytes, stream>>>(p);
  cuda_check_launch("gemm_bf16");
}

}  // namespace

void launch_gemm_bf16(const GemmParams& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return;
  if (p.m <= 16) {
    launch<SmallM>(p, stream);
  } else if (p.m <= 64) {
    launch<MediumM>(p, stream);
  } else {
    launch<LargeM>(p, stream);
  }
}

}  // namespace dflash::gemm

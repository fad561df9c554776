// RMSNorm over rows; see params.h for the formula. One block a row, two elements a thread and pass.
#include <cuda_bf16.h>

#include "common/dependent_launch.cuh"
#include "smxx/norm/launch.h"

namespace dflash::norm {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) rmsnorm_kernel(const __grid_constant__ RmsNormParams p) {
  __shared__ float partial[kThreads / 32];
  const int64_t row = blockIdx.x;
  grid_dependency_launch();
  grid_dependency_wait();
  if (!p.live.at(row)) return;
  const auto* x = reinterpret_cast<const __nv_bfloat162*>(p.x + row * p.x_stride);
  const auto* weight = reinterpret_cast<const __nv_bfloat162*>(p.weight);
  auto* out = reinterpret_cast<__nv_bfloat162*>(p.out + row * p.out_stride);
  const int pairs = static_cast<int>(p.n / 2), part_pairs = pairs / p.parts;
  const auto load = [&](int i) {
    if (p.parts == 1) return __bfloat1622float2(x[i]);
    return __bfloat1622float2(x[i / part_pairs * (p.part_stride / 2) + i % part_pairs]);
  };

  float sum = 0.0f;
  for (int i = threadIdx.x; i < pairs; i += kThreads) {
    const float2 v = load(i);
    sum += v.x * v.x + v.y * v.y;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) total += partial[w];
  const float scale = rsqrtf(total / static_cast<float>(p.n) + p.eps);

  // In place is safe: a thread rewrites only the elements it reads.
  for (int i = threadIdx.x; i < pairs; i += kThreads) {
    float2 v = load(i);
    v.x *= scale;
    v.y *= scale;
    if (p.round_before_weight) v = __bfloat1622float2(__float22bfloat162_rn(v));
    const float2 g = __bfloat1622float2(weight[i]);
    out[i] = __float22bfloat162_rn(make_float2(v.x * g.x, v.y * g.y));
  }
}

}  // namespace

void launch_rmsnorm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.m == 0) return;
  launch_kernel(rmsnorm_kernel, dim3(static_cast<unsigned>(p.m)), kThreads, 0, stream, p.early_start, "rmsnorm", p);
}

}  // namespace dflash::norm

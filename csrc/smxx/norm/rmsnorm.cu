// RMSNorm over rows; see params.h for the formula. One block a row.
//
// Up to 8192 columns, 16 bytes at a time where addresses allow it: a thread holds its weights before it waits for the
// preceding kernel, then its part of the row, all of it under way at once: one trip to memory, one barrier. Other rows
// are read twice, two elements a thread and pass. Held rows may go to e4m3: a second barrier gives their largest
// magnitude, and a third of the stores and of the next kernel's loads is saved, with the launch of a kernel that
// quantises (csrc/smxx/quantize). Floor: 3 M N bytes at the rate of L2, as there.
#include <cuda_bf16.h>

#include <initializer_list>

#include "common/dependent_launch.cuh"
#include "smxx/norm/launch.h"
#include "smxx/quantize/rows.cuh"

namespace dflash::norm {
namespace {

constexpr int kThreads = 256;
constexpr int kMostVectors = 4;  // 16-byte parts of a row that a thread holds
static_assert(kMaxHeldColumns == 8 * kThreads * kMostVectors);

// Elements from the start of a row.
__device__ __forceinline__ int64_t place(const RmsNormParams& p, int column, int part_columns) {
  return p.parts == 1 ? column : column / part_columns * p.part_stride + column % part_columns;
}

__device__ __forceinline__ float scale_of_row(const RmsNormParams& p, float sum) {
  __shared__ float partial[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) total += partial[w];
  return rsqrtf(total / static_cast<float>(p.n) + p.eps);
}

__device__ __forceinline__ __nv_bfloat162 normed(const RmsNormParams& p, __nv_bfloat162 x, float scale,
                                                 __nv_bfloat162 weight) {
  float2 v = __bfloat1622float2(x);
  v.x *= scale;
  v.y *= scale;
  if (p.round_before_weight) v = __bfloat1622float2(__float22bfloat162_rn(v));
  const float2 g = __bfloat1622float2(weight);
  return __float22bfloat162_rn(make_float2(v.x * g.x, v.y * g.y));
}

// In place is safe in both kernels: a thread rewrites only the elements it reads.
__global__ void __launch_bounds__(kThreads) rmsnorm_kernel(const __grid_constant__ RmsNormParams p) {
  const int64_t row = blockIdx.x;
  grid_dependency_launch();
  grid_dependency_wait();
  if (!p.live.at(row)) return;
  const uint16_t* x = p.x + row * p.x_stride;
  const auto* weight = reinterpret_cast<const __nv_bfloat162*>(p.weight);
  auto* out = reinterpret_cast<__nv_bfloat162*>(p.out + row * p.out_stride);
  const int pairs = static_cast<int>(p.n / 2), part_columns = static_cast<int>(p.n / p.parts);
  const auto load = [&](int i) { return *reinterpret_cast<const __nv_bfloat162*>(x + place(p, 2 * i, part_columns)); };

  float sum = 0.0f;
  for (int i = threadIdx.x; i < pairs; i += kThreads) {
    const float2 v = __bfloat1622float2(load(i));
    sum += v.x * v.x + v.y * v.y;
  }
  const float scale = scale_of_row(p, sum);
  for (int i = threadIdx.x; i < pairs; i += kThreads) out[i] = normed(p, load(i), scale, weight[i]);
}

template <int kVectors, bool kQuantize>
__global__ void __launch_bounds__(kThreads) held_rmsnorm_kernel(const __grid_constant__ RmsNormParams p) {
  const int64_t row = blockIdx.x;
  grid_dependency_launch();
  const int columns = static_cast<int>(p.n), part_columns = columns / p.parts;
  uint4 weight[kVectors], x[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = 8 * (i * kThreads + static_cast<int>(threadIdx.x));
    weight[i] = make_uint4(0, 0, 0, 0);
    if (column < columns) weight[i] = *reinterpret_cast<const uint4*>(p.weight + column);
  }
  grid_dependency_wait();
  if (!p.live.at(row)) return;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = 8 * (i * kThreads + static_cast<int>(threadIdx.x));
    x[i] = make_uint4(0, 0, 0, 0);
    if (column >= columns) continue;
    x[i] = *reinterpret_cast<const uint4*>(p.x + row * p.x_stride + place(p, column, part_columns));
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&x[i]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 v = __bfloat1622float2(pairs[e]);
      sum += v.x * v.x + v.y * v.y;
    }
  }
  const float scale = scale_of_row(p, sum);
  __nv_bfloat162 largest = __float2bfloat162_rn(0.0f);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = 8 * (i * kThreads + static_cast<int>(threadIdx.x));
    if (column >= columns) continue;
    auto* pairs = reinterpret_cast<__nv_bfloat162*>(&x[i]);
    const auto* weights = reinterpret_cast<const __nv_bfloat162*>(&weight[i]);
#pragma unroll
    for (int e = 0; e < 4; ++e) pairs[e] = normed(p, pairs[e], scale, weights[e]);
    if (kQuantize) {
      largest = quantize::largest_of(x[i], largest);
    } else {
      *reinterpret_cast<uint4*>(p.out + row * p.out_stride + column) = x[i];
    }
  }
  if (!kQuantize) return;
  __shared__ float partial[kThreads / 32];
  const RowScale codes = row_scale(quantize::largest_of_block(largest, partial));
  if (threadIdx.x == 0) p.row_scales[row] = codes.scale;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = 8 * (i * kThreads + static_cast<int>(threadIdx.x));
    if (column >= columns) continue;
    *reinterpret_cast<uint2*>(p.codes + row * columns + column) = quantize::codes_of(x[i], codes.inverse);
  }
}

// Columns fit the registers of a block, and every 16 bytes lie in one part and at a multiple of 16 bytes.
bool is_held(const RmsNormParams& p) {
  for (const void* start :
       {static_cast<const void*>(p.x), static_cast<const void*>(p.weight), static_cast<const void*>(p.out)}) {
    if (reinterpret_cast<uintptr_t>(start) % 16 != 0) return false;
  }
  return p.n <= 8 * kThreads * kMostVectors && p.n % (8 * p.parts) == 0 && p.x_stride % 8 == 0 &&
         p.part_stride % 8 == 0 && p.out_stride % 8 == 0;
}

}  // namespace

void launch_rmsnorm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.m == 0) return;
  const bool small = p.n <= 8 * kThreads * 2;
  const auto held = p.codes != nullptr
                        ? (small ? held_rmsnorm_kernel<2, true> : held_rmsnorm_kernel<kMostVectors, true>)
                        : (small ? held_rmsnorm_kernel<2, false> : held_rmsnorm_kernel<kMostVectors, false>);
  const auto kernel = p.codes != nullptr || is_held(p) ? held : rmsnorm_kernel;
  launch_kernel(kernel, dim3(static_cast<unsigned>(p.m)), kThreads, 0, stream, p.early_start, "rmsnorm", p);
}

}  // namespace dflash::norm

// The live tokens of a batch of blocks, listed and their taps put together, so that the GEMMs after it see full tiles
// of live rows and load them by TMA (which cannot follow a list).
//
// Floor: M * K * W * 2 bytes read, and written into L2: at 208 rows of 20480 columns 8.5 MB each, some 4 us.
//
// Partition: a warp takes parts of kPart columns of one token's tap, in turn over the grid: 8 x 16 bytes a lane, all
// loaded before the first store. With norms it takes all of a tap, twice: once for the squares, then from L1. How many
// tokens are live nobody knows at the launch, so that every block first adds up the commit lengths, thread t those of
// requests t * kEach ..; a token's request is then found by bisection.
#include <algorithm>

#include "common/bf16_pairs.cuh"
#include "common/cuda_check.h"
#include "common/dependent_launch.cuh"
#include "smxx/inject/gather.h"

namespace dflash::inject {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = kMaxGatherRequests / kThreads;
constexpr int kLoads = 8;                // of 16 bytes, a lane
constexpr int kPart = 32 * kLoads * 8;   // columns
constexpr int64_t kMaxBlocks = 3 * 132;  // some for every SM of any card; more tokens are taken in turn

__device__ __forceinline__ float squares(uint32_t bits) {
  const float2 x = pair_of(bits);
  return x.x * x.x + x.y * x.y;
}

__device__ __forceinline__ uint32_t normed(uint32_t bits, float scale, uint32_t weight) {
  const float2 x = pair_of(bits), w = pair_of(weight);
  return rounded(make_float2(x.x * scale * w.x, x.y * scale * w.y));
}

template <bool kNorm>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherParams p) {
  __shared__ int first_of[kMaxGatherRequests];  // live tokens of the requests before
  __shared__ int warp_sums[kThreads / 32];
  grid_dependency_launch();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block_size = static_cast<int>(p.live.rows_per_request);

  int length[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int b = static_cast<int>(threadIdx.x) * kEach + i;
    length[i] = 0;
    if (b < p.batch) {
      const int64_t wanted = p.live.commit_lens.data == nullptr ? block_size : p.live.commit_lens.at(b);
      length[i] = static_cast<int>(wanted < 0 ? 0 : wanted > block_size ? block_size : wanted);
    }
    sum += length[i];
  }
  int through = sum;  // inclusive scan of the warp
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, through, offset);
    if (lane >= offset) through += other;
  }
  if (lane == 31) warp_sums[warp] = through;
  __syncthreads();
  int at = through - sum, total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) at += warp_sums[w];
    total += warp_sums[w];
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int b = static_cast<int>(threadIdx.x) * kEach + i;
    if (b < p.batch) first_of[b] = at;
    at += length[i];
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.count = total;
  __syncthreads();

  const int parts = kNorm ? 1 : (p.width + kPart - 1) / kPart, per_row = p.num_taps * parts;
  const int warps = static_cast<int>(gridDim.x) * (kThreads / 32);
  const int64_t items = static_cast<int64_t>(total) * per_row;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp; item < items; item += warps) {
    const int row = static_cast<int>(item / per_row), rest = static_cast<int>(item % per_row);
    const int tap = rest / parts, part = rest % parts;
    int request = 0, end = p.batch;  // the last one with first_of[request] <= row is in [request, end)
    while (end - request > 1) {
      const int middle = (request + end) / 2;
      if (first_of[middle] <= row) {
        request = middle;
      } else {
        end = middle;
      }
    }
    const int64_t token = static_cast<int64_t>(request) * block_size + (row - first_of[request]);
    if (rest == 0 && lane == 0) p.order[row] = static_cast<int32_t>(token);
    const uint16_t* from = p.taps[0];
    int64_t stride = p.tap_stride[0];
#pragma unroll
    for (int s = 1; s < kMaxTaps; ++s) {  // constant indices keep the pointers in the constant bank
      if (tap == s) {
        from = p.taps[s];
        stride = p.tap_stride[s];
      }
    }
    from += token * stride;
    uint16_t* to = p.rows + (static_cast<int64_t>(row) * p.num_taps + tap) * p.width;
    if constexpr (kNorm) {
      float sum = 0.0f;
#pragma unroll 4
      for (int column = lane * 8; column < p.width; column += 256) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + column);
        sum += squares(v.x) + squares(v.y) + squares(v.z) + squares(v.w);
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      const float scale = rsqrtf(sum / static_cast<float>(p.width) + p.eps);
      const uint16_t* weight = p.norm + static_cast<int64_t>(tap) * p.width;
#pragma unroll 4
      for (int column = lane * 8; column < p.width; column += 256) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + column);
        const uint4 w = *reinterpret_cast<const uint4*>(weight + column);
        *reinterpret_cast<uint4*>(to + column) = make_uint4(normed(v.x, scale, w.x), normed(v.y, scale, w.y),
                                                            normed(v.z, scale, w.z), normed(v.w, scale, w.w));
      }
    } else {
      uint4 value[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int column = part * kPart + (i * 32 + lane) * 8;
        if (column < p.width) value[i] = *reinterpret_cast<const uint4*>(from + column);
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int column = part * kPart + (i * 32 + lane) * 8;
        if (column < p.width) *reinterpret_cast<uint4*>(to + column) = value[i];
      }
    }
  }
}

}  // namespace

void launch_gather(const GatherParams& p, cudaStream_t stream) {
  const int64_t items = p.batch * p.live.rows_per_request * p.num_taps * ((p.width + kPart - 1) / kPart);
  const auto blocks = static_cast<unsigned>(std::min((items + kThreads / 32 - 1) / (kThreads / 32), kMaxBlocks));
  if (p.norm != nullptr) {
    gather_kernel<true><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    gather_kernel<false><<<blocks, kThreads, 0, stream>>>(p);
  }
  cuda_check_launch("inject_kv");
}

}  // namespace dflash::inject

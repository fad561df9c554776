// The drafter's small kernels: embedding gather, per-head norm + rotation, index checks.
#include <cuda_bf16.h>

#include "common/dependent_launch.cuh"
#include "smxx/draft/launch.h"

namespace dflash::draft {
namespace {

constexpr int kEmbedThreads = 128;
constexpr int kRotateWarps = 4;
constexpr int kMaxHeadDim = 256;
constexpr int kCheckThreads = 64;

__device__ __forceinline__ float to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

__device__ __forceinline__ uint16_t to_bf16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// One block a token, 16 bytes a thread and pass.
__global__ void __launch_bounds__(kEmbedThreads) embed_kernel(const __grid_constant__ EmbedParams p) {
  const int64_t token = blockIdx.x;
  grid_dependency_launch();
  const int64_t id = p.ids.at(token / p.block_size, token % p.block_size);
  const bool known = id >= 0 && id < p.vocab;
  const auto* from = reinterpret_cast<const uint4*>(p.embed_weight + (known ? id : 0) * p.hidden);
  auto* to = reinterpret_cast<uint4*>(p.x + token * p.hidden);
  for (int64_t i = threadIdx.x; i < p.hidden / 8; i += kEmbedThreads) {
    to[i] = known ? from[i] : make_uint4(0, 0, 0, 0);
  }
}

// One warp a (token, head of q or k).
__global__ void __launch_bounds__(32 * kRotateWarps) rotate_kernel(const __grid_constant__ RotateParams p) {
  __shared__ float rows[kRotateWarps][kMaxHeadDim];
  const int lane = threadIdx.x % 32;
  float* row = rows[threadIdx.x / 32];
  grid_dependency_launch();
  grid_dependency_wait();
  const int heads = p.q_heads + p.kv_heads;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kRotateWarps + threadIdx.x / 32;
  if (item >= p.tokens * heads) return;
  const int64_t token = item / heads;
  const int head = static_cast<int>(item % heads);
  const int64_t width = static_cast<int64_t>(heads + p.kv_heads) * p.head_dim;
  uint16_t* x = p.qkv + token * width + head * p.head_dim;

  float squares = 0.0f;
  for (int i = lane; i < p.head_dim; i += 32) {
    const float value = to_float(x[i]);
    row[i] = value;
    squares += value * value;
  }
  const uint16_t* weight = head < p.q_heads ? p.q_norm : p.k_norm;
  if (weight != nullptr) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    const float scale = rsqrtf(squares / static_cast<float>(p.head_dim) + p.eps);
    for (int i = lane; i < p.head_dim; i += 32) row[i] = to_float(to_bf16(row[i] * scale * to_float(weight[i])));
  }
  __syncwarp();

  int64_t position = p.positions.at(token / p.block_size, token % p.block_size);
  position = position < 0 ? 0 : position >= p.max_positions ? p.max_positions - 1 : position;
  const float* cosines = p.cos_sin + position * p.rotary_dim;
  const int half = p.rotary_dim / 2;
  for (int i = lane; i < half; i += 32) {
    const float cosine = cosines[i], sine = cosines[half + i];
    const float first = row[i], second = row[half + i];
    x[i] = to_bf16(first * cosine - second * sine);
    x[half + i] = to_bf16(second * cosine + first * sine);
  }
  for (int i = p.rotary_dim + lane; i < p.head_dim; i += 32) x[i] = to_bf16(row[i]);
}

__global__ void __launch_bounds__(kCheckThreads)
    check_indices_kernel(const __grid_constant__ IndexParams p, IndexFault* found) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kCheckThreads + threadIdx.x;
  if (b >= p.batch) return;
  const IndexFault fault = find_fault(p, b);
  if (fault.fault == Fault::kNone) return;
  if (atomicCAS(reinterpret_cast<int*>(&found->fault), 0, static_cast<int>(fault.fault)) == 0) {
    found->value = fault.value;
  }
}

}  // namespace

void launch_embed(const EmbedParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return;
  launch_kernel(embed_kernel, dim3(static_cast<unsigned>(p.tokens)), kEmbedThreads, 0, stream, false, "embed", p);
}

void launch_rotate(const RotateParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return;
  const int64_t items = p.tokens * (p.q_heads + p.kv_heads);
  const auto blocks = static_cast<unsigned>((items + kRotateWarps - 1) / kRotateWarps);
  launch_kernel(rotate_kernel, dim3(blocks), 32 * kRotateWarps, 0, stream, true, "rotate", p);
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cuda_check(cudaStreamIsCapturing(stream, &status), "draft_forward");
  return status != cudaStreamCaptureStatusNone;
}

IndexFault check_indices(const IndexParams& p, void* scratch, cudaStream_t stream) {
  static_assert(static_cast<int>(Fault::kNone) == 0, "zeroed memory means no fault");
  auto* found = static_cast<IndexFault*>(scratch);
  IndexFault result;
  if (p.batch == 0) return result;
  cuda_check(cudaMemsetAsync(found, 0, sizeof(IndexFault), stream), "draft_forward");
  const auto blocks = static_cast<unsigned>((p.batch + kCheckThreads - 1) / kCheckThreads);
  check_indices_kernel<<<blocks, kCheckThreads, 0, stream>>>(p, found);
  cuda_check_launch("draft_forward");
  cuda_check(cudaMemcpyAsync(&result, found, sizeof(IndexFault), cudaMemcpyDeviceToHost, stream), "draft_forward");
  cuda_check(cudaStreamSynchronize(stream), "draft_forward");
  return result;
}

}  // namespace dflash::draft

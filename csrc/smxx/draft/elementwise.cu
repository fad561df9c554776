// The drafter's small kernels: embedding gather, per-head norm + rotation, index checks.
#include <cuda_bf16.h>

#include "common/dependent_launch.cuh"
#include "smxx/draft/launch.h"

namespace dflash::draft {
namespace {

constexpr int kEmbedThreads = 128;
constexpr int kRotateThreads = 128;
constexpr int kHeadsTogether = 5;  // 40 heads of 128 in one pass
constexpr int kCheckThreads = 64;

__device__ __forceinline__ float to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

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

__device__ __forceinline__ void unpack(uint4 packed, float (&to)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ uint4 pack(const float (&from)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// One block a token, kLanes threads a head, 16 bytes each; a thread has the same columns of kHeadsTogether heads under
// way at once. Angles and weights, which belong to its columns, are there before the wait, so that one trip to memory
// follows it. Elements meet their partners, half of the rotary columns away, in shared memory.
template <int kLanes>
__global__ void __launch_bounds__(kRotateThreads) rotate_kernel(const __grid_constant__ RotateParams p) {
  constexpr int kSide = kRotateThreads / kLanes;  // heads side by side
  __shared__ __align__(16) uint16_t rows[kSide][8 * kLanes];
  const int side = threadIdx.x / kLanes, column = threadIdx.x % kLanes * 8;
  uint16_t* row = rows[side];
  grid_dependency_launch();
  const int64_t token = blockIdx.x;
  const int heads = p.q_heads + p.kv_heads;
  const int half = p.rotary_dim / 2;
  uint16_t* x = p.qkv + token * (heads + p.kv_heads) * p.head_dim + column;

  int64_t position = p.positions.at(token / p.block_size, token % p.block_size);
  position = position < 0 ? 0 : position >= p.max_positions ? p.max_positions - 1 : position;
  const float* cosines = p.cos_sin + position * p.rotary_dim;
  float cosine[8], sine[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int c = column + e, i = c < half ? c : c - half;
    const bool turned = c < p.rotary_dim;
    cosine[e] = turned ? cosines[i] : 0.0f;
    sine[e] = !turned ? 0.0f : c < half ? -cosines[half + i] : cosines[half + i];
  }
  const bool held = column < p.head_dim;  // 12 of 16 threads at head size 96
  const auto weight_of = [&](const uint16_t* weight) {
    return held && weight != nullptr ? *reinterpret_cast<const uint4*>(weight + column) : make_uint4(0, 0, 0, 0);
  };
  const uint4 q_weight = weight_of(p.q_norm), k_weight = weight_of(p.k_norm);
  grid_dependency_wait();

  for (int first = 0; first < heads; first += kSide * kHeadsTogether) {
    uint4 loaded[kHeadsTogether];
#pragma unroll
    for (int i = 0; i < kHeadsTogether; ++i) {
      const int head = first + kSide * i + side;
      loaded[i] = make_uint4(0, 0, 0, 0);
      if (held && head < heads) loaded[i] = *reinterpret_cast<const uint4*>(x + head * p.head_dim);
    }
#pragma unroll
    for (int i = 0; i < kHeadsTogether; ++i) {
      if (first + kSide * i >= heads) break;
      const int head = first + kSide * i + side;
      float v[8];
      unpack(loaded[i], v);
      float squares = 0.0f;
#pragma unroll
      for (int e = 0; e < 8; ++e) squares += v[e] * v[e];
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
      }
      uint4 normed = loaded[i];
      const bool of_q = head < p.q_heads;
      if ((of_q ? p.q_norm : p.k_norm) != nullptr) {
        const float scale = rsqrtf(squares / static_cast<float>(p.head_dim) + p.eps);
        float weight[8];
        unpack(of_q ? q_weight : k_weight, weight);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = v[e] * scale * weight[e];
        normed = pack(v);
        unpack(normed, v);
      }
      __syncwarp();  // the head before is done with
      *reinterpret_cast<uint4*>(row + column) = normed;
      __syncwarp();
      if (column < p.rotary_dim) {
        float partner[8];
        if (half % 8 == 0) {
          unpack(*reinterpret_cast<const uint4*>(row + (column < half ? column + half : column - half)), partner);
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const int c = column + e;
            partner[e] = c < p.rotary_dim ? to_float(row[c < half ? c + half : c - half]) : 0.0f;
          }
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (column + e < p.rotary_dim) v[e] = v[e] * cosine[e] + partner[e] * sine[e];
        }
        normed = pack(v);
      }
      if (held && head < heads) *reinterpret_cast<uint4*>(x + head * p.head_dim) = normed;
    }
  }
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
  const auto launch = [&](auto kernel) {
    launch_kernel(kernel, dim3(static_cast<unsigned>(p.tokens)), kRotateThreads, 0, stream, true, "rotate", p);
  };
  if (p.head_dim <= 32) return launch(rotate_kernel<4>);
  if (p.head_dim <= 64) return launch(rotate_kernel<8>);
  if (p.head_dim <= 128) return launch(rotate_kernel<16>);
  launch(rotate_kernel<32>);
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

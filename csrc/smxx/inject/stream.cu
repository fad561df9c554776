// inject_kv for at most 64 rows: one launch that streams fc's and the KV projection's weights (stream/stream.cuh).
//
//   stage 0  f = bf16(taps fc^T), row tiles of 128 features over K * H columns; a finished tile leaves g = bf16(f *
//            hidden_norm) and, of each token, the sum of 128 f^2. The taps' rows are read where they lie: no
//            concatenation, dead rows never.
//   stage 1  k | v = bf16(scale (g kv^T) + bias), scale = rsqrt(mean f^2 + eps) of the token: the norm's factor comes
//            after the product, so that nobody waits for it, and x = f * scale * hidden_norm is rounded once, as in the
//            definition. Row tiles hold whole heads, so that the block that finishes a tile norms, rotates and writes
//            its heads into the caches. k and v are never in memory elsewhere.
// Stage 1 needs all of f (the mean), so the hand-off is one counter of stage 0's row tiles; W keeps streaming
// meanwhile.
//
// Tokens are the live rows, gathered: 4 requests of 16 rows with 26 committed are four n8 tiles, not eight.
//
// Floor: (K H^2 + 2 L Hkv D H) * 2 bytes at the read rate: 252 MB, 80 us on an H100 at the Qwen3-8B size. In addition
// the launch and the first tiles' way, some 3 us, and the last tile's sums, norm and writes, some 4.
#include <cuda_bf16.h>

#include "smxx/inject/stream.h"
#include "smxx/stream/arithmetic.cuh"
#include "smxx/stream/stream.cuh"

namespace dflash::inject {
namespace {

using stream::from_bf16;
using stream::kBlockPitch;
using stream::kConsumerWarps;
using stream::kMaxTokens;
using stream::kTileRows;
using stream::pack_bf16;
using stream::rounded;
using stream::Unit;
using stream::warp_sum;

struct Inject {
  using Params = StreamInjectParams;
  using Format = stream::Bf16;

  struct Shared {
    int64_t slots[kMaxTokens];  // -1: the row is not written
    int32_t positions[kMaxTokens];
    int32_t rows[kMaxTokens];  // of the taps
    float scales[kMaxTokens];  // rsqrt(mean f^2 + eps)
    int32_t tokens;
  };

  static __device__ __forceinline__ void prepare(const Params& p, Shared& shared, int thread) {
    if (thread >= 32) return;
    int before = 0;
#pragma unroll
    for (int i = 0; i < kMaxTokens / 32; ++i) {
      const int row = 32 * i + thread;
      const bool live = row < p.write.rows && p.write.live.at(row);
      const unsigned mask = __ballot_sync(0xffffffffu, live);
      if (live) {
        const int token = before + __popc(mask & ((1u << thread) - 1));
        const int64_t slot = p.write.slots.at(row), position = p.write.positions.at(row);
        const bool valid = slot >= 0 && slot < p.write.pool_size && position >= 0 && position < p.write.max_positions;
        shared.rows[token] = row;
        shared.slots[token] = valid ? slot : -1;
        shared.positions[token] = valid ? static_cast<int32_t>(position) : 0;
      }
      before += __popc(mask);
    }
    if (thread == 0) shared.tokens = before;
  }

  static __device__ __forceinline__ int tokens(const Params&, const Shared& shared) { return shared.tokens; }

  static __device__ __forceinline__ bool has_more(int stage) { return stage == 1; }  // the norm's factors

  class Loader {
   public:
    struct Source {
      const uint16_t* from;  // of row 0; nullptr: beyond K
      int64_t stride;
    };

    __device__ __forceinline__ Loader(const Params& p, Shared& shared) : p_(p), shared_(shared) {}

    __device__ __forceinline__ void enter(const Unit& u) { stage_ = u.stage; }

    __device__ __forceinline__ void job(const Unit&) {}

    __device__ __forceinline__ void more() {
      const int token = static_cast<int>(threadIdx.x) - stream::kConsumers;
      if (token < shared_.tokens) {
        float sum = 0.0f;
#pragma unroll 8
        for (int tile = 0; tile < p_.fc_tiles; ++tile) sum += __ldcg(p_.squares + tile * kMaxTokens + token);
        shared_.scales[token] = rsqrtf(sum / static_cast<float>(p_.hidden) + p_.write.eps);
      }
    }

    __device__ __forceinline__ Source source(int k) const {
      if (stage_ == 0) {
        const int tap = k / p_.hidden;
        if (tap >= p_.num_taps) return {nullptr, 0};
        return {p_.taps[tap] + (k - tap * p_.hidden), p_.tap_stride[tap]};
      }
      return {k < p_.hidden ? p_.fused + k : nullptr, p_.hidden};
    }

    __device__ __forceinline__ const uint16_t* address(const Source& source, int token) const {
      if (source.from == nullptr) return nullptr;
      return source.from + (stage_ == 0 ? shared_.rows[token] : token) * source.stride;
    }

   private:
    const Params& p_;
    Shared& shared_;
    int stage_ = 0;
  };

  // What the end of a tile reads and no block writes, on its way while other blocks' parts are waited for.
  static __device__ __forceinline__ void expect(const Params& p, const Shared& shared, const Unit& u, int tokens,
                                                int thread) {
    const WriteParams& w = p.write;
    if (u.stage == 0) {
      const int feature = u.row_tile * kTileRows + 64 * thread;
      if (thread < 2 && feature < p.hidden) prefetch_l1(p.hidden_norm + feature);
      return;
    }
    const int lines = (w.rotary_dim + 31) / 32;  // of 128 bytes
    for (int i = thread; i < tokens * lines; i += stream::kConsumers) {
      prefetch_l1(w.cos_sin + shared.positions[i / lines] * w.cos_sin_stride + i % lines * 32);
    }
  }

  static __device__ __forceinline__ void finish(const Params& p, Shared& shared, const Unit& u, float* block,
                                                int tokens, int thread) {
    u.stage == 0 ? finish_fused(p, u, block, tokens, thread) : finish_heads(p, shared, u, block, tokens, thread);
  }

  // A warp takes a token at a time.
  static __device__ __forceinline__ void finish_fused(const Params& p, const Unit& u, const float* block, int tokens,
                                                      int thread) {
    const int lane = thread % 32;
    const int feature = u.row_tile * kTileRows + 4 * lane;
    uint2 weight = make_uint2(0, 0);
    if (feature < p.hidden) weight = __ldg(reinterpret_cast<const uint2*>(p.hidden_norm + feature));
    for (int token = thread / 32; token < tokens; token += kConsumerWarps) {
      float4 f = *reinterpret_cast<const float4*>(block + token * kBlockPitch + 4 * lane);
      f = make_float4(rounded(f.x), rounded(f.y), rounded(f.z), rounded(f.w));
      if (feature < p.hidden) {
        *reinterpret_cast<uint2*>(p.fused + static_cast<int64_t>(token) * p.hidden + feature) =
            make_uint2(pack_bf16(f.x * from_bf16(weight.x & 0xffffu), f.y * from_bf16(weight.x >> 16)),
                       pack_bf16(f.z * from_bf16(weight.y & 0xffffu), f.w * from_bf16(weight.y >> 16)));
      }
      const float sum = warp_sum(f.x * f.x + f.y * f.y + f.z * f.z + f.w * f.w);
      if (lane == 0) p.squares[u.row_tile * kMaxTokens + token] = sum;
    }
  }

  // A warp takes a head of a token at a time; the heads of all layers, [L, 2, Hkv], one after another.
  static __device__ __forceinline__ void finish_heads(const Params& p, Shared& shared, const Unit& u, float* block,
                                                      int tokens, int thread) {
    const WriteParams& w = p.write;
    const int lane = thread % 32, dim = w.head_dim, half = w.rotary_dim / 2;
    const int tile_heads = kTileRows / dim;
    const int heads = min(tile_heads, 2 * w.layers * w.kv_heads - u.row_tile * tile_heads);
    for (int item = thread / 32; item < tokens * heads; item += kConsumerWarps) {
      const int token = item / heads, head = item % heads;
      const int row = u.row_tile * tile_heads + head;  // of [L, 2, Hkv]
      const int layer = row / (2 * w.kv_heads), kind = row / w.kv_heads % 2;
      const int64_t slot = shared.slots[token];
      if (slot < 0) continue;
      const CacheView view = kind == 0 ? w.k[layer] : w.v[layer];
      uint16_t* out = static_cast<uint16_t*>(view.data) + slot * view.slot_stride + row % w.kv_heads * view.head_stride;
      float* x = block + token * kBlockPitch + head * dim;
      float sum = 0.0f;
      for (int i = lane; i < dim; i += 32) {
        float value = x[i] * shared.scales[token];
        if (p.kv_bias != nullptr) value += from_bf16(__ldg(p.kv_bias + static_cast<int64_t>(row) * dim + i));
        value = rounded(value);
        x[i] = value;
        sum += value * value;
        if (kind == 1) out[i] = __bfloat16_as_ushort(__float2bfloat16_rn(value));
      }
      if (kind == 1) continue;
      if (w.k_norm != nullptr) {
        const float scale = rsqrtf(warp_sum(sum) / static_cast<float>(dim) + w.eps);
        const uint16_t* weight = static_cast<const uint16_t*>(w.k_norm) + layer * dim;
        for (int i = lane; i < dim; i += 32) x[i] = x[i] * scale * from_bf16(__ldg(weight + i));
      }
      __syncwarp();
      const float* cosines = w.cos_sin + shared.positions[token] * w.cos_sin_stride;
      const float* sines = cosines + half;
      for (int i = lane; i < dim; i += 32) {
        float value = x[i];
        if (i < half) {
          value = x[i] * __ldg(cosines + i) - x[i + half] * __ldg(sines + i);
        } else if (i < 2 * half) {
          value = x[i] * __ldg(cosines + i - half) + x[i - half] * __ldg(sines + i - half);
        }
        out[i] = __bfloat16_as_ushort(__float2bfloat16_rn(value));
      }
    }
  }

  template <typename Wait>
  static __device__ __forceinline__ void job(const Params&, Shared&, const Unit&, float*, unsigned char*, int, int,
                                             const Wait&) {}
};

__global__ void __launch_bounds__(stream::kThreads, 1)
    stream_inject_kernel(const __grid_constant__ StreamInjectParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  stream::Stream<Inject>::run(p, shared);
}

}  // namespace

void launch_stream_inject_kv(const StreamInjectParams& p, cudaStream_t stream) {
  if (p.write.rows == 0) return;
  stream::launch_stream<Inject>(stream_inject_kernel, p, stream, "inject_kv");
}

}  // namespace dflash::inject

#ifdef DFLASH_STREAM_TRACE
// [kTraceBlocks][kTraceUnits][kEvents] uint32 of the last launch.
extern "C" __attribute__((visibility("default"))) int dflash_trace_inject(void* host) {
  using dflash::stream::trace_times;
  return static_cast<int>(cudaMemcpyFromSymbol(host, trace_times, sizeof trace_times));
}
#endif

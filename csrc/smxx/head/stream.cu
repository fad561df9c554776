// lm_head_argmax for at most 64 rows: one launch that streams the LM head (stream/stream.cuh).
//
//   kScore    logits = bf16(hidden W^T + bias), row tiles of 128 vocabulary rows. The block that finishes a tile takes
//             each token's best of its 128 logits as one integer key (tile_key.cuh) and keeps the maximum over its
//             tiles in shared memory: nothing leaves the SM for a tile. Logits are in memory nowhere.
//   kPublish  once its tiles are done, a block writes its best key of each token.
//   kChoose   the first block waits for all, takes the maximum and writes ids and values.
// A maximum of integers: the answer depends neither on who comes first nor on how the tiles are dealt out.
//
// Partition: whole row tiles, as many for every block; K is cut only for the few that are left over
// (head_stream.py). At V 151936 on 132 SMs these are 9 tiles a block, but for one that has 8: no sum is ever split.
//
// Floor: V H bytes of the format at the read rate: 1.245 GB of bf16, 395 us on an H100 at the Qwen3-8B size; fp8 204
// us, 4 bits in groups of 128 102 us, scales included. In addition the launch and the first tile's way, some 4 us, and
// the two jobs at the end, some 3. A tile's end, 64 K tiles apart, takes 8 warps some 150 cycles at 16 tokens and 500
// at 64.
#include "smxx/head/launch.h"
#include "smxx/head/tile_key.cuh"
#include "smxx/stream/quantized_format.cuh"
#include "smxx/stream/stream.cuh"

namespace dflash::head {
namespace {

using stream::kBlockPitch;
using stream::kConsumerWarps;
using stream::kMaxTokens;
using stream::kTileRows;
using stream::Unit;

template <typename WeightFormat>
struct Argmax {
  using Params = StreamHeadParams;
  using Format = WeightFormat;

  struct Shared {
    unsigned long long best[kMaxTokens];  // a key is above 0
  };

  static __device__ __forceinline__ void prepare(const Params&, Shared& shared, int thread) {
    if (thread < kMaxTokens) shared.best[thread] = 0;
  }

  static __device__ __forceinline__ int tokens(const Params& p, const Shared&) { return p.rows; }

  static __device__ __forceinline__ bool has_more(int) { return false; }

  class Loader {
   public:
    __device__ __forceinline__ Loader(const Params& p, Shared&) : p_(p) {}
    __device__ __forceinline__ void job(const Unit&) {}
    __device__ __forceinline__ void enter(const Unit&) {}
    __device__ __forceinline__ void more() {}
    __device__ __forceinline__ const uint16_t* source(int k) const {
      return k < p_.hidden_size ? p_.hidden + k : nullptr;
    }
    __device__ __forceinline__ const uint16_t* address(const uint16_t* source, int token) const {
      return source == nullptr ? nullptr : source + token * p_.hidden_stride;
    }

   private:
    const Params& p_;
  };

  static __device__ __forceinline__ void expect(const Params& p, const Shared&, const Unit& u, int, int thread) {
    if (thread < 2 && p.bias != nullptr && u.row_tile * kTileRows + 64 * thread < p.vocab) {
      prefetch_l1(p.bias + u.row_tile * kTileRows + 64 * thread);
    }
  }

  // A warp takes a token at a time, always the same ones; a lane four rows.
  static __device__ __forceinline__ void finish(const Params& p, Shared& shared, const Unit& u, const float* block,
                                                int tokens, int thread) {
    const int lane = thread % 32, first = u.row_tile * kTileRows;
    float bias[4] = {};
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first + 4 * lane + i;
        if (row < p.vocab) bias[i] = __uint_as_float(static_cast<uint32_t>(__ldg(p.bias + row)) << 16);
      }
    }
    for (int token = thread / 32; token < tokens; token += kConsumerWarps) {
      const float4 v = *reinterpret_cast<const float4*>(block + token * kBlockPitch + 4 * lane);
      const float logits[4] = {v.x + bias[0], v.y + bias[1], v.z + bias[2], v.w + bias[3]};
      uint32_t key = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + 4 * lane + i < p.vocab) key = max(key, tile_key(logits[i], 4 * lane + i));
      }
      key = __reduce_max_sync(0xffffffffu, key);
      if (lane == 0)
        shared.best[token] = max(shared.best[token], static_cast<unsigned long long>(vocab_key(key, first)));
    }
  }

  template <typename Wait>
  static __device__ __forceinline__ void job(const Params& p, Shared& shared, const Unit& u, float*, unsigned char*,
                                             int tokens, int thread, const Wait& wait) {
    wait();
    if (u.stage == kPublish) {
      if (thread < tokens) p.best[u.index[0] * kMaxTokens + thread] = shared.best[thread];
      return;
    }
    const int lane = thread % 32;
    for (int token = thread / 32; token < tokens; token += kConsumerWarps) {
      unsigned long long key = 0;
#pragma unroll 8
      for (int block = lane; block < p.stream.blocks; block += 32) {
        key = max(key, __ldcg(p.best + block * kMaxTokens + token));
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) key = max(key, __shfl_xor_sync(0xffffffffu, key, offset));
      if (lane != 0) continue;
      const int64_t row = argmax_index(key);
      p.ids[token] = p.vocab_start + (p.token_ids == nullptr ? row : __ldg(p.token_ids + row));
      p.values[token] = vocab_key_value(key);
    }
  }
};

template <typename Format>
__global__ void __launch_bounds__(stream::kThreads, 1)
    stream_argmax_kernel(const __grid_constant__ StreamHeadParams p) {
  stream::Stream<Argmax<Format>>::run(p, dynamic_shared());
}

}  // namespace

void launch_stream_argmax(const StreamHeadParams& p, stream::WeightFormat format, cudaStream_t stream) {
  if (p.rows == 0) return;
  stream::with_format(format, [&](auto weights) {
    using Format = decltype(weights);
    stream::launch_stream<Argmax<Format>>(stream_argmax_kernel<Format>, p, stream, "lm_head_argmax_packed");
  });
}

}  // namespace dflash::head

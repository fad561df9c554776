// draft_forward for at most 64 rows as one persistent kernel over the stream of weights (stream/stream.cuh).
//
// Stages of a layer; W streams through all of them, a hand-off is a counter that the next stage's blocks watch:
//   qkv      reads bf16(x * input_norm), which whoever wrote x left beside it; the norm's factor of a token,
//            rsqrt(mean x^2 + eps), comes after the product, so that nobody waits for it (the sums of squares come with
//            x, one for 128 features). A row tile holds whole heads; the block that finishes it adds the bias, norms
//            and rotates q and k, and writes [B * T, heads, D].
//   attend   (request, KV head, split of the keys, 64 query rows) dealt to the blocks; a first tile of context keys and
//            values is fetched before the wait for qkv, as it does not depend on this pass. Leaves parts, fp32, which
//            then all blocks add up, a warp a (token, head), as they arrive
//   out      + residual: x += o; a finished tile leaves x, x times the next norm's weights, and its sums of squares
//   gate_up  normed as qkv. Row tile r of W holds gate rows 64 r .. + 63, then the up rows of the same features, so
//            that the block that finishes it holds both: silu(g) * u
//   down     + residual, as out
// Before the first layer: a job that gathers the embedding; after the last: the final norm.
//
// Five hand-offs a layer. Between products one takes, from the last multiplication of one stage to the first of the
// next (sums of other blocks' parts, end of the tile, counter, tokens), about what the ring's 160 KB of W a block hide;
// from qkv to o, with the attention, it takes several times that (bench/NOTES.md, bench/results/*/stream_trace.txt).
//
// Floor and first prediction on an H100 (3.15 TB/s), B 1, T 16, context 1024; measured: bench/NOTES.md.
//   Qwen3-8B drafter    1.93 GB of W, 21 MB of context   619 us; + start, end, 30 hand-offs partly hidden: 660-690 us
//   397B drafter / 8    0.29 GB, 3 MB                     93 us; latency decides: 6 x (12 + 13) + 10 = 160-175 us
//
// Attention of a unit: 8 warps = 4 x 16 query rows by 2 halves: a warp weighs half of a tile's 64 keys, passes the
// weights to the other and adds up half of V's columns. K and V take the 32 KB of the finished block, Q the buffers of
// tokens, which nobody needs before o:
//   Q [64][D] | K [64][D] | V [64][D] bf16, 16-byte chunks of a row permuted (k_chunk, v_chunk) against bank conflicts.
// Q and K are multiplied in the order of stream/format.cuh.
// cp.async: K of tile i + 1 is under way while tile i is weighed, V of tile i + 1 while S of tile i + 1 is computed.
#pragma once

#include <cuda_bf16.h>

#include <stdexcept>
#include <string>

#include "common/exchange.cuh"
#include "smxx/draft/launch.h"
#include "smxx/stream/arithmetic.cuh"
#include "smxx/stream/stream.cuh"

namespace dflash::draft {
namespace {

using stream::from_bf16;
using stream::high_half;
using stream::kBlockPitch;
using stream::kConsumerBarrier;
using stream::kConsumers;
using stream::kConsumerWarps;
using stream::kMaxTokens;
using stream::kNothing;
using stream::kTileRows;
using stream::low_half;
using stream::pack_bf16;
using stream::rounded;
using stream::Unit;
using stream::warp_sum;

__device__ __forceinline__ int clamp_to(int64_t value, int64_t low, int64_t high) {
  return static_cast<int>(value < low ? low : value > high ? high : value);
}

// 8 elements of x, scaled and weighted.
__device__ __forceinline__ uint4 normed(const uint4& x, float scale, const uint4& weight) {
  const auto pair = [&](uint32_t a, uint32_t w) {
    return pack_bf16(low_half(a) * scale * low_half(w), high_half(a) * scale * high_half(w));
  };
  return make_uint4(pair(x.x, weight.x), pair(x.y, weight.y), pair(x.z, weight.z), pair(x.w, weight.w));
}

template <int D, typename WeightFormat>
struct Draft {
  using Params = StreamDraftParams;
  using Format = WeightFormat;

  struct Shared {
    float scales[kMaxTokens];  // of the loaders: rsqrt(mean x^2 + eps)
    int32_t positions[kMaxTokens];
    int32_t prefix[kMaxTokens];    // of request b: context keys, 0 for a row outside the table
    int32_t earliest[kMaxTokens];  // of request b: its lowest position
    int64_t table_rows[kMaxTokens];
    int32_t first_slots[stream::kLoaders];    // of the first tile of keys of this block's attention; -1: no such key
    uint32_t slots_of[stream::kLoaderWarps];  // 1 + the layer for which this loader warp has looked them up
  };

  static __device__ __forceinline__ void prepare(const Params& p, Shared& shared, int thread) {
    if (thread < stream::kLoaderWarps) shared.slots_of[thread] = 0;
    if (thread < p.batch * p.block_size) {
      const int64_t position = p.positions.at(thread / p.block_size, thread % p.block_size);
      shared.positions[thread] = clamp_to(position, INT32_MIN, INT32_MAX);
    }
    if (thread < p.batch) {
      const int64_t row = p.req_pool_indices.at(thread);
      const bool mapped = row >= 0 && row < p.rows;
      shared.table_rows[thread] = mapped ? row : 0;
      shared.prefix[thread] = mapped ? clamp_to(p.prefix_lens.at(thread), 0, p.width) : 0;
      int64_t earliest = INT32_MAX;
      for (int t = 0; t < p.block_size; ++t) {
        const int64_t position = p.positions.at(thread, t);
        earliest = position < earliest ? position : earliest;
      }
      shared.earliest[thread] = clamp_to(earliest, INT32_MIN, INT32_MAX);
    }
  }

  static __device__ __forceinline__ int tokens(const Params& p, const Shared&) { return p.batch * p.block_size; }

  static __device__ __forceinline__ bool has_more(int stage) {  // the norm's factors
    return stage % kKinds == kQkv || stage % kKinds == kGateUp;
  }

  static __device__ __forceinline__ int squares_of_token(const Params& p) {
    return (p.hidden + kTileRows - 1) / kTileRows;
  }

  // All lanes of a warp; every lane gets the scale of the token's norm.
  static __device__ __forceinline__ float norm_scale(const Params& p, int token) {
    const int tiles = squares_of_token(p);
    const float* squares = p.squares + token * tiles;
    float sum = 0.0f;
#pragma unroll 1
    for (int tile = opaque(threadIdx.x) % 32; tile < tiles; tile += 32) sum += __ldcg(squares + tile);
    return rsqrtf(warp_sum(sum) / static_cast<float>(p.hidden) + p.eps);
  }

  // ---- geometry of the attention ------------------------------------------------------------------------------------

  static constexpr int kMostAhead = 1024;                       // keys of a unit that the loaders fetch ahead
  static constexpr int kKeys = 64, kHalf = kKeys / 2;           // of a tile, of a warp
  static constexpr int kChunks = D / 8;                         // 16-byte pieces of a row
  static constexpr int kCopies = kKeys * kChunks / kConsumers;  // of K, and of V, a thread and tile
  static constexpr int kPairBarrier = 4;                        // .. 7, of the two warps of 16 query rows
  static_assert(kKeys == stream::kLoaders, "one looks up a slot");
  // Behind Q: the weights of a tile, as the warps of the same rows read them, and what they tell each other of a row.
  static constexpr int kExchangeBytes = kStreamQueryRows * kKeys * 2;
  static_assert(kStreamQueryRows * D * 2 + kExchangeBytes + 128 * 4 <=
                stream::kTokenBuffers * stream::kTokenBufferBytes);
  static_assert(kStreamQueryRows == kKeys, "Q is copied as K is");
  static_assert(2 * kKeys * D * 2 <= stream::kBlockBytes);

  struct Keys {  // of one request in one layer
    int low;     // first context key that any query of the block sees
    int tiles;   // of context; one more holds the block's own keys
    int per_split;
    // The last of them takes the block's own keys too.
    __device__ __forceinline__ int used_splits() const { return max(1, (tiles + per_split - 1) / per_split); }
  };

  static __device__ __forceinline__ Keys keys_of(const Params& p, const Shared& shared, int layer, int b) {
    Keys keys{};
    const int window = p.layers[layer].window, prefix = shared.prefix[b];
    if (window > 0) keys.low = clamp_to(static_cast<int64_t>(shared.earliest[b]) - window + 1, 0, prefix);
    keys.tiles = (prefix - keys.low + kKeys - 1) / kKeys;
    keys.per_split = max(1, (keys.tiles + p.splits - 1) / p.splits);
    return keys;
  }

  // Unit: ((b * Hkv + KV head) * splits + split) * row_tiles + row tile.
  struct Part {
    int row0, kv_head, b;
    int begin, end;  // tiles of keys; keys.tiles is the block's own. Empty: nobody reads what the unit leaves
    Keys keys;
  };

  static __device__ __forceinline__ Part part_of(const Params& p, const Shared& shared, int layer, int unit) {
    Part part;
    part.row0 = unit % p.row_tiles * kStreamQueryRows;
    const int split = unit / p.row_tiles % p.splits, pair = unit / (p.row_tiles * p.splits);
    part.kv_head = pair % p.kv_heads;
    part.b = pair / p.kv_heads;
    part.keys = keys_of(p, shared, layer, part.b);
    part.begin = split * part.keys.per_split;
    const int last = part.keys.used_splits() - 1;
    part.end = split == last ? part.keys.tiles + 1 : split < last ? part.begin + part.keys.per_split : part.begin;
    return part;
  }

  // ---- tokens on their way to shared memory ------------------------------------------------------------------------

  class Loader {
   public:
    __device__ __forceinline__ Loader(const Params& p, Shared& shared) : p_(p), shared_(shared) {}

    __device__ __forceinline__ void enter(const Unit& u) {
      const int kind = u.stage % kKinds;
      from_ = kind == kOut ? p_.attended : kind == kDown ? p_.activated : p_.weighted;
      width_ = kind == kOut ? p_.q_heads * D : kind == kDown ? p_.intermediate : p_.hidden;
    }

    // The norm's factors. Four lanes a token.
    __device__ __forceinline__ void more() {
      const int thread = static_cast<int>(threadIdx.x) - kConsumers, tiles = squares_of_token(p_);
      const int tokens = p_.batch * p_.block_size;
#pragma unroll 1
      for (int first = 0; first < tokens; first += stream::kLoaders / 4) {
        const int token = first + thread / 4;
        const float* squares = p_.squares + min(token, tokens - 1) * tiles;
        float sum = 0.0f;
#pragma unroll 8
        for (int tile = thread % 4; tile < tiles; tile += 4) sum += __ldcg(squares + tile);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (thread % 4 == 0 && token < tokens) {
          shared_.scales[token] = rsqrtf(sum / static_cast<float>(p_.hidden) + p_.eps);
        }
      }
    }

    // Looks up the slots of the first keys of this block's attention, and brings the context's keys and values of its
    // units into the L2: by the time that q is there they are, too.
    __device__ __forceinline__ void job(const Unit& u) {
      if (u.stage % kKinds != kAttend) return;
      const int layer = u.stage / kKinds, thread = static_cast<int>(threadIdx.x) - kConsumers;
      const StreamLayer& cache = p_.layers[layer];
#pragma unroll 1
      for (int unit = u.index[0]; unit < p_.units; unit += p_.stream.blocks) {
        const Part part = part_of(p_, shared_, layer, unit);
        const int first = part.keys.low + part.begin * kKeys;
        const int last = min(part.keys.low + part.end * kKeys, shared_.prefix[part.b]);
#pragma unroll 1
        for (int key = first + thread; key < first + kMostAhead; key += stream::kLoaders) {
          int64_t slot = -1;
          if (key < last) slot = p_.req_to_token.at(shared_.table_rows[part.b], key);
          const bool there = slot >= 0 && slot < cache.num_slots;
          if (unit == u.index[0] && key == first + thread) {
            shared_.first_slots[thread] = there ? static_cast<int32_t>(slot) : -1;
            __syncwarp();
            if (thread % 32 == 0) {
              store_release_shared(&shared_.slots_of[thread / 32], static_cast<uint32_t>(layer) + 1);
            }
          }
          if (key >= last) break;
          if (!there) continue;
          const uint16_t* k = cache.k + slot * cache.k_slot_stride + part.kv_head * D;
          const uint16_t* v = cache.v + slot * cache.v_slot_stride + part.kv_head * D;
#pragma unroll
          for (int i = 0; i < D; i += 64) {  // 128 bytes
            prefetch_l2(k + i);
            prefetch_l2(v + i);
          }
        }
      }
    }

    __device__ __forceinline__ const uint16_t* source(int k) const { return k < width_ ? from_ + k : nullptr; }

    __device__ __forceinline__ const uint16_t* address(const uint16_t* source, int token) const {
      return source == nullptr ? nullptr : source + static_cast<uint32_t>(token * width_);
    }

   private:
    const Params& p_;
    Shared& shared_;
    const uint16_t* from_ = nullptr;
    int width_ = 0;
  };

  // ---- ends of tiles -----------------------------------------------------------------------------------------------

  static __device__ __forceinline__ void finish(const Params& p, Shared& shared, const Unit& u, float* block,
                                                int tokens, int thread) {
    const int kind = u.stage % kKinds, layer = u.stage / kKinds;
    if (kind == kQkv) {
      finish_heads(p, shared, layer, u.row_tile, block, tokens, thread);
    } else if (kind == kGateUp) {
      finish_gated(p, shared, u.row_tile, block, tokens, thread);
    } else {
      const uint16_t* bias = kind == kOut && p.o_bias != nullptr ? p.o_bias + int64_t{layer} * p.hidden : nullptr;
      // Of the norm that follows; after the last layer nobody reads x weighted.
      const uint16_t* norm = kind == kOut ? p.post_norm + int64_t{layer} * p.hidden
                                          : p.input_norm + int64_t{min(layer + 1, p.num_layers - 1)} * p.hidden;
      finish_residual(p, kind, bias, norm, u.row_tile, block, tokens, thread);
    }
  }

  // What the end of a tile reads and no block writes, on its way while other blocks' parts are waited for.
  static __device__ __forceinline__ void expect(const Params& p, const Shared& shared, const Unit& u, int tokens,
                                                int thread) {
    const int kind = u.stage % kKinds, layer = u.stage / kKinds;
    if (kind == kQkv) {
      const int lines = (p.rotary_dim + 31) / 32;  // of 128 bytes
      for (int i = thread; i < tokens * lines; i += kConsumers) {
        const int64_t row = clamp_to(shared.positions[i / lines], 0, p.max_positions - 1);
        prefetch_l1(p.cos_sin + row * p.rotary_dim + i % lines * 32);
      }
      if (thread < 2 && p.q_norm != nullptr) prefetch_l1(p.q_norm + int64_t{layer} * D + 64 * thread);
      if (thread >= 2 && thread < 4 && p.k_norm != nullptr)
        prefetch_l1(p.k_norm + int64_t{layer} * D + 64 * (thread - 2));
    } else if (kind != kGateUp && thread < 2) {
      const int feature = u.row_tile * kTileRows + 64 * thread;
      const int next = kind == kOut ? layer : min(layer + 1, p.num_layers - 1);
      if (feature < p.hidden)
        prefetch_l1((kind == kOut ? p.post_norm : p.input_norm) + int64_t{next} * p.hidden + feature);
    }
  }

  // A warp takes a head of a token at a time.
  static __device__ __forceinline__ void finish_heads(const Params& p, const Shared& shared, int layer, int row_tile,
                                                      float* block, int tokens, int thread) {
    constexpr int kTileHeads = kTileRows / D, kPer = D / 32;
    const int lane = thread % 32, half = p.rotary_dim / 2;
    const int all_heads = p.q_heads + 2 * p.kv_heads;
    const int heads = min(kTileHeads, all_heads - row_tile * kTileHeads);
    for (int item = thread / 32; item < tokens * heads; item += kConsumerWarps) {
      const int token = item / heads, head = row_tile * kTileHeads + item % heads;
      const bool is_q = head < p.q_heads, is_v = head >= p.q_heads + p.kv_heads;
      const uint16_t* weights = is_v ? nullptr : is_q ? p.q_norm : p.k_norm;
      const float* cosines =
          p.cos_sin + clamp_to(shared.positions[token], 0, p.max_positions - 1) * static_cast<int64_t>(p.rotary_dim);
      float* x = block + token * kBlockPitch + item % heads * D;
      float value[kPer], cosine[kPer], sine[kPer], weight[kPer];
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int i = 32 * j + lane;
        const int pair = i < half ? i : i - half;
        const bool turns = !is_v && i < 2 * half;
        cosine[j] = turns ? __ldg(cosines + pair) : 1.0f;
        sine[j] = turns ? __ldg(cosines + half + pair) : 0.0f;
        weight[j] = weights == nullptr ? 1.0f : from_bf16(__ldg(weights + int64_t{layer} * D + i));
        float bias = 0.0f;
        if (p.qkv_bias != nullptr) {
          bias = from_bf16(__ldg(p.qkv_bias + (int64_t{layer} * all_heads + head) * D + i));
        }
        value[j] = rounded(x[i] * shared.scales[token] + bias);
        sum += value[j] * value[j];
      }
      const float scale = rsqrtf(warp_sum(sum) / static_cast<float>(D) + p.eps);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        if (weights != nullptr) value[j] = rounded(value[j] * scale * weight[j]);
        x[32 * j + lane] = value[j];
      }
      __syncwarp();
      uint16_t* out = p.qkv + (static_cast<int64_t>(token) * all_heads + head) * D;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int i = 32 * j + lane;
        float result = value[j];
        if (!is_v && i < half) result = value[j] * cosine[j] - x[i + half] * sine[j];
        if (!is_v && i >= half && i < 2 * half) result = value[j] * cosine[j] + x[i - half] * sine[j];
        out[i] = __bfloat16_as_ushort(__float2bfloat16_rn(result));
      }
    }
  }

  static __device__ __forceinline__ uint2 x_of(const Params& p, int token, int feature) {
    return __ldcg(reinterpret_cast<const uint2*>(p.x + static_cast<int64_t>(token) * p.hidden + feature));
  }

  // A warp takes a token at a time, a lane four features.
  static __device__ __forceinline__ void finish_residual(const Params& p, int kind, const uint16_t* bias,
                                                         const uint16_t* norm, int row_tile, float* block, int tokens,
                                                         int thread) {
    const int lane = thread % 32, warp = thread / 32;
    const int feature = row_tile * kTileRows + 4 * lane;
    const bool live = feature < p.hidden;
    uint2 added = make_uint2(0, 0), weight = make_uint2(0, 0);
    if (live) weight = __ldg(reinterpret_cast<const uint2*>(norm + feature));
    if (live && bias != nullptr) added = __ldg(reinterpret_cast<const uint2*>(bias + feature));
    constexpr int kMost = kMaxTokens / kConsumerWarps;
    uint2 before[kMost];  // all on their way before the first is changed
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int token = warp + i * kConsumerWarps;
      before[i] = make_uint2(0, 0);
      if (live && token < tokens) before[i] = x_of(p, token, feature);
    }
    if (p.ranks.world > 1) sum_over_ranks(p, kind, row_tile, block, tokens, thread);
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int token = warp + i * kConsumerWarps;
      if (token >= tokens) break;
      const float4 sum = *reinterpret_cast<const float4*>(block + token * kBlockPitch + 4 * lane);
      const float a = rounded(low_half(before[i].x) + (sum.x + low_half(added.x)));
      const float b = rounded(high_half(before[i].x) + (sum.y + high_half(added.x)));
      const float c = rounded(low_half(before[i].y) + (sum.z + low_half(added.y)));
      const float d = rounded(high_half(before[i].y) + (sum.w + high_half(added.y)));
      if (live) {
        *reinterpret_cast<uint2*>(p.x + static_cast<int64_t>(token) * p.hidden + feature) =
            make_uint2(pack_bf16(a, b), pack_bf16(c, d));
        *reinterpret_cast<uint2*>(p.weighted + static_cast<int64_t>(token) * p.hidden + feature) =
            make_uint2(pack_bf16(a * low_half(weight.x), b * high_half(weight.x)),
                       pack_bf16(c * low_half(weight.y), d * high_half(weight.y)));
      }
      const float squares = warp_sum(live ? a * a + b * b + c * c + d * d : 0.0f);
      if (lane == 0) p.squares[token * squares_of_token(p) + row_tile] = squares;
    }
  }

  // A warp takes a token at a time, a lane two features.
  static __device__ __forceinline__ void finish_gated(const Params& p, const Shared& shared, int row_tile,
                                                      const float* block, int tokens, int thread) {
    const int lane = thread % 32, feature = row_tile * (kTileRows / 2) + 2 * lane;
    if (feature >= p.intermediate) return;
    for (int token = thread / 32; token < tokens; token += kConsumerWarps) {
      const float2 g = *reinterpret_cast<const float2*>(block + token * kBlockPitch + 2 * lane);
      const float2 u = *reinterpret_cast<const float2*>(block + token * kBlockPitch + kTileRows / 2 + 2 * lane);
      const float scale = shared.scales[token];
      const auto gated = [](float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; };
      *reinterpret_cast<uint32_t*>(p.activated + static_cast<int64_t>(token) * p.intermediate + feature) =
          pack_bf16(gated(g.x * scale, u.x * scale), gated(g.y * scale, u.y * scale));
    }
  }

  // ---- jobs --------------------------------------------------------------------------------------------------------

  template <typename Wait>
  static __device__ __forceinline__ void job(const Params& p, Shared& shared, const Unit& u, float* block,
                                             unsigned char* buffers, int tokens, int thread, const Wait& wait) {
    const int kind = u.stage % kKinds, layer = u.stage / kKinds;
    if (kind == kAttend) return attend(p, shared, layer, u.index[0], block, buffers, thread, wait);
    wait();
    if (kind == kEmbed) {
      for (int token = u.index[0]; token < tokens; token += u.index[1]) embed(p, token, thread);
    } else {
      for (int token = u.index[0]; token < tokens; token += u.index[1]) final_norm(p, token, thread);
    }
  }

  // A warp takes 128 features at a time, a lane four. An id outside the vocabulary gives zeros.
  static __device__ __forceinline__ void embed(const Params& p, int token, int thread) {
    const int64_t id = p.block_ids.at(token / p.block_size, token % p.block_size) - p.ranks.vocab_start;
    const bool known = id >= 0 && id < p.vocab;
    const uint16_t* from = p.embed_weight + (known ? id : 0) * p.hidden;
    const int tiles = squares_of_token(p), lane = thread % 32;
    constexpr int kAtOnce = 4;  // so that their trips to memory overlap
    for (int first = thread / 32; first < tiles; first += kAtOnce * kConsumerWarps) {
      uint2 x[kAtOnce], weight[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int feature = (first + i * kConsumerWarps) * kTileRows + 4 * lane;
        x[i] = weight[i] = make_uint2(0, 0);
        if (feature >= p.hidden) continue;
        if (known) x[i] = __ldg(reinterpret_cast<const uint2*>(from + feature));
        weight[i] = __ldg(reinterpret_cast<const uint2*>(p.input_norm + feature));
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int tile = first + i * kConsumerWarps, feature = tile * kTileRows + 4 * lane;
        if (tile >= tiles) break;
        if (p.ranks.world > 1 && feature < p.hidden) share_row(p, id, token, feature, x[i]);
        const float a = low_half(x[i].x), b = high_half(x[i].x), c = low_half(x[i].y), d = high_half(x[i].y);
        if (feature < p.hidden) {
          const int64_t at = static_cast<int64_t>(token) * p.hidden + feature;
          *reinterpret_cast<uint2*>(p.x + at) = x[i];
          *reinterpret_cast<uint2*>(p.weighted + at) =
              make_uint2(pack_bf16(a * low_half(weight[i].x), b * high_half(weight[i].x)),
                         pack_bf16(c * low_half(weight[i].y), d * high_half(weight[i].y)));
        }
        const float squares = warp_sum(a * a + b * b + c * c + d * d);
        if (lane == 0) p.squares[token * tiles + tile] = squares;
      }
    }
  }

  static __device__ __forceinline__ void final_norm(const Params& p, int token, int thread) {
    const float scale = norm_scale(p, token);
    const auto* x = reinterpret_cast<const uint4*>(p.x + static_cast<int64_t>(token) * p.hidden);
    auto* out = reinterpret_cast<uint4*>(p.out + static_cast<int64_t>(token) * p.hidden);
    for (int i = thread; i < p.hidden / 8; i += kConsumers) {
      out[i] = normed(__ldcg(x + i), scale, __ldg(reinterpret_cast<const uint4*>(p.final_norm) + i));
    }
  }

  // ---- other ranks --------------------------------------------------------------------------------------------------
  // Words of one rank in the memory of another come as common/exchange.cuh says, and as parts of sums between blocks do
  // (stream/stream.cuh).
  //
  // Why no word is lost, read twice or taken for another's. There is a buffer for o's sums and one for down's, so the
  // sums of a pass, and of pass after pass, alternate between them; call them 1, 2, 3, ... A block of rank P writes
  // words of sum n + 1 only after all of P's tiles of sum n are finished: the products between them wait for the
  // counter of all these tiles, or for the end of P's launch. A tile of sum n on P is finished only after each rank R
  // has written its words of it, so (*) after R has finished all of its tiles of sum n - 1: read the words of others
  // and cleared them, which the tiles' signal releases. Hence before P writes a word of sum n + 1, the word's place,
  // last used in sum n - 1, has been read and cleared by R, however late R is. And R cannot read a word of sum n + 1 in
  // place of one of sum n - 1: it is past those. Rows of the embedding are written once a launch, into a place of their
  // own: two sums at least lie between one use and the next.
  //   (*) is one step by words without a fence: R clears, releases at the device's scope, another block of R acquires
  // and writes to P, P sees that and writes to R. The place and its clearing are in R's own L2, which the release has
  // waited for, and P's write has still to come there.
  //   The first use: buffers are filled with kNoWord and the ranks meet before any of them launches (Python).
  //
  // Nobody waits in a circle: in a stage a block first leaves its part of a row tile that another block finishes, then
  // finishes row tiles in ascending order; so the lowest unfinished row tile of all ranks lacks no part and no words.
  //
  // The sum is made in the order of ranks from the same fp32 words on each of them, so x has the same bits everywhere.

  // Replaces the block by its sum over the ranks. A thread adds what it uses in finish_residual.
  static __device__ __forceinline__ void sum_over_ranks(const Params& p, int kind, int row_tile, float* block,
                                                        int tokens, int thread) {
    constexpr int kPieces = kTileRows / 4, kAtOnce = 4;
    const int world = p.ranks.world, rank = p.ranks.rank, pieces = tokens * kPieces;
    const int step = squares_of_token(p) * kSlotPieces;  // from one rank's words to the next's
    const int first = (kind == kDown ? world * step : 0) + row_tile * kSlotPieces;
    const auto piece_of = [&](int i) {
      return reinterpret_cast<float4*>(block + i / kPieces * kBlockPitch) + i % kPieces;
    };
#pragma unroll 1
    for (int i = thread; i < pieces; i += kConsumers) {
      const float4 v = *piece_of(i);
      const uint4 words = make_uint4(word_of(__float_as_uint(v.x)), word_of(__float_as_uint(v.y)),
                                     word_of(__float_as_uint(v.z)), word_of(__float_as_uint(v.w)));
      for_peers<uint4>(p.ranks,
                       [&](uint4* exchange) { store_relaxed_system(exchange + first + rank * step + i, words); });
    }

    const uint4 nothing = make_uint4(kNoWord, kNoWord, kNoWord, kNoWord);
    uint4* const own = own_exchange<uint4>(p.ranks) + first;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    Patience patience;
    int piece = thread, from = 0;  // what is added next
    while (piece < pieces) {
      uint4 v[kAtOnce];
      const auto each = [&](auto&& visit) {
        int i = piece, r = from;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          if (i < pieces && r != rank) visit(v[n], own + r * step + i);
          if (++r == world) r = 0, i += kConsumers;
        }
      };
      bool whole;
      do {
        whole = true;
        each([](uint4& to, const uint4* place) { to = load_relaxed_system(place); });
        each([&](const uint4& words, const uint4*) { whole &= has_come(words); });
        if (!whole) patience.look(p.ranks);
      } while (!whole);
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (piece >= pieces) break;
        float4 part = make_float4(__uint_as_float(v[n].x), __uint_as_float(v[n].y), __uint_as_float(v[n].z),
                                  __uint_as_float(v[n].w));
        if (from == rank) part = *piece_of(piece);
        if (from != rank) store_relaxed_system(own + from * step + piece, nothing);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        if (++from == world) {
          *piece_of(piece) = sum;
          sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          from = 0;
          piece += kConsumers;
        }
      }
    }
  }

  // Four features of the embedding of row `id` of this rank's part: to the others where it is here, else from the rank
  // that has it. An id outside the vocabulary is nobody's.
  static __device__ __forceinline__ void share_row(const Params& p, int64_t id, int token, int feature, uint2& x) {
    const int64_t sums = int64_t{2} * p.ranks.world * squares_of_token(p) * kSlotPieces;
    const auto place = [&](uint4* exchange) {
      return reinterpret_cast<uint2*>(exchange + sums) + (static_cast<int64_t>(token) * p.hidden + feature) / 4;
    };
    if (id >= 0 && id < p.vocab) {
      const uint2 words = make_uint2(word_of(x.x), word_of(x.y));
      for_peers<uint4>(p.ranks, [&](uint4* exchange) { store_relaxed_system(place(exchange), words); });
      return;
    }
    const int64_t of_all = id + p.ranks.vocab_start;
    if (of_all < 0 || of_all >= p.ranks.vocab) return;
    uint2* own = place(own_exchange<uint4>(p.ranks));
    Patience patience;
    do {
      x = load_relaxed_system(own);
      patience.look(p.ranks);
    } while (!has_come(x));
    store_relaxed_system(own, make_uint2(kNoWord, kNoWord));
  }

  // ---- attention ---------------------------------------------------------------------------------------------------

  static __device__ __forceinline__ int k_chunk(int key, int chunk) { return chunk ^ (key & 1) << 2; }
  static __device__ __forceinline__ int v_chunk(int key, int chunk) { return chunk ^ (key & 7); }

  template <typename Wait>
  static __device__ __forceinline__ void attend(const Params& p, Shared& shared, int layer, int first, float* block,
                                                unsigned char* q_tile, int thread, const Wait& wait) {
    const StreamLayer& cache = p.layers[layer];
    const int group = p.q_heads / p.kv_heads, query_rows = p.block_size * group;
    const int qkv_stride = (p.q_heads + 2 * p.kv_heads) * D;
    auto* k_tile = reinterpret_cast<unsigned char*>(block);
    unsigned char* v_tile = k_tile + kKeys * D * 2;
    unsigned char* exchange = q_tile + kStreamQueryRows * D * 2;
    constexpr int kStep = kConsumers / kChunks;

    for (int unit = first; unit < p.units; unit += p.stream.blocks) {
      const int here = opaque(thread);
      // This thread copies piece here % kChunks of the keys here / kChunks + i * kStep.
      const Part part_here = part_of(p, shared, layer, unit);
      const Keys& keys = part_here.keys;
      const int row0 = part_here.row0, kv_head = part_here.kv_head, b = part_here.b;
      const int begin = part_here.begin, end = part_here.end, prefix = shared.prefix[b];
      const auto is_first = [&] { return unit == opaque(static_cast<int>(blockIdx.x)); };  // index[0] of the job
      if (begin >= end) {
        if (is_first()) wait();
        continue;
      }

      int32_t slots[kCopies];  // of the tile that is copied next; -1: no such key
      const auto find_slots = [&](int tile) {
        const int key0 = opaque(here) / kChunks;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          const int key = key0 + i * kStep;
          slots[i] = -1;
          if (tile == keys.tiles) {
            if (key < p.block_size) slots[i] = b * p.block_size + key;  // a row of qkv
          } else if (tile < keys.tiles && keys.low + tile * kKeys + key < prefix) {
            const int64_t slot = p.req_to_token.at(shared.table_rows[b], keys.low + tile * kKeys + key);
            if (slot >= 0 && slot < cache.num_slots) slots[i] = static_cast<int32_t>(slot);
          }
        }
      };
      const auto copy = [&](bool is_k, int tile) {
        const int chunk = opaque(here) % kChunks, key0 = opaque(here) / kChunks;
        const bool own = tile == keys.tiles;
        const uint16_t* from = own ? p.qkv + (p.q_heads + (is_k ? 0 : p.kv_heads) + kv_head) * D
                                   : (is_k ? cache.k : cache.v) + kv_head * D;
        const int64_t stride = own ? qkv_stride : is_k ? cache.k_slot_stride : cache.v_slot_stride;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          const int key = key0 + i * kStep;
          unsigned char* to = is_k ? k_tile + (key * kChunks + k_chunk(key, chunk)) * 16
                                   : v_tile + (key * kChunks + v_chunk(key, chunk)) * 16;
          const int64_t row = max(slots[i], 0);
          copy_async_16(to, from + row * stride + chunk * 8, slots[i] < 0 ? 0 : 16);  // absent: 0 * V must stay 0
        }
      };
      const auto copy_first = [&] {
        copy(true, begin);
        copy_async_commit();
        copy(false, begin);
        copy_async_commit();
      };

      // Of the first unit's first keys the loaders have looked them up.
      const bool early = begin != keys.tiles;
      if (is_first() && early) {
        for (int w = 0; w < stream::kLoaderWarps; ++w) {
          while (load_acquire_shared(&shared.slots_of[w]) - 1 !=
                 static_cast<uint32_t>(layer)) {  // layer + 1 would be kept
          }
        }
#pragma unroll
        for (int i = 0; i < kCopies; ++i) slots[i] = shared.first_slots[here / kChunks + i * kStep];
      } else {
        find_slots(begin);
      }
      if (!is_first()) named_barrier(kConsumerBarrier, kConsumers);  // the unit before has left its part
      if (early) copy_first();
      if (is_first()) wait();
      if (!early) copy_first();

#pragma unroll
      for (int i = 0; i < kCopies; ++i) {  // Q: [row0 + row][D], a row is a (token, head of the group)
        const int row = here / kChunks + i * kStep, chunk = here % kChunks;
        const bool live = row0 + row < query_rows;
        const int token = b * p.block_size + (live ? (row0 + row) / group : 0);
        const int head = kv_head * group + (live ? (row0 + row) % group : 0);
        copy_async_16(q_tile + (row * kChunks + k_chunk(row, chunk)) * 16,
                      p.qkv + static_cast<uint32_t>(token * qkv_stride + head * D + chunk * 8), live ? 16 : 0);
      }
      copy_async_commit();
      find_slots(begin + 1);
      const int lane = here % 32, part = here / 32 % 4, half = here / 128;
      // This thread's rows: row0 + 16 part + lane / 4 + {0, 8}.
      const bool busy = row0 + 16 * part < query_rows;
      const auto fragment = [&](int kk) {  // of the weights: rows of `part`, keys 16 kk ..
        const int h = opaque(here);
        return reinterpret_cast<uint4*>(exchange) + (h / 32 % 4 * (kKeys / 16) + kk) * 32 + h % 32;
      };
      float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
      float out[D / 16][4] = {};  // columns half * D / 2 ..

      for (int tile = begin; tile < end; ++tile) {
        tile == begin ? copy_async_wait<0>() : copy_async_wait<1>();
        named_barrier(kConsumerBarrier, kConsumers);  // K is here, first Q too
        if (tile == begin) wait.mark(stream::kFirstWeights);
        float s[kHalf / 8][4] = {};
        if (busy) {
          const int lane = opaque(here) % 32;
#pragma unroll 2
          for (int c = 0; c < D / 32; ++c) {  // 32 columns: of each row this lane's 8
            const auto piece = [&](const unsigned char* from, int row) {
              return *reinterpret_cast<const uint4*>(from + (row * kChunks + k_chunk(row, 4 * c + lane % 4)) * 16);
            };
            const uint4 upper = piece(q_tile, 16 * part + lane / 4), lower = piece(q_tile, 16 * part + lane / 4 + 8);
            const uint32_t a0[4] = {upper.x, lower.x, upper.y, lower.y};
            const uint32_t a1[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
            for (int j = 0; j < kHalf / 8; ++j) {
              const uint4 k = piece(k_tile, kHalf * half + 8 * j + lane / 4);
              mma_m16n8k16(s[j], a0, k.x, k.y);
              mma_m16n8k16(s[j], a1, k.z, k.w);
            }
          }
        }
        named_barrier(kConsumerBarrier, kConsumers);  // K has been read
        if (tile == begin) wait.mark(stream::kLastTile);
        if (tile + 1 < end) copy(true, tile + 1);
        copy_async_commit();

        if (busy) {
          const float scale_log2 = p.scale * 1.4426950408889634f;
#pragma unroll
          for (int j = 0; j < kHalf / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[j][e] *= scale_log2;
          const bool own = tile == keys.tiles;
          const int first_key = keys.low + tile * kKeys;
          if (own || cache.window > 0 || first_key + kKeys > prefix) {
            // A query sees the keys of the tile that exist and whose positions lie in an interval.
            const int row = opaque(here) % 32 / 4 + 16 * part + row0;
            const int last_key = own ? p.block_size : prefix - first_key;
            int low[2], high[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int token = b * p.block_size + (row + 8 * h < query_rows ? (row + 8 * h) / group : 0);
              const int64_t query = shared.positions[token];
              low[h] = cache.window > 0 ? clamp_to(query - cache.window + 1, INT32_MIN, INT32_MAX) : INT32_MIN;
              high[h] = INT32_MAX;
              if (own && cache.window > 0) high[h] = clamp_to(query + cache.window - 1, INT32_MIN, INT32_MAX);
              if (own && cache.causal != 0) high[h] = static_cast<int>(query);
            }
#pragma unroll
            for (int j = 0; j < kHalf / 8; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int key = kHalf * half + 8 * j + 2 * (opaque(here) % 4) + e;
                const bool exists = key < last_key;
                const int position = own ? shared.positions[b * p.block_size + (exists ? key : 0)] : first_key + key;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                  if (!exists || position < low[h] || position > high[h]) s[j][2 * h + e] = -INFINITY;
                }
              }
          }
          float here_highest[2];
          float* const peaks = reinterpret_cast<float*>(exchange + kExchangeBytes) + 32 * part + lane / 4;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float highest = maximum[h];
#pragma unroll
            for (int j = 0; j < kHalf / 8; ++j) highest = fmaxf(highest, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
            if (lane % 4 == 0) peaks[16 * half + 8 * h] = highest;
            here_highest[h] = highest;
          }
          named_barrier(kPairBarrier + part, 64);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float highest = fmaxf(here_highest[h], peaks[16 * (1 - half) + 8 * h]);
            const float shift = highest == -INFINITY ? 0.0f : highest;
            const float correction = exp2_approx(maximum[h] - shift);
            maximum[h] = highest;
            sum[h] *= correction;
#pragma unroll
            for (int j = 0; j < kHalf / 8; ++j)
#pragma unroll
              for (int e = 2 * h; e < 2 * h + 2; ++e) {
                s[j][e] = exp2_approx(s[j][e] - shift);
                sum[h] += s[j][e];
              }
            if (tile > begin) {
#pragma unroll
              for (int n = 0; n < D / 16; ++n) {
                out[n][2 * h] *= correction;
                out[n][2 * h + 1] *= correction;
              }
            }
          }
#pragma unroll
          for (int kk = 0; kk < kHalf / 16; ++kk) {
            *fragment(2 * half + kk) = make_uint4(
                pack_bf16(s[2 * kk][0], s[2 * kk][1]), pack_bf16(s[2 * kk][2], s[2 * kk][3]),
                pack_bf16(s[2 * kk + 1][0], s[2 * kk + 1][1]), pack_bf16(s[2 * kk + 1][2], s[2 * kk + 1][3]));
          }
        }
        copy_async_wait<1>();
        if (tile == begin) wait.mark(stream::kAddedHalves);
        named_barrier(kConsumerBarrier, kConsumers);  // V is here
        if (tile == begin) wait.mark(stream::kLeftPart);
        if (busy) {
#pragma unroll 2
          for (int kk = 0; kk < kKeys / 16; ++kk) {
            const uint4 w = *fragment(kk);
            const uint32_t a[4] = {w.x, w.y, w.z, w.w};
            const int lane = opaque(here) % 32, key = 16 * kk + lane % 16;
#pragma unroll
            for (int n = 0; n < D / 16; n += 2) {
              uint32_t v[4];
              load_matrix_x4_transposed(
                  v, v_tile + (key * kChunks + v_chunk(key, half * (kChunks / 2) + n + lane / 16)) * 16);
              mma_m16n8k16(out[n], a, v[0], v[1]);
              mma_m16n8k16(out[n + 1], a, v[2], v[3]);
            }
          }
        }
        named_barrier(kConsumerBarrier, kConsumers);  // V has been read
        if (tile + 1 < end) copy(false, tile + 1);
        copy_async_commit();
        find_slots(tile + 2);
      }

      wait.mark(stream::kAddedParts);
      if (busy) {
        float* const sums = reinterpret_cast<float*>(exchange + kExchangeBytes) + 32 * part + lane / 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
          sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
          if (lane % 4 == 0) sums[16 * half + 8 * h] = sum[h];
        }
        named_barrier(kPairBarrier + part, 64);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = row0 + 16 * part + lane / 4 + 8 * h;
          if (row >= query_rows) continue;
          float* to =
              part_row(p, unit / p.row_tiles % p.splits, b * p.block_size + row / group, kv_head * group + row % group);
#pragma unroll
          for (int n = 0; n < D / 16; ++n) {
            store_relaxed(reinterpret_cast<uint2*>(to + half * (D / 2) + 8 * n + 2 * (lane % 4)),
                          make_uint2(stream::word(out[n][2 * h]), stream::word(out[n][2 * h + 1])));
          }
          if (lane % 4 == 0) {
            store_relaxed(reinterpret_cast<uint2*>(to + D + 2 * half),
                          make_uint2(stream::word(maximum[h]), stream::word(sum[h] + sums[16 * (1 - half) + 8 * h])));
          }
        }
      }
    }
    if (first >= p.units) wait();
    merge(p, shared, layer, opaque(static_cast<int>(blockIdx.x)), p.batch * p.block_size, opaque(thread));
  }

  static __device__ __forceinline__ float* part_row(const Params& p, int split, int token, int head) {
    const int row = (split * p.batch * p.block_size + token) * p.q_heads + head;
    return p.attention_parts + static_cast<int64_t>(row) * (D + 4);
  }

  // out = sum_s 2^(m_s - m) o_s / sum_s 2^(m_s - m) l_s over the splits s of 64 columns of a (token, head): a warp
  // each, of all blocks. Waits for the parts, whoever computes them, and leaves their places empty for the next layer.
  static __device__ __forceinline__ void merge(const Params& p, const Shared& shared, int layer, int first, int tokens,
                                               int thread) {
    constexpr int kRounds = kMaxStreamSplits / 32, kPieces = D / 64, kAtOnce = 16;
    const uint2 nothing = make_uint2(kNothing, kNothing);
    const int lane = thread % 32;
#pragma unroll 1
    for (int item = thread / 32 * p.stream.blocks + first; item < tokens * p.q_heads * kPieces;
         item += kConsumerWarps * p.stream.blocks) {
      const int piece = item % kPieces, head = item / kPieces % p.q_heads, token = item / (kPieces * p.q_heads);
      const int used = keys_of(p, shared, layer, token / p.block_size).used_splits();
      float* const parts = part_row(p, 0, token, head);
      const uint32_t step = static_cast<uint32_t>(p.batch * p.block_size * p.q_heads) * (D + 4);
      const auto at = [&](int split) { return reinterpret_cast<uint2*>(parts + split * step + 64 * piece + 2 * lane); };
      const auto stats_at = [&](int split) { return reinterpret_cast<uint2*>(parts + split * step + D + 2 * piece); };
      float weight[kRounds], sum[kRounds], highest = -INFINITY, total = 0.0f;
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        uint2 stats = make_uint2(__float_as_uint(-INFINITY), 0u);
        if (lane + 32 * i < used) {
          do {
            stats = load_relaxed(stats_at(lane + 32 * i));
          } while (!stream::is_whole(stats));
          store_relaxed(stats_at(lane + 32 * i), nothing);
        }
        weight[i] = __uint_as_float(stats.x);
        sum[i] = __uint_as_float(stats.y);
        highest = fmaxf(highest, weight[i]);
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
      }
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        weight[i] = sum[i] == 0.0f ? 0.0f : exp2f(weight[i] - highest);
        total += weight[i] * sum[i];
      }
      const float inverse = 1.0f / warp_sum(total);  // a query sees at least its own key
      float x = 0.0f, y = 0.0f;
#pragma unroll 1
      for (int from = 0; from < used; from += kAtOnce) {
        uint2 v[kAtOnce];
        bool whole;
        do {
          whole = true;
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            v[j] = make_uint2(0u, 0u);
            if (from + j < used) v[j] = load_relaxed(at(from + j));
          }
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) whole &= stream::is_whole(v[j]);
        } while (!whole);
        __syncwarp();
        float of_round = weight[0];
#pragma unroll
        for (int i = 1; i < kRounds; ++i) of_round = from >= 32 * i ? weight[i] : of_round;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const float w = __shfl_sync(0xffffffffu, of_round, (from + j) % 32);  // 0 beyond `used`
          x += w * __uint_as_float(v[j].x), y += w * __uint_as_float(v[j].y);
          if (from + j < used) store_relaxed(at(from + j), nothing);
        }
      }
      auto* to = reinterpret_cast<uint32_t*>(p.attended + (static_cast<int64_t>(token) * p.q_heads + head) * D) +
                 32 * piece + lane;
      *to = pack_bf16(x * inverse, y * inverse);
    }
  }
};

template <int D, typename Format>
__global__ void __launch_bounds__(stream::kThreads, 1)
    stream_draft_kernel(const __grid_constant__ StreamDraftParams p) {
  stream::Stream<Draft<D, Format>>::run(p, dynamic_shared());
}

}  // namespace

template <typename Format>
void launch_stream_draft(const StreamDraftParams& p, int64_t head_dim, cudaStream_t stream) {
  // Cooperative launches are not promised to overlap. Simulated ranks are few enough blocks, one a multiprocessor, to
  // become resident without that, as soon as what else runs has ended (api/draft.cpp).
  const bool cooperative = !p.ranks.one_device;
  if (head_dim == 64) {
    stream::launch_stream<Draft<64, Format>>(stream_draft_kernel<64, Format>, p, stream, "draft_forward", cooperative);
  } else if (head_dim == 128) {
    stream::launch_stream<Draft<128, Format>>(stream_draft_kernel<128, Format>, p, stream, "draft_forward",
                                              cooperative);
  } else {
    throw std::runtime_error("dflash::draft_forward: no streaming kernel for head size " + std::to_string(head_dim));
  }
}

}  // namespace dflash::draft

// Attention of a block over its paged context and itself; see params.h for what it computes.
//
// Partition: a block of threads owns (request, KV head, split of the keys, 64 of the T * G query rows that share the KV
// head). Keys come in tiles of 64 (32 for D = 256): context tiles from the first visible key on, then one tile with the
// block's own keys. Tiles are dealt evenly to the splits; with more splits than tiles the last splits stay empty. Four
// warps own 16 query rows each, against all keys of the tile, as in FlashAttention-2: the softmax never leaves a warp.
// Splits are merged by a second kernel, one warp a (token, head).
//
// Shared memory, bf16, rows padded by 8 elements so that ldmatrix is free of bank conflicts for every D here:
//   Q [64, D] | even tiles: K [kKeys, D], V [kKeys, D] | odd tiles: K, V
// Pipeline: cp.async, tile i + 1 on its way while tile i is computed. Slots run one tile further ahead, so that a copy
// never waits for its address. Two barriers a tile: one publishes tile i, one frees its stage and publishes slots.
#include <cuda_bf16.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "common/dependent_launch.cuh"
#include "common/ptx.cuh"
#include "smxx/attention/launch.h"

namespace dflash::attention {
namespace {

template <int D>
struct Config {
  static constexpr int kKeys = D <= 128 ? 64 : 32;  // 64 at D = 256 takes more than 255 registers
  static constexpr int kWarps = kRowTile / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPitch = D + 8;  // elements between rows in shared memory
  static constexpr int kQueryElements = kRowTile * kPitch;
  static constexpr int kTileElements = kKeys * kPitch;  // of K, of V
  static constexpr int kSharedBytes = (kQueryElements + 4 * kTileElements) * 2;
  static constexpr int kChunks = D / 8;  // 16-byte copies of a row
  static_assert(D % 16 == 0 && kKeys % 16 == 0, "operands are 16 x 16");
  static_assert(kKeys * kChunks % kThreads == 0 && kRowTile * kChunks % kThreads == 0, "even copies");
  static_assert(kMaxBlockSize <= kKeys, "a block's own keys are one tile");
  static_assert(kSharedBytes + 2048 <= 232448, "shared memory of an SM");
};

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ int clamp_to(int64_t value, int64_t low, int64_t high) {
  return static_cast<int>(value < low ? low : value > high ? high : value);
}

template <int D>
__global__ void __launch_bounds__(Config<D>::kThreads, 1)
    block_attention_kernel(const __grid_constant__ BlockAttentionParams p) {
  using C = Config<D>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ int block_positions[kMaxBlockSize];
  __shared__ int64_t slots[2][C::kKeys];  // of even and odd tiles; -1: no such key
  auto* q_tile = reinterpret_cast<__nv_bfloat16*>(shared_bytes);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  grid_dependency_launch();

  const int group = p.q_heads / p.kv_heads;
  const int rows = p.block_size * group;
  const int row_tiles = (rows + kRowTile - 1) / kRowTile;
  int64_t item = blockIdx.x;
  const int row0 = static_cast<int>(item % row_tiles) * kRowTile;
  item /= row_tiles;
  const int split = static_cast<int>(item % p.num_splits);
  item /= p.num_splits;
  const int kv_head = static_cast<int>(item % p.kv_heads);
  const int64_t b = item / p.kv_heads;
  const int64_t qkv_stride = static_cast<int64_t>(p.q_heads + 2 * p.kv_heads) * D;

  if (threadIdx.x < p.block_size) block_positions[threadIdx.x] = static_cast<int>(p.positions.at(b, threadIdx.x));
  __syncthreads();
  const int64_t table_row = p.req_pool_indices.at(b);
  const bool mapped = table_row >= 0 && table_row < p.rows;
  const int prefix = mapped ? clamp_to(p.prefix_lens.at(b), 0, p.width) : 0;
  int low = 0;  // first context key that any query of the block sees
  if (p.window > 0) {
    int earliest = block_positions[0];
    for (int t = 1; t < p.block_size; ++t) earliest = min(earliest, block_positions[t]);
    low = clamp_to(static_cast<int64_t>(earliest) - p.window + 1, 0, prefix);
  }
  const int context_tiles = (prefix - low + C::kKeys - 1) / C::kKeys;
  const int tiles_per_split = (context_tiles + 1 + p.num_splits - 1) / p.num_splits;
  const int begin = min(split * tiles_per_split, context_tiles + 1);
  const int end = min(begin + tiles_per_split, context_tiles + 1);

  auto slot_of = [&](int tile, int key) -> int64_t {
    if (tile == context_tiles) return key < p.block_size ? b * p.block_size + key : -1;  // a row of qkv
    const int position = low + tile * C::kKeys + key;
    if (position >= prefix) return -1;
    const int64_t slot = p.req_to_token.at(table_row, position);
    return slot >= 0 && slot < p.num_slots ? slot : -1;
  };
  auto copy_tile = [&](int tile) {
    const bool own = tile == context_tiles;
    const uint16_t* k_from = own ? p.qkv + (p.q_heads + kv_head) * D : p.k_cache + kv_head * D;
    const uint16_t* v_from = own ? p.qkv + (p.q_heads + p.kv_heads + kv_head) * D : p.v_cache + kv_head * D;
    const int64_t k_stride = own ? qkv_stride : p.k_slot_stride;
    const int64_t v_stride = own ? qkv_stride : p.v_slot_stride;
    __nv_bfloat16* k_tile = q_tile + C::kQueryElements + tile % 2 * 2 * C::kTileElements;
    __nv_bfloat16* v_tile = k_tile + C::kTileElements;
#pragma unroll 4
    for (int i = 0; i < C::kKeys * C::kChunks / C::kThreads; ++i) {
      const int chunk = i * C::kThreads + threadIdx.x;
      const int key = chunk / C::kChunks;
      const int column = chunk % C::kChunks * 8;
      const int64_t slot = slots[tile % 2][key];
      const int64_t row = slot < 0 ? 0 : slot;
      const int bytes = slot < 0 ? 0 : 16;  // absent keys are zeros: 0 * V must stay 0
      copy_async_16(k_tile + key * C::kPitch + column, k_from + row * k_stride + column, bytes);
      copy_async_16(v_tile + key * C::kPitch + column, v_from + row * v_stride + column, bytes);
    }
  };

  // The context does not depend on the preceding kernel: its first tile is on its way before the wait.
  if (threadIdx.x < C::kKeys && begin < end) {
    slots[begin % 2][threadIdx.x] = slot_of(begin, threadIdx.x);
    if (begin + 1 < end) slots[(begin + 1) % 2][threadIdx.x] = slot_of(begin + 1, threadIdx.x);
  }
  __syncthreads();
  if (begin < end && begin != context_tiles) copy_tile(begin);
  grid_dependency_wait();
  const int64_t partial_row0 = ((b * p.kv_heads + kv_head) * p.num_splits + split) * rows;
  if (begin >= end) {  // only with more splits than tiles: nothing to add
    for (int row = row0 + threadIdx.x; row < min(rows, row0 + kRowTile); row += C::kThreads) {
      p.partial_stats[2 * (partial_row0 + row)] = -INFINITY;
      p.partial_stats[2 * (partial_row0 + row) + 1] = 0.0f;
    }
    return;
  }
  if (begin == context_tiles) copy_tile(begin);
#pragma unroll 4
  for (int i = 0; i < kRowTile * C::kChunks / C::kThreads; ++i) {
    const int chunk = i * C::kThreads + threadIdx.x;
    const int row = chunk / C::kChunks;
    const int column = chunk % C::kChunks * 8;
    const bool live = row0 + row < rows;
    const int token = live ? (row0 + row) / group : 0;
    const int head = live ? kv_head * group + (row0 + row) % group : 0;
    copy_async_16(q_tile + row * C::kPitch + column,
                  p.qkv + (b * p.block_size + token) * qkv_stride + head * D + column, live ? 16 : 0);
  }
  copy_async_commit();

  // This thread's accumulators belong to rows row0 + warp * 16 + lane / 4 + {0, 8}.
  const bool busy = row0 + warp * 16 < rows;
  const float scale_log2 = p.scale * 1.4426950408889634f;
  int query_position[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + warp * 16 + lane / 4 + 8 * half;
    query_position[half] = block_positions[row < rows ? row / group : 0];
  }
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // over this thread's columns
  float out[D / 8][4];
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) out[n][e] = 0.0f;

  for (int tile = begin; tile < end; ++tile) {
    if (tile + 1 < end) copy_tile(tile + 1);
    copy_async_commit();  // an empty group at the end keeps the count
    int64_t next_slot = -1;
    if (tile + 2 < end && threadIdx.x < C::kKeys) next_slot = slot_of(tile + 2, threadIdx.x);
    copy_async_wait<1>();
    __syncthreads();

    if (busy) {
      const __nv_bfloat16* k_tile = q_tile + C::kQueryElements + tile % 2 * 2 * C::kTileElements;
      const __nv_bfloat16* v_tile = k_tile + C::kTileElements;
      float s[C::kKeys / 8][4];
#pragma unroll
      for (int j = 0; j < C::kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[j][e] = 0.0f;
#pragma unroll 2
      for (int kk = 0; kk < D; kk += 16) {
        uint32_t a[4];
        load_matrix_x4(a, q_tile + (warp * 16 + lane % 16) * C::kPitch + kk + lane / 16 * 8);
#pragma unroll
        for (int j = 0; j < C::kKeys / 8; j += 2) {
          uint32_t k[4];
          load_matrix_x4(k, k_tile + (8 * j + lane / 16 * 8 + lane % 8) * C::kPitch + kk + lane / 8 % 2 * 8);
          mma_m16n8k16(s[j], a, k[0], k[1]);
          mma_m16n8k16(s[j + 1], a, k[2], k[3]);
        }
      }

      const bool own = tile == context_tiles;
      const int first = low + tile * C::kKeys;
      const bool all_visible = !own && p.window == 0 && first + C::kKeys <= prefix;
      auto visible = [&](int key, int query) {
        if (!own) return first + key < prefix && (p.window == 0 || query - (first + key) < p.window);
        if (key >= p.block_size) return false;
        const int distance = query - block_positions[key];
        return (!p.causal || distance >= 0) && (p.window == 0 || abs(distance) < p.window);
      };
#pragma unroll
      for (int j = 0; j < C::kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[j][e] *= scale_log2;
          if (!all_visible && !visible(8 * j + 2 * (lane % 4) + e % 2, query_position[e / 2])) s[j][e] = -INFINITY;
        }

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = maximum[half];
#pragma unroll
        for (int j = 0; j < C::kKeys / 8; ++j) highest = fmaxf(highest, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        const float shift = highest == -INFINITY ? 0.0f : highest;  // no key so far: all weights become 0
        const float correction = exp2f(maximum[half] - shift);
        maximum[half] = highest;
        sum[half] *= correction;
#pragma unroll
        for (int j = 0; j < C::kKeys / 8; ++j)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[j][e] = exp2f(s[j][e] - shift);
            sum[half] += s[j][e];
          }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          out[n][2 * half] *= correction;
          out[n][2 * half + 1] *= correction;
        }
      }

      // The accumulator layout of S is the operand layout of P: two n8 tiles of S are one k16 step.
#pragma unroll
      for (int kk = 0; kk < C::kKeys / 16; ++kk) {
        const uint32_t a[4] = {pack_bf16(s[2 * kk][0], s[2 * kk][1]), pack_bf16(s[2 * kk][2], s[2 * kk][3]),
                               pack_bf16(s[2 * kk + 1][0], s[2 * kk + 1][1]),
                               pack_bf16(s[2 * kk + 1][2], s[2 * kk + 1][3])};
        // V: matrices (keys 0-7, d 0-7), (keys 8-15, d 0-7), (keys 0-7, d 8-15), (keys 8-15, d 8-15), transposed.
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
          uint32_t v[4];
          load_matrix_x4_transposed(v, v_tile + (16 * kk + lane % 16) * C::kPitch + 8 * n + lane / 16 * 8);
          mma_m16n8k16(out[n], a, v[0], v[1]);
          mma_m16n8k16(out[n + 1], a, v[2], v[3]);
        }
      }
    }

    // The slots of this tile were last read when its copy was issued, before the barrier above.
    if (threadIdx.x < C::kKeys) slots[tile % 2][threadIdx.x] = next_slot;
    __syncthreads();
  }
  copy_async_wait<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    const int row = row0 + warp * 16 + lane / 4 + 8 * half;
    if (row >= rows) continue;
    if (p.num_splits > 1) {
      float* to = p.partial_out + (partial_row0 + row) * D + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<float2*>(to + 8 * n) = make_float2(out[n][2 * half], out[n][2 * half + 1]);
      }
      if (lane % 4 == 0) {
        p.partial_stats[2 * (partial_row0 + row)] = maximum[half];
        p.partial_stats[2 * (partial_row0 + row) + 1] = sum[half];
      }
    } else {
      const float inverse = 1.0f / sum[half];  // a query sees at least its own key
      const int64_t token = b * p.block_size + row / group;
      const int head = kv_head * group + row % group;
      uint16_t* to = p.out + (token * p.q_heads + head) * D + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<uint32_t*>(to + 8 * n) =
            pack_bf16(out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse);
      }
    }
  }
}

constexpr int kMergeWarps = 4;

// out = sum_s 2^(m_s - m) o_s / sum_s 2^(m_s - m) l_s over the splits s of one (token, head).
template <int D>
__global__ void __launch_bounds__(32 * kMergeWarps)
    merge_splits_kernel(const __grid_constant__ BlockAttentionParams p) {
  const int lane = threadIdx.x % 32;
  grid_dependency_launch();
  grid_dependency_wait();
  const int group = p.q_heads / p.kv_heads;
  const int rows = p.block_size * group;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / 32;  // (b, KV head, row)
  if (item >= p.batch * p.kv_heads * rows) return;
  const int row = static_cast<int>(item % rows);
  const int64_t pair = item / rows;  // b * Hkv + KV head
  const int64_t partial_row = pair * p.num_splits * rows + row;

  constexpr int kRounds = kMaxSplits / 32;
  float weight[kRounds], sum[kRounds];
  float highest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int split = lane + 32 * i;
    weight[i] = -INFINITY;
    sum[i] = 0.0f;
    if (split < p.num_splits) {
      const float2 stats =
          *reinterpret_cast<const float2*>(p.partial_stats + 2 * (partial_row + static_cast<int64_t>(split) * rows));
      weight[i] = stats.x;
      sum[i] = stats.y;
    }
    highest = fmaxf(highest, weight[i]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, offset));
  }
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    weight[i] = sum[i] == 0.0f ? 0.0f : exp2f(weight[i] - highest);
    total += weight[i] * sum[i];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);

  constexpr int kPairs = (D / 2 + 31) / 32;  // pairs of columns of a lane
  float2 out[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) out[i] = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int splits = min(32, p.num_splits - 32 * round);
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      const float w = __shfl_sync(0xffffffffu, weight[round], s);
      if (w == 0.0f) continue;  // empty splits have written no output
      const float* from = p.partial_out + (partial_row + static_cast<int64_t>(32 * round + s) * rows) * D;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int column = 2 * (lane + 32 * i);
        if (column >= D) continue;
        const float2 value = *reinterpret_cast<const float2*>(from + column);
        out[i].x += w * value.x;
        out[i].y += w * value.y;
      }
    }
  }
  const float inverse = 1.0f / total;
  const int64_t token = pair / p.kv_heads * p.block_size + row / group;
  const int head = static_cast<int>(pair % p.kv_heads) * group + row % group;
  uint16_t* to = p.out + (token * p.q_heads + head) * D;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int column = 2 * (lane + 32 * i);
    if (column >= D) continue;
    *reinterpret_cast<uint32_t*>(to + column) = pack_bf16(out[i].x * inverse, out[i].y * inverse);
  }
}

template <int D>
void launch(const BlockAttentionParams& p, cudaStream_t stream) {
  using C = Config<D>;
  cuda_check(
      cudaFuncSetAttribute(block_attention_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
      "block_attention");
  const int64_t rows = static_cast<int64_t>(p.block_size) * (p.q_heads / p.kv_heads);
  const int64_t pairs = p.batch * p.kv_heads;
  const int64_t blocks = pairs * p.num_splits * ((rows + kRowTile - 1) / kRowTile);
  launch_kernel(block_attention_kernel<D>, dim3(static_cast<unsigned>(blocks)), C::kThreads, C::kSharedBytes, stream,
                true, "block_attention", p);
  if (p.num_splits == 1) return;
  const int64_t merge_blocks = (pairs * rows + kMergeWarps - 1) / kMergeWarps;
  launch_kernel(merge_splits_kernel<D>, dim3(static_cast<unsigned>(merge_blocks)), 32 * kMergeWarps, 0, stream, true,
                "merge_splits", p);
}

}  // namespace

void launch_block_attention(const BlockAttentionParams& p, cudaStream_t stream) {
  if (p.batch == 0) return;
  switch (p.head_dim) {
    case 32:
      return launch<32>(p, stream);
    case 64:
      return launch<64>(p, stream);
    case 96:
      return launch<96>(p, stream);
    case 128:
      return launch<128>(p, stream);
    case 256:
      return launch<256>(p, stream);
    default:
      throw std::runtime_error("dflash::block_attention: no kernel for head size " + std::to_string(p.head_dim));
  }
}

}  // namespace dflash::attention

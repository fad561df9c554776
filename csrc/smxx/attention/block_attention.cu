// Attention of a block over its paged context and itself; see params.h for what it computes.
//
// Partition: a block of threads owns (request, KV head, split of the keys, 64 of the T * G query rows that share the KV
// head). Keys come in tiles of 64 (32 for D = 256): context tiles from the first visible key on, then one tile with the
// block's own keys. Tiles are dealt evenly to the splits, the block's own tile as the last; with more splits than tiles
// some stay empty. Splits are merged by a second kernel, one warp a (token, head).
// Two warps own 32 query rows each against the first half of a tile's keys, two the same rows against the second half:
// an operand read from shared memory serves two products instead of one. The halves have a softmax of their own each
// and are put together at the end, in shared memory. At D = 256 that takes too many registers: four warps own 16 rows
// against all keys.
//
// Shared memory, bf16: Q [64, D] | kStages times K [kKeys, D], V [kKeys, D]
// 16-byte chunks of a row are permuted by the row's number (D a multiple of 64), or rows are padded by one chunk, so
// that neither copies nor ldmatrix have bank conflicts. At D = 128 that is 112 KB, of which two blocks fit an SM.
// Pipeline: cp.async, two tiles on their way while a third is computed (one at D = 256). Slots are looked up one tile
// before their copies are issued, by one thread a key, and lie in the order in which a thread needs them. One barrier a
// tile: it publishes tile i and the slots of the copies that follow it, and frees the stage of tile i - 1 for them.
#include <cuda_bf16.h>

#include <climits>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/dependent_launch.cuh"
#include "common/ptx.cuh"
#include "smxx/attention/launch.h"

namespace dflash::attention {
namespace {

constexpr uint32_t kNoSlot = 0xffffffffu;

template <int D>
struct Config {
  static constexpr int kKeys = D <= 128 ? 64 : 32;    // of a tile
  static constexpr int kKeyWarps = D <= 128 ? 2 : 1;  // warps that share query rows
  static constexpr int kRowTiles = kKeyWarps;         // tiles of 16 query rows of a warp
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStages = D <= 128 ? 3 : 2;
  static constexpr bool kPermuted = D % 64 == 0;
  static constexpr int kPitch = kPermuted ? D : D + 8;  // elements between rows in shared memory
  static constexpr int kQueryElements = kRowTile * kPitch;
  static constexpr int kTileElements = kKeys * kPitch;  // of K, of V
  static constexpr int kSharedBytes = (kQueryElements + 2 * kStages * kTileElements) * 2;
  static constexpr int kChunks = D / 8;                                          // 16-byte copies of a row
  static constexpr int kLanes = D <= 32 ? 4 : D <= 64 ? 8 : D <= 128 ? 16 : 32;  // threads that copy a row
  static constexpr int kCopyRows = kThreads / kLanes;                            // rows under way side by side
  static constexpr int kCopies = kKeys / kCopyRows;                              // rows of a thread
  static_assert(kRowTile == 16 * kRowTiles * (kWarps / kKeyWarps), "all rows have warps");
  static_assert(D % 16 == 0 && kWarpKeys % 16 == 0, "operands are 16 x 16");
  static_assert(kKeys % kCopyRows == 0 && kRowTile % kCopyRows == 0, "even copies");
  static_assert(kMaxBlockSize <= kKeys, "a block's own keys are one tile");
  static_assert(kKeyWarps == 1 || kRowTile * D * 4 + kThreads * 16 <= 4 * kStages * kTileElements,
                "halves are exchanged in stages");
  static_assert(D > 128 || 2 * (kSharedBytes + 2 * 1024) <= 233472, "two blocks an SM");

  // Elements from the start of a tile to a chunk of a row.
  static __device__ __forceinline__ int place(int row, int chunk) {
    return row * kPitch + 8 * (kPermuted ? chunk ^ (row % 8) : chunk);
  }
};

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ int clamp_to(int64_t value, int64_t low, int64_t high) {
  return static_cast<int>(value < low ? low : value > high ? high : value);
}

struct Part {
  int unit;  // (b * Hkv + kv_head) * num_splits + split
  int b, kv_head, split;
  int group;  // G
  int rows;   // T * G
  int row0;
};

__device__ __forceinline__ Part part_of_block(const BlockAttentionParams& p, unsigned block) {
  Part part;
  part.group = p.q_heads / p.kv_heads;
  part.rows = p.block_size * part.group;
  const unsigned row_tiles = (part.rows + kRowTile - 1) / kRowTile;
  const unsigned unit = block / row_tiles;
  const unsigned pair = unit / static_cast<unsigned>(p.num_splits);
  part.unit = static_cast<int>(unit);
  part.row0 = static_cast<int>(block - unit * row_tiles) * kRowTile;
  part.split = static_cast<int>(unit - pair * p.num_splits);
  part.b = static_cast<int>(pair / static_cast<unsigned>(p.kv_heads));
  part.kv_head = static_cast<int>(pair) - part.b * p.kv_heads;
  return part;
}

template <int D>
__global__ void __launch_bounds__(Config<D>::kThreads, D <= 128 ? 2 : 1)
    block_attention_kernel(const __grid_constant__ BlockAttentionParams p) {
  using C = Config<D>;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  __shared__ int block_positions[kMaxBlockSize];
  __shared__ __align__(16) uint32_t slots[C::kStages][C::kCopyRows][C::kCopies];  // of key r + kCopyRows * i at [r][i]
  auto* q_tile = reinterpret_cast<__nv_bfloat16*>(shared_bytes);
  __nv_bfloat16* stages = q_tile + C::kQueryElements;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  grid_dependency_launch();

  const Part part = part_of_block(p, blockIdx.x);
  const int b = part.b, kv_head = part.kv_head, split = part.split;
  const int group = part.group, rows = part.rows, row0 = part.row0;
  const uint32_t qkv_stride = (p.q_heads + 2 * p.kv_heads) * D;

  if (threadIdx.x < p.block_size) block_positions[threadIdx.x] = static_cast<int>(p.positions.at(b, threadIdx.x));
  const int64_t pool_index = p.req_pool_indices.at(b);
  const int64_t prefix_len = p.prefix_lens.at(b);
  __syncthreads();
  const bool mapped = pool_index >= 0 && pool_index < p.rows;
  const int table_row = mapped ? static_cast<int>(pool_index) : 0;
  const int prefix = mapped ? clamp_to(prefix_len, 0, p.width) : 0;
  int low = 0;  // first context key that any query of the block sees
  if (p.window > 0) {
    int earliest = block_positions[0];
    for (int t = 1; t < p.block_size; ++t) earliest = min(earliest, block_positions[t]);
    low = clamp_to(static_cast<int64_t>(earliest) - p.window + 1, 0, prefix);
  }
  const int context_tiles = (prefix - low + C::kKeys - 1) / C::kKeys;
  const int begin = static_cast<int>(static_cast<int64_t>(split) * (context_tiles + 1) / p.num_splits);
  const int end = static_cast<int>(static_cast<int64_t>(split + 1) * (context_tiles + 1) / p.num_splits);

  const auto slot_of = [&](int tile) {  // of key threadIdx.x
    const int key = threadIdx.x;
    if (tile >= end || key >= C::kKeys) return kNoSlot;
    if (tile == context_tiles) return key < p.block_size ? static_cast<uint32_t>(key) : kNoSlot;  // a row of qkv
    const int position = low + tile * C::kKeys + key;
    if (position >= prefix) return kNoSlot;
    const int64_t slot = p.req_to_token.at(opaque(table_row), position);
    return slot >= 0 && slot < p.num_slots ? static_cast<uint32_t>(slot) : kNoSlot;
  };
  const auto publish_slot = [&](int stage, uint32_t slot) {
    const int key = threadIdx.x;
    if (key < C::kKeys) slots[stage][key % C::kCopyRows][key / C::kCopyRows] = slot;
  };
  // A thread copies one chunk of rows copy_row + kCopyRows * i.
  const int copy_row = threadIdx.x / C::kLanes, copy_chunk = threadIdx.x % C::kLanes;
  const auto copy_tile = [&](int tile, int stage) {
    if (copy_chunk >= C::kChunks) return;
    // Addresses are made anew for every tile: no registers are left to hold them.
    const bool own = tile == context_tiles;
    const int64_t own_row = static_cast<int64_t>(opaque(b)) * p.block_size;
    const uint16_t* own_k = p.qkv + own_row * qkv_stride + p.q_heads * D;
    const int column = opaque(kv_head * D + 8 * copy_chunk);
    const uint16_t* k_from = (own ? own_k : p.k_cache) + column;
    const uint16_t* v_from = (own ? own_k + p.kv_heads * D : p.v_cache) + column;
    const uint32_t k_bytes = 2 * (own ? qkv_stride : static_cast<uint32_t>(p.k_slot_stride));
    const uint32_t v_bytes = 2 * (own ? qkv_stride : static_cast<uint32_t>(p.v_slot_stride));
    __nv_bfloat16* k_tile = stages + stage * 2 * C::kTileElements;
    uint32_t slot[C::kCopies];
#pragma unroll
    for (int i = 0; i < C::kCopies; ++i) slot[i] = slots[stage][copy_row][i];
#pragma unroll
    for (int i = 0; i < C::kCopies; ++i) {
      const uint32_t row = slot[i] == kNoSlot ? 0 : slot[i];
      const int bytes = slot[i] == kNoSlot ? 0 : 16;  // absent keys are zeros: 0 * V must stay 0
      const int place = C::place(copy_row + C::kCopyRows * i, copy_chunk);
      copy_async_16(k_tile + place, reinterpret_cast<const char*>(k_from) + static_cast<uint64_t>(row) * k_bytes,
                    bytes);
      copy_async_16(k_tile + C::kTileElements + place,
                    reinterpret_cast<const char*>(v_from) + static_cast<uint64_t>(row) * v_bytes, bytes);
    }
  };

  // The context does not depend on the preceding kernel: its first tiles are on their way before the wait.
  constexpr int kAhead = C::kStages - 1;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) publish_slot(i, slot_of(begin + i));
  uint32_t next_slot = slot_of(begin + kAhead);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (begin + i < min(end, context_tiles)) copy_tile(begin + i, i);
  }
  constexpr int kQueryCopies = kRowTile / C::kCopyRows;
  int query_at[kQueryCopies];  // elements from the request's first row of qkv; -1: no such row
#pragma unroll
  for (int i = 0; i < kQueryCopies; ++i) {
    const unsigned row = row0 + copy_row + C::kCopyRows * i;
    const unsigned token = row / static_cast<unsigned>(group);
    const int head = kv_head * group + static_cast<int>(row - token * group);
    query_at[i] = row < static_cast<unsigned>(rows) ? static_cast<int>(token * qkv_stride) + head * D : -1;
  }
  grid_dependency_wait();
  if (begin == end) {  // only with more splits than tiles: nothing to add
    for (int row = row0 + threadIdx.x; row < min(rows, row0 + kRowTile); row += C::kThreads) {
      const int64_t at = static_cast<int64_t>(part.unit) * rows + row;
      *reinterpret_cast<float2*>(p.partial_stats + 2 * at) = make_float2(-INFINITY, 0.0f);
    }
    return;
  }
  if (copy_chunk < C::kChunks) {
#pragma unroll
    for (int i = 0; i < kQueryCopies; ++i) {
      const bool live = query_at[i] >= 0;
      copy_async_16(
          q_tile + C::place(copy_row + C::kCopyRows * i, copy_chunk),
          p.qkv + static_cast<int64_t>(b) * p.block_size * qkv_stride + (live ? query_at[i] : 0) + 8 * copy_chunk,
          live ? 16 : 0);
    }
  }
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (begin + i == context_tiles && context_tiles < end) copy_tile(context_tiles, i);
  }
  copy_async_commit();
#pragma unroll
  for (int i = 0; i < kAhead - 1; ++i) copy_async_commit();  // empty: from here on a group is a tile

  // This thread's accumulators belong to rows first_row + 16 * m + lane / 4 + {0, 8}.
  constexpr int kRowWarps = C::kWarps / C::kKeyWarps, kRowTiles = C::kRowTiles, kSteps = C::kWarpKeys / 8;
  const int first_row = warp % kRowWarps * 16 * kRowTiles;  // from row0
  const int key_part = warp / kRowWarps;
  const int first_key = key_part * C::kWarpKeys;
  const bool busy = row0 + first_row < rows;
  const float scale_log2 = p.scale * 1.4426950408889634f;
  float maximum[kRowTiles][2], sum[kRowTiles][2];  // sums: over this thread's columns
  float out[kRowTiles][D / 8][4];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maximum[m][half] = -INFINITY;
      sum[m][half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[m][n][e] = 0.0f;
  }

  int stage = 0;
  for (int tile = begin; tile < end; ++tile) {
    const int free_stage = stage == 0 ? kAhead : stage - 1;  // of the tile before
    publish_slot(free_stage, next_slot);
    copy_async_wait<kAhead - 1>();
    __syncthreads();
    if (tile + kAhead < end) copy_tile(tile + kAhead, free_stage);
    copy_async_commit();  // an empty group at the end keeps the count
    next_slot = slot_of(tile + kAhead + 1);

    const bool own = tile == context_tiles;
    const int first = low + tile * C::kKeys;  // position of a context tile's first key
    const int keys = own ? p.block_size : prefix - first;
    if (busy && first_key < keys) {
      const __nv_bfloat16* k_tile = stages + stage * 2 * C::kTileElements;
      const __nv_bfloat16* v_tile = k_tile + C::kTileElements;
      float s[kRowTiles][kSteps][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int j = 0; j < kSteps; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[m][j][e] = 0.0f;
#pragma unroll(D <= 128 ? D / 16 : 2)
      for (int kk = 0; kk < D / 16; ++kk) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          load_matrix_x4(a[m], q_tile + C::place(first_row + 16 * m + lane % 16, 2 * kk + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < kSteps; j += 2) {
          uint32_t k[4];
          load_matrix_x4(k, k_tile + C::place(first_key + 8 * j + lane / 16 * 8 + lane % 8, 2 * kk + lane / 8 % 2));
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            mma_m16n8k16(s[m][j], a[m], k[0], k[1]);
            mma_m16n8k16(s[m][j + 1], a[m], k[2], k[3]);
          }
        }
      }

#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int j = 0; j < kSteps; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[m][j][e] *= scale_log2;
      if (own || p.window > 0 || first_key + C::kWarpKeys > keys) {
        const int window = p.window > 0 ? p.window : INT_MAX;
        const int least = p.causal ? 0 : 1 - window;  // distance from a key of the block
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = opaque(row0 + first_row + 16 * m + lane / 4 + 8 * half);
            const int query = block_positions[row < rows ? row / group : 0];
#pragma unroll
            for (int j = 0; j < kSteps; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int key = first_key + 8 * j + 2 * (lane % 4) + e;
                const int distance = query - (own ? block_positions[key % kMaxBlockSize] : first + key);
                const bool visible = (key < keys) & (distance < window) & (!own | (distance >= least));
                if (!visible) s[m][j][2 * half + e] = -INFINITY;
              }
          }
      }

      float correction[kRowTiles][2];
      bool raised = false;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float highest = maximum[m][half];
#pragma unroll
          for (int j = 0; j < kSteps; ++j) highest = fmaxf(highest, fmaxf(s[m][j][2 * half], s[m][j][2 * half + 1]));
          highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
          highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
          const float shift = highest == -INFINITY ? 0.0f : highest;  // no key so far: all weights become 0
          correction[m][half] = exp2_approx(maximum[m][half] - shift);
          raised |= highest != maximum[m][half];
          maximum[m][half] = highest;
          float added = 0.0f;
#pragma unroll
          for (int j = 0; j < kSteps; ++j)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              s[m][j][e] = exp2_approx(s[m][j][e] - shift);
              added += s[m][j][e];
            }
          sum[m][half] = sum[m][half] * correction[m][half] + added;
        }
      if (__ballot_sync(0xffffffffu, raised) != 0) {  // seldom after the first tiles
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[m][n][e] *= correction[m][e / 2];
      }

      // The accumulator layout of S is the operand layout of P: two n8 tiles of S are one k16 step.
#pragma unroll
      for (int kk = 0; kk < kSteps / 2; ++kk) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a[m][i] = pack_bf16(s[m][2 * kk + i / 2][i % 2 * 2], s[m][2 * kk + i / 2][i % 2 * 2 + 1]);
          }
        // V: matrices (keys 0-7, d 0-7), (keys 8-15, d 0-7), (keys 0-7, d 8-15), (keys 8-15, d 8-15), transposed.
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
          uint32_t v[4];
          load_matrix_x4_transposed(v, v_tile + C::place(first_key + 16 * kk + lane % 16, n + lane / 16));
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            mma_m16n8k16(out[m][n], a[m], v[0], v[1]);
            mma_m16n8k16(out[m][n + 1], a[m], v[2], v[3]);
          }
        }
      }
    }
    stage = stage == kAhead ? 0 : stage + 1;
  }

  // Of two warps with the same rows each ends with one of the two tiles of 16 rows: it gives away the other.
  const int kept = C::kKeyWarps == 1 ? 0 : key_part;
  if constexpr (C::kKeyWarps > 1) {
    auto* given = reinterpret_cast<float4*>(stages);
    __syncthreads();  // nobody reads the last tile any more
    const auto pick = [](bool second, float x, float y) { return second ? y : x; };
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      given[(warp * (D / 8) + n) * 32 + lane] =
          make_float4(pick(kept == 0, out[0][n][0], out[1][n][0]), pick(kept == 0, out[0][n][1], out[1][n][1]),
                      pick(kept == 0, out[0][n][2], out[1][n][2]), pick(kept == 0, out[0][n][3], out[1][n][3]));
#pragma unroll
      for (int e = 0; e < 4; ++e) out[0][n][e] = pick(kept == 1, out[0][n][e], out[1][n][e]);
    }
    float4* given_stats = given + C::kWarps * (D / 8) * 32;
    given_stats[threadIdx.x] =
        make_float4(pick(kept == 0, maximum[0][0], maximum[1][0]), pick(kept == 0, maximum[0][1], maximum[1][1]),
                    pick(kept == 0, sum[0][0], sum[1][0]), pick(kept == 0, sum[0][1], sum[1][1]));
    __syncthreads();
    const int other = warp ^ kRowWarps;
    const float4 stats = given_stats[32 * other + lane];
    float mine[2], theirs[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float own_maximum = pick(kept == 1, maximum[0][half], maximum[1][half]);
      const float other_maximum = half == 0 ? stats.x : stats.y;
      const float highest = fmaxf(own_maximum, other_maximum);
      const float shift = highest == -INFINITY ? 0.0f : highest;
      mine[half] = exp2_approx(own_maximum - shift);
      theirs[half] = exp2_approx(other_maximum - shift);
      maximum[0][half] = highest;
      sum[0][half] =
          pick(kept == 1, sum[0][half], sum[1][half]) * mine[half] + (half == 0 ? stats.z : stats.w) * theirs[half];
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float4 o = given[(other * (D / 8) + n) * 32 + lane];
      out[0][n][0] = out[0][n][0] * mine[0] + o.x * theirs[0];
      out[0][n][1] = out[0][n][1] * mine[0] + o.y * theirs[0];
      out[0][n][2] = out[0][n][2] * mine[1] + o.z * theirs[1];
      out[0][n][3] = out[0][n][3] * mine[1] + o.w * theirs[1];
    }
  }

  const Part to = part_of_block(p, opaque(blockIdx.x));  // again, so that nothing of it is held through the loop
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[0][half] += __shfl_xor_sync(0xffffffffu, sum[0][half], 1);
    sum[0][half] += __shfl_xor_sync(0xffffffffu, sum[0][half], 2);
    const int row = to.row0 + first_row + 16 * kept + lane / 4 + 8 * half;
    if (row >= to.rows) continue;
    if (p.num_splits > 1) {
      const int64_t at = static_cast<int64_t>(to.unit) * to.rows + row;
      float* partial = p.partial_out + at * D + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<float2*>(partial + 8 * n) = make_float2(out[0][n][2 * half], out[0][n][2 * half + 1]);
      }
      if (lane % 4 == 0) {
        *reinterpret_cast<float2*>(p.partial_stats + 2 * at) = make_float2(maximum[0][half], sum[0][half]);
      }
    } else {
      const float inverse = 1.0f / sum[0][half];  // a query sees at least its own key
      const int64_t token = static_cast<int64_t>(to.b) * p.block_size + row / to.group;
      const int head = to.kv_head * to.group + row % to.group;
      uint16_t* out_row = p.out + (token * p.q_heads + head) * D + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<uint32_t*>(out_row + 8 * n) =
            pack_bf16(out[0][n][2 * half] * inverse, out[0][n][2 * half + 1] * inverse);
      }
    }
  }
}

constexpr int kMergeWarps = 4;

// out = sum_s 2^(m_s - m) o_s / sum_s 2^(m_s - m) l_s over the splits s of one (token, head). One trip to memory up to
// kTogether splits: outputs are loaded before their weights are known, of empty splits in vain.
template <int D>
__global__ void __launch_bounds__(32 * kMergeWarps, 8)  // 1024 blocks, of 8 requests of Qwen3-8B, in one wave
    merge_splits_kernel(const __grid_constant__ BlockAttentionParams p) {
  constexpr int kWidth = D % 128 == 0 ? 4 : 2;  // adjacent columns of a lane
  constexpr int kVectors = (D / kWidth + 31) / 32;
  constexpr int kTogether = D <= 128 ? 8 : 4;
  const int lane = threadIdx.x % 32;
  grid_dependency_launch();
  const int group = p.q_heads / p.kv_heads;
  const int rows = p.block_size * group;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / 32;  // (b, KV head, row)
  const int64_t pair = item / rows;                                                        // b * Hkv + KV head
  const int row = static_cast<int>(item % rows);
  const int64_t partial_row = pair * p.num_splits * rows + row;
  const int64_t token = pair / p.kv_heads * p.block_size + row / group;
  const int head = static_cast<int>(pair % p.kv_heads) * group + row % group;
  grid_dependency_wait();
  if (item >= p.batch * p.kv_heads * rows) return;

  float part[kTogether][kVectors][kWidth];
  const auto load = [&](int first) {
#pragma unroll
    for (int s = 0; s < kTogether; ++s) {
      if (first + s >= p.num_splits) continue;
      const float* from = p.partial_out + (partial_row + static_cast<int64_t>(first + s) * rows) * D;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int column = kWidth * (lane + 32 * i);
        if (column >= D) continue;
        if constexpr (kWidth == 4) {
          const float4 v = *reinterpret_cast<const float4*>(from + column);
          part[s][i][0] = v.x, part[s][i][1] = v.y, part[s][i][2] = v.z, part[s][i][3] = v.w;
        } else {
          const float2 v = *reinterpret_cast<const float2*>(from + column);
          part[s][i][0] = v.x, part[s][i][1] = v.y;
        }
      }
    }
  };
  load(0);

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
    weight[i] = sum[i] == 0.0f ? 0.0f : exp2_approx(weight[i] - highest);
    total += weight[i] * sum[i];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);

  float out[kVectors][kWidth] = {};
  for (int first = 0; first < p.num_splits; first += kTogether) {
    if (first > 0) load(first);
    const float mine = first < 32 ? weight[0] : weight[kRounds - 1];
#pragma unroll
    for (int s = 0; s < kTogether; ++s) {
      if (first + s >= p.num_splits) continue;
      const float w = __shfl_sync(0xffffffffu, mine, (first + s) % 32);
      if (w == 0.0f) continue;  // empty splits have written no output
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
#pragma unroll
        for (int e = 0; e < kWidth; ++e) out[i][e] += w * part[s][i][e];
    }
  }
  const float inverse = 1.0f / total;
  uint16_t* to = p.out + (token * p.q_heads + head) * D;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = kWidth * (lane + 32 * i);
    if (column >= D) continue;
    if constexpr (kWidth == 4) {
      *reinterpret_cast<uint2*>(to + column) = make_uint2(pack_bf16(out[i][0] * inverse, out[i][1] * inverse),
                                                          pack_bf16(out[i][2] * inverse, out[i][3] * inverse));
    } else {
      *reinterpret_cast<uint32_t*>(to + column) = pack_bf16(out[i][0] * inverse, out[i][1] * inverse);
    }
  }
}
static_assert(kMaxSplits == 64, "two rounds of weights");

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

// lm_head_topk: the k best logits of each row without storing the others; formula in params.h. Two launches.
//
// Floors: those of argmax.cu; the candidates add N * ceil(V / 128) * k * 8 bytes written (k / 128 of 4 * N * V bytes;
// in L2 for a decode step) and a fraction of them read.
//
// 1. candidates: the mainloop of argmax.cu. The block's keys go to shared memory [BM, 128 + 8] (the pipeline's buffers,
//    free by then), a warp takes a row, a lane 4 of its keys, sorted; k times the warp takes the maximum of the lanes'
//    heads (one redux) and the winner, unique because the column is part of the key, moves on to its next key.
//    So each tile leaves its k best in descending order.
// 2. merge: one block a row. The k-th largest of the tiles' first keys bounds the answer from below: it has k keys at
// or
//    above it. So only the k tiles whose first key reaches the bound matter, and of those the keys at or above it: at
//    most k * k, mostly few more than k. Both selections are radix selections on the 64-bit keys, 8 bits a pass; they
//    stop as soon as a digit decides, and keys being unique they always decide.
#include "common/cuda_check.h"
#include "smxx/head/config.cuh"
#include "smxx/head/launch.h"

namespace dflash::head {
namespace {

constexpr int kKeyPitch = kTileColumns + 8;  // words between rows of keys: rows 8 banks apart
constexpr int kMergeThreads = 256;

__device__ __forceinline__ void order_pair(uint32_t& a, uint32_t& b) {
  const uint32_t high = max(a, b), low = min(a, b);
  a = high;
  b = low;
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, kBlocksPerSm) candidates_kernel(const __grid_constant__ HeadParams p) {
  static_assert(C::BM * kKeyPitch * 4 <= C::kSharedBytes, "keys reuse the pipeline's buffers");
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * C::BM;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * C::BN;

  gemm::Accumulators<C> acc;
  gemm::compute_tile<C>(p.gemm, row0, column0, reinterpret_cast<__nv_bfloat16*>(shared_bytes), acc);
  __syncthreads();

  auto* keys = reinterpret_cast<uint32_t*>(shared_bytes);
  const gemm::TilePosition<C> at;
#pragma unroll
  for (int i = 0; i < C::kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < C::kTilesN; ++j) {
        uint2 pair;
        pair.x = accumulator_key(p.gemm, acc, at, column0, i, half, j, 0);
        pair.y = accumulator_key(p.gemm, acc, at, column0, i, half, j, 1);
        *reinterpret_cast<uint2*>(keys + at.row(i, half) * kKeyPitch + at.column(j)) = pair;
      }
    }
  }
  __syncthreads();

  for (int r = threadIdx.x / 32; r < C::BM && row0 + r < p.gemm.m; r += C::kThreads / 32) {
    const uint32_t* row = keys + r * kKeyPitch + at.lane;
    uint32_t k0 = row[0], k1 = row[32], k2 = row[64], k3 = row[96];
    order_pair(k0, k1);
    order_pair(k2, k3);
    order_pair(k0, k2);
    order_pair(k1, k3);
    order_pair(k1, k2);
    unsigned long long* out = p.workspace + ((row0 + r) * gridDim.y + blockIdx.y) * p.k;
    for (int start = 0; start < p.k; start += 32) {
      uint32_t mine = 0;  // the winner of round start + lane
      const int rounds = min(32, p.k - start);
      for (int round = 0; round < rounds; ++round) {
        const uint32_t winner = __reduce_max_sync(0xffffffffu, k0);
        if (at.lane == round) mine = winner;
        if (k0 == winner) {
          k0 = k1;
          k1 = k2;
          k2 = k3;
          k3 = 0;
        }
      }
      if (at.lane < rounds) out[start + at.lane] = mine == 0 ? 0ull : vocab_key(mine, column0);
    }
  }
}

struct SelectShared {
  unsigned histogram[256];
  unsigned bin, above, count;  // the deciding digit, keys above it, keys with it
};

// A bound with exactly k of the n keys at or above it. Keys are distinct, at least k of them; all threads of the block.
template <typename Load>
__device__ __forceinline__ uint64_t select_bound(int n, unsigned k, SelectShared& s, Load load) {
  uint64_t prefix = 0;
  for (int shift = 56;; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kMergeThreads) s.histogram[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kMergeThreads) {
      const uint64_t key = load(i);
      const bool candidate = shift == 56 || (key >> (shift + 8)) == (prefix >> (shift + 8));
      if (candidate) atomicAdd(&s.histogram[key >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane l holds bins 255 - 8 * l and the 7 below
      const int lane = threadIdx.x;
      unsigned sum = 0;
      for (int i = 0; i < 8; ++i) sum += s.histogram[255 - 8 * lane - i];
      unsigned through = sum;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const unsigned other = __shfl_up_sync(0xffffffffu, through, offset);
        if (lane >= offset) through += other;
      }
      if (through >= k && through - sum < k) {  // one lane
        unsigned above = through - sum;
        int bin = 255 - 8 * lane;
        while (above + s.histogram[bin] < k) above += s.histogram[bin--];
        s.bin = bin;
        s.above = above;
        s.count = s.histogram[bin];
      }
    }
    __syncthreads();
    prefix |= static_cast<uint64_t>(s.bin) << shift;
    k -= s.above;
    if (s.count == k || shift == 0) return prefix;
    __syncthreads();  // histogram and results are rewritten by the next pass
  }
}

__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const unsigned long long* candidates, int tiles, int k,
                                                              int64_t vocab_start, int64_t* ids, float* values) {
  __shared__ SelectShared select;
  __shared__ uint64_t list[kMaxTopK * kMaxTopK];
  __shared__ uint64_t best[kMaxTopK];
  __shared__ int tile_list[kMaxTopK];
  __shared__ int num_listed_tiles, num_listed, num_best;
  const int64_t row = blockIdx.x;
  const unsigned long long* keys = candidates + row * tiles * k;
  if (threadIdx.x == 0) num_listed_tiles = num_listed = num_best = 0;
  __syncthreads();

  uint64_t bound = 1;  // every key but "none"
  if (tiles > k) {
    bound = select_bound(tiles, k, select, [&](int i) { return keys[static_cast<int64_t>(i) * k]; });
  }
  for (int i = threadIdx.x; i < tiles; i += kMergeThreads) {
    if (keys[static_cast<int64_t>(i) * k] >= bound) tile_list[atomicAdd(&num_listed_tiles, 1)] = i;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_listed_tiles * k; i += kMergeThreads) {
    const uint64_t key = keys[static_cast<int64_t>(tile_list[i / k]) * k + i % k];
    if (key >= bound) list[atomicAdd(&num_listed, 1)] = key;
  }
  __syncthreads();
  bound = select_bound(num_listed, k, select, [&](int i) { return list[i]; });
  for (int i = threadIdx.x; i < num_listed; i += kMergeThreads) {
    if (list[i] >= bound) best[atomicAdd(&num_best, 1)] = list[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < k; i += kMergeThreads) {
    int rank = 0;
    for (int other = 0; other < k; ++other) rank += best[other] > best[i];
    ids[row * k + rank] = vocab_start + argmax_index(best[i]);
    values[row * k + rank] = vocab_key_value(best[i]);
  }
}

template <typename C>
void launch_candidates(const HeadParams& p, cudaStream_t stream) {
  cuda_check(cudaFuncSetAttribute(candidates_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
             "lm_head_topk");
  const dim3 grid(static_cast<unsigned>((p.gemm.m + C::BM - 1) / C::BM), static_cast<unsigned>(num_tiles(p.gemm.n)));
  candidates_kernel<C><<<grid, C::kThreads, C::kSharedBytes, stream>>>(p);
  cuda_check_launch("lm_head_topk");
}

}  // namespace

void launch_topk(const HeadParams& p, cudaStream_t stream) {
  if (p.gemm.m == 0) return;
  if (p.gemm.m <= 16) {
    launch_candidates<Rows16>(p, stream);
  } else if (p.gemm.m <= 32) {
    launch_candidates<Rows32>(p, stream);
  } else if (p.gemm.m <= 64) {
    launch_candidates<Rows64>(p, stream);
  } else {
    launch_candidates<Rows128>(p, stream);
  }
  merge_kernel<<<static_cast<unsigned>(p.gemm.m), kMergeThreads, 0, stream>>>(
      p.workspace, static_cast<int>(num_tiles(p.gemm.n)), p.k, p.vocab_start, p.ids, p.values);
  cuda_check_launch("lm_head_topk");
}

}  // namespace dflash::head

// Sampled verification: the launches, and the path of requests whose rows keep many tokens. Without sorting and without
// a probability tensor.
//
//   p_j(v) = softmax((logits[b, j, v] + bias[b, v]) / temperature), masked, top-k, then top-p, then min-p
//   token rule: x_{j+1} accepted iff u_j q_j(x_{j+1}) < p_j(x_{j+1}); block rule: common/accept.h
//   bonus at accept_len: a draw from max(scale p - q, 0), after all T - 1 drafts from p
//
// Two launches. verify_sampled_topk.cu does what keeps few tokens of a row (greedy, top-k up to 64) and leaves a list
// of the other requests in the workspace; the clusters of this file do these. Theirs is a programmatic dependent
// launch: they are in place when the first kernel ends, set the front of the workspace to zero, and leave at once if
// the list is empty, which is the usual case.
//
// Floors. Bytes: as in the other file, and one row a request for the bonus (from L2). FLOPs: one exponential for each
// logit and pass, at most six passes over shared memory: 4096 MUFU lanes a cycle on 132 SMs at half of that rate make
// it 4 us a pass for 32 blocks. What really sets the time of one block is the chain of cluster barriers, about twelve
// of them for a row with top-k and top-p, each with a pass of some 40 elements a thread.
//
// Partition. A cluster of 8 CTAs takes one row (b, j); each CTA keeps V / 8 tokens of it in shared memory from one read
// of the logits, so that all further passes touch no global memory, and the CTAs exchange sums through distributed
// shared memory. As many clusters as fit walk over the rows, the block position outermost; a row whose request is known
// to stop earlier is not read. Acceptance of a row needs only that row's p (token rule) or comes from the rows' scalars
// (block rule). The cluster that finishes the last row of a request does the accept step and draws the bonus. Waiting
// is only ever for CTAs of the same cluster.
//
// Numbers: smxx/verify/sampled.cuh. Thresholds (top-k, top-p) are found over depths by four rounds of 256-bin
// histograms, 8 bits a round; bins are linear in the logit, so that a round spreads over many bins.
//
// Memory of a CTA: cells[V / 8] uint32 (76 KB for V = 151936: two CTAs an SM; 124 KB for V = 248320: one),
// two histograms of 256 x 64 bits, one slot for each value exchanged with the cluster. What a cluster writes for its
// next row was last read, by any of its CTAs, before one of the cluster barriers between.
#include <cooperative_groups.h>

#include <algorithm>

#include "common/cuda_check.h"
#include "common/dependent_launch.cuh"
#include "smxx/verify/launch.h"
#include "smxx/verify/sampled.cuh"

namespace dflash::verify {
namespace {

namespace cg = cooperative_groups;

constexpr int kCluster = 8;    // the largest portable cluster
constexpr int kThreads = 256;  // two CTAs an SM with 128 registers a thread; 288 have 96, and spill on sm_100
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 256;
constexpr int kMaxCells = kMaxSampledVocab / kCluster;  // 220 KiB of the 227 KiB an SM can give to one CTA
constexpr int kMaxCellsOfTwo = 26624;                   // 104 KiB: two CTAs an SM
static_assert(int64_t{kMaxCells} * kCluster <= (int64_t{1} << (63 - kMassBits)),
              "the mass of a row must fit in 63 bits");

int cells_of(int vocab_size) { return (vocab_size + kCluster * 32 - 1) / (kCluster * 32) * 32; }

// Sum of the CTA's values, or of all before a thread: scratch of the block-wide helpers.
struct Scratch {
  uint64_t warp[kWarps];
  uint64_t total;
};

struct Shared {
  uint32_t histogram[2][2][kBins];  // [round parity][low, high half][bin]
  Scratch scratch;
  // Exchanged with the cluster; each is written once for a row.
  uint64_t max_key;
  uint64_t mass;
  uint64_t residual[2];  // without the draft, and again with it if nothing was left
  uint32_t skip;
  uint32_t last;
  // The bin found in a round.
  uint32_t bin;
  uint64_t before;
  // The accept step.
  int accept_len;
  double scale;
};

static_assert((kMaxCells + 4) * sizeof(uint32_t) + sizeof(Shared) <= 232448, "a CTA's shared memory");

// ---- block-wide and cluster-wide helpers -----------------------------------------------------------------------

// Sum over the CTA, in all threads. Ends with scratch free for the next call.
__device__ uint64_t block_sum(Scratch& scratch, uint64_t value) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch.warp[threadIdx.x / 32] = value;
  __syncthreads();
  uint64_t total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += scratch.warp[warp];
  __syncthreads();
  return total;
}

// Inclusive scan over the CTA's threads; scratch.total is the sum until the next call, which starts with a barrier of
// its own before it is written.
__device__ uint64_t block_inclusive_scan(Scratch& scratch, uint64_t value) {
  value = warp_inclusive_scan(value);
  if (threadIdx.x % 32 == 31) scratch.warp[threadIdx.x / 32] = value;
  __syncthreads();
  uint64_t before = 0, total = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp < static_cast<int>(threadIdx.x / 32)) before += scratch.warp[warp];
    total += scratch.warp[warp];
  }
  if (threadIdx.x == 0) scratch.total = total;
  __syncthreads();
  return before + value;
}

// The sum of a value that every CTA of the cluster holds in the same place of its shared memory. The caller has put a
// cluster barrier between writing and this.
__device__ uint64_t cluster_sum(const uint64_t* slot) {
  uint64_t total = 0;
#pragma unroll
  for (int rank = 0; rank < kCluster; ++rank) total += load_remote(slot, rank);
  return total;
}

// Adds to a 64-bit number kept as two halves with the 32-bit atomics that shared memory has: exactly one of the
// additions that wrap the low half around carries.
__device__ void add_wide(uint32_t* low, uint32_t* high, uint64_t value) {
  const auto low_part = static_cast<uint32_t>(value);
  const uint32_t old = atomicAdd(low, low_part);
  const uint32_t carry = static_cast<uint32_t>(value >> 32) + (old + low_part < old ? 1u : 0u);
  if (carry != 0) atomicAdd(high, carry);
}

// ---- one row ---------------------------------------------------------------------------------------------------

// This CTA's tokens: begin .. begin + count of the vocabulary.
struct Share {
  int begin, count;
};

// Puts the logits of the share into `cells` as float bits. The caller puts a barrier before reading them.
template <LogitType kType>
__device__ void load_share(const SampledParams& p, int64_t b, int j, const Share& share, uint32_t* cells) {
  visit_span<kType>(
      logits_row<kType>(p.logits, b, j) + share.begin, share.count, threadIdx.x, kThreads,
      [&](int i, float value) { cells[i] = __float_as_uint(value); },
      [&](int i, const uint4& v) {
        float x[Element<kType>::kPerVector];
        Element<kType>::unpack(v, x);
#pragma unroll
        for (int e = 0; e < Element<kType>::kPerVector; e += 4) {
          // `cells` is placed so that a vector's first element is 16-byte aligned (aligned_cells).
          *reinterpret_cast<uint4*>(cells + i + e) = make_uint4(__float_as_uint(x[e]), __float_as_uint(x[e + 1]),
                                                                __float_as_uint(x[e + 2]), __float_as_uint(x[e + 3]));
        }
      });
}

// Puts the masked logits of the share into `cells`. Returns the largest argmax_key of what this thread masked.
template <LogitType kType>
__device__ uint64_t load_masked_share(const SampledParams& p, int64_t b, int j, const Share& share, uint32_t* cells) {
  load_share<kType>(p, b, j, share, cells);
  __syncthreads();
  uint64_t best = 0;
  for (int i = threadIdx.x; i < share.count; i += kThreads) {
    const float value = masked_logit(p, b, j, share.begin + i, __uint_as_float(cells[i]));
    cells[i] = __float_as_uint(value);
    const uint64_t key = argmax_key(value, static_cast<uint32_t>(share.begin + i));
    best = key > best ? key : best;
  }
  return best;
}

// Where cell 0 lies in `storage` (16-byte aligned, three cells longer than the share).
template <LogitType kType>
__device__ uint32_t* aligned_cells(const SampledParams& p, int64_t b, int j, const Share& share, uint32_t* storage) {
  const int head = unaligned_head(logits_row<kType>(p.logits, b, j) + share.begin, share.count);
  return storage + (4 - head % 4) % 4;
}

// The smallest depth d such that the tokens with depth <= d number at least `top_k` (kMass: have at least `top_p` of
// the mass of all) among those with depth <= limit. Four rounds, each with one cluster barrier. `round` numbers them
// over the life of a row: histograms alternate, and the one that a round clears was last read before the barrier
// of the round before, by every CTA.
template <bool kMass>
__device__ uint32_t find_cut(cg::cluster_group& cluster, Shared& shared, const uint32_t* cells, int count,
                             uint32_t limit, uint64_t top_k, double top_p, const Depths& depths, int& round) {
  const int thread = threadIdx.x;
  uint32_t prefix = 0;
  uint64_t need = 0;
  for (int shift = 24; shift >= 0; shift -= 8, ++round) {
    uint32_t* low = shared.histogram[round & 1][0];
    uint32_t* high = shared.histogram[round & 1][1];
    if (thread < kBins) low[thread] = high[thread] = 0;
    __syncthreads();
    for (int i = thread; i < count; i += kThreads) {
      const uint32_t depth = cells[i];
      if (depth > limit || (shift < 24 && (depth >> (shift + 8)) != prefix)) continue;
      const uint32_t bin = (depth >> shift) & (kBins - 1);
      if (kMass) {
        const uint64_t weight = depths.weight(depth);
        if (weight != 0) add_wide(low + bin, high + bin, weight);
      } else {
        atomicAdd(low + bin, 1u);
      }
    }
    cluster.sync();
    uint64_t mine = 0;
    if (thread < kBins) {
#pragma unroll
      for (int rank = 0; rank < kCluster; ++rank) {
        mine += load_remote(low + thread, rank);
        if (kMass) mine += static_cast<uint64_t>(load_remote(high + thread, rank)) << 32;
      }
    }
    const uint64_t inclusive = block_inclusive_scan(shared.scratch, mine);
    if (shift == 24) {
      const uint64_t total = shared.scratch.total;  // > 0: the largest token has depth 0
      need = kMass ? static_cast<uint64_t>(ceil(top_p * static_cast<double>(total))) : top_k;
      need = need < 1 ? 1 : need > total ? total : need;
    }
    if (inclusive - mine < need && need <= inclusive) {  // one thread
      shared.bin = thread;
      shared.before = inclusive - mine;
    }
    __syncthreads();
    prefix = (prefix << 8) | shared.bin;
    need -= shared.before;
  }
  return prefix;
}

// The row's distribution, the same in every thread of the cluster; its depths are left in `cells`.
template <LogitType kType>
__device__ RowStats row_stats(cg::cluster_group& cluster, Shared& shared, const SampledParams& p, int64_t b,
                              const Share& share, uint32_t* cells, uint64_t max_key, const Depths& depths) {
  const uint32_t order = argmax_order_key(max_key);
  if (!(p.temperature[b] > 0.0f) || order >= kPosInfOrderKey || order <= kNegInfOrderKey) {
    // Greedy; or a NaN or +inf on top, or nothing allowed at all.
    return RowStats{0.0f, argmax_index(max_key), 0, false};
  }
  RowStats row{order_value(order), kOut - 1, 0, false};
  for (int i = threadIdx.x; i < share.count; i += kThreads) {
    cells[i] = depths.depth(row.max, __uint_as_float(cells[i]));
  }
  int round = 0;
  const int64_t top_k = p.top_k.at(b);
  if (top_k > 0 && top_k < p.vocab_size) {
    row.cut = find_cut<false>(cluster, shared, cells, share.count, row.cut, top_k, 0.0, depths, round);
  }
  if (p.top_p[b] < 1.0f) {
    row.cut = find_cut<true>(cluster, shared, cells, share.count, row.cut, 0, p.top_p[b], depths, round);
  }
  if (p.min_p[b] > 0.0f) row.cut = depths.depth_of_ratio(p.min_p[b], row.cut);
  uint64_t mass = 0;
  for (int i = threadIdx.x; i < share.count; i += kThreads) {
    const uint32_t depth = cells[i];
    if (depth <= row.cut) mass += depths.weight(depth);
  }
  mass = block_sum(shared.scratch, mass);
  if (threadIdx.x == 0) shared.mass = mass;
  cluster.sync();
  row.total = cluster_sum(&shared.mass);
  return row;
}

// ---- the accept step -------------------------------------------------------------------------------------------

// Draws the bonus from row j and writes the outputs. All CTAs of the cluster take part; the one that holds the token
// writes. Other CTAs may still read this one's shared memory when it ends.
template <LogitType kType>
__device__ void draw_bonus(cg::cluster_group& cluster, Shared& shared, const SampledParams& p, int64_t b,
                           const Share& share, uint32_t* storage, const Accept& accept, const Depths& depths) {
  const int j = accept.accept_len;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const auto rank = static_cast<int>(cluster.block_rank());
  const RowStats row = RowStats::load(p.workspace.row(b, j));
  const auto write = [&](int64_t bonus) {  // one warp
    write_outputs(p.out, p.candidates, p.prefix_lens, p.block_size, b, lane, Accepted{j, bonus});
  };
  if (row.point()) {
    if (rank == 0 && warp == 0) write(row.cut);
    return;
  }
  uint32_t* cells = aligned_cells<kType>(p, b, j, share, storage);
  const int segment = (share.count + kThreads - 1) / kThreads * 32;  // tokens of a warp
  const int segment_begin = min(warp * segment, share.count);
  const int segment_end = min(segment_begin + segment, share.count);

  bool subtract = j < p.block_size - 1;
  uint64_t base = 0, tail = 0, total = 0;
  for (int attempt = 0; attempt < 2; ++attempt) {
    __syncthreads();  // the cells of the row before, or of the first attempt, are no longer read
    load_share<kType>(p, b, j, share, cells);
    __syncthreads();
    for (int i = thread; i < share.count; i += kThreads) {
      const float value = masked_logit(p, b, j, share.begin + i, __uint_as_float(cells[i]));
      const uint32_t depth = depths.depth(row.max, value);
      cells[i] = depth <= row.cut ? depth : kOut;
    }
    __syncthreads();
    tail = 0;
    if (subtract) {
      const auto drop = [&](int64_t id) {
        if (id >= share.begin && id < share.begin + share.count) cells[id - share.begin] = kOut;
      };
      if (p.draft_probs == nullptr) {
        if (thread == 0) drop(p.candidates.at(b, j + 1));
      } else {
        const int64_t draft_row = b * (p.block_size - 1) + j;
#pragma unroll 1
        for (int k = thread; k < p.draft_width; k += kThreads) {
          if (p.draft_probs[draft_row * p.draft_width + k] > 0.0f) drop(p.draft_ids.at(draft_row, k));
          tail += pair_residual<kType>(p, b, j, k, row, accept.scale, depths);
        }
      }
      tail = block_sum(shared.scratch, tail);  // also: the drops are seen by all
    }
    uint64_t mine = 0;
    for (int i = segment_begin + lane; i < segment_end; i += 32) mine += depths.weight(cells[i]);
    mine = block_sum(shared.scratch, mine);
    if (thread == 0) shared.residual[attempt] = mine;
    cluster.sync();
    base = cluster_sum(&shared.residual[attempt]);
    total = base + tail;
    if (total != 0) {
      // u <= 1 - 2^-24, so the target is below the total, rounded or not.
      const auto target = static_cast<uint64_t>(uniforms(p, b, j).sample * static_cast<double>(total));
      if (target >= base) {
        if (rank == 0 && warp == 0) {
          uint64_t cumulative = base;
          int k = -1;
          while (cumulative <= target) cumulative += pair_residual<kType>(p, b, j, ++k, row, accept.scale, depths);
          write(p.draft_ids.at(b * (p.block_size - 1) + j, k));
        }
        return;
      }
      uint64_t before = 0;
      for (int other = 0; other < rank; ++other) before += load_remote(&shared.residual[attempt], other);
      if (target < before || target >= before + mine) return;
      // This CTA holds the token: find the warp, then walk its segment.
      uint64_t segment_mass = 0;
      for (int i = segment_begin + lane; i < segment_end; i += 32) segment_mass += depths.weight(cells[i]);
      segment_mass = warp_sum(segment_mass);
      if (lane == 0) shared.scratch.warp[warp] = segment_mass;
      __syncthreads();
      for (int other = 0; other < warp; ++other) before += shared.scratch.warp[other];
      if (target < before || target >= before + segment_mass) return;
      for (int first = segment_begin; first < segment_end; first += 32) {
        const int i = first + lane;
        const uint64_t inclusive = before + warp_inclusive_scan(i < segment_end ? depths.weight(cells[i]) : 0);
        const unsigned found = __ballot_sync(kFullWarp, inclusive > target);
        if (found != 0) {
          write(share.begin + first + __ffs(found) - 1);
          return;
        }
        before = __shfl_sync(kFullWarp, inclusive, 31);
      }
      return;
    }
    subtract = false;  // nothing left: target and draft agree here, draw from the target
  }
}

// Row (b, j), by all CTAs of a cluster; and the end of the request, if it was the last of its rows.
template <LogitType kType>
__device__ __forceinline__ void verify_row(cg::cluster_group& cluster, Shared& shared, const SampledParams& p,
                                           int64_t b, int j, const Share& share, uint32_t* storage) {
  const auto rank = static_cast<int>(cluster.block_rank());
  const int thread = threadIdx.x;
  const Depths depths(p.temperature[b]);

  // CTAs may see the flag in different states; the row is skipped if any of them saw it.
  if (thread == 0) shared.skip = __ldcg(p.workspace.stop(b)) > static_cast<unsigned long long>(p.block_size - j);
  uint32_t* cells = aligned_cells<kType>(p, b, j, share, storage);
  __syncthreads();
  uint64_t best = shared.skip == 0 ? load_masked_share<kType>(p, b, j, share, cells) : 0;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(kFullWarp, best, offset);
    best = other > best ? other : best;
  }
  if (thread % 32 == 0) shared.scratch.warp[thread / 32] = best;
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < kWarps; ++warp) best = max(best, shared.scratch.warp[warp]);
    shared.max_key = best;
  }
  cluster.sync();
  uint64_t max_key = 0;
  uint32_t skip = 0;
  for (int other = 0; other < kCluster; ++other) {
    max_key = max(max_key, load_remote(&shared.max_key, other));
    skip |= load_remote(&shared.skip, other);
  }

  RowStats row{};
  if (skip == 0) row = row_stats<kType>(cluster, shared, p, b, share, cells, max_key, depths);
  if (rank == 0 && thread == 0) {
    if (skip == 0) {
      row.stops = row_stops<kType>(p, b, j, row, depths);
      row.store(p.workspace.row(b, j));
      if (row.stops) atomicMax(p.workspace.stop(b), static_cast<unsigned long long>(p.block_size - j));
    }
    __threadfence();
    const bool last = atomicAdd(p.workspace.arrivals(b), 1ull) == static_cast<unsigned long long>(p.block_size) - 1;
    __threadfence();
    for (int other = 0; other < kCluster; ++other) store_remote(&shared.last, other, last);
  }
  cluster.sync();
  if (shared.last == 0) return;

  // Every CTA of the request's last cluster comes to the same result from the rows' words. Words of rows past the first
  // that stops may be anything: they are not used.
  if (thread < 32) {
    const Accept accept = accept_request<kType>(p, b, thread, depths);
    if (thread == 0) {
      shared.accept_len = accept.accept_len;
      shared.scale = accept.scale;
    }
  }
  __syncthreads();
  draw_bonus<kType>(cluster, shared, p, b, share, storage, Accept{shared.accept_len, shared.scale}, depths);
  // Nobody reads these words any more.
  if (rank == 0 && thread == 0) *p.workspace.arrivals(b) = *p.workspace.stop(b) = 0;
}

// Grid (clusters, 1, kCluster).
template <LogitType kType>
__global__ void __launch_bounds__(kThreads, 2) verify_sampled_kernel(SampledParams p, int cells_per_cta) {
  extern __shared__ uint4 dynamic_shared[];
  __shared__ Shared shared;
  cg::cluster_group cluster = cg::this_cluster();
  const auto rank = static_cast<int>(cluster.block_rank());
  grid_dependency_wait();
  const auto left = static_cast<uint32_t>(__ldcg(p.workspace.left_count()));
  const int64_t topk_words = p.batch * (p.block_size + 1);  // progress and tiles_read
  for (int64_t i = (blockIdx.x * kCluster + rank) * kThreads + threadIdx.x; i < topk_words;
       i += int64_t{gridDim.x} * kCluster * kThreads) {
    p.workspace.progress(0)[i] = 0;
  }
  const int64_t key_quads = p.batch * p.block_size * p.workspace.row_keys / 4;
  for (int64_t i = (blockIdx.x * kCluster + rank) * kThreads + threadIdx.x; i < key_quads;
       i += int64_t{gridDim.x} * kCluster * kThreads) {
    reinterpret_cast<uint4*>(p.workspace.keys)[i] = make_uint4(0, 0, 0, 0);
  }
  if (left == 0) return;

  Share share;
  share.begin = min(rank * cells_per_cta, p.vocab_size);
  share.count = min(cells_per_cta, p.vocab_size - share.begin);
  for (uint32_t unit = blockIdx.x; unit < left * p.block_size; unit += gridDim.x) {
    const auto j = static_cast<int>(unit / left);
    const auto b = static_cast<int64_t>(__ldcg(p.workspace.left(unit - j * left)));
    verify_row<kType>(cluster, shared, p, b, j, share, reinterpret_cast<uint32_t*>(dynamic_shared));
  }
  cluster.sync();  // all CTAs have read left_count, and none another's shared memory any more
  if (rank == 0 && threadIdx.x == 0 && atomicAdd(p.workspace.exits(), 1ull) + 1 == gridDim.x) {
    *p.workspace.left_count() = *p.workspace.exits() = 0;
  }
}

template <LogitType kType>
void launch(const SampledParams& p, int sms, cudaStream_t stream) {
  const char* op = "verify_block_sampled";
  const int cells = cells_of(p.vocab_size);
  const size_t bytes = (cells + 4) * sizeof(uint32_t);
  cuda_check(cudaFuncSetAttribute(verify_sampled_kernel<kType>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             op);
  const int64_t fit = sms * (cells <= kMaxCellsOfTwo ? 2 : 1) / kCluster;
  const auto clusters =
      static_cast<unsigned>(std::clamp<int64_t>(p.batch * p.block_size, 1, std::max<int64_t>(fit, 1)));
  launch_cluster_kernel(verify_sampled_kernel<kType>, dim3(clusters, 1, kCluster), kThreads, static_cast<int>(bytes),
                        kCluster, stream, true, op, p, cells);
  cuda_check_launch(op);
}

constexpr int kCheckThreads = 64;

// first = the smallest request * 16 + fault.
__global__ void __launch_bounds__(kCheckThreads) check_sampled_kernel(SampledParams p, unsigned long long* first) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kCheckThreads + threadIdx.x;
  if (b >= p.batch) return;
  const Fault fault = find_fault(p, b);
  if (fault != Fault::kNone) atomicMin(first, static_cast<unsigned long long>(b) * 16 + static_cast<int>(fault));
}

}  // namespace

void launch_verify_block_sampled(const SampledParams& p, cudaStream_t stream) {
  const char* op = "verify_block_sampled";
  int device = 0, sms = 0;
  cuda_check(cudaGetDevice(&device), op);
  cuda_check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), op);
  launch_verify_topk(p, sms, stream);
  dispatch_logit_type(p.logits.type, [&](auto type) { launch<decltype(type)::value>(p, sms, stream); });
}

SampledFault check_sampled_cuda(const SampledParams& p, cudaStream_t stream) {
  const char* op = "verify_block_sampled";
  unsigned long long* device_first = nullptr;
  unsigned long long first = ~0ull;
  cuda_check(cudaMallocAsync(reinterpret_cast<void**>(&device_first), sizeof(first), stream), op);
  cuda_check(cudaMemsetAsync(device_first, 0xff, sizeof(first), stream), op);
  const auto blocks = static_cast<unsigned>((p.batch + kCheckThreads - 1) / kCheckThreads);
  check_sampled_kernel<<<blocks, kCheckThreads, 0, stream>>>(p, device_first);
  cuda_check_launch(op);
  cuda_check(cudaMemcpyAsync(&first, device_first, sizeof(first), cudaMemcpyDeviceToHost, stream), op);
  cuda_check(cudaStreamSynchronize(stream), op);
  cuda_check(cudaFreeAsync(device_first, stream), op);
  if (first == ~0ull) return SampledFault{};
  return SampledFault{static_cast<Fault>(first % 16), static_cast<int64_t>(first / 16)};
}

}  // namespace dflash::verify

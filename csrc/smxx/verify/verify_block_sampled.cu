// Sampled verification without sorting and without a probability tensor.
//
//   p_j(v) = softmax((logits[b, j, v] + bias[b, v]) / temperature), masked, top-k, then top-p, then min-p
//   token rule: x_{j+1} accepted iff u_j q_j(x_{j+1}) < p_j(x_{j+1}); block rule: common/accept.h
//   bonus at accept_len: a draw from max(scale p - q, 0), after all T - 1 drafts from p
//
// Floors. Bytes: B*T*V logits once, plus one row a request for the bonus (from L2): 4.9 MB for 16 rows of V = 151936 in
// bfloat16, 1.6 us at a measured 3.1 TB/s, 50 us for 32 blocks, half of that when rows past the first rejection are
// skipped. FLOPs: one exponential for each logit and pass, at most six passes over shared memory: 4096 MUFU lanes a
// cycle on 132 SMs at half of that rate make it 4 us a pass for 32 blocks. What really sets the time of one block is
// the chain of cluster barriers, about twelve of them for a row with top-k and top-p, each with a pass of some 40
// elements a thread.
//
// Partition. A cluster of 8 CTAs takes one row (b, j); each CTA keeps V / 8 tokens of it in shared memory from one read
// of the logits, so that all further passes touch no global memory, and the CTAs exchange sums through distributed
// shared memory. All rows of a block run at once: acceptance of a row needs only that row's p (token rule) or comes
// from the rows' scalars (block rule). Clusters are numbered with the block position outermost, and a row whose request
// is known to stop earlier is not read. The last cluster of a request to finish does the accept step and draws the
// bonus.
//
// Numbers. A token's distance to the row's largest logit is taken in float32, as by any float32 softmax, and scaled by
// a power of two to a 32-bit integer, its *depth*. The weight 2^(-octaves) of a depth is a 44-bit fixed-point integer;
// beyond 44 octaves it is zero (less than 1e-13 of the largest token's probability). Sums of integers do not depend on
// their order: the result is the same for every launch. Thresholds (top-k, top-p) are found over depths by four rounds
// of 256-bin histograms, 8 bits a round; bins are linear in the logit, so that a round spreads over many bins.
// Distances closer than 2^-26 of the temperature fall on one depth, and are ties.
//
// Memory of a CTA: cells[V / 8] uint32 (76 KB for V = 151936: two CTAs an SM; 124 KB for V = 248320: one),
// two histograms of 256 x 64 bits, one slot for each value exchanged with the cluster.
#include <cooperative_groups.h>

#include "common/accept.h"
#include "common/cuda_check.h"
#include "common/order_key.h"
#include "common/philox.h"
#include "common/ptx.cuh"
#include "smxx/verify/finish.cuh"
#include "smxx/verify/launch.h"
#include "smxx/verify/row_reader.cuh"

namespace dflash::verify {
namespace {

namespace cg = cooperative_groups;

constexpr int kCluster = 8;    // the largest portable cluster
constexpr int kThreads = 288;  // two CTAs an SM with 112 registers a thread; 320 would spill on sm_100
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 256;
constexpr int kMaxCells = 56320;        // 220 KiB of the 227 KiB an SM can give to one CTA
constexpr int kMassBits = 44;           // fixed-point weight of the largest token: 2^44
constexpr int kOctaveBits = 25;         // fraction bits of a depth converted to octaves
constexpr uint32_t kOut = 0xffffffffu;  // depth of a token with no weight
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
  // Exchanged with the cluster; each is written once in the life of a cluster.
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

// How distances become depths and depths weights, for one temperature.
struct Depths {
  float scale;       // 2^32 / R, R the power of two above 44 octaves
  uint32_t octaves;  // R in octaves, times 2^25

  __device__ explicit Depths(float temperature) {
    const double octave = 0.6931471805599453 * static_cast<double>(fminf(fmaxf(temperature, 1e-20f), 1e20f));
    const int exponent = (__double2hiint(kMassBits * octave) >> 20) - 1022;  // 44 octaves < 2^exponent <= 88 octaves
    scale = __int_as_float((32 - exponent + 127) << 23);
    octaves = static_cast<uint32_t>(__hiloint2double((exponent + kOctaveBits + 1023) << 20, 0) / octave);
  }

  // Saturates: -inf, or anything far away, is kOut.
  __device__ uint32_t depth(float max, float value) const { return __float2uint_rz((max - value) * scale); }

  __device__ uint64_t weight(uint32_t depth) const {
    const uint32_t scaled = __umulhi(depth, octaves);
    const uint32_t whole = scaled >> kOctaveBits;
    if (depth == kOut || whole >= kMassBits) return 0;
    const float fraction = static_cast<float>(scaled & ((1u << kOctaveBits) - 1)) * (1.0f / (1u << kOctaveBits));
    const uint32_t mantissa = __float2uint_rz(exp2f(-fraction) * 2147483648.0f);  // 2^30 < mantissa <= 2^31
    return (static_cast<uint64_t>(mantissa) << (kMassBits - 31)) >> whole;
  }

  // The largest depth <= limit whose weight is at least `ratio` of the largest token's; 0 if none is.
  __device__ uint32_t depth_of_ratio(float ratio, uint32_t limit) const {
    const auto least = static_cast<uint64_t>(ceil(static_cast<double>(ratio) * (1ll << kMassBits)));
    uint32_t low = 0;  // known to be kept: a weight of 2^44
    while (low < limit) {
      const uint32_t middle = limit - (limit - low) / 2;  // low < middle <= limit
      if (weight(middle) >= least) {
        low = middle;
      } else {
        limit = middle - 1;
      }
    }
    return low;
  }
};

// A row's distribution in two words of the workspace. total == 0: all mass on the token `cut`.
struct RowStats {
  float max;
  uint32_t cut;    // depths above it are filtered out
  uint64_t total;  // below 2^63
  bool stops;  // no later row matters: the row is the last, or rejects, or (block rule) has p = 0 for its draft token

  static __device__ RowStats load(const unsigned long long* words) {
    const uint64_t first = __ldcg(words), second = __ldcg(words + 1);
    return RowStats{__uint_as_float(static_cast<uint32_t>(first >> 32)), static_cast<uint32_t>(first),
                    second & ~(1ull << 63), (second >> 63) != 0};
  }
  __device__ void store(unsigned long long* words) const {
    words[0] = (static_cast<unsigned long long>(__float_as_uint(max)) << 32) | cut;
    words[1] = total | (static_cast<unsigned long long>(stops) << 63);
  }
  __device__ bool point() const { return total == 0; }
};

__device__ float masked_logit(const SampledParams& p, int64_t b, int j, int64_t id, float value) {
  if (p.logit_bias != nullptr) value += p.logit_bias[b * p.vocab_size + id];
  if (p.token_bitmask != nullptr) {
    const int64_t words = (p.vocab_size + 31) / 32;
    const auto word = static_cast<uint32_t>(p.token_bitmask[(b * p.block_size + j) * words + (id >> 5)]);
    if (((word >> (id & 31)) & 1u) == 0) value = __int_as_float(0xff800000);
  }
  return value;
}

// The unnormalised weight of one token of row (b, j).
template <LogitType kType>
__device__ uint64_t token_weight(const SampledParams& p, int64_t b, int j, int64_t id, const RowStats& row,
                                 const Depths& depths) {
  if (id < 0 || id >= p.vocab_size) return 0;
  const float value = masked_logit(p, b, j, id, Element<kType>::value(logits_row<kType>(p.logits, b, j)[id]));
  const uint32_t depth = depths.depth(row.max, value);
  return depth <= row.cut ? depths.weight(depth) : 0;
}

template <LogitType kType>
__device__ double token_probability(const SampledParams& p, int64_t b, int j, int64_t id, const RowStats& row,
                                    const Depths& depths) {
  if (row.point()) return id == row.cut ? 1.0 : 0.0;
  return static_cast<double>(token_weight<kType>(p, b, j, id, row, depths)) / static_cast<double>(row.total);
}

// q of the draft token that follows row j.
__device__ double draft_probability(const SampledParams& p, int64_t b, int j) {
  if (p.draft_probs == nullptr) return 1.0;
  const int64_t id = p.candidates.at(b, j + 1);
  const int64_t row = b * (p.block_size - 1) + j;
  double q = 0.0;
#pragma unroll 1
  for (int k = 0; k < p.draft_width; ++k) {
    if (p.draft_ids.at(row, k) == id) q += p.draft_probs[row * p.draft_width + k];
  }
  return q;
}

struct Uniforms {
  double accept, sample;
};

__device__ Uniforms uniforms(const SampledParams& p, int64_t b, int j) {
  const PhiloxWords words = philox4x32_10(static_cast<uint64_t>(p.seeds[b]), static_cast<uint64_t>(p.offsets[b]),
                                          static_cast<uint32_t>(j), kPhiloxStreamVerify);
  return Uniforms{uniform_from_bits(words.w[0]), uniform_from_bits(words.w[1])};
}

// RowStats::stops of row j.
template <LogitType kType>
__device__ bool row_stops(const SampledParams& p, int64_t b, int j, const RowStats& row, const Depths& depths) {
  if (j == p.block_size - 1) return true;
  const int64_t id = p.candidates.at(b, j + 1);
  if (!(p.temperature[b] > 0.0f)) return id != row.cut;
  const double probability = token_probability<kType>(p, b, j, id, row, depths);
  if (p.block_rule) return probability == 0.0;
  return !accept_token(uniforms(p, b, j).accept, probability, draft_probability(p, b, j));
}

// ---- block-wide and cluster-wide helpers -----------------------------------------------------------------------

__device__ uint64_t warp_sum(uint64_t value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

__device__ uint64_t warp_inclusive_scan(uint64_t value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t below = __shfl_up_sync(kFullWarp, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
}

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
// over the life of the cluster: histograms alternate, and the one that a round clears was last read before the barrier
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

struct Accept {
  int accept_len;
  double scale;  // of p in the residual
};

// sum_v min(weight p_j(v), q_j(v)) over the draft row's pairs; one warp, the same result in all lanes.
template <LogitType kType>
__device__ double pair_overlap(const SampledParams& p, int64_t b, int j, int lane, double weight,
                               const Depths& depths) {
  const RowStats row = RowStats::load(p.workspace.row(b, j));
  const int64_t draft_row = b * (p.block_size - 1) + j;
  double overlap = 0.0;
#pragma unroll 1
  for (int k = lane; k < p.draft_width; k += 32) {
    const double q = p.draft_probs[draft_row * p.draft_width + k];
    if (q <= 0.0) continue;
    overlap += fmin(weight * token_probability<kType>(p, b, j, p.draft_ids.at(draft_row, k), row, depths), q);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) overlap += __shfl_xor_sync(kFullWarp, overlap, offset);
  return overlap;
}

// Block rule (common/accept.h), one warp, the same result in all lanes. Lane j holds row j's scalars; those of rows
// after the first impossible draft token are never used.
template <LogitType kType>
__device__ Accept accept_block(const SampledParams& p, int64_t b, int lane, const Depths& depths) {
  const int drafts = p.block_size - 1;
  double guess_p = 0.0, guess_q = 1.0, uniform = 0.0;
  if (lane < drafts) {
    const RowStats row = RowStats::load(p.workspace.row(b, lane));
    guess_p = token_probability<kType>(p, b, lane, p.candidates.at(b, lane + 1), row, depths);
    guess_q = draft_probability(p, b, lane);
    uniform = uniforms(p, b, lane).accept;
  }
  Accept accept{0, 1.0};
  double weight = 1.0;
#pragma unroll 1
  for (int j = 0; j < drafts && weight > 0.0; ++j) {
    const double row_p = __shfl_sync(kFullWarp, guess_p, j), row_q = __shfl_sync(kFullWarp, guess_q, j);
    if (j > 0) {
      const double overlap =
          p.draft_probs == nullptr ? fmin(weight * row_p, 1.0) : pair_overlap<kType>(p, b, j, lane, weight, depths);
      const double chance = block_accept_probability(fmax(weight - overlap, 0.0), weight);
      if (__shfl_sync(kFullWarp, uniform, j - 1) < chance) accept = Accept{j, weight};
    }
    weight = block_weight(weight, row_p, row_q);
  }
  if (drafts > 0 && __shfl_sync(kFullWarp, uniform, drafts - 1) < weight) accept.accept_len = drafts;
  return accept;
}

// One warp; the same result in all lanes.
template <LogitType kType>
__device__ Accept accept_request(const SampledParams& p, int64_t b, int lane, const Depths& depths) {
  if (p.block_rule && p.temperature[b] > 0.0f) return accept_block<kType>(p, b, lane, depths);
  const bool stops = lane < p.block_size && RowStats::load(p.workspace.row(b, lane)).stops;
  return Accept{__ffs(__ballot_sync(kFullWarp, stops)) - 1, 1.0};
}

// The residual weight of the draft row's pair k: w - min(w, q total / scale), in the units of w.
template <LogitType kType>
__device__ uint64_t pair_residual(const SampledParams& p, int64_t b, int j, int k, const RowStats& row, double scale,
                                  const Depths& depths) {
  const int64_t draft_row = b * (p.block_size - 1) + j;
  const double q = p.draft_probs[draft_row * p.draft_width + k];
  if (!(q > 0.0)) return 0;
  const uint64_t weight = token_weight<kType>(p, b, j, p.draft_ids.at(draft_row, k), row, depths);
  const double taken = q * static_cast<double>(row.total) / scale;
  return taken >= static_cast<double>(weight) ? 0 : weight - static_cast<uint64_t>(taken);
}

// Draws the bonus from row j and writes the outputs. All CTAs of the cluster take part; the one that holds the token
// writes. Ends past the last cluster barrier but one.
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

template <LogitType kType>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 2)
    verify_sampled_kernel(SampledParams p, int cells_per_cta, bool check_stop) {
  extern __shared__ uint4 dynamic_shared[];
  __shared__ Shared shared;
  auto* storage = reinterpret_cast<uint32_t*>(dynamic_shared);
  cg::cluster_group cluster = cg::this_cluster();
  const auto rank = static_cast<int>(cluster.block_rank());
  const int64_t unit = blockIdx.x / kCluster;
  const int64_t b = unit % p.batch;
  const auto j = static_cast<int>(unit / p.batch);
  const int thread = threadIdx.x;
  Share share;
  share.begin = min(rank * cells_per_cta, p.vocab_size);
  share.count = min(cells_per_cta, p.vocab_size - share.begin);
  const Depths depths(p.temperature[b]);

  // CTAs may see the flag in different states; the row is skipped if any of them saw it.
  if (thread == 0) {
    shared.skip = check_stop && __ldcg(p.workspace.stop(b)) > static_cast<unsigned long long>(p.block_size - j);
  }
  uint32_t* cells = aligned_cells<kType>(p, b, j, share, storage);
  if (check_stop) __syncthreads();
  uint64_t best = !check_stop || shared.skip == 0 ? load_masked_share<kType>(p, b, j, share, cells) : 0;
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

  // Every CTA of the request's last cluster comes to the same result from the rows' words.
  if (thread < 32) {
    const Accept accept = accept_request<kType>(p, b, thread, depths);
    if (thread == 0) {
      shared.accept_len = accept.accept_len;
      shared.scale = accept.scale;
    }
  }
  __syncthreads();
  draw_bonus<kType>(cluster, shared, p, b, share, storage, Accept{shared.accept_len, shared.scale}, depths);
  cluster.sync();  // nobody reads the words, or another CTA's shared memory, any more
  if (rank == 0 && thread < 32) clear_workspace(p.workspace, b, thread);
}

template <LogitType kType>
void launch(const SampledParams& p, cudaStream_t stream) {
  const char* op = "verify_block_sampled";
  const int cells = cells_of(p.vocab_size);
  const size_t bytes = (cells + 4) * sizeof(uint32_t);
  cuda_check(cudaFuncSetAttribute(verify_sampled_kernel<kType>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             op);
  int device = 0, sms = 0;
  cuda_check(cudaGetDevice(&device), op);
  cuda_check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), op);
  const int64_t clusters = p.batch * p.block_size;
  // Looking costs a round trip to L2, and pays once not all clusters start at the same time (two CTAs an SM).
  const bool check_stop = clusters * kCluster > 2 * sms;
  verify_sampled_kernel<kType>
      <<<static_cast<unsigned>(clusters * kCluster), kThreads, bytes, stream>>>(p, cells, check_stop);
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

int max_sampled_vocab() { return kMaxCells * kCluster; }

void launch_verify_block_sampled(const SampledParams& p, cudaStream_t stream) {
  dispatch_logit_type(p.logits.type, [&](auto type) { launch<decltype(type)::value>(p, stream); });
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

// What the two kernels of verify_block_sampled share: numbers, a row's distribution, random numbers, accept rules.
//
// Numbers. A token's distance to the row's largest logit is taken in float32, as by any float32 softmax, and scaled by
// a power of two to a 32-bit integer, its *depth*. The weight 2^(-octaves) of a depth is a 44-bit fixed-point integer;
// beyond 44 octaves it is zero (less than 1e-13 of the largest token's probability). Sums of integers do not depend on
// their order: the result is the same for every launch, and for either kernel. Distances closer than 2^-26 of the
// temperature fall on one depth, and are ties.
#pragma once

#include <cuda_runtime.h>

#include "common/accept.h"
#include "common/order_key.h"
#include "common/philox.h"
#include "common/ptx.cuh"
#include "smxx/verify/finish.cuh"
#include "smxx/verify/params.h"
#include "smxx/verify/row_reader.cuh"

namespace dflash::verify {

constexpr int kMassBits = 44;           // fixed-point weight of the largest token: 2^44
constexpr int kOctaveBits = 25;         // fraction bits of a depth converted to octaves
constexpr uint32_t kOut = 0xffffffffu;  // depth of a token with no weight

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

// A row's distribution, in the first two words of its scratch. total == 0: all mass on the token `cut`.
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

__device__ __forceinline__ float masked_logit(const SampledParams& p, int64_t b, int j, int64_t id, float value) {
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
__device__ __forceinline__ double draft_probability(const SampledParams& p, int64_t b, int j) {
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

__device__ __forceinline__ Uniforms uniforms(const SampledParams& p, int64_t b, int j) {
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

__device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

__device__ __forceinline__ uint64_t warp_inclusive_scan(uint64_t value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t below = __shfl_up_sync(kFullWarp, value, offset);
    if (lane >= offset) value += below;
  }
  return value;
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

}  // namespace dflash::verify

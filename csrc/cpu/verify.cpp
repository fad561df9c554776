// verify_block and verify_block_sampled on the CPU. Accept rules, random numbers and the order of floats are the
// code the CUDA kernels run (common/accept.h, philox.h, order_key.h); sums are in double.
#include "cpu/verify.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/accept.h"
#include "common/half_bits.h"
#include "common/order_key.h"
#include "common/philox.h"
#include "smxx/verify/merge.h"

namespace dflash::verify {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

template <typename Convert, typename Bits>
void convert_row(const void* base, int64_t offset, int vocab_size, Convert convert, const Bits*, float* out) {
  const Bits* row = static_cast<const Bits*>(base) + offset;
  for (int i = 0; i < vocab_size; ++i) out[i] = convert(row[i]);
}

// Row (b, j) of the logits as float32.
void load_row(const Logits& logits, int64_t b, int j, int vocab_size, float* out) {
  const int64_t offset = b * logits.stride_request + j * logits.stride_row;
  switch (logits.type) {
    case LogitType::kFloat32:
      return convert_row(
          logits.data, offset, vocab_size, [](float x) { return x; }, static_cast<const float*>(nullptr), out);
    case LogitType::kBFloat16:
      return convert_row(logits.data, offset, vocab_size, bf16_bits_to_float, static_cast<const uint16_t*>(nullptr),
                         out);
    case LogitType::kFloat16:
      return convert_row(logits.data, offset, vocab_size, fp16_bits_to_float, static_cast<const uint16_t*>(nullptr),
                         out);
  }
}

// argmax_key of the row.
uint64_t row_argmax(const std::vector<float>& row) {
  uint64_t best = 0;
  for (size_t i = 0; i < row.size(); ++i) {
    best = std::max(best, argmax_key(row[i], static_cast<uint32_t>(i)));
  }
  return best;
}

void write_outputs(const Outputs& out, const IntView& candidates, const IntView& prefix_lens, int block_size, int64_t b,
                   const Accepted& accepted) {
  out.accept_lens[b] = accepted.accept_len;
  out.commit_lens[b] = accepted.accept_len + 1;
  out.bonus_ids[b] = accepted.bonus;
  out.new_seq_lens[b] = prefix_lens.at(b) + accepted.accept_len + 1;
  for (int j = 0; j < block_size; ++j) {
    out.out_tokens[b * block_size + j] = out_token(j, block_size, accepted, [&](int c) { return candidates.at(b, c); });
  }
}

// The target's distribution at one position, filtered. Keeps the working vectors between rows.
//
// Filters compare distances, max - x in float32, as any softmax in float32 does: logits whose distances are the same
// float32 number are ties.
class TargetRow {
 public:
  TargetRow(const SampledParams& params, int64_t request)
      : p_(params), b_(request), values_(params.vocab_size), weights_(params.vocab_size) {}

  // Logits + bias, masked, as float32. Returns their argmax_key.
  uint64_t load(int j) {
    load_row(p_.logits, b_, j, p_.vocab_size, values_.data());
    if (p_.logit_bias != nullptr) {
      const float* bias = p_.logit_bias + b_ * p_.vocab_size;
      for (int i = 0; i < p_.vocab_size; ++i) values_[i] += bias[i];
    }
    if (p_.token_bitmask != nullptr) {
      const int64_t words = (p_.vocab_size + 31) / 32;
      const int32_t* mask = p_.token_bitmask + (b_ * p_.block_size + j) * words;
      for (int i = 0; i < p_.vocab_size; ++i) {
        if (((static_cast<uint32_t>(mask[i >> 5]) >> (i & 31)) & 1u) == 0) values_[i] = kNegInf;
      }
    }
    return row_argmax(values_);
  }

  // Loads row j and turns it into p (unnormalised weights and their total).
  void load_distribution(int j) {
    const uint64_t best = load(j);
    const uint32_t best_key = argmax_order_key(best);
    tail_.clear();
    if (best_key >= kPosInfOrderKey || best_key <= kNegInfOrderKey) {
      // NaN or +inf on top, or nothing allowed at all: all mass on the argmax.
      std::fill(weights_.begin(), weights_.end(), 0.0);
      weights_[argmax_index(best)] = 1.0;
      total_ = 1.0;
      return;
    }
    const float max = values_[argmax_index(best)];
    const double temperature = p_.temperature[b_];
    for (int i = 0; i < p_.vocab_size; ++i) {
      values_[i] = max - values_[i];  // the distance from here on
      weights_[i] = values_[i] == -kNegInf ? 0.0 : std::exp(-static_cast<double>(values_[i]) / temperature);
    }
    apply_top_k();
    apply_top_p();
    const double min_p = p_.min_p[b_];
    for (double& w : weights_) {
      if (w < min_p) w = 0.0;  // the largest weight is 1
    }
    total_ = 0.0;
    for (double w : weights_) total_ += w;
  }

  double probability(int64_t id) const { return id < 0 || id >= p_.vocab_size ? 0.0 : weights_[id] / total_; }

  // Turns the weights into those of max(scale * p - q, 0), q given as pairs or as all mass on `one_hot`; the pairs'
  // tokens move to the tail. Changes nothing if no mass is left.
  void subtract_draft(double scale, int64_t draft_row, int64_t one_hot) {
    std::vector<double> residual = weights_;
    std::vector<std::pair<int64_t, double>> tail;
    if (p_.draft_probs == nullptr) {
      if (one_hot >= 0 && one_hot < p_.vocab_size) residual[one_hot] = 0.0;
    } else {
      for (int k = 0; k < p_.draft_width; ++k) {
        const int64_t id = p_.draft_ids.at(draft_row, k);
        const double q = p_.draft_probs[draft_row * p_.draft_width + k];
        if (q <= 0.0 || id < 0 || id >= p_.vocab_size) continue;
        tail.emplace_back(id, std::max(residual[id] - q * total_ / scale, 0.0));
        residual[id] = 0.0;
      }
    }
    double total = 0.0;
    for (double r : residual) total += r;
    for (const auto& [id, r] : tail) total += r;
    if (!(total > 0.0)) return;
    weights_.swap(residual);
    tail_.swap(tail);
    total_ = total;
  }

  // Inverse CDF in the order of ids, the draft's pairs after them: the first token whose cumulative weight exceeds
  // u * total.
  int64_t sample(double u) const {
    const double target = u * total_;
    double cumulative = 0.0;
    int64_t last = 0;
    for (int i = 0; i < p_.vocab_size; ++i) {
      if (weights_[i] <= 0.0) continue;
      cumulative += weights_[i];
      last = i;
      if (cumulative > target) return last;
    }
    for (const auto& [id, weight] : tail_) {
      if (weight <= 0.0) continue;
      cumulative += weight;
      last = id;
      if (cumulative > target) return last;
    }
    return last;
  }

 private:
  // Keeps distances <= the k-th smallest; ties stay.
  void apply_top_k() {
    const int64_t k = p_.top_k.at(b_);
    if (k <= 0 || k >= p_.vocab_size) return;
    scratch_ = values_;
    std::nth_element(scratch_.begin(), scratch_.begin() + (k - 1), scratch_.end());
    drop_beyond(scratch_[k - 1]);
  }

  // Keeps distances <= the smallest one within which lies at least top_p of the mass; ties stay.
  void apply_top_p() {
    const double top_p = p_.top_p[b_];
    if (!(top_p < 1.0)) return;
    double mass = 0.0;
    for (double w : weights_) mass += w;
    const double target = top_p * mass;
    // Weights below this one cannot decide: all of them together are less than the mass that may be dropped.
    const double floor = (mass - target) / (2.0 * p_.vocab_size);
    order_.clear();
    for (int i = 0; i < p_.vocab_size; ++i) {
      if (weights_[i] > floor || weights_[i] == 1.0) order_.emplace_back(values_[i], weights_[i]);
    }
    std::sort(order_.begin(), order_.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    double cumulative = 0.0;
    float threshold = order_.back().first;
    for (const auto& [distance, weight] : order_) {
      cumulative += weight;
      if (cumulative >= target) {
        threshold = distance;
        break;
      }
    }
    drop_beyond(threshold);
  }

  void drop_beyond(float threshold) {
    for (int i = 0; i < p_.vocab_size; ++i) {
      if (values_[i] > threshold) weights_[i] = 0.0;
    }
  }

  const SampledParams& p_;
  int64_t b_;
  std::vector<float> values_, scratch_;  // logits, then distances
  std::vector<double> weights_;
  std::vector<std::pair<int64_t, double>> tail_;
  std::vector<std::pair<float, double>> order_;
  double total_ = 1.0;
};

class SampledRequest {
 public:
  SampledRequest(const SampledParams& params, int64_t request) : p_(params), b_(request), row_(params, request) {}

  Accepted run() {
    if (!(p_.temperature[b_] > 0.0f)) return greedy();
    return p_.block_rule ? block() : token();
  }

 private:
  int drafts() const { return p_.block_size - 1; }
  int64_t candidate(int j) const { return p_.candidates.at(b_, j); }
  int64_t draft_row(int j) const { return b_ * drafts() + j; }

  // q of the draft token that follows position j.
  double draft_probability(int j) const {
    if (p_.draft_probs == nullptr) return 1.0;
    double q = 0.0;
    for (int k = 0; k < p_.draft_width; ++k) {
      if (p_.draft_ids.at(draft_row(j), k) == candidate(j + 1)) {
        q += p_.draft_probs[draft_row(j) * p_.draft_width + k];
      }
    }
    return q;
  }

  // sum_v max(scale * p(v) - q(v), 0) = scale - sum_v min(scale * p(v), q(v)) at position j.
  double residual_mass(int j, double scale) const {
    double overlap = 0.0;
    if (p_.draft_probs == nullptr) {
      overlap = std::min(scale * row_.probability(candidate(j + 1)), 1.0);
    } else {
      for (int k = 0; k < p_.draft_width; ++k) {
        const double q = p_.draft_probs[draft_row(j) * p_.draft_width + k];
        overlap += std::min(scale * row_.probability(p_.draft_ids.at(draft_row(j), k)), q);
      }
    }
    return std::max(scale - overlap, 0.0);
  }

  PhiloxWords words(int j) const {
    return philox4x32_10(static_cast<uint64_t>(p_.seeds[b_]), static_cast<uint64_t>(p_.offsets[b_]),
                         static_cast<uint32_t>(j), kPhiloxStreamVerify);
  }
  double accept_uniform(int j) const { return uniform_from_bits(words(j).w[0]); }
  double sample_uniform(int j) const { return uniform_from_bits(words(j).w[1]); }

  Accepted greedy() {
    return accept_greedy(
        p_.block_size, [&](int j) { return static_cast<int64_t>(argmax_index(row_.load(j))); },
        [&](int j) { return candidate(j); });
  }

  Accepted token() {
    int j = 0;
    for (;; ++j) {
      row_.load_distribution(j);
      if (j == drafts()) break;
      const double p = row_.probability(candidate(j + 1));
      if (!accept_token(accept_uniform(j), p, draft_probability(j))) break;
    }
    return finish(j, 1.0);
  }

  Accepted block() {
    double weight = 1.0, accepted_weight = 1.0;  // w_j, and w at accept_len
    int accept_len = 0, loaded = -1;
    for (int j = 0; j < drafts() && weight > 0.0; ++j) {
      row_.load_distribution(loaded = j);
      if (j > 0 && accept_uniform(j - 1) < block_accept_probability(residual_mass(j, weight), weight)) {
        accept_len = j;
        accepted_weight = weight;
      }
      weight = block_weight(weight, row_.probability(candidate(j + 1)), draft_probability(j));
    }
    if (drafts() > 0 && accept_uniform(drafts() - 1) < weight) accept_len = drafts();
    if (loaded != accept_len) row_.load_distribution(accept_len);
    return finish(accept_len, accepted_weight);
  }

  // Samples the token after accept_len accepted ones from the row that is loaded.
  Accepted finish(int accept_len, double scale) {
    if (accept_len < drafts()) {
      row_.subtract_draft(scale, draft_row(accept_len), candidate(accept_len + 1));
    }
    return Accepted{accept_len, row_.sample(sample_uniform(accept_len))};
  }

  const SampledParams& p_;
  int64_t b_;
  TargetRow row_;
};

}  // namespace

void verify_block_cpu(const BlockParams& p) {
  std::vector<float> row(p.target_ids.data == nullptr ? p.vocab_size : 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Accepted accepted = accept_greedy(
        p.block_size,
        [&](int j) -> int64_t {
          if (p.target_ids.data != nullptr) return p.target_ids.at(b, j);
          load_row(p.logits, b, j, p.vocab_size, row.data());
          return argmax_index(row_argmax(row));
        },
        [&](int j) { return p.candidates.at(b, j); });
    write_outputs(p.out, p.candidates, p.prefix_lens, p.block_size, b, accepted);
  }
}

void verify_block_sampled_cpu(const SampledParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    write_outputs(p.out, p.candidates, p.prefix_lens, p.block_size, b, SampledRequest(p, b).run());
  }
}

SampledFault check_sampled_cpu(const SampledParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const Fault fault = find_fault(p, b);
    if (fault != Fault::kNone) return SampledFault{fault, b};
  }
  return SampledFault{};
}

void argmax_logits_cpu(const ArgmaxParams& p) {
  std::vector<float> row(p.vocab_size);
  for (int64_t n = 0; n < p.rows; ++n) {
    load_row(p.logits, n, 0, p.vocab_size, row.data());
    const uint32_t index = argmax_index(row_argmax(row));
    p.ids[n] = p.vocab_start + index;
    p.values[n] = row[index];
  }
}

void merge_vocab_shards_cpu(const MergeParams& p) {
  for (int64_t n = 0; n < p.rows; ++n) merge_shards(p, n);
}

}  // namespace dflash::verify

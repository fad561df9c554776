// CPU implementations of select_path and grouped_conv: the arithmetic of csrc/smxx/dflash2/, in loops. In bfloat16 the
// transition scores and the convolution equal the CUDA kernels' bit for bit; the sampled probabilities differ by expf.
#include "cpu/dflash2.h"

#include <cmath>
#include <vector>

#include "smxx/dflash2/rules.h"

namespace dflash::dflash2 {
namespace {

struct Bf16 {
  using Storage = uint16_t;
  static float load(Storage x) { return bf16_value(x); }
  static Storage store(float x) { return bf16_bits(x); }
  static float round(float x) { return round_to_bf16(x); }
};

struct Fp32 {
  using Storage = float;
  static float load(Storage x) { return x; }
  static Storage store(float x) { return x; }
  static float round(float x) { return x; }
};

// The sum's order is a warp's: each of 32 lanes adds its 8 neighbouring products, then a butterfly joins the lanes.
template <typename Type>
float transition(const float* product, const typename Type::Storage* successor, int rank) {
  float lanes[32] = {};
  for (int r = 0; r < rank; ++r) lanes[r / kRankVector] += product[r] * Type::load(successor[r]);
  for (int step = 16; step > 0; step /= 2) {
    for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
  }
  return Type::round(lanes[0]);
}

int argmax(const float* scores, int count) {
  uint64_t best = 0;
  for (int c = 0; c < count; ++c) {
    const uint64_t key = argmax_key(scores[c], static_cast<uint32_t>(c));
    if (key > best) best = key;
  }
  return static_cast<int>(argmax_index(best));
}

// Draws from softmax(scores / temperature) with u in [0, 1). False: no softmax (see has_softmax), nothing written.
bool draw(const float* scores, int count, float temperature, float u, float* probs, int* chosen) {
  const float t = temperature < kMinTemperature ? kMinTemperature : temperature;
  uint32_t largest_key = 0;
  float largest = 0.0f;
  for (int c = 0; c < count; ++c) {
    const float scaled = scores[c] / t;
    if (order_key(scaled) > largest_key) {
      largest_key = order_key(scaled);
      largest = scaled;
    }
  }
  if (!has_softmax(largest_key)) return false;
  float cumulated[kMaxTopK];
  float total = 0.0f;
  for (int c = 0; c < count; ++c) {
    probs[c] = std::exp(scores[c] / t - largest);
    total += probs[c];
    cumulated[c] = total;
  }
  int last_positive = 0;
  *chosen = -1;
  for (int c = 0; c < count; ++c) {
    if (*chosen < 0 && u * total < cumulated[c]) *chosen = c;
    if (probs[c] > 0.0f) last_positive = c;
  }
  if (*chosen < 0) *chosen = last_positive;
  for (int c = 0; c < count; ++c) probs[c] /= total;
  return true;
}

template <typename Type>
void select_path(const SelectParams& p) {
  using Storage = typename Type::Storage;
  const auto* predecessors = static_cast<const Storage*>(p.predecessors);
  const auto* successors = static_cast<const Storage*>(p.successors);
  float product[kMaxRank];
  float scores[kMaxTopK];
  for (int64_t b = 0; b < p.batch; ++b) {
    int64_t previous = p.anchor_ids.at(b);
    for (int j = 0; j < p.slots; ++j) {
      const Storage* hidden = static_cast<const Storage*>(p.hidden) + p.hidden_offset(b, j);
      const Storage* predecessor = predecessors + previous * p.rank;
      for (int r = 0; r < p.rank; ++r) product[r] = Type::round(Type::load(predecessor[r]) * Type::load(hidden[r]));
      for (int c = 0; c < p.top_k; ++c) {
        const Storage* successor = successors + p.candidate_at(b, j, c) * p.rank;
        scores[c] = p.logit_at(b, j, c) + transition<Type>(product, successor, p.rank);
      }
      const int64_t slot = b * p.slots + j;
      float* probs = p.draft_probs + slot * p.top_k;
      int chosen = 0;
      const bool sampled = p.temperature != nullptr && p.temperature[b] > 0.0f &&
                           draw(scores, p.top_k, p.temperature[b], p.uniforms[slot], probs, &chosen);
      if (!sampled) {
        chosen = argmax(scores, p.top_k);
        for (int c = 0; c < p.top_k; ++c) probs[c] = c == chosen ? 1.0f : 0.0f;
      }
      previous = p.candidate_at(b, j, chosen);
      p.path_ids[slot] = previous;
    }
  }
}

// A row's sums, tap by tap: the loop over a group's channels has one coefficient, and vectorises.
template <typename Type>
void grouped_conv(const ConvParams& p) {
  using Storage = typename Type::Storage;
  const auto* base = static_cast<const Storage*>(p.base);
  const int groups = p.hidden_size / p.group_size;
  std::vector<float> sums(p.hidden_size);
  for (int64_t n = 0; n < p.rows; ++n) {
    const int64_t position = n % p.block_size;
    for (int tap = 0; tap < p.taps; ++tap) {
      const bool inside = position >= tap;
      const Storage* x = static_cast<const Storage*>(p.x) + (inside ? n - tap : n) * p.x_stride;
      const Storage* delta = static_cast<const Storage*>(p.delta) + n * p.delta_row_stride + tap * p.delta_tap_stride;
      const Storage* tap_base = base + static_cast<int64_t>(tap) * p.hidden_size;
      for (int g = 0; g < groups; ++g) {
        const float d = Type::load(delta[g]);
        for (int h = g * p.group_size; h < (g + 1) * p.group_size; ++h) {
          const float value = inside ? Type::load(x[h]) : 0.0f;
          const float b = Type::load(tap_base[h]);
          sums[h] = tap == 0 ? first_tap(b, d, value) : add_tap(sums[h], b, d, value);
        }
      }
    }
    Storage* out = static_cast<Storage*>(p.out) + n * p.hidden_size;
    for (int h = 0; h < p.hidden_size; ++h) out[h] = Type::store(sums[h]);
  }
}

}  // namespace

void select_path_cpu(const SelectParams& params) {
  params.is_bf16 ? select_path<Bf16>(params) : select_path<Fp32>(params);
}

void grouped_conv_cpu(const ConvParams& params) {
  params.is_bf16 ? grouped_conv<Bf16>(params) : grouped_conv<Fp32>(params);
}

}  // namespace dflash::dflash2

// Value checks of verify_block_sampled's arguments: always on the CPU, under DFLASH_DEBUG=1 on CUDA.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "smxx/verify/params.h"

namespace dflash::verify {

enum class Fault : int {
  kNone,
  kTemperature,     // NaN or negative
  kTopP,            // outside [0, 1]
  kMinP,            // outside [0, 1]
  kCandidate,       // a draft token outside [0, V)
  kDraftProb,       // NaN, infinite or negative
  kDraftId,         // outside [0, V) with a probability > 0
  kDraftDuplicate,  // an id twice in one row with probabilities > 0
};

struct SampledFault {
  Fault fault = Fault::kNone;
  int64_t request = 0;
};

// Ids are searched for duplicates in rows of up to this many pairs (the search is quadratic).
constexpr int kMaxDuplicateSearch = 256;

DFLASH_HOST_DEVICE Fault find_fault(const SampledParams& p, int64_t b) {
  if (!(p.temperature[b] >= 0.0f)) return Fault::kTemperature;
  if (!(p.top_p[b] >= 0.0f && p.top_p[b] <= 1.0f)) return Fault::kTopP;
  if (!(p.min_p[b] >= 0.0f && p.min_p[b] <= 1.0f)) return Fault::kMinP;
  for (int j = 1; j < p.block_size; ++j) {
    const int64_t id = p.candidates.at(b, j);
    if (id < 0 || id >= p.vocab_size) return Fault::kCandidate;
  }
  if (p.draft_probs == nullptr) return Fault::kNone;
  for (int j = 0; j < p.block_size - 1; ++j) {
    const int64_t row = b * (p.block_size - 1) + j;
    const float* probs = p.draft_probs + row * p.draft_width;
    for (int k = 0; k < p.draft_width; ++k) {
      if (!(probs[k] >= 0.0f && probs[k] <= 3.0e38f)) return Fault::kDraftProb;
      if (probs[k] == 0.0f) continue;
      const int64_t id = p.draft_ids.at(row, k);
      if (id < 0 || id >= p.vocab_size) return Fault::kDraftId;
      if (p.draft_width > kMaxDuplicateSearch) continue;
      for (int other = 0; other < k; ++other) {
        if (probs[other] > 0.0f && p.draft_ids.at(row, other) == id) return Fault::kDraftDuplicate;
      }
    }
  }
  return Fault::kNone;
}

}  // namespace dflash::verify

// The accept rules of chain verification, shared by the CPU ops and the CUDA kernels.
//
// A block is [anchor, x_1, ..., x_G], G = T - 1. Target row j (j = 0..G) is the target's distribution of the
// token after [.., x_j]; x_{j+1} is the draft's guess at it.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dflash {

struct Accepted {
  int accept_len;  // accepted draft tokens, 0..G
  int64_t bonus;   // the target's own token after them
};

// Greedy: the longest prefix with target_at(j) == candidate_at(j + 1). target_at is called for j = 0, 1, ... and
// never again after the first mismatch, so an expensive argmax is only paid for rows that matter.
template <typename TargetAt, typename CandidateAt>
DFLASH_HOST_DEVICE Accepted accept_greedy(int block_size, TargetAt target_at, CandidateAt candidate_at) {
  int j = 0;
  for (;; ++j) {
    const int64_t target = target_at(j);
    if (j == block_size - 1 || target != candidate_at(j + 1)) return Accepted{j, target};
  }
}

// Token rule: accept with probability min(1, p / q), written without the division. A draft token that its own
// distribution gives no mass (q = 0) is accepted iff the target gives it any.
template <typename Real>
DFLASH_HOST_DEVICE bool accept_token(Real u, Real p, Real q) {
  return u * q < p;
}

// Block rule: Sun, Mendlovic, Leviathan, Aharoni, Ro, Beirami, Suresh, "Block Verification Accelerates Speculative
// Decoding" (2024), algorithm 2.
//   w_0 = 1,  w_i = min(w_{i-1} * p(x_i) / q(x_i), 1)
//   S_i = sum_v max(w_i * p_i(v) - q_i(v), 0)      p_i, q_i: distributions after x_i
//   h_i = S_i / (S_i + 1 - w_i) for i < G,  h_G = w_G
//   accept_len = the last i with u_{i-1} < h_i;  the residual at accept_len uses w_{accept_len}.
template <typename Real>
DFLASH_HOST_DEVICE Real block_weight(Real previous, Real p, Real q) {
  const Real scaled = previous * p;
  return scaled >= q ? (scaled > Real(0) ? Real(1) : Real(0)) : scaled / q;
}

// With w = 1 and S = 0 the target equals the draft at the next position, which is then accepted for certain.
template <typename Real>
DFLASH_HOST_DEVICE Real block_accept_probability(Real residual_mass, Real weight) {
  return weight >= Real(1) ? Real(1) : residual_mass / (residual_mass + Real(1) - weight);
}

// out_tokens[j] of a request: the draft tokens shifted by one, with the bonus at accept_len.
template <typename CandidateAt>
DFLASH_HOST_DEVICE int64_t out_token(int j, int block_size, const Accepted& accepted, CandidateAt candidate_at) {
  if (j == accepted.accept_len) return accepted.bonus;
  return j < block_size - 1 ? candidate_at(j + 1) : 0;
}

}  // namespace dflash

// The end of an argmax launch, run by the block that drew the last ticket: keys become outputs, the workspace zero.
#pragma once

#include "common/accept.h"
#include "smxx/head/params.h"
#include "smxx/head/tile_key.cuh"

namespace dflash::head {

// Greedy targets of all rows are in v.out_tokens; each is read before its place is given the committed token.
__device__ __forceinline__ void verify_request(const VerifyParams& v, int64_t b) {
  int64_t* out = v.out_tokens + b * v.block_size;
  const auto candidate_at = [&](int j) { return v.candidates.at(b, j); };
  const Accepted accepted = accept_greedy(v.block_size, [&](int j) { return out[j]; }, candidate_at);
  v.accept_lens[b] = accepted.accept_len;
  v.commit_lens[b] = accepted.accept_len + 1;
  v.bonus_ids[b] = accepted.bonus;
  v.new_seq_lens[b] = v.prefix_lens.at(b) + accepted.accept_len + 1;
  for (int j = 0; j < v.block_size; ++j) out[j] = out_token(j, v.block_size, accepted, candidate_at);
}

// Threads 0..threads-1 of the block; sync is their barrier.
template <typename Sync>
__device__ __forceinline__ void finish_argmax(const HeadParams& p, int threads, Sync sync) {
  const bool verify = p.verify.candidates.data != nullptr;
  for (int64_t row = threadIdx.x; row < p.gemm.m; row += threads) {
    const uint64_t key = atomicExch(p.workspace + 1 + row, 0ull);  // at L2, where the other blocks' keys are
    const int64_t id = p.vocab_start + argmax_index(key);
    if (verify) {
      p.verify.out_tokens[row] = id;
    } else {
      p.ids[row] = id;
      p.values[row] = vocab_key_value(key);
    }
  }
  if (threadIdx.x == 0) p.workspace[0] = 0;
  if (!verify) return;
  sync();
  for (int64_t b = threadIdx.x; b < p.verify.batch; b += threads) verify_request(p.verify, b);
}

}  // namespace dflash::head

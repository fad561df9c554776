// The end of every verification: one warp writes a request's outputs.
#pragma once

#include <cuda_runtime.h>

#include "common/accept.h"
#include "smxx/verify/params.h"

namespace dflash::verify {

constexpr unsigned kFullWarp = 0xffffffffu;

// What a request's outputs need beside the target's tokens. Loaded before a warp knows whether it finishes the request,
// so that the end does not wait for memory again.
struct Request {
  int64_t guess;  // lane j < T - 1: the draft token that row j is compared with; otherwise 0
  int64_t prefix_len;
};

__device__ __forceinline__ Request load_request(const IntView& candidates, const IntView& prefix_lens, int block_size,
                                                int64_t b, int lane) {
  return Request{lane < block_size - 1 ? candidates.at(b, lane + 1) : 0, prefix_lens.at(b)};
}

// `lane` holds target token `target` of row `lane` (lane < T). Returns the longest accepted prefix and its bonus, the
// same in all lanes.
__device__ __forceinline__ Accepted accept_warp(const Request& request, int block_size, int lane, int64_t target) {
  const bool ends = lane >= block_size - 1 || target != request.guess;
  const int accept_len = __ffs(__ballot_sync(kFullWarp, ends)) - 1;
  return Accepted{accept_len, __shfl_sync(kFullWarp, target, accept_len)};
}

__device__ __forceinline__ void write_outputs(const Outputs& out, const Request& request, int block_size, int64_t b,
                                              int lane, const Accepted& accepted) {
  if (lane == 0) {
    out.accept_lens[b] = accepted.accept_len;
    out.commit_lens[b] = accepted.accept_len + 1;
    out.bonus_ids[b] = accepted.bonus;
    out.new_seq_lens[b] = request.prefix_len + accepted.accept_len + 1;
  }
  if (lane < block_size) {
    out.out_tokens[b * block_size + lane] =
        out_token(lane, block_size, accepted, [&](int) { return request.guess; });  // its own: candidate lane + 1
  }
}

__device__ __forceinline__ void write_outputs(const Outputs& out, const IntView& candidates, const IntView& prefix_lens,
                                              int block_size, int64_t b, int lane, const Accepted& accepted) {
  write_outputs(out, load_request(candidates, prefix_lens, block_size, b, lane), block_size, b, lane, accepted);
}

}  // namespace dflash::verify

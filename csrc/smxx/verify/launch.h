#pragma once

#include <cuda_runtime_api.h>

#include "smxx/verify/fault.h"
#include "smxx/verify/params.h"

namespace dflash::verify {

void launch_verify_block(const BlockParams& params, cudaStream_t stream);
void launch_verify_block_sampled(const SampledParams& params, cudaStream_t stream);
void launch_argmax_logits(const ArgmaxParams& params, cudaStream_t stream);
void launch_merge_vocab_shards(const MergeParams& params, cudaStream_t stream);
void launch_merge_vocab_ranks(const MergeRanksParams& params, cudaStream_t stream);

// The first of the two launches of launch_verify_block_sampled: what keeps few tokens of a row.
void launch_verify_topk(const SampledParams& params, int sms, cudaStream_t stream);

// The first request with a fault, found on the device (DFLASH_DEBUG=1): allocates and synchronises.
SampledFault check_sampled_cuda(const SampledParams& params, cudaStream_t stream);

}  // namespace dflash::verify

#pragma once

#include "smxx/verify/fault.h"
#include "smxx/verify/params.h"

namespace dflash::verify {

void verify_block_cpu(const BlockParams& params);
void verify_block_sampled_cpu(const SampledParams& params);

// The first request with a fault, if any.
SampledFault check_sampled_cpu(const SampledParams& params);

void argmax_logits_cpu(const ArgmaxParams& params);
void merge_vocab_shards_cpu(const MergeParams& params);

}  // namespace dflash::verify

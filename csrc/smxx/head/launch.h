#pragma once

#include <cuda_runtime_api.h>

#include "smxx/head/params.h"
#include "smxx/head/stream.h"

namespace dflash::head {

// hidden and weight are 16-byte aligned, H and hidden's row stride multiples of 8.
void launch_argmax(const HeadParams& params, cudaStream_t stream);
void launch_topk(const HeadParams& params, cudaStream_t stream);

// hidden and weight in e4m3 (gemm/params.h); only where gemm::is_fp8_supported. Both 16-byte aligned, H and hidden's
// row stride multiples of 16.
void launch_argmax_fp8(const HeadParams& params, cudaStream_t stream);

// Argmax as one cooperative launch of params.stream.blocks blocks.
void launch_stream_argmax(const StreamHeadParams& params, stream::WeightFormat format, cudaStream_t stream);

}  // namespace dflash::head

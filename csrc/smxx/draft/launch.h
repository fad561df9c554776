#pragma once

#include <cuda_runtime_api.h>

#include "smxx/draft/index_check.h"
#include "smxx/draft/params.h"
#include "smxx/draft/stream.h"

namespace dflash::draft {

// The whole pass, about nine kernels a layer, all on `stream`; in fp8 eleven, where gemm::is_fp8_supported, in
// nvfp4 thirteen, where gemm::is_nvfp4_supported.
void launch_draft_forward(const DraftParams& params, cudaStream_t stream);

// The two halves of layer `layer`: out = x + part where add_x, else the part alone, as the other ranks of a tensor
// parallel drafter give it. `out` may be x. Only what the half reads has to be set in `params`: the attention uses the
// workspace; the MLP, which asks for the sizes of tokens() rows alone, normed [B * T, H] and activated [B * T, I], and
// other than in bf16 the workspace.
void launch_draft_attention(const DraftParams& params, int64_t layer, const uint16_t* x, uint16_t* out, bool add_x,
                            cudaStream_t stream);
void launch_draft_mlp(const DraftParams& params, int64_t layer, const uint16_t* x, uint16_t* out, bool add_x,
                      uint16_t* normed, uint16_t* activated, cudaStream_t stream);

// The whole pass as one cooperative launch of params.stream.blocks blocks; head_dim is 64 or 128.
void launch_stream_draft_forward(const StreamDraftParams& params, int64_t head_dim, stream::WeightFormat format,
                                 cudaStream_t stream);

void launch_embed(const EmbedParams& params, cudaStream_t stream);
// Started early: positions must have been written before the stream's preceding kernel started.
void launch_rotate(const RotateParams& params, cudaStream_t stream);

bool is_capturing(cudaStream_t stream);  // then nothing may wait for the device

// First fault of the batch, found on the device; waits for it. `scratch`: device memory of sizeof(IndexFault).
IndexFault check_indices(const IndexParams& params, void* scratch, cudaStream_t stream);

}  // namespace dflash::draft

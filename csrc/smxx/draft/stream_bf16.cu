// The streaming kernel over bf16 weights.
#include "smxx/draft/stream.cuh"

namespace dflash::draft {

template void launch_stream_draft<stream::Bf16>(const StreamDraftParams&, int64_t, cudaStream_t);

}  // namespace dflash::draft

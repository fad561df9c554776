// The streaming kernel over e2m1 weights in groups of 64 or 128.
#include "smxx/draft/stream.cuh"
#include "smxx/stream/quantized_format.cuh"

namespace dflash::draft {

template void launch_stream_draft<stream::E2m1<64>>(const StreamDraftParams&, int64_t, cudaStream_t);
template void launch_stream_draft<stream::E2m1<128>>(const StreamDraftParams&, int64_t, cudaStream_t);

}  // namespace dflash::draft

// The streaming kernel over e4m3 weights with a scale for each row.
#include "smxx/draft/stream.cuh"
#include "smxx/stream/quantized_format.cuh"

namespace dflash::draft {

template void launch_stream_draft<stream::Fp8>(const StreamDraftParams&, int64_t, cudaStream_t);

}  // namespace dflash::draft

// Which of the streaming kernels reads the weights.
#include "smxx/draft/launch.h"
#include "smxx/stream/quantized_format.cuh"

namespace dflash::draft {

template <typename Format>
void launch_stream_draft(const StreamDraftParams& p, int64_t head_dim, cudaStream_t stream);  // stream.cuh

void launch_stream_draft_forward(const StreamDraftParams& p, int64_t head_dim, stream::WeightFormat format,
                                 cudaStream_t stream) {
  if (p.batch == 0) return;
  stream::with_format(format, [&](auto weights) { launch_stream_draft<decltype(weights)>(p, head_dim, stream); });
}

}  // namespace dflash::draft

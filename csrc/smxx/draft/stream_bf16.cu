// The streaming kernel over bf16 weights.
#include "smxx/draft/stream.cuh"

namespace dflash::draft {

template void launch_stream_draft<stream::Bf16>(const StreamDraftParams&, int64_t, cudaStream_t);

}  // namespace dflash::draft

#ifdef DFLASH_STREAM_TRACE
// [kTraceBlocks][kTraceUnits][kEvents] uint32 of the last launch.
extern "C" __attribute__((visibility("default"))) int dflash_trace_draft(void* host) {
  using dflash::stream::trace_times;
  return static_cast<int>(cudaMemcpyFromSymbol(host, trace_times, sizeof trace_times));
}
// [kTraceBlocks][kTraceTiles] uint32 of the last launch.
extern "C" __attribute__((visibility("default"))) int dflash_trace_draft_landed(void* host) {
  using dflash::stream::landed_times;
  return static_cast<int>(cudaMemcpyFromSymbol(host, landed_times, sizeof landed_times));
}
#endif

// Current CUDA stream of a device through torch's C shim. The shim lives in the CUDA half of torch: declared weak, so
// that the library also loads beside a CPU-only torch.
#pragma once

#if DFLASH_WITH_CUDA

#include <cuda_runtime_api.h>

#include "api/check.h"
#include "common/cuda_check.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace dflash::api {

inline cudaStream_t current_stream(const char* op, const Tensor& tensor) {
  if (aoti_torch_get_current_cuda_stream == nullptr) fail(op, "this torch has no CUDA support");
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != 0) {
    fail(op, "torch has no current stream for ", device_text(tensor));
  }
  return static_cast<cudaStream_t>(stream);
}

// Whether a call looks at its index values now: under DFLASH_DEBUG=1, but not while the stream is being captured, when
// nobody can wait for the device.
inline bool checks_values(const char* op, cudaStream_t stream) {
  if (!debug_enabled()) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cuda_check(cudaStreamIsCapturing(stream, &status), op);
  return status == cudaStreamCaptureStatusNone;
}

}  // namespace dflash::api

#endif  // DFLASH_WITH_CUDA

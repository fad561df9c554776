// C = A * W^T (* scales) (+ bias) (+ residual | gating) in nvfp4: only compute capability 10.x has a kernel, for any
// number of rows.
#include "common/cuda_check.h"
#include "common/device.h"
#include "sm100/gemm/launch.h"
#include "smxx/gemm/launch.h"

namespace dflash::gemm {

bool is_nvfp4_supported([[maybe_unused]] int device) {
#if DFLASH_WITH_SM100
  int major = 0;
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "gemm_nvfp4");
  return major == 10;
#else
  return false;
#endif
}

void launch_gemm_nvfp4(const GemmParams& p, [[maybe_unused]] cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return;
#if DFLASH_WITH_SM100
  const Device device = current_device("gemm_nvfp4");
  if (device.major == 10 && sm100::gemm::launch_gemm_nvfp4(p, device.num_sms, stream)) return;
#endif
  cuda_check(cudaErrorNotSupported, "gemm_nvfp4");
}

}  // namespace dflash::gemm

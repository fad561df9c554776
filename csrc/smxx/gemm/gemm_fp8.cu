// C = A * W^T (* scales) (+ bias) (+ residual | gating) in e4m3: which architecture's kernel. Few rows take the same
// one; there is none with mma.sync to fall back on.
#include "common/cuda_check.h"
#include "common/device.h"
#include "sm100/gemm/launch.h"
#include "sm90/gemm/launch.h"
#include "smxx/gemm/launch.h"

namespace dflash::gemm {
namespace {

// Compiled for this compute capability; a build has one architecture or both.
bool is_major_supported(int major) {
#if DFLASH_WITH_SM90
  if (major == 9) return true;
#endif
#if DFLASH_WITH_SM100
  if (major == 10) return true;
#endif
  (void)major;
  return false;
}

}  // namespace

bool is_fp8_supported(int device) {
  int major = 0;
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "gemm_fp8");
  return is_major_supported(major);
}

void launch_gemm_fp8(const GemmParams& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return;
  [[maybe_unused]] const Device device = current_device("gemm_fp8");
#if DFLASH_WITH_SM90
  if (device.major == 9 && sm90::gemm::launch_gemm_fp8(p, device.num_sms, stream)) return;
#endif
#if DFLASH_WITH_SM100
  if (device.major == 10 && sm100::gemm::launch_gemm_fp8(p, device.num_sms, stream)) return;
#endif
  cuda_check(cudaErrorNotSupported, "gemm_fp8");
}

}  // namespace dflash::gemm

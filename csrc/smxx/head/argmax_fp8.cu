// lm_head_argmax_fp8: which architecture's kernel. Few rows take the one for many; nothing does it with mma.sync.
#include "common/cuda_check.h"
#include "common/device.h"
#include "sm100/head/launch.h"
#include "sm90/head/launch.h"
#include "smxx/head/launch.h"

namespace dflash::head {

void launch_argmax_fp8(const HeadParams& p, cudaStream_t stream) {
  if (p.gemm.m == 0) return;
  [[maybe_unused]] const Device device = current_device("lm_head_argmax_fp8");
#if DFLASH_WITH_SM90
  if (device.major == 9 && sm90::head::launch_argmax_fp8(p, device.num_sms, stream)) return;
#endif
#if DFLASH_WITH_SM100
  if (device.major == 10 && sm100::head::launch_argmax_fp8(p, device.num_sms, stream)) return;
#endif
  cuda_check(cudaErrorNotSupported, "lm_head_argmax_fp8");
}

}  // namespace dflash::head

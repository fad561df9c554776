// C = A * W^T (+ bias) (+ residual | gating) in bf16 for many rows on Hopper; formulas and rounding in
// smxx/gemm/params.h, the kernel in smxx/many_rows, with wgmma.
#include "sm90/gemm/launch.h"
#include "sm90/gemm/mainloop.cuh"
#include "smxx/many_rows/store.cuh"

namespace dflash::sm90::gemm {
namespace {

template <int BN, bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_bf16_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ SourceMaps a_maps,
                     const __grid_constant__ CUtensorMap w_map, const __grid_constant__ Schedule schedule) {
  using C = Tiles<BN>;
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[kBarriers<C>];
  run<C>(p, a_maps, &w_map, schedule, shared_bytes, barriers, many_rows::Store<BN, kGated>(p));
}

struct Launcher {
  static constexpr int kNarrowest = 64, kWidest = 256;  // columns of a tile
  const GemmParams& p;
  int num_sms;
  cudaStream_t stream;
  template <int BN, bool kGated>
  void launch(const many_rows::Operands& of) const {
    many_rows::launch<Tiles<BN>>(gemm_bf16_kernel<BN, kGated>, kThreads, p, of, num_sms, stream, "gemm_bf16");
  }
};

}  // namespace

bool launch_gemm_bf16(const GemmParams& p, int num_sms, cudaStream_t stream) {
  return many_rows::launch_store(p, num_sms, many_rows::kHopperRates, Launcher{p, num_sms, stream});
}

}  // namespace dflash::sm90::gemm

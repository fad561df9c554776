// C = A * W^T (+ bias) (+ residual | gating) in bf16 for many rows on Blackwell; formulas and rounding in
// smxx/gemm/params.h, the kernel in smxx/many_rows, with tcgen05.
#include "sm100/gemm/launch.h"
#include "sm100/gemm/mainloop.cuh"
#include "smxx/many_rows/store.cuh"

namespace dflash::sm100::gemm {
namespace {

template <int BN, bool kGated, bool kPair>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_bf16_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ SourceMaps a_maps,
                     const __grid_constant__ CUtensorMap w_map, const __grid_constant__ Schedule schedule) {
  using C = Tiles<BN, kPair>;
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[kBarriers<C>];
  __shared__ uint32_t tmem;
  run<C>(p, a_maps, &w_map, schedule, shared_bytes, barriers, &tmem, many_rows::Store<BN, kGated>(p));
}

struct Launcher {
  static constexpr int kNarrowest = 128, kWidest = 256;  // columns of a tile
  const GemmParams& p;
  int num_sms;
  cudaStream_t stream;
  template <int BN, bool kGated>
  void launch(const many_rows::Operands& of) const {
    of.plan.pair == 2 ? launch<BN, kGated, true>(of) : launch<BN, kGated, false>(of);
  }
  template <int BN, bool kGated, bool kPair>
  void launch(const many_rows::Operands& of) const {
    many_rows::launch<Tiles<BN, kPair>>(gemm_bf16_kernel<BN, kGated, kPair>, kThreads, p, of, num_sms, stream,
                                        "gemm_bf16");
  }
};

}  // namespace

bool launch_gemm_bf16(const GemmParams& p, int num_sms, cudaStream_t stream) {
  return many_rows::launch_store(p, num_sms, many_rows::kB200Rates, Launcher{p, num_sms, stream});
}

}  // namespace dflash::sm100::gemm

// C = A * W^T (* scales) (+ bias) (+ residual | gating) in e4m3 on Blackwell; formulas and rounding in
// smxx/gemm/params.h, the kernel in smxx/many_rows, with tcgen05 (.kind::f8f6f4). Never run on the hardware.
//
// A step of K is as many bytes and as many cycles of the tensor cores as in bf16, and twice the products: both floors
// are half of bf16's.
#include "sm100/gemm/launch.h"
#include "sm100/gemm/mainloop.cuh"
#include "smxx/many_rows/store.cuh"

namespace dflash::sm100::gemm {
namespace {

template <int BN, bool kPair>
using Fp8Tiles = Tiles<BN, kPair, 1>;

template <int BN, bool kGated, bool kPair>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_fp8_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ SourceMaps a_maps,
                    const __grid_constant__ CUtensorMap w_map, const __grid_constant__ Schedule schedule) {
  using C = Fp8Tiles<BN, kPair>;
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[kBarriers<C>];
  __shared__ uint32_t tmem;
  run<C>(p, a_maps, &w_map, schedule, shared_bytes, barriers, &tmem, many_rows::Store<BN, kGated, true>(p));
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
    many_rows::launch<Fp8Tiles<BN, kPair>>(gemm_fp8_kernel<BN, kGated, kPair>, kThreads, p, of, num_sms, stream,
                                           "gemm_fp8");
  }
};

}  // namespace

bool launch_gemm_fp8(const GemmParams& p, int num_sms, cudaStream_t stream) {
  return many_rows::launch_store(p, num_sms, many_rows::kB200Rates, Launcher{p, num_sms, stream});
}

}  // namespace dflash::sm100::gemm

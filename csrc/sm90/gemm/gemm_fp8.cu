// C = A * W^T (* scales) (+ bias) (+ residual | gating) in e4m3 on Hopper; formulas and rounding in smxx/gemm/params.h,
// the kernel in smxx/many_rows, with wgmma.
//
// A step of K is as many bytes and as many cycles of the tensor cores as in bf16, and twice the products: both floors
// are half of bf16's. The sums are less exact than fp32: between two instructions Hopper's tensor cores keep about 14
// bits of them (seen by others, not in the PTX ISA), and nothing here adds them up elsewhere in between. That is meant
// for drafts, whose errors verification finds.
#include "sm90/gemm/launch.h"
#include "sm90/gemm/mainloop.cuh"
#include "smxx/many_rows/store.cuh"

namespace dflash::sm90::gemm {
namespace {

template <int BN>
using Fp8Tiles = Tiles<BN, 1>;

template <int BN, bool kGated>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_fp8_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ SourceMaps a_maps,
                    const __grid_constant__ CUtensorMap w_map, const __grid_constant__ Schedule schedule) {
  using C = Fp8Tiles<BN>;
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[kBarriers<C>];
  run<C>(p, a_maps, &w_map, schedule, shared_bytes, barriers, many_rows::Store<BN, kGated, true>(p));
}

struct Launcher {
  static constexpr int kNarrowest = 64, kWidest = 256;  // columns of a tile
  const GemmParams& p;
  int num_sms;
  cudaStream_t stream;
  template <int BN, bool kGated>
  void launch(const many_rows::Operands& of) const {
    many_rows::launch<Fp8Tiles<BN>>(gemm_fp8_kernel<BN, kGated>, kThreads, p, of, num_sms, stream, "gemm_fp8");
  }
};

}  // namespace

bool launch_gemm_fp8(const GemmParams& p, int num_sms, cudaStream_t stream) {
  return many_rows::launch_store(p, num_sms, many_rows::kHopperRates, Launcher{p, num_sms, stream});
}

}  // namespace dflash::sm90::gemm

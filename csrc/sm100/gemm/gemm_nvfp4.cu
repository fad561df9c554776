// C = A * W^T (* scales) (+ bias) (+ residual | gating) in nvfp4 on Blackwell; formulas and rounding in
// smxx/gemm/params.h, the kernel in smxx/many_rows, with tcgen05 (.kind::mxf4nvf4, a scale for 16 neighbours). Never
// run on the hardware.
//
// A step of K is as many bytes and as many cycles of the tensor cores as in bf16, and four times the products; scales
// add an eighth of the bytes. Floors: 9 / 32 of bf16's bytes of W, a quarter of its cycles.
//
// Tiles are 128 columns wide, no wider: tensor memory holds two accumulators of 128 columns and, for each stage of the
// ring, 32 columns of scales, so that none are overwritten while products read them. 256 columns would leave room for
// one accumulator, and gated they would begin within blocks of scales. A crosses from L2 more often for it: with more
// than some 128 rows that path is the narrow one.
#include "sm100/gemm/launch.h"
#include "sm100/gemm/mainloop.cuh"
#include "smxx/many_rows/store.cuh"

namespace dflash::sm100::gemm {
namespace {

constexpr int kColumns = 128;  // of a tile

template <bool kPair>
using Nvfp4Tiles = Tiles<kColumns, kPair, 1, true>;

template <bool kGated, bool kPair>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_nvfp4_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ SourceMaps a_maps,
                      const __grid_constant__ CUtensorMap w_map, const __grid_constant__ Schedule schedule) {
  using C = Nvfp4Tiles<kPair>;
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[kBarriers<C>];
  __shared__ uint32_t tmem;
  run<C>(p, a_maps, &w_map, schedule, shared_bytes, barriers, &tmem, many_rows::Store<kColumns, kGated, true>(p));
}

struct Launcher {
  static constexpr int kNarrowest = kColumns, kWidest = kColumns;
  const GemmParams& p;
  int num_sms;
  cudaStream_t stream;
  template <int BN, bool kGated>
  void launch(const many_rows::Operands& of) const {
    of.plan.pair == 2 ? launch_pairs<kGated, true>(of) : launch_pairs<kGated, false>(of);
  }
  template <bool kGated, bool kPair>
  void launch_pairs(const many_rows::Operands& of) const {
    many_rows::launch<Nvfp4Tiles<kPair>>(gemm_nvfp4_kernel<kGated, kPair>, kThreads, p, of, num_sms, stream,
                                         "gemm_nvfp4");
  }
};

}  // namespace

bool launch_gemm_nvfp4(const GemmParams& p, int num_sms, cudaStream_t stream) {
  return many_rows::launch_store(p, num_sms, many_rows::kB200Rates, Launcher{p, num_sms, stream});
}

}  // namespace dflash::sm100::gemm

// The KV projection of all drafter layers on Hopper, with K-norm, RoPE and the paged write as its epilogue
// (smxx/inject/write_heads.cuh); the GEMM in smxx/many_rows, with wgmma.
//
// Floor: that of the GEMM; what is saved is 2 * M * L * 2 * Hkv * D * 2 bytes through L2 and a launch.
#include "sm90/gemm/mainloop.cuh"
#include "sm90/inject/launch.h"
#include "smxx/inject/write_heads.cuh"

namespace dflash::sm90::inject {
namespace {

using dflash::gemm::GemmParams;
using dflash::inject::WriteHeads;
using dflash::inject::WriteParams;

template <int BN, int kDim>
__global__ void __launch_bounds__(gemm::kThreads, 1)
    project_kernel(const __grid_constant__ GemmParams p, const __grid_constant__ many_rows::SourceMaps a_maps,
                   const __grid_constant__ CUtensorMap w_map, const __grid_constant__ many_rows::Schedule schedule,
                   const __grid_constant__ WriteParams write) {
  using C = many_rows::Tiles<BN>;
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[gemm::kBarriers<C>];
  gemm::run<C>(p, a_maps, &w_map, schedule, shared_bytes, barriers, WriteHeads<BN, kDim>(p.bias, write));
}

struct Launcher {
  const GemmParams& p;
  const WriteParams& write;
  int num_sms;
  cudaStream_t stream;
  template <int BN, int kDim>
  void launch(const many_rows::Operands& of) const {
    many_rows::launch<many_rows::Tiles<BN>>(project_kernel<BN, kDim>, gemm::kThreads, p, of, num_sms, stream,
                                            "inject_kv", write);
  }
};

}  // namespace

bool launch_project(const GemmParams& p, const WriteParams& write, int num_sms, cudaStream_t stream) {
  return dflash::inject::launch_write_heads(p, write, num_sms, many_rows::kHopperRates,
                                            Launcher{p, write, num_sms, stream});
}

}  // namespace dflash::sm90::inject

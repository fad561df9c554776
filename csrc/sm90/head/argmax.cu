// lm_head_argmax and verify_block_from_hidden for more than 128 rows, and lm_head_argmax_fp8, on Hopper:
// smxx/head/many_rows.cuh with wgmma. What its sums of e4m3 keep: sm90/gemm/gemm_fp8.cu.
#include "sm90/gemm/mainloop.cuh"
#include "sm90/head/launch.h"
#include "smxx/head/many_rows.cuh"

namespace dflash::sm90::head {
namespace {

using dflash::head::HeadParams;
using dflash::head::kClusterSize;
using dflash::head::Schedule;
using dflash::head::TilePlace;
using dflash::head::Tiles;

constexpr int kThreads = dflash::head::kConsumers + 32;  // and a producer warp

template <int kElementBytes>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    argmax_kernel(const __grid_constant__ HeadParams p, const __grid_constant__ CUtensorMap hidden_map,
                  const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ Schedule schedule) {
  using C = Tiles<kElementBytes>;
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[2 * C::kStages];
  __shared__ bool last;
  const TilePlace place;
  const Pipeline<C> pipe = make_pipeline<C>(shared_bytes, barriers, place.pair);
  const int warp = static_cast<int>(threadIdx.x) / 32;

  if (warp == C::kConsumers / 32) {
    if (threadIdx.x % 32 == 0) dflash::head::produce(pipe, &hidden_map, &weight_map, schedule, place);
    __syncwarp();
  } else {
    PipelineState<C> state;
    for (int tile = place.cluster; tile < schedule.tiles; tile += place.clusters) {
      float acc[C::BN / 2];
      multiply_tile(pipe, state, warp / 4, schedule.k_tiles, place.pair, acc);
      // 64 rows a warpgroup, 16 a warp
      dflash::head::add_keys<kElementBytes>(p, acc, place.row0(schedule, tile) + 16 * warp,
                                            place.column0(schedule, tile));
    }
    dflash::head::finish_block(p, last);
  }
  cluster_sync();
}

template <int kElementBytes>
bool launch(const HeadParams& p, const char* op, int num_sms, cudaStream_t stream) {
  CUtensorMap hidden_map, weight_map;
  if (!dflash::head::make_maps<kElementBytes>(&hidden_map, &weight_map, p)) return false;
  const Schedule schedule = dflash::head::make_schedule<kElementBytes>(p);
  const int blocks = dflash::head::num_blocks(schedule, num_sms);
  constexpr int kSharedBytes = Tiles<kElementBytes>::kSharedBytes;
  cuda_check(
      cudaFuncSetAttribute(argmax_kernel<kElementBytes>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
      op);
  argmax_kernel<kElementBytes><<<blocks, kThreads, kSharedBytes, stream>>>(p, hidden_map, weight_map, schedule);
  cuda_check_launch(op);
  return true;
}

}  // namespace

bool launch_argmax(const HeadParams& p, int num_sms, cudaStream_t stream) {
  return launch<2>(p, "lm_head_argmax", num_sms, stream);
}

bool launch_argmax_fp8(const HeadParams& p, int num_sms, cudaStream_t stream) {
  return launch<1>(p, "lm_head_argmax_fp8", num_sms, stream);
}

}  // namespace dflash::sm90::head

// lm_head_argmax and verify_block_from_hidden for more than 32 rows, and lm_head_argmax_fp8, on Blackwell:
// smxx/head/many_rows.cuh with tcgen05. Never run on the hardware.
#include "sm100/gemm/mainloop.cuh"
#include "sm100/head/launch.h"
#include "smxx/head/many_rows.cuh"

namespace dflash::sm100::head {
namespace {

using dflash::head::HeadParams;
using dflash::head::kClusterSize;
using dflash::head::Schedule;
using dflash::head::TilePlace;

template <int kElementBytes>
using HeadTiles = PairTiles<dflash::head::kBN, kElementBytes>;

template <int kElementBytes>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    argmax_kernel(const __grid_constant__ HeadParams p, const __grid_constant__ CUtensorMap hidden_map,
                  const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ Schedule schedule) {
  using C = HeadTiles<kElementBytes>;
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[kBarriers<C>];
  __shared__ uint32_t tmem;
  __shared__ bool last;
  const TilePlace place;
  const Pipeline<C> pipe = make_pipeline<C>(shared_bytes, barriers, &tmem);
  const int warp = static_cast<int>(threadIdx.x) / 32;

  if (warp < C::kConsumers / 32) {
    take_registers<kManyRegisters>();
    TensorMemory<C> memory(barriers, &tmem);
    for (int tile = place.cluster; tile < schedule.tiles; tile += place.clusters) {
      float acc[C::BN / 2];
      take_tile(memory, warp, place.pair, acc);
      memory.advance();
      dflash::head::add_keys<kElementBytes>(p, acc, place.row0(schedule, tile) + first_row_of(warp),
                                            place.column0(schedule, tile));
    }
    dflash::head::finish_block(p, last);
  } else {
    give_back_registers<kFewRegisters>();
    if (warp == kLoadWarp) {
      if (threadIdx.x % 32 == 0) dflash::head::produce(pipe, &hidden_map, &weight_map, schedule, place);
    } else if (warp == kMultiplyWarp && place.pair.index == 0 && elect_one()) {
      TensorMemory<C> memory(barriers, &tmem);
      PipelineState<C> state;
      for (int tile = place.cluster; tile < schedule.tiles; tile += place.clusters) {
        multiply_tile(pipe, state, memory, schedule.k_tiles, place.pair);
        memory.advance();
      }
    }
    __syncwarp();
  }
  leave_together<C>(&tmem);
}

template <int kElementBytes>
bool launch(const HeadParams& p, const char* op, int num_sms, cudaStream_t stream) {
  CUtensorMap hidden_map, weight_map;
  if (!dflash::head::make_maps<kElementBytes>(&hidden_map, &weight_map, p)) return false;
  const Schedule schedule = dflash::head::make_schedule<kElementBytes>(p);
  const int blocks = dflash::head::num_blocks(schedule, num_sms);
  constexpr int kSharedBytes = HeadTiles<kElementBytes>::kSharedBytes;
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

}  // namespace dflash::sm100::head

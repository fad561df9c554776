// lm_head_argmax and verify_block_from_hidden for more than 128 rows on Blackwell: smxx/head/many_rows.cuh with
// tcgen05.
#include "sm100/gemm/mainloop.cuh"
#include "sm100/head/launch.h"
#include "smxx/head/many_rows.cuh"

namespace dflash::sm100::head {
namespace {

using dflash::head::HeadParams;
using dflash::head::kClusterSize;
using dflash::head::Schedule;
using dflash::head::TilePlace;

using Tiles = PairTiles<dflash::head::Tiles::BN>;

__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    argmax_kernel(const __grid_constant__ HeadParams p, const __grid_constant__ CUtensorMap hidden_map,
                  const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ Schedule schedule) {
  extern __shared__ unsigned char shared_bytes[];
  __shared__ uint64_t barriers[kBarriers<Tiles>];
  __shared__ uint32_t tmem;
  __shared__ bool last;
  const TilePlace place;
  const Pipeline<Tiles> pipe = make_pipeline<Tiles>(shared_bytes, barriers, &tmem);
  const int warp = static_cast<int>(threadIdx.x) / 32;

  if (warp < Tiles::kConsumers / 32) {
    take_registers<kManyRegisters>();
    TensorMemory<Tiles> memory(barriers, &tmem);
    for (int tile = place.cluster; tile < schedule.tiles; tile += place.clusters) {
      float acc[Tiles::BN / 2];
      take_tile(memory, warp, place.pair, acc);
      memory.advance();
      dflash::head::add_keys(p, acc, place.row0(schedule, tile) + first_row_of(warp), place.column0(schedule, tile));
    }
    dflash::head::finish_block(p, last);
  } else {
    give_back_registers<kFewRegisters>();
    if (warp == kLoadWarp) {
      if (threadIdx.x % 32 == 0) dflash::head::produce(pipe, &hidden_map, &weight_map, schedule, place);
    } else if (warp == kMultiplyWarp && place.pair.index == 0 && elect_one()) {
      TensorMemory<Tiles> memory(barriers, &tmem);
      PipelineState<Tiles> state;
      for (int tile = place.cluster; tile < schedule.tiles; tile += place.clusters) {
        multiply_tile(pipe, state, memory, schedule.k_tiles, place.pair);
        memory.advance();
      }
    }
    __syncwarp();
  }
  leave_together<Tiles>(&tmem);
}

}  // namespace

bool launch_argmax(const HeadParams& p, int num_sms, cudaStream_t stream) {
  CUtensorMap hidden_map, weight_map;
  if (!dflash::head::make_maps(&hidden_map, &weight_map, p)) return false;
  const Schedule schedule = dflash::head::make_schedule(p);
  const int blocks = dflash::head::num_blocks(schedule, num_sms);
  cuda_check(cudaFuncSetAttribute(argmax_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tiles::kSharedBytes),
             "lm_head_argmax");
  argmax_kernel<<<blocks, kThreads, Tiles::kSharedBytes, stream>>>(p, hidden_map, weight_map, schedule);
  cuda_check_launch("lm_head_argmax");
  return true;
}

}  // namespace dflash::sm100::head

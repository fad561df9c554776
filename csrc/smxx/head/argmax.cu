// lm_head_argmax, and verify_block_from_hidden which ends it with the accept rule; formulas in params.h.
//
// Few rows, and any number where there is no kernel for many (many_rows.cuh).
//
// Floors. N <= 128 rows: the weights once, V * H * 2 bytes, at the HBM read rate; hidden rows come from L2, N / 128 of
// the weights' traffic. More rows: 2 * N * V * H tensor-core flops. Nothing else of size moves: a matmul followed by an
// argmax also writes and reads 2 * N * V bytes of logits.
//
// Partition: grid x over row tiles, y over tiles of 128 vocabulary rows, so the blocks that share weights run together.
// Each block reduces its logits to one key a row (registers, then the 4 lanes of a row, then shared memory across
// warps) and adds it to the row's key in the workspace with a 64-bit atomicMax: a maximum of integers, so neither the
// order of the blocks nor the schedule can change the answer. The end: every block takes a ticket after its keys are
// visible (fence, barrier, then the add). The last one turns keys into outputs and leaves keys and counter at zero, so
// that the next launch, or a graph replay, needs no clearing.
#include "common/cuda_check.h"
#include "common/device.h"
#include "sm100/head/launch.h"
#include "sm90/head/launch.h"
#include "smxx/head/config.cuh"
#include "smxx/head/finish.cuh"
#include "smxx/head/launch.h"

namespace dflash::head {
namespace {

// More rows than these are bound by the tensor cores, and go to many_rows.cuh: measured for wgmma; for tcgen05 from
// what mma.sync gives beside it, and that is published only (bench/NOTES.md).
[[maybe_unused]] constexpr int64_t kWgmmaRows = 128, kTcgen05Rows = 32;

template <typename C>
__global__ void __launch_bounds__(C::kThreads, kBlocksPerSm) argmax_kernel(const __grid_constant__ HeadParams p) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ uint32_t best[C::BM];
  __shared__ bool last;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * C::BM;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * C::BN;
  for (int i = threadIdx.x; i < C::BM; i += C::kThreads) best[i] = 0;  // published by the mainloop's first barrier

  gemm::Accumulators<C> acc;
  gemm::compute_tile<C>(p.gemm, row0, column0, reinterpret_cast<__nv_bfloat16*>(shared_bytes), acc);

  const gemm::TilePosition<C> at;
#pragma unroll
  for (int i = 0; i < C::kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t key = 0;
#pragma unroll
      for (int j = 0; j < C::kTilesN; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) key = max(key, accumulator_key(p.gemm, acc, at, column0, i, half, j, e));
      }
      key = max(key, __shfl_xor_sync(0xffffffffu, key, 1));
      key = max(key, __shfl_xor_sync(0xffffffffu, key, 2));
      if (at.lane % 4 == 0) atomicMax(&best[at.row(i, half)], key);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < C::BM && row0 + i < p.gemm.m; i += C::kThreads) {
    atomicMax(p.workspace + 1 + row0 + i, static_cast<unsigned long long>(vocab_key(best[i], column0)));
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned long long blocks = static_cast<unsigned long long>(gridDim.x) * gridDim.y;
    last = atomicAdd(p.workspace, 1ull) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  if (last) finish_argmax(p, C::kThreads, [] { __syncthreads(); });
}

template <typename C>
void launch(const HeadParams& p, cudaStream_t stream) {
  cuda_check(cudaFuncSetAttribute(argmax_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
             "lm_head_argmax");
  const dim3 grid(static_cast<unsigned>((p.gemm.m + C::BM - 1) / C::BM), static_cast<unsigned>(num_tiles(p.gemm.n)));
  argmax_kernel<C><<<grid, C::kThreads, C::kSharedBytes, stream>>>(p);
  cuda_check_launch("lm_head_argmax");
}

}  // namespace

void launch_argmax(const HeadParams& p, cudaStream_t stream) {
  if (p.gemm.m == 0) return;
  if (p.gemm.m > kTcgen05Rows) {
    [[maybe_unused]] const Device device = current_device("lm_head_argmax");
#if DFLASH_WITH_SM90
    if (device.major == 9 && p.gemm.m > kWgmmaRows && sm90::head::launch_argmax(p, device.num_sms, stream)) return;
#endif
#if DFLASH_WITH_SM100
    if (device.major == 10 && sm100::head::launch_argmax(p, device.num_sms, stream)) return;
#endif
  }
  if (p.gemm.m <= 16) {
    launch<Rows16>(p, stream);
  } else if (p.gemm.m <= 32) {
    launch<Rows32>(p, stream);
  } else if (p.gemm.m <= 64) {
    launch<Rows64>(p, stream);
  } else {
    launch<Rows128>(p, stream);
  }
}

}  // namespace dflash::head

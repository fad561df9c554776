// tcgen05: tensor memory and the tensor cores of compute capability 10.x. kGroup: blocks that multiply together (1 or
// 2), alike for all instructions of a kernel. python_tests/emulator/sm100/gemm/ptx.cuh has the same functions in C++.
// An address in tensor memory is lane << 16 | column.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace dflash::sm100 {

// One lane of a warp that is all there: true for it. The lane that issues all that tcgen05_commit is to wait for.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, elected;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// -- tensor memory: 128 lanes of 512 columns of 32 bits -------------------------------------------------------------

// A whole warp: all 128 lanes of `columns` columns, a power of two and at least 32; waits until they are free. The
// address is stored in shared memory.
template <int kGroup>
__device__ __forceinline__ void tmem_allocate(uint32_t shared_place, uint32_t columns) {
  asm volatile("tcgen05.alloc.cta_group::%2.sync.aligned.shared::cta.b32 [%0], %1;\n" ::"r"(shared_place), "r"(columns),
               "n"(kGroup)
               : "memory");
}

// This block allocates no more.
template <int kGroup>
__device__ __forceinline__ void tmem_relinquish() {
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::%0.sync.aligned;\n" ::"n"(kGroup) : "memory");
}

// A whole warp, and before the block ends.
template <int kGroup>
__device__ __forceinline__ void tmem_free(uint32_t address, uint32_t columns) {
  asm volatile("tcgen05.dealloc.cta_group::%2.sync.aligned.b32 %0, %1;\n" ::"r"(address), "r"(columns), "n"(kGroup));
}

// A warp's 16 lanes from `address` on, 32 columns: lane l gets, for j = 0 .. 3, columns 8 j + 2 * (l % 4) + {0, 1} of
// lane l / 4 in d[4 j + {0, 1}] and the same of lane l / 4 + 8 in d[4 j + {2, 3}]. Warp w reaches lanes
// 32 * (w % 4) .. + 31 only. Not to be used before tmem_wait_loads() and pin_registers().
__device__ __forceinline__ void tmem_load_16x32(float* d, uint32_t address) {
  asm volatile(
      "tcgen05.ld.sync.aligned.16x256b.x4.b32 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, [%16];\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]), "=f"(d[7]), "=f"(d[8]),
        "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]), "=f"(d[13]), "=f"(d[14]), "=f"(d[15])
      : "r"(address));
}

__device__ __forceinline__ void tmem_wait_loads() { asm volatile("tcgen05.wait::ld.sync.aligned;\n" ::: "memory"); }

// What this thread's tcgen05 instructions did comes before what another thread's do: one calls the first and then
// signals, the other waits for the signal and then calls the second.
__device__ __forceinline__ void tcgen05_fence_before_signal() {
  asm volatile("tcgen05.fence::before_thread_sync;\n" ::: "memory");
}
__device__ __forceinline__ void tcgen05_fence_after_wait() {
  asm volatile("tcgen05.fence::after_thread_sync;\n" ::: "memory");
}

// -- products, by one thread; they are done in the order of issue ----------------------------------------------------

// d[M, N] in tensor memory = a * b^T, plus d if accumulate, by descriptors (descriptor.h); K is 32 bytes: 16 of bf16
// (elements of 2 bytes) or 32 of e4m3 (of 1). Two blocks, the first of which issues it: each has M / 2 rows of a and d
// and N / 2 rows of b, at the same addresses.
template <int kElementBytes, int kGroup>
__device__ __forceinline__ void multiply(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, bool accumulate) {
#define DFLASH_MMA(kind)                                                                    \
  asm volatile(                                                                             \
      "{\n"                                                                                 \
      ".reg .pred accumulate;\n"                                                            \
      "setp.ne.b32 accumulate, %4, 0;\n"                                                    \
      "tcgen05.mma.cta_group::%5.kind::" kind                                               \
      " [%0], %1, %2, %3, accumulate;\n"                                                    \
      "}\n" ::"r"(d),                                                                       \
      "l"(a), "l"(b), "r"(instruction), "r"(static_cast<uint32_t>(accumulate)), "n"(kGroup) \
      : "memory")
  static_assert(kElementBytes == 2 || kElementBytes == 1, "bf16 or e4m3");
  if constexpr (kElementBytes == 2) {
    DFLASH_MMA("f16");
  } else {
    DFLASH_MMA("f8f6f4");
  }
#undef DFLASH_MMA
}

// A block of scales (512 bytes, by scale_descriptor) from shared memory to four columns of tensor memory, once for each
// 32 lanes: row r's four scales become the word in column r / 32 of lanes r % 32 + 0, 32, 64, 96. Two blocks: in both,
// each from its own shared memory. Products that this thread issues afterwards see it.
template <int kGroup>
__device__ __forceinline__ void tmem_copy_scales(uint32_t address, uint64_t block) {
  asm volatile("tcgen05.cp.cta_group::%2.32x128b.warpx4 [%0], %1;\n" ::"r"(address), "l"(block), "n"(kGroup)
               : "memory");
}

// As multiply, for nvfp4 (.block16, the same as .scale_vec::4X, is the spelling that sm_100f has): K is 32 bytes, 64
// codes of e2m1, and each 16 of a row have an e4m3 scale in tensor memory. Of two blocks each has the scales of its
// rows of a and of all rows of b.
template <int kGroup>
__device__ __forceinline__ void multiply_nvfp4(uint32_t d, uint64_t a, uint64_t b, uint32_t a_scales, uint32_t b_scales,
                                               uint32_t instruction, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %6, 0;\n"
      "tcgen05.mma.cta_group::%7.kind::mxf4nvf4.block_scale.block16 [%0], %1, %2, %3, [%4], [%5], accumulate;\n"
      "}\n" ::"r"(d),
      "l"(a), "l"(b), "r"(instruction), "r"(a_scales), "r"(b_scales), "r"(static_cast<uint32_t>(accumulate)),
      "n"(kGroup)
      : "memory");
}

// One arrival at the barrier at this place in each block of `mask` when all that this thread has issued is done; its
// operands have been read by then. Takes the place of tcgen05_fence_before_signal.
__device__ __forceinline__ void tcgen05_commit_pair(uint32_t barrier, uint16_t mask) {
  asm volatile(
      "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], %1;\n" ::"r"(
          barrier),
      "h"(mask)
      : "memory");
}

// The same for a block by itself, at its own barrier.
__device__ __forceinline__ void tcgen05_commit(uint32_t barrier) {
  asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];\n" ::"r"(barrier)
               : "memory");
}

// -- two blocks that multiply together: loads of both count towards a barrier of the first ---------------------------

// A box to this block's shared memory, its bytes to the barrier at that place of block `rank` of the cluster, one of
// the pair.
__device__ __forceinline__ void tma_load_pair(uint32_t destination, const CUtensorMap* map, int column, int row,
                                              uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "cp.async.bulk.tensor.2d.cta_group::2.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [remote];\n"
      "}\n" ::"r"(destination),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "r"(rank)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect_at(uint32_t barrier, uint32_t rank, uint32_t bytes) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [remote], %2;\n"
      "}\n" ::"r"(barrier),
      "r"(rank), "r"(bytes)
      : "memory");
}

}  // namespace dflash::sm100

// PTX building blocks of the Hopper GEMMs: mbarriers, TMA loads with multicast, clusters, wgmma.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace dflash::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// -- mbarriers in shared memory -----------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the other blocks of the cluster and to TMA; a cluster barrier must follow.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// What this thread wrote to shared memory by ordinary stores or cp.async that it has waited for, before wgmma reads it:
// then a barrier must follow.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Arrives at the same barrier of block `rank` of the cluster (this one included). Orders no writes beyond this block:
// for consumers, whose reads are over and who wrote nothing; a release for the cluster would cost a full fence each
// time.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Waits for the end of the phase of that parity. A fresh barrier counts as having ended a phase of parity 1.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// -- clusters --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// -- TMA: a box of a 2-d tensor to shared memory; signals its bytes to `barrier` --------------------------------------

__device__ __forceinline__ void tma_load(uint32_t destination, const CUtensorMap* map, int column, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(
          destination),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// To the same place in all blocks of `mask`, signalling the barrier at the same place in each.
__device__ __forceinline__ void tma_load_multicast(uint32_t destination, const CUtensorMap* map, int column, int row,
                                                   uint32_t barrier, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(destination),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask)
      : "memory");
}

// The box into L2 alone.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];\n" ::"l"(map), "r"(column), "r"(row)
               : "memory");
}

// -- registers of a warpgroup; all its warps call it. Multiples of 8 ---------------------------------------

template <int kRegisters>
__device__ __forceinline__ void give_back_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// -- wgmma -----------------------------------------------------------------------------------------------------------

// Descriptor of a K-major operand in shared memory whose rows are 128 bytes (64 bf16), swizzled by 128 bytes: groups of
// 8 rows are 1024 bytes, and 1024 bytes apart. Address 1024-aligned plus the offset along K. 16 columns further: + 2.
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t kFixed = (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16);
  return kFixed | ((address & 0x3ffffu) >> 4);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// The accumulators are written behind the compiler's back until the wait: no use of them may move across this.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d[64, N] = a[64, 16] * b[N, 16]^T, plus d if accumulate, N = 2 * size of d. Lane l of warp w of the warpgroup holds,
// for j = 0..N / 8 - 1, d[16 w + l / 4][8 j + 2 * (l % 4) + {0, 1}] in d[4 j + {0, 1}] and the same of row + 8 in
// d[4 j + {2, 3}].
#define DFLASH_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DFLASH_F16(i) DFLASH_F4(i), DFLASH_F4(i + 4), DFLASH_F4(i + 8), DFLASH_F4(i + 12)
#define DFLASH_R64                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, " \
  "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, " \
  "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, " \
  "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DFLASH_R80 DFLASH_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define DFLASH_R96 DFLASH_R80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define DFLASH_R128                                                                                                  \
  DFLASH_R96                                                                                                         \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define DFLASH_F64 DFLASH_F16(0), DFLASH_F16(16), DFLASH_F16(32), DFLASH_F16(48)
// a, b and accumulate are the operands after the registers.
#define DFLASH_WGMMA(n, registers, a_operand, b_operand, accumulate_operand)                           \
  "{\n"                                                                                                \
  ".reg .pred accumulate;\n"                                                                           \
  "setp.ne.b32 accumulate, " accumulate_operand                                                        \
  ", 0;\n"                                                                                             \
  "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" registers "}, " a_operand ", " b_operand \
  ", accumulate, 1, 1, 0, 0;\n"                                                                        \
  "}\n"
#define DFLASH_INPUTS "l"(a), "l"(b), "r"(static_cast<int>(accumulate))

__device__ __forceinline__ void wgmma_k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(DFLASH_WGMMA("128", DFLASH_R64, "%64", "%65", "%66") : DFLASH_F64 : DFLASH_INPUTS);
}
__device__ __forceinline__ void wgmma_k16(float (&d)[80], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(DFLASH_WGMMA("160", DFLASH_R80, "%80", "%81", "%82") : DFLASH_F64, DFLASH_F16(64) : DFLASH_INPUTS);
}
__device__ __forceinline__ void wgmma_k16(float (&d)[96], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(DFLASH_WGMMA("192", DFLASH_R96, "%96", "%97", "%98")
               : DFLASH_F64, DFLASH_F16(64), DFLASH_F16(80)
               : DFLASH_INPUTS);
}
__device__ __forceinline__ void wgmma_k16(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(DFLASH_WGMMA("256", DFLASH_R128, "%128", "%129", "%130")
               : DFLASH_F64, DFLASH_F16(64), DFLASH_F16(80), DFLASH_F16(96), DFLASH_F16(112)
               : DFLASH_INPUTS);
}
#undef DFLASH_INPUTS
#undef DFLASH_WGMMA
#undef DFLASH_F64
#undef DFLASH_R128
#undef DFLASH_R96
#undef DFLASH_R80
#undef DFLASH_R64
#undef DFLASH_F16
#undef DFLASH_F4

}  // namespace dflash::sm90

// wgmma. python_tests/emulator/sm90/gemm/ptx.cuh has the same functions in C++.
#pragma once

#include <cstdint>

namespace dflash::sm90 {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// d[64, N] = a[64, K] * b[N, K]^T, plus d if accumulate, N = 2 * size of d; K is 32 bytes: 16 of bf16 (elements of 2
// bytes) or 32 of e4m3 (of 1). Lane l of warp w of the warpgroup holds, for j = 0..N / 8 - 1,
// d[16 w + l / 4][8 j + 2 * (l % 4) + {0, 1}] in d[4 j + {0, 1}] and the same of row + 8 in d[4 j + {2, 3}].
// e4m3: the tensor cores of Hopper keep about 14 bits of the sum from one instruction to the next (observed, and not in
// the PTX ISA).
#define DFLASH_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DFLASH_F16(i) DFLASH_F4(i), DFLASH_F4(i + 4), DFLASH_F4(i + 8), DFLASH_F4(i + 12)
#define DFLASH_R32                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, " \
  "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, " \
  "%28, %29, %30, %31"
#define DFLASH_R48 DFLASH_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
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
// a, b and accumulate are the operands after the registers; of bf16, two more immediates: K-major both.
#define DFLASH_WGMMA_TEXT(shape, registers, a, b, accumulate, immediates)                                 \
  "{\n"                                                                                                   \
  ".reg .pred accumulate;\n"                                                                              \
  "setp.ne.b32 accumulate, " accumulate                                                                   \
  ", 0;\n"                                                                                                \
  "wgmma.mma_async.sync.aligned.m64n" shape " {" registers "}, " a ", " b ", accumulate, 1, 1" immediates \
  ";\n"                                                                                                   \
  "}\n"
#define DFLASH_INPUTS "l"(a), "l"(b), "r"(static_cast<int>(accumulate))
#define DFLASH_WGMMA(size, n, registers, a_operand, b_operand, accumulate_operand, ...)                              \
  template <int kElementBytes>                                                                                       \
  __device__ __forceinline__ void wgmma(float (&d)[size], uint64_t a, uint64_t b, bool accumulate) {                 \
    static_assert(kElementBytes == 2 || kElementBytes == 1, "bf16 or e4m3");                                         \
    if constexpr (kElementBytes == 2) {                                                                              \
      asm volatile(                                                                                                  \
          DFLASH_WGMMA_TEXT(n "k16.f32.bf16.bf16", registers, a_operand, b_operand, accumulate_operand, ", 0, 0")    \
          : __VA_ARGS__                                                                                              \
          : DFLASH_INPUTS);                                                                                          \
    } else {                                                                                                         \
      asm volatile(DFLASH_WGMMA_TEXT(n "k32.f32.e4m3.e4m3", registers, a_operand, b_operand, accumulate_operand, "") \
                   : __VA_ARGS__                                                                                     \
                   : DFLASH_INPUTS);                                                                                 \
    }                                                                                                                \
  }

DFLASH_WGMMA(32, "64", DFLASH_R32, "%32", "%33", "%34", DFLASH_F16(0), DFLASH_F16(16))
DFLASH_WGMMA(48, "96", DFLASH_R48, "%48", "%49", "%50", DFLASH_F16(0), DFLASH_F16(16), DFLASH_F16(32))
DFLASH_WGMMA(64, "128", DFLASH_R64, "%64", "%65", "%66", DFLASH_F64)
DFLASH_WGMMA(80, "160", DFLASH_R80, "%80", "%81", "%82", DFLASH_F64, DFLASH_F16(64))
DFLASH_WGMMA(96, "192", DFLASH_R96, "%96", "%97", "%98", DFLASH_F64, DFLASH_F16(64), DFLASH_F16(80))
DFLASH_WGMMA(128, "256", DFLASH_R128, "%128", "%129", "%130", DFLASH_F64, DFLASH_F16(64), DFLASH_F16(80),
             DFLASH_F16(96), DFLASH_F16(112))
#undef DFLASH_WGMMA
#undef DFLASH_INPUTS
#undef DFLASH_WGMMA_TEXT
#undef DFLASH_F64
#undef DFLASH_R128
#undef DFLASH_R96
#undef DFLASH_R80
#undef DFLASH_R64
#undef DFLASH_R48
#undef DFLASH_R32
#undef DFLASH_F16
#undef DFLASH_F4

}  // namespace dflash::sm90

// When what happened in the greedy kernels, warp by warp; nothing unless compiled with -DDFLASH_TRACE.
// bench/trace_verify.py says how, runs one call and prints it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/ptx.cuh"

namespace dflash::verify {

enum class Event : int { kStart = 1, kReduced, kAsked, kReported, kRow, kRequest, kEnd };

#ifdef DFLASH_TRACE
constexpr int kTracedBlocks = 160, kTracedWarps = 16, kStamps = 256;

struct Stamp {
  unsigned long long time;  // ns
  int event;                // Event; 0: none
  int row;                  // in the order of the kernel
};
__device__ Stamp trace_stamps[kTracedBlocks][kTracedWarps][kStamps];

class Trace {
 public:
  __device__ __forceinline__ void mark(Event event, int row = -1) {
    const unsigned warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0 && next_ < kStamps && blockIdx.x < kTracedBlocks) {
      trace_stamps[blockIdx.x][warp][next_++] = Stamp{global_timer(), static_cast<int>(event), row};
    }
  }

 private:
  int next_ = 0;
};
#else
struct Trace {
  __device__ __forceinline__ void mark(Event, int = -1) {}
};
#endif

}  // namespace dflash::verify

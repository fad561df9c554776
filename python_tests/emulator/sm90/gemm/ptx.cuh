// The functions of csrc/sm90/gemm/ptx.cuh in C++.
#pragma once

#include "tensor_cores.h"

namespace dflash::sm90 {

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}
template <int kElementBytes, int kCount>
void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  emulator::wgmma(kElementBytes, d, 2 * kCount, a, b, accumulate);
}

}  // namespace dflash::sm90

// The functions of csrc/sm100/gemm/ptx.cuh in C++.
#pragma once

#include "tensor_cores.h"

namespace dflash::sm100 {

inline bool elect_one() { return emulator::elect_one(); }

inline void tmem_allocate(uint32_t shared_place, uint32_t columns) { emulator::tmem_allocate(shared_place, columns); }
inline void tmem_relinquish() { emulator::tmem_relinquish(); }
inline void tmem_free(uint32_t address, uint32_t columns) { emulator::tmem_free(address, columns); }
inline void tmem_load_16x32(float* d, uint32_t address) { emulator::tmem_load_16x256b(d, address, 4); }
inline void tmem_wait_loads() { emulator::tmem_wait_loads(); }

inline void tcgen05_fence_before_signal() { emulator::tensor_state().read = false; }
inline void tcgen05_fence_after_wait() { emulator::tensor_state().waited = false; }

inline void multiply_bf16(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, bool accumulate) {
  emulator::multiply_f16(d, a, b, instruction, accumulate);
}
inline void tcgen05_commit(uint32_t barrier, uint16_t mask) { emulator::commit(barrier, mask); }
inline void tcgen05_commit(uint32_t barrier) { emulator::commit(barrier, 0); }

}  // namespace dflash::sm100

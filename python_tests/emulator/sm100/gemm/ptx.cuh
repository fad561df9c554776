// The functions of csrc/sm100/gemm/ptx.cuh in C++.
#pragma once

#include "emulator.h"
#include "tensor_cores.h"

namespace dflash::sm100 {

inline bool elect_one() { return emulator::elect_one(); }

template <int kGroup>
void tmem_allocate(uint32_t shared_place, uint32_t columns) {
  emulator::tmem_allocate(kGroup, shared_place, columns);
}
template <int kGroup>
void tmem_relinquish() {
  emulator::tmem_relinquish(kGroup);
}
template <int kGroup>
void tmem_free(uint32_t address, uint32_t columns) {
  emulator::tmem_free(kGroup, address, columns);
}
inline void tmem_load_16x32(float* d, uint32_t address) { emulator::tmem_load_16x256b(d, address, 4); }
inline void tmem_wait_loads() { emulator::tmem_wait_loads(); }

inline void tcgen05_fence_before_signal() { emulator::tensor_state().read = false; }
inline void tcgen05_fence_after_wait() { emulator::tensor_state().waited = false; }

template <int kElementBytes, int kGroup>
void multiply(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, bool accumulate) {
  emulator::multiply(kElementBytes, kGroup, d, a, b, instruction, accumulate);
}
template <int kGroup>
void tmem_copy_scales(uint32_t address, uint64_t block) {
  emulator::tmem_copy_32x128b(kGroup, address, block);
}
template <int kGroup>
void multiply_nvfp4(uint32_t d, uint64_t a, uint64_t b, uint32_t a_scales, uint32_t b_scales, uint32_t instruction,
                    bool accumulate) {
  emulator::multiply_nvfp4(kGroup, d, a, b, a_scales, b_scales, instruction, accumulate);
}
inline void tcgen05_commit_pair(uint32_t barrier, uint16_t mask) { emulator::commit(2, barrier, mask); }
inline void tcgen05_commit(uint32_t barrier) { emulator::commit(1, barrier, 0); }

inline void tma_load_pair(uint32_t destination, const CUtensorMap* map, int column, int row, uint32_t barrier,
                          uint32_t rank) {
  emulator::copy_box_of_pair(destination, map, column, row, barrier, rank);
}
inline void barrier_arrive_expect_at(uint32_t barrier, uint32_t rank, uint32_t bytes) {
  emulator::mbarrier_arrive(reinterpret_cast<uint64_t*>(emulator::shared_place(barrier, rank)), bytes);
}

}  // namespace dflash::sm100

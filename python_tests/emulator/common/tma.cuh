// The functions of csrc/common/tma.cuh in C++.
#pragma once

#include <cuda_runtime.h>

#include "tensor_cores.h"

namespace dflash {

inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

inline uint64_t* emulated_barrier(uint32_t address, unsigned rank) {
  return reinterpret_cast<uint64_t*>(emulator::shared_place(address, rank));
}
inline uint64_t* emulated_barrier(uint32_t address) { return emulated_barrier(address, emulator::cluster_rank()); }

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  emulator::mbarrier_init(emulated_barrier(barrier), arrivals);
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) { emulator::mbarrier_arrive(emulated_barrier(barrier), 0); }
inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  emulator::mbarrier_arrive(emulated_barrier(barrier), bytes);
}
inline void async_proxy_fence() {}
constexpr int kRankBit = 24;  // of the addresses that barrier_at makes
inline uint32_t barrier_at(uint32_t barrier, uint32_t rank) { return barrier | rank << kRankBit; }
inline void barrier_arrive_at(uint32_t remote) {
  emulator::mbarrier_arrive(emulated_barrier(remote & ((1u << kRankBit) - 1), remote >> kRankBit), 0);
}
inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) { barrier_arrive_at(barrier_at(barrier, rank)); }
inline bool barrier_passed(uint32_t barrier, uint32_t parity) {
  return emulator::mbarrier_passed(emulated_barrier(barrier), parity);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulator::mbarrier_wait(emulated_barrier(barrier), parity);
}

inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_sync() {
  emulator::cluster_arrive();
  emulator::cluster_wait();
}

inline void tma_load(uint32_t destination, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  emulator::copy_box(destination, map, column, row, barrier, 0);
}
inline void tma_load_multicast(uint32_t destination, const CUtensorMap* map, int column, int row, uint32_t barrier,
                               uint16_t mask) {
  emulator::copy_box(destination, map, column, row, barrier, mask);
}
inline void tma_prefetch(const CUtensorMap*, int, int) {}

template <int kRegisters>
void give_back_registers() {}
template <int kRegisters>
void take_registers() {}

}  // namespace dflash

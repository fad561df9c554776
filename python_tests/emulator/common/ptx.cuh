// The functions of csrc/common/ptx.cuh in C++.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "common/half_bits.h"

namespace dflash {

inline int opaque(int x) { return x; }
template <int kCount>
void pin_registers(float (&)[kCount]) {}
inline uint32_t same_in_warp(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }
inline unsigned long long global_timer() {
  static thread_local unsigned long long reads = 0;
  return ++reads;
}
inline void pause(unsigned) { emulator::spin(); }
inline uint32_t e4m3_pair(float first, float second) {
  return float_to_e4m3(first) | static_cast<uint32_t>(float_to_e4m3(second)) << 8;
}
inline unsigned char* dynamic_shared() { return emulator::dynamic_shared(); }

inline void copy_async_16(void* shared, const void* global, int bytes) { emulator::copy_async(shared, global, bytes); }
inline void copy_async_commit() { emulator::commit_copies(); }
template <int kPending>
void copy_async_wait() {
  emulator::wait_for_copies(kPending);
}

inline unsigned long long atomic_add_release(unsigned long long* counter, unsigned long long value) {
  return atomicAdd(counter, value);
}
inline uint32_t load_relaxed(const uint32_t* place) { return __ldg(place); }
inline unsigned long long load_relaxed(const unsigned long long* place) {
  emulator::spin();
  return __ldg(place);
}
inline void fence_device() {}

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { emulator::mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { emulator::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { emulator::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emulator::mbarrier_wait(barrier, parity); }
inline uint4 load_once(const uint4* from, uint64_t) { return *from; }
inline uint64_t evict_first_policy() { return 0; }
inline void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, uint64_t) {
  emulator::copy_bulk(shared, global, bytes, barrier);
}

// The copies land here at the latest: nothing else waits for them.
inline void copy_async_arrive(uint64_t* barrier) {
  emulator::commit_copies();
  emulator::wait_for_copies(0);
  emulator::mbarrier_arrive(barrier, 0);
}

inline void prefetch_l1(const void*) {}
inline void prefetch_l2(const void*) {}
inline float exp2_approx(float x) { return std::exp2(x); }

inline void named_barrier(int id, int threads) { emulator::named_barrier(id, static_cast<unsigned>(threads)); }

// A load that is repeated until another block has written lets that block run.
inline uint32_t load_acquire(const uint32_t* counter) {
  emulator::spin();
  return __ldg(counter);
}
inline uint32_t load_acquire_shared(const uint32_t* word) {
  emulator::spin();
  return *word;
}
inline void store_release_shared(uint32_t* word, uint32_t value) { *word = value; }
inline uint32_t load_relaxed_shared(const uint32_t* word) { return *word; }
inline void store_relaxed_shared(uint32_t* word, uint32_t value) { *word = value; }
inline uint4 load_relaxed(const uint4* from) {
  emulator::spin();
  return *from;
}
inline uint2 load_relaxed(const uint2* from) {
  emulator::spin();
  return *from;
}
inline void store_relaxed(uint32_t* to, uint32_t value) { *to = value; }
inline void store_relaxed(uint4* to, const uint4& v) { *to = v; }
inline uint4 load_relaxed_system(const uint4* from) {
  emulator::spin_outside();
  return *from;
}
inline uint2 load_relaxed_system(const uint2* from) {
  emulator::spin_outside();
  return *from;
}
inline void store_relaxed_system(uint4* to, const uint4& v) { *to = v; }
inline void store_relaxed_system(uint2* to, const uint2& v) { *to = v; }
inline void trap() { emulator::fail("a trap"); }
inline void store_relaxed(uint2* to, const uint2& v) { *to = v; }
inline void add_release(uint32_t* counter, uint32_t value) { atomicAdd(counter, value); }
inline uint32_t add_acquire_release(uint32_t* counter, uint32_t value) { return atomicAdd(counter, value); }

// Lane l gets row l / 4, columns 2 * (l % 4) + {0, 1} of each matrix, or of its transpose.
inline void load_matrices(uint32_t (&r)[4], const void* shared, bool transposed) {
  const auto address = reinterpret_cast<uint64_t>(shared);
  if (address % 16 != 0) emulator::fail("a matrix row that is not a multiple of 16 bytes from zero");
  const auto* rows = emulator::exchange(emulator::Collective::kLoadMatrix, &address, 1);
  const unsigned lane = emulator::lane();
  const auto element = [&](int matrix, unsigned row, unsigned column) -> uint32_t {
    return reinterpret_cast<const uint16_t*>(rows[8 * matrix + row][0])[column];
  };
  for (int i = 0; i < 4; ++i) {
    const unsigned major = lane / 4, minor = 2 * (lane % 4);
    r[i] = transposed ? element(i, minor, major) | element(i, minor + 1, major) << 16
                      : element(i, major, minor) | element(i, major, minor + 1) << 16;
  }
  emulator::exchange(emulator::Collective::kLoadMatrix, nullptr, 0);  // all have read
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* shared) { load_matrices(r, shared, false); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared) { load_matrices(r, shared, true); }

inline float bf16_half(uint64_t pair, int half) {
  return __uint_as_float(static_cast<uint32_t>(pair >> (16 * half)) << 16);
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::count_product(emulator::Product::kMma);
  const uint64_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto* lanes = emulator::exchange(emulator::Collective::kMultiply, words, 6);
  const unsigned lane = emulator::lane();
  for (int e = 0; e < 4; ++e) {
    const unsigned row = lane / 4, column = 2 * (lane % 4) + e % 2;  // of the 8 x 8 quarter
    float sum = d[e];
    for (int k = 0; k < 16; ++k) {
      const uint64_t x = lanes[4 * row + k % 8 / 2][e / 2 + 2 * (k / 8)];
      const uint64_t y = lanes[4 * column + k % 8 / 2][4 + k / 8];
      sum += bf16_half(x, k % 2) * bf16_half(y, k % 2);
    }
    d[e] = sum;
  }
}

inline float max_nan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  const auto half = [&](int i) { return __float_as_uint(max_nan(bf16_half(a, i), bf16_half(b, i))) >> 16; };
  return half(0) | half(1) << 16;
}
inline uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  const auto value = [](uint32_t pair, int i) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> (16 * i))));
  };
  const auto half = [&](int i) -> uint32_t {
    return __half_as_ushort(__float2half_rn(max_nan(value(a, i), value(b, i))));
  };
  return half(0) | half(1) << 16;
}

inline unsigned long long atomic_add_acq_rel(unsigned long long* place, unsigned long long value) {
  return atomicAdd(place, value);
}
inline unsigned long long atomic_or_acq_rel(unsigned long long* place, unsigned long long value) {
  return emulated_atomic(place, [=](unsigned long long old) { return old | value; });
}

inline void cluster_arrive_relaxed() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
template <typename T>
T load_remote(const T* local, int rank) {
  return *reinterpret_cast<const T*>(emulator::remote_shared(local, static_cast<unsigned>(rank)));
}
inline void store_remote(const uint32_t* local, int rank, uint32_t value) {
  *reinterpret_cast<uint32_t*>(emulator::remote_shared(local, static_cast<unsigned>(rank))) = value;
}

// Kernels run one after another.
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

}  // namespace dflash

// Instructions that CUDA C++ has no name for, one function each. No kernel of csrc/smxx holds inline PTX of its own:
// python_tests/emulator/common/ptx.cuh has the same functions in C++, with which the kernels run on a CPU.
#pragma once

#include <cstdint>

namespace dflash {

// ---- registers ---------------------------------------------------------------------------------------------------

// x, of which the compiler knows nothing: what is computed from it is not moved out of loops, where it would be held in
// registers from one use to the next.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// What an instruction under way writes behind the compiler's back, until it is waited for: no use may move across this.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// A value that all lanes of the warp have: the compiler is told so, keeps it and can use uniform registers for what
// depends on it.
__device__ __forceinline__ uint32_t same_in_warp(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

// ---- shared memory -----------------------------------------------------------------------------------------------

// The launch's dynamic shared memory.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}

// Nanoseconds, the same clock on all SMs.
__device__ __forceinline__ unsigned long long global_timer() {
  unsigned long long time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time)::"memory");
  return time;
}

__device__ __forceinline__ void pause(unsigned ns) { __nanosleep(ns); }

// e4m3 of two floats, the first in the low byte: to the nearest, ties to even; beyond +-448 saturates.
__device__ __forceinline__ uint32_t e4m3_pair(float first, float second) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
}

// ---- asynchronous copies ---------------------------------------------------------------------------------------

// global -> shared, 16 bytes, bypassing L1. bytes = 0 reads nothing and writes zeros.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kPending of this thread's most recent groups are still under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// ---- order between CTAs ------------------------------------------------------------------------------------------

// Adds to a counter and returns what it held; this thread's earlier writes and atomics are seen by whoever sees the new
// count and then calls fence_device().
__device__ __forceinline__ unsigned long long atomic_add_release(unsigned long long* counter,
                                                                 unsigned long long value) {
  unsigned long long old;
  asm volatile("atom.release.gpu.global.add.u64 %0, [%1], %2;" : "=l"(old) : "l"(counter), "l"(value) : "memory");
  return old;
}

// What other CTAs write: never from L1; in no order with anything else.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* place) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(place) : "memory");
  return value;
}

__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* place) {
  unsigned long long value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(place) : "memory");
  return value;
}

// Acquire and release; __threadfence() would be sequentially consistent, which nobody here needs.
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Brings what a later load through the L1 will read into it.
__device__ __forceinline__ void prefetch_l1(const void* global) {
  asm volatile("prefetch.global.L1 [%0];\n" ::"l"(global));
}

__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global));
}

// 2^x; subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// ---- mbarriers and bulk copies ------------------------------------------------------------------------------------
// An mbarrier is 8 bytes of shared memory. Its phases alternate in parity; a fresh one counts as having just ended a
// phase of parity 1.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
      "r"(arrivals)
      : "memory");
}

// Makes initialised barriers visible to bulk copies; a barrier of the block must follow.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile(
      "mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier)))
      : "memory");
}

// Arrives, and makes the phase wait for `bytes` of bulk copies too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
               "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of that parity.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))),
      "r"(parity)
      : "memory");
}

// 16 bytes that nothing writes during the launch, past L1, in order among the accesses of the thread's program.
__device__ __forceinline__ uint4 load_once(const uint4* from, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from), "l"(policy)
               : "memory");
  return v;
}

// L2 policy of data that is read once.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}

// global -> shared by one thread; addresses and `bytes` multiples of 16. The bytes count towards `barrier`.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;\n" ::
          "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(bytes), "r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier))), "l"(policy)
      : "memory");
}

// One arrival of this thread at `barrier` when all copy_async_16 that it started before have landed. It has to be among
// the arrivals that the barrier was made for.
__device__ __forceinline__ void copy_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(barrier)))
               : "memory");
}

// ---- parts of a block, blocks of a grid -------------------------------------------------------------------------

// Barrier `id` (1..15; 0 is __syncthreads) of `threads` threads, whole warps.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Counters between blocks: what the releasing thread (and, after a barrier, its block) wrote before is seen after an
// acquiring load of the new value.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

__device__ __forceinline__ void add_release(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;\n" ::"l"(counter), "r"(value) : "memory");
}

// The same between warps of a block, through a word of shared memory.
__device__ __forceinline__ uint32_t load_acquire_shared(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];\n"
               : "=r"(value)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(word)))
               : "memory");
  return value;
}

__device__ __forceinline__ void store_release_shared(uint32_t* word, uint32_t value) {
  asm volatile(
      "st.release.cta.shared::cta.u32 [%0], %1;\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(word))),
      "r"(value)
      : "memory");
}

// The same words in no order with anything else.
__device__ __forceinline__ uint32_t load_relaxed_shared(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.cta.shared::cta.u32 %0, [%1];\n"
               : "=r"(value)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(word)))
               : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed_shared(uint32_t* word, uint32_t value) {
  asm volatile(
      "st.relaxed.cta.shared::cta.u32 [%0], %1;\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(word))),
      "r"(value)
      : "memory");
}

// Words that another block writes while this one looks: each of the four is whole, and nothing else is said about other
// memory, so no fence is waited for.
__device__ __forceinline__ uint4 load_relaxed(const uint4* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_relaxed(const uint2* from) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed(uint32_t* to, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;\n" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed(uint4* to, const uint4& v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// The same between GPUs: places in the memory of a peer, and in this one's that a peer writes.
__device__ __forceinline__ uint4 load_relaxed_system(const uint4* from) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_relaxed_system(const uint2* from) {
  uint2 v;
  asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];\n" : "=r"(v.x), "=r"(v.y) : "l"(from) : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed_system(uint4* to, const uint4& v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_relaxed_system(uint2* to, const uint2& v) {
  asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1, %2};\n" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}

// Ends the launch, and the use of this GPU by the process, with an error.
__device__ __forceinline__ void trap() { asm volatile("trap;\n" ::: "memory"); }

__device__ __forceinline__ void store_relaxed(uint2* to, const uint2& v) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};\n" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}

// Returns the value before.
__device__ __forceinline__ uint32_t add_acquire_release(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;\n" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

// ---- tensor cores ----------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane 8 * i + r gives the address of row r of matrix i (16-byte aligned).
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* shared) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed on its way: lane l gets column l / 4, rows 2 * (l % 4) + {0, 1}.
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d[16, 8] += a[16, 16] * b[16, 8] in bf16; a row-major, b column-major (so b comes straight from W [N, K]).
// Lane l holds d[l / 4][2 * (l % 4) + {0, 1}] in d[0..1] and the same of row l / 4 + 8 in d[2..3].
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- maxima ----------------------------------------------------------------------------------------------------

// The larger of two, NaN if either is; of a pair of 16-bit floats, each half by itself.
__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

__device__ __forceinline__ uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// ---- atomics that publish and see
// ------------------------------------------------------------------------------------

// What this thread, and those it met at a barrier, wrote before is visible to whoever sees the new value in the same
// way.
__device__ __forceinline__ unsigned long long atomic_add_acq_rel(unsigned long long* place, unsigned long long value) {
  unsigned long long old;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;" : "=l"(old) : "l"(place), "l"(value) : "memory");
  return old;
}

__device__ __forceinline__ unsigned long long atomic_or_acq_rel(unsigned long long* place, unsigned long long value) {
  unsigned long long old;
  asm volatile("atom.acq_rel.gpu.global.or.b64 %0, [%1], %2;" : "=l"(old) : "l"(place), "l"(value) : "memory");
  return old;
}

// ---- clusters --------------------------------------------------------------------------------------------------

// The cluster's barrier in two halves. Arriving is relaxed: it publishes no writes of this CTA.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Another CTA's copy of a variable in shared memory. Volatile: not to be kept in registers across barriers.
__device__ __forceinline__ uint32_t remote_address(const void* local, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(local))), "r"(rank));
  return address;
}

__device__ __forceinline__ uint32_t load_remote(const uint32_t* local, int rank) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(remote_address(local, rank)) : "memory");
  return value;
}

__device__ __forceinline__ uint64_t load_remote(const uint64_t* local, int rank) {
  uint64_t value;
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(remote_address(local, rank)) : "memory");
  return value;
}

__device__ __forceinline__ void store_remote(const uint32_t* local, int rank, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote_address(local, rank)), "r"(value) : "memory");
}

// ---- programmatic dependent launch: rules in common/dependent_launch.cuh ------------------------------------------

// Returns at once in a kernel that was launched without the attribute.
__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;\n" ::: "memory"); }

// Lets the next kernel's blocks start once every block of this one has called it or ended.
__device__ __forceinline__ void grid_dependency_launch() { asm volatile("griddepcontrol.launch_dependents;\n" :::); }

}  // namespace dflash

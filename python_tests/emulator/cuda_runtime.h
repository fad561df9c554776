// Stands in for the toolkit's cuda_runtime.h: what nvcc knows by itself, in C++ on top of emulator.h. Types, and the
// arithmetic of cuda_bf16.h and cuda_fp16.h, are the toolkit's.
#pragma once

#include <cuda_runtime_api.h>
// Before any kernel, so that these see the toolkit's own macros.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#undef __global__
#undef __device__
#undef __launch_bounds__
#undef __cluster_dims__
#undef __grid_constant__
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __cluster_dims__(...)  // build.py hands it to the launch
#define __grid_constant__

#define EMULATOR_TLS __attribute__((tls_model("initial-exec")))  // a device for each host thread
extern __thread EMULATOR_TLS uint3 threadIdx, blockIdx;
extern __thread EMULATOR_TLS dim3 blockDim, gridDim;

// ---- launching -----------------------------------------------------------------------------------------------------

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > 232448) return cudaErrorInvalidValue;
  dflash::emulator::allow_shared_bytes(reinterpret_cast<const void*>(kernel), static_cast<size_t>(value));
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  dim3 cluster;
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeCooperative) cooperative = config->attrs[i].val.cooperative != 0;
    if (config->attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& dims = config->attrs[i].val.clusterDim;
    cluster = dim3(dims.x, dims.y, dims.z);
  }
  dflash::emulator::launcher(kernel, cluster, config->gridDim, config->blockDim.x, config->dynamicSmemBytes, nullptr,
                             cooperative)(arguments...);
  return cudaGetLastError();
}

// ---- barriers and warps --------------------------------------------------------------------------------------------

inline void __syncthreads() { dflash::emulator::block_barrier(); }
inline int __syncthreads_or(int value) { return dflash::emulator::block_any(value != 0); }
inline void __syncwarp() { dflash::emulator::exchange(dflash::emulator::Collective::kBarrier, nullptr, 0); }
inline void __threadfence() {}

namespace dflash::emulator {

template <typename T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

// What `source` (a function of the lane) holds.
template <typename T, typename Source>
T shuffle(unsigned mask, T value, Source source) {
  if (mask != 0xffffffffu) fail("a warp function without all lanes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return from_word<T>(exchange(Collective::kShuffle, &word, 1)[source(lane())][0]);
}

}  // namespace dflash::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return dflash::emulator::shuffle(mask, value, [=](unsigned) { return source & 31; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  return dflash::emulator::shuffle(mask, value, [=](unsigned lane) { return (lane ^ offset) & 31; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset) {
  return dflash::emulator::shuffle(mask, value, [=](unsigned lane) { return lane >= offset ? lane - offset : lane; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  return dflash::emulator::shuffle(mask, value,
                                   [=](unsigned lane) { return lane + offset < 32 ? lane + offset : lane; });
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  if (mask != 0xffffffffu) dflash::emulator::fail("a warp function without all lanes");
  const uint64_t word = value;
  const auto* words = dflash::emulator::exchange(dflash::emulator::Collective::kBallot, &word, 1);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(words[i][0]) << i;
  return bits;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  if (mask != 0xffffffffu) dflash::emulator::fail("a warp function without all lanes");
  const uint64_t word = value;
  const auto* words = dflash::emulator::exchange(dflash::emulator::Collective::kReduce, &word, 1);
  unsigned largest = 0;
  for (int i = 0; i < 32; ++i) largest = words[i][0] > largest ? static_cast<unsigned>(words[i][0]) : largest;
  return largest;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  if (mask != 0xffffffffu) dflash::emulator::fail("a warp function without all lanes");
  const uint64_t word = value;
  const auto* words = dflash::emulator::exchange(dflash::emulator::Collective::kReduce, &word, 1);
  unsigned sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<unsigned>(words[i][0]);
  return sum;
}

// ---- memory --------------------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* place) {
  if (reinterpret_cast<uintptr_t>(place) % alignof(T) != 0) dflash::emulator::fail("a load from an unaligned address");
  return *place;
}
template <typename T>
T __ldcg(const T* place) {
  return __ldg(place);
}
template <typename T>
T __ldca(const T* place) {
  return __ldg(place);
}

// One thread runs at a time, and none is interrupted here; but after a maximum of words another may come.
template <typename T, typename Change>
T emulated_atomic(T* place, Change change) {
  const T old = __ldg(place);
  *place = change(old);
  return old;
}
template <typename T>
T atomicAdd(T* place, std::common_type_t<T> value) {
  return emulated_atomic(place, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* place, std::common_type_t<T> value) {
  const T old = emulated_atomic(place, [=](T before) { return before > value ? before : value; });
  if (sizeof(T) == 8) dflash::emulator::pause();
  return old;
}
template <typename T>
T atomicMin(T* place, std::common_type_t<T> value) {
  return emulated_atomic(place, [=](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicOr(T* place, std::common_type_t<T> value) {
  return emulated_atomic(place, [=](T old) { return static_cast<T>(old | value); });
}
template <typename T>
T atomicExch(T* place, std::common_type_t<T> value) {
  return emulated_atomic(place, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* place, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return emulated_atomic(place, [=](T old) { return old == expected ? value : old; });
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? std::common_type_t<A, B>(b) : std::common_type_t<A, B>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? std::common_type_t<A, B>(b) : std::common_type_t<A, B>(a);
}

inline float __uint_as_float(uint32_t bits) { return dflash::emulator::from_word<float>(bits); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline int __double2hiint(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<int>(bits >> 32);
}
inline double __hiloint2double(int high, int low) {
  return dflash::emulator::from_word<double>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 |
                                             static_cast<uint32_t>(low));
}
inline uint32_t __float2uint_rz(float x) {
  return !(x > 0.0f) ? 0u : x >= 4294967296.0f ? 0xffffffffu : static_cast<uint32_t>(x);
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
// The C library has a function of this name.
inline float emulated_expf(float x) { return std::exp(x); }
#define __expf emulated_expf
inline float __fdividef(float x, float y) { return x / y; }

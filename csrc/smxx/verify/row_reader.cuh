// Reading a span of one row of logits with 16-byte loads, whatever the row's address and length.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/ptx.cuh"
#include "smxx/verify/params.h"

namespace dflash::verify {

// An element type: value of one, the values of a 16-byte vector, and the vector's max_nan.
template <LogitType kType>
struct Element;

template <>
struct Element<LogitType::kFloat32> {
  using Bits = float;
  static constexpr int kPerVector = 4;
  static __device__ __forceinline__ float value(float bits) { return bits; }
  static __device__ __forceinline__ void unpack(const uint4& v, float (&x)[4]) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
  }
  static __device__ __forceinline__ float max_of(const uint4& v) {
    return max_nan(max_nan(__uint_as_float(v.x), __uint_as_float(v.y)),
                   max_nan(__uint_as_float(v.z), __uint_as_float(v.w)));
  }
};

template <>
struct Element<LogitType::kBFloat16> {
  using Bits = uint16_t;
  static constexpr int kPerVector = 8;
  static __device__ __forceinline__ float value(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
  static __device__ __forceinline__ void unpack(const uint4& v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ uint32_t max2(uint32_t a, uint32_t b) { return max_nan_bf16x2(a, b); }
  static __device__ __forceinline__ float max_of(const uint4& v) {
    const uint32_t pair = max2(max2(v.x, v.y), max2(v.z, v.w));
    return max_nan(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
};

template <>
struct Element<LogitType::kFloat16> {
  using Bits = uint16_t;
  static constexpr int kPerVector = 8;
  static __device__ __forceinline__ float value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ __forceinline__ void unpack(const uint4& v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = value(static_cast<uint16_t>(words[i]));
      x[2 * i + 1] = value(static_cast<uint16_t>(words[i] >> 16));
    }
  }
  static __device__ __forceinline__ uint32_t max2(uint32_t a, uint32_t b) { return max_nan_f16x2(a, b); }
  static __device__ __forceinline__ float max_of(const uint4& v) {
    const uint32_t pair = max2(max2(v.x, v.y), max2(v.z, v.w));
    return max_nan(value(static_cast<uint16_t>(pair)), value(static_cast<uint16_t>(pair >> 16)));
  }
};

template <LogitType kType>
__device__ __forceinline__ const typename Element<kType>::Bits* logits_row(const Logits& logits, int64_t b, int j) {
  return static_cast<const typename Element<kType>::Bits*>(logits.data) + b * logits.stride_request +
         j * logits.stride_row;
}

// Elements before the first 16-byte boundary, at most `count`.
template <typename Bits>
__device__ __forceinline__ int unaligned_head(const Bits* span, int count) {
  const int bytes = static_cast<int>((16 - (reinterpret_cast<uintptr_t>(span) & 15)) & 15);
  const int head = bytes / static_cast<int>(sizeof(Bits));
  return head < count ? head : count;
}

// Visits the elements of span[0, count) that belong to `thread` of `threads`, in ascending order: scalar(i, value) in
// the unaligned head and tail, vector(i, v) for the 16 bytes that start at element i. Four vectors of a thread are in
// flight at a time.
template <LogitType kType, typename Scalar, typename Vector>
__device__ __forceinline__ void visit_span(const typename Element<kType>::Bits* span, int count, int thread,
                                           int threads, Scalar scalar, Vector vector) {
  constexpr int kPerVector = Element<kType>::kPerVector;
  constexpr int kInFlight = 4;
  const int head = unaligned_head(span, count);
  const int vectors = (count - head) / kPerVector;
  if (thread < head) scalar(thread, Element<kType>::value(span[thread]));
  const uint4* body = reinterpret_cast<const uint4*>(span + head);
  for (int first = thread; first < vectors; first += kInFlight * threads) {
    uint4 v[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (first + u * threads < vectors) v[u] = __ldg(body + first + u * threads);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (first + u * threads < vectors) vector(head + (first + u * threads) * kPerVector, v[u]);
    }
  }
  const int tail = head + vectors * kPerVector + thread;
  if (tail < count) scalar(tail, Element<kType>::value(span[tail]));
}

// Calls body(std::integral_constant<LogitType, type>).
template <typename Body>
void dispatch_logit_type(LogitType type, Body body) {
  switch (type) {
    case LogitType::kFloat32:
      return body(std::integral_constant<LogitType, LogitType::kFloat32>());
    case LogitType::kBFloat16:
      return body(std::integral_constant<LogitType, LogitType::kBFloat16>());
    case LogitType::kFloat16:
      return body(std::integral_constant<LogitType, LogitType::kFloat16>());
  }
}

}  // namespace dflash::verify

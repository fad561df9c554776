// The argmax of a part of a row: a thread keeps the best of the 16-byte vectors it is shown, in about two instructions
// an element, and finds the place inside the winning vector once at the end; warps meet with two integer maxima.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.h"
#include "common/order_key.h"
#include "common/ptx.cuh"
#include "smxx/verify/finish.cuh"
#include "smxx/verify/row_reader.cuh"

namespace dflash::verify {

// A row of V elements: `head` of them before the first 16-byte boundary, `vectors` of 16 bytes, the tail.
template <LogitType kType>
struct Row {
  const typename Element<kType>::Bits* data;
  int head;
  int vectors;

  __device__ __forceinline__ Row(const Logits& logits, int64_t b, int j, int vocab_size)
      : data(logits_row<kType>(logits, b, j)),
        head(unaligned_head(data, vocab_size)),
        vectors((vocab_size - head) / Element<kType>::kPerVector) {}

  __device__ __forceinline__ const uint4* vector(int i) const {
    return reinterpret_cast<const uint4*>(data + head) + i;
  }

  // The element in no vector that a lane takes: of the head (lanes 0..7) or the tail (8..15), where these are wanted;
  // -1: none.
  __device__ __forceinline__ int scalar(int vocab_size, int lane, bool of_head, bool of_tail) const {
    if (of_head && lane < head) return lane;
    const int i = head + vectors * Element<kType>::kPerVector + lane - 8;
    return of_tail && lane >= 8 && i < vocab_size ? i : -1;
  }
};

// What a lane holds of a slice of at most 32 * kVectors vectors, in registers: every 32nd. In place of those that there
// are not it has the last one, which changes nothing.
template <LogitType kType, int kVectors>
struct Held {
  uint4 vectors[kVectors];

  static __device__ __forceinline__ int place(int i, int count, int lane) { return min(lane + 32 * i, count - 1); }

  // Starts to load vectors from[0, count), count > 0.
  __device__ __forceinline__ void load(const uint4* from, int count, int lane, uint64_t policy) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) vectors[i] = load_once(from + place(i, count, lane), policy);
  }
};

// The best of what a lane holds.
template <LogitType kType>
struct Best {
  uint4 elements;
  float top;
  int vector;  // of the slice

  // The first among equals stays, and so does the first NaN.
  static __device__ __forceinline__ bool beats(float later, float earlier) {
    return !(later <= earlier) && earlier == earlier;
  }

  // Two at a time meet first, so that few steps wait for what was found before.
  template <int kVectors>
  __device__ __forceinline__ void take(const Held<kType, kVectors>& held, int count, int lane) {
    top = __uint_as_float(0xff800000u);
    int best = 0;
#pragma unroll
    for (int i = 0; i < kVectors; i += 2) {
      const float a = Element<kType>::max_of(held.vectors[i]);
      const float b = Element<kType>::max_of(held.vectors[min(i + 1, kVectors - 1)]);
      const bool second = beats(b, a);
      const float pair = second ? b : a;
      const bool better = beats(pair, top);
      top = better ? pair : top;
      best = better ? (second ? i + 1 : i) : best;
    }
    elements = held.vectors[0];
#pragma unroll
    for (int i = 1; i < kVectors; ++i) {
      elements.x = best == i ? held.vectors[i].x : elements.x;
      elements.y = best == i ? held.vectors[i].y : elements.y;
      elements.z = best == i ? held.vectors[i].z : elements.z;
      elements.w = best == i ? held.vectors[i].w : elements.w;
    }
    vector = Held<kType, kVectors>::place(best, count, lane);
  }

  // argmax_key with the index counted from the row's start; the slice is the row's vectors from `first` on.
  __device__ __forceinline__ uint64_t key(int first, int head) const {
    float x[Element<kType>::kPerVector];
    Element<kType>::unpack(elements, x);
    int element = 0;
#pragma unroll
    for (int e = Element<kType>::kPerVector - 1; e >= 0; --e) {
      if (x[e] == top || x[e] != x[e]) element = e;
    }
    return argmax_key(top, static_cast<uint32_t>(head + (first + vector) * Element<kType>::kPerVector + element));
  }
};

// The largest key of a warp, in all lanes.
__device__ __forceinline__ uint64_t warp_max(uint64_t key) {
  const auto high = static_cast<uint32_t>(key >> 32);
  const uint32_t top = __reduce_max_sync(kFullWarp, high);
  const uint32_t low = __reduce_max_sync(kFullWarp, high == top ? static_cast<uint32_t>(key) : 0u);
  return static_cast<uint64_t>(top) << 32 | low;
}

inline int sm_count(const char* op) {
  int device = 0, sms = 0;
  cuda_check(cudaGetDevice(&device), op);
  cuda_check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), op);
  return sms;
}

}  // namespace dflash::verify

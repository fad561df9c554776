// The argmax of a part of a row: a thread keeps the best of the 16-byte vectors it is shown, in about two instructions
// an element, and finds the place inside the winning vector once at the end; warps meet with two integer maxima.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.h"
#include "common/order_key.h"
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

// The best of the vectors that one thread takes.
template <LogitType kType>
struct Best {
  uint4 elements;
  float top;
  int place;  // of `elements` among all vectors; -1: none was taken

  // The first among equals stays, and so does the first NaN.
  static __device__ __forceinline__ bool beats(float later, float earlier) {
    return !(later <= earlier) && earlier == earlier;
  }

  // The lane's share of `count` vectors. Four at a time meet among themselves first, so that few steps wait for what
  // was found before.
  __device__ __forceinline__ void take_all(const uint4* vectors, int count, int lane) {
    constexpr int kStep = 4;
    const float none = __uint_as_float(0xff800000u);
    top = none, place = lane < count ? lane : -1;
#pragma unroll 1
    for (int i = lane; i < count; i += 32 * kStep) {
      float values[kStep];
#pragma unroll
      for (int u = 0; u < kStep; ++u) {
        values[u] = i + 32 * u < count ? Element<kType>::max_of(vectors[i + 32 * u]) : none;
      }
      const bool first = beats(values[1], values[0]), second = beats(values[3], values[2]);
      const float a = first ? values[1] : values[0], b = second ? values[3] : values[2];
      const int at_a = first ? i + 32 : i, at_b = second ? i + 96 : i + 64;
      const bool half = beats(b, a);
      const float best = half ? b : a;
      const bool better = beats(best, top);
      top = better ? best : top;
      place = better ? (half ? at_b : at_a) : place;
    }
    if (place >= 0) elements = vectors[place];
  }

  // argmax_key with the index counted from the row's start, for vectors from `first` on; 0 if none was taken.
  __device__ __forceinline__ uint64_t key(int first, int head) const {
    if (place < 0) return 0;
    float x[Element<kType>::kPerVector];
    Element<kType>::unpack(elements, x);
    int element = 0;
#pragma unroll
    for (int e = Element<kType>::kPerVector - 1; e >= 0; --e) {
      if (x[e] == top || x[e] != x[e]) element = e;
    }
    return argmax_key(top, static_cast<uint32_t>(head + (first + place) * Element<kType>::kPerVector + element));
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

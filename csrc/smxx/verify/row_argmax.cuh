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

// The best of the vectors that one thread takes, in ascending order.
template <LogitType kType>
struct Best {
  uint4 elements;
  float top;
  int vector;

  // `first`: the vector that will be taken first. Until something beats it, it stands for -inf.
  __device__ __forceinline__ void start(int first) {
    const uint32_t bits = Element<kType>::kNegInfBits;
    elements = uint4{bits, bits, bits, bits};
    top = __uint_as_float(0xff800000u);
    vector = first;
  }

  __device__ __forceinline__ void take(const uint4& v, int i) {
    const float candidate = Element<kType>::max_of(v);
    // The first among equals stays, and so does the first NaN.
    const bool better = !(candidate <= top) && top == top;
    elements.x = better ? v.x : elements.x;
    elements.y = better ? v.y : elements.y;
    elements.z = better ? v.z : elements.z;
    elements.w = better ? v.w : elements.w;
    top = better ? candidate : top;
    vector = better ? i : vector;
  }

  // argmax_key with the index counted from the row's start. At least one vector was taken.
  __device__ __forceinline__ uint64_t key(int head) const {
    float x[Element<kType>::kPerVector];
    Element<kType>::unpack(elements, x);
    int place = 0;
#pragma unroll
    for (int e = Element<kType>::kPerVector - 1; e >= 0; --e) {
      if (x[e] == top || x[e] != x[e]) place = e;
    }
    return argmax_key(top, static_cast<uint32_t>(head + vector * Element<kType>::kPerVector + place));
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

// Order-preserving integer keys of floats, in torch.argmax's order.
//
//   a > b             =>  order_key(a) >  order_key(b)
//   a == b            =>  order_key(a) == order_key(b)   (-0.0 and +0.0 are one key)
//   NaN               =>  the largest key of all
//
// argmax_key(value, index) packs both so that the maximum of the keys is torch.argmax's answer: the largest
// value, the smallest index among equals, the first NaN if there is any. Being a maximum of integers it does
// not depend on the order of the reduction.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace dflash {

constexpr uint32_t kNanOrderKey = 0xffffffffu;
constexpr uint32_t kPosInfOrderKey = 0xff800000u;  // order_key(+inf)
constexpr uint32_t kNegInfOrderKey = 0x007fffffu;  // order_key(-inf)

DFLASH_HOST_DEVICE uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

DFLASH_HOST_DEVICE uint32_t order_key(float x) {
  if (x != x) return kNanOrderKey;
  if (x == 0.0f) x = 0.0f;  // -0.0 -> +0.0
  const uint32_t bits = float_bits(x);
  return (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
}

// The number whose key it is; not for the key of NaN.
DFLASH_HOST_DEVICE float order_value(uint32_t key) {
  const uint32_t bits = (key & 0x80000000u) ? (key & 0x7fffffffu) : ~key;
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

DFLASH_HOST_DEVICE uint64_t argmax_key(float value, uint32_t index) {
  return (static_cast<uint64_t>(order_key(value)) << 32) | static_cast<uint32_t>(~index);
}

DFLASH_HOST_DEVICE uint32_t argmax_index(uint64_t key) { return ~static_cast<uint32_t>(key & 0xffffffffu); }

DFLASH_HOST_DEVICE uint32_t argmax_order_key(uint64_t key) { return static_cast<uint32_t>(key >> 32); }

}  // namespace dflash

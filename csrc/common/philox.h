// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A counter-based generator: the same (key, counter) gives the same four words on every device, whatever else
// is in the batch. Used with key = the request's seed and counter = (offset, position, stream):
//   counter words 0, 1: the request's 64-bit offset (low, high)
//   counter word  2:    position j inside the block
//   counter word  3:    stream, so that other consumers of the same seed never share words with verification
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dflash {

struct PhiloxWords {
  uint32_t w[4];
};

// Stream numbers (counter word 3).
constexpr uint32_t kPhiloxStreamVerify = 0;

DFLASH_HOST_DEVICE uint32_t philox_mulhi(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

DFLASH_HOST_DEVICE PhiloxWords philox4x32_10(uint64_t seed, uint64_t offset, uint32_t position, uint32_t stream) {
  uint32_t c0 = static_cast<uint32_t>(offset), c1 = static_cast<uint32_t>(offset >> 32);
  uint32_t c2 = position, c3 = stream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t hi0 = philox_mulhi(0xD2511F53u, c0), lo0 = 0xD2511F53u * c0;
    const uint32_t hi1 = philox_mulhi(0xCD9E8D57u, c2), lo1 = 0xCD9E8D57u * c2;
    const uint32_t n0 = hi1 ^ c1 ^ k0, n2 = hi0 ^ c3 ^ k1;
    c0 = n0;
    c1 = lo1;
    c2 = n2;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return PhiloxWords{{c0, c1, c2, c3}};
}

// Uniform in [0, 1) on the grid of 2^-24: exact in float32.
DFLASH_HOST_DEVICE float uniform_from_bits(uint32_t word) {
  return static_cast<float>(word >> 8) * 5.9604644775390625e-8f;
}

}  // namespace dflash

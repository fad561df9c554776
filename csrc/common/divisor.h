// Division by a number that a launch fixes: one multiplication and a shift where a division is a chain of some twenty
// instructions.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dflash {

// For d = value and 2^(l - 1) < d <= 2^l: n / d = n * ceil(2^(31 + l) / d) >> (31 + l), exact for n < 2^31, since the
// rounded-up factor is off by less than 2^l / d of its unit.
struct Divisor {
  uint32_t value = 1;
  uint32_t factor = 1u << 31;
  uint32_t shift = 31;

  Divisor() = default;
  // d in [1, 2^31).
  explicit Divisor(int64_t d) : value(static_cast<uint32_t>(d)) {
    while ((1ll << (shift - 31)) < d) ++shift;
    factor = static_cast<uint32_t>(((1ull << shift) + d - 1) / d);
  }

  // n < 2^31.
  DFLASH_HOST_DEVICE uint32_t divide(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * factor >> shift);
  }
};

}  // namespace dflash

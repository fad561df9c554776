// A read-only view of an int32 or int64 index tensor with up to two strided dimensions.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dflash {

struct IntView {
  const void* data = nullptr;
  int64_t stride0 = 0;  // elements
  int64_t stride1 = 0;  // elements; 0 for a vector
  bool is_int64 = true;

  DFLASH_HOST_DEVICE int64_t at(int64_t i, int64_t j = 0) const {
    const int64_t offset = i * stride0 + j * stride1;
    return is_int64 ? static_cast<const int64_t*>(data)[offset]
                    : static_cast<int64_t>(static_cast<const int32_t*>(data)[offset]);
  }
};

}  // namespace dflash

// Which rows of a [B * T] batch are live: row b * T + j iff j < commit_lens[b]. No lengths: every row is.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/int_view.h"

namespace dflash {

struct LiveRows {
  IntView commit_lens;           // [B]; data == nullptr: every row is live
  int64_t rows_per_request = 1;  // T

  DFLASH_HOST_DEVICE bool at(int64_t row) const {
    if (commit_lens.data == nullptr) return true;
    return row % rows_per_request < commit_lens.at(row / rows_per_request);
  }
};

}  // namespace dflash

// The memory of tensor-parallel ranks in which their kernels meet.
#pragma once

#include <cstdint>

namespace dflash {

constexpr int kMostRanks = 8;
constexpr uint32_t kNoWord = 0xffffffffu;

struct Peers {
  int world = 1, rank = 0;
  unsigned long long patience = 0;      // ns that a rank waits for another
  uint32_t* exchange[kMostRanks] = {};  // of every rank, in peer memory; [rank] is this one's own
};

}  // namespace dflash

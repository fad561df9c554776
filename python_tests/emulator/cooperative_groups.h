// Stands in for the toolkit's cooperative_groups.h: the cluster.
#pragma once

#include "emulator.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return dflash::emulator::cluster_size(); }
  unsigned block_rank() const { return dflash::emulator::cluster_rank(); }
  void sync() const {
    dflash::emulator::cluster_arrive();
    dflash::emulator::cluster_wait();
  }
  template <typename T>
  T* map_shared_rank(T* local, int rank) const {
    return reinterpret_cast<T*>(dflash::emulator::remote_shared(local, static_cast<unsigned>(rank)));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

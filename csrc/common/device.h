// What the choice of a kernel depends on: the current device.
#pragma once

#include "common/cuda_check.h"

namespace dflash {

struct Device {
  int major = 0;  // of its compute capability: 9 Hopper (wgmma), 10 data centre Blackwell (tcgen05)
  int num_sms = 0;
};

inline Device current_device(const char* what) {
  int ordinal = 0;
  Device device;
  cuda_check(cudaGetDevice(&ordinal), what);
  cuda_check(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, ordinal), what);
  cuda_check(cudaDeviceGetAttribute(&device.num_sms, cudaDevAttrMultiProcessorCount, ordinal), what);
  return device;
}

}  // namespace dflash

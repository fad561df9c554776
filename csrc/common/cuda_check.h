// Turns a CUDA error into an exception that names the launch.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace dflash {

inline void cuda_check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("dflash::") + what + ": CUDA error: " + cudaGetErrorString(error));
  }
}

// After a kernel launch.
inline void cuda_check_launch(const char* what) { cuda_check(cudaGetLastError(), what); }

}  // namespace dflash

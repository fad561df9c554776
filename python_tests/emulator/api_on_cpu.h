// Included before csrc/api/*.cpp: their schemas go to the namespace dflash_emulated, and what they register for CUDA
// serves CPU tensors there.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

namespace torch::stable::accelerator {
struct EmulatedDeviceGuard {
  explicit EmulatedDeviceGuard(int) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard EmulatedDeviceGuard

#undef STABLE_TORCH_LIBRARY_FRAGMENT
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) _STABLE_TORCH_LIBRARY_FRAGMENT(dflash_emulated, m, C10_UID)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) DFLASH_EMULATED_##key(m)
#define DFLASH_EMULATED_CUDA(m) _STABLE_TORCH_LIBRARY_IMPL(dflash_emulated, CPU, m, C10_UID)
#define DFLASH_EMULATED_CPU(m) \
  [[maybe_unused]] static void C10_CONCATENATE(not_registered, C10_UID)(torch::stable::detail::StableLibrary & m)
#define DFLASH_EMULATED_CompositeExplicitAutograd(m) \
  _STABLE_TORCH_LIBRARY_IMPL(dflash_emulated, CompositeExplicitAutograd, m, C10_UID)

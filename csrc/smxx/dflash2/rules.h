// Arithmetic of select_path and grouped_conv that host and device share, so that both give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"
#include "common/order_key.h"
#include "smxx/dflash2/params.h"

namespace dflash::dflash2 {

// Temperatures in (0, kMinTemperature) count as kMinTemperature; 0 is greedy.
constexpr float kMinTemperature = 1e-5f;

// float -> bfloat16 bits, to nearest, ties to even; any NaN becomes the quiet one.
DFLASH_HOST_DEVICE uint16_t bf16_bits(float x) {
  if (x != x) return 0x7fc0u;
  const uint32_t bits = float_bits(x);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

DFLASH_HOST_DEVICE float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

DFLASH_HOST_DEVICE float bf16_value(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }

DFLASH_HOST_DEVICE float round_to_bf16(float x) { return bf16_value(bf16_bits(x)); }

// One tap: sum + (base + delta) * value, every operation rounded to float32 on its own (no fused multiply-add).
DFLASH_HOST_DEVICE float add_tap(float sum, float base, float delta, float value) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(sum, __fmul_rn(__fadd_rn(base, delta), value));
#else
  return sum + (base + delta) * value;
#endif
}

// Tap 0 has no sum to join: adding 0 would turn -0 into +0.
DFLASH_HOST_DEVICE float first_tap(float base, float delta, float value) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(__fadd_rn(base, delta), value);
#else
  return (base + delta) * value;
#endif
}

// Can a softmax be taken whose largest scaled score has this order key? Not with a NaN, nor with an infinite maximum.
DFLASH_HOST_DEVICE bool has_softmax(uint32_t largest_key) {
  return largest_key != kNanOrderKey && largest_key != kPosInfOrderKey && largest_key != kNegInfOrderKey;
}

// Value checks of select_path's arguments: always on the CPU, under DFLASH_DEBUG=1 on CUDA.
enum class Fault : int {
  kNone,
  kAnchor,       // outside [0, V)
  kCandidate,    // outside [0, V)
  kTemperature,  // NaN or negative
  kUniform,      // outside [0, 1)
};

DFLASH_HOST_DEVICE Fault find_fault(const SelectParams& p, int64_t b) {
  const int64_t anchor = p.anchor_ids.at(b);
  if (anchor < 0 || anchor >= p.vocab_size) return Fault::kAnchor;
  if (p.temperature != nullptr && !(p.temperature[b] >= 0.0f)) return Fault::kTemperature;
  for (int j = 0; j < p.slots; ++j) {
    for (int c = 0; c < p.top_k; ++c) {
      const int64_t id = p.candidate_at(b, j, c);
      if (id < 0 || id >= p.vocab_size) return Fault::kCandidate;
    }
    if (p.uniforms != nullptr) {
      const float u = p.uniforms[b * p.slots + j];
      if (!(u >= 0.0f && u < 1.0f)) return Fault::kUniform;
    }
  }
  return Fault::kNone;
}

struct SelectFault {
  Fault fault = Fault::kNone;
  int64_t request = 0;
};

}  // namespace dflash::dflash2

// Host conversions of 16-bit floats from their bit patterns, and of floats to e4m3, for CPU code that includes no CUDA
// or torch headers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace dflash {

inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float bf16_bits_to_float(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

inline float fp16_bits_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | (mantissa << 13));
  return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// To the nearest, ties to even; beyond +-448 saturates, NaN stays NaN: what cvt.rn.satfinite.e4m3x2.f32 does.
inline uint8_t float_to_e4m3(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = bits >> 24 & 0x80u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  const float magnitude = float_from_bits(bits);
  uint32_t code;
  if (magnitude < 0.015625f) {  // subnormal: steps of 2^-9
    code = static_cast<uint32_t>(std::nearbyint(magnitude * 512.0f));
  } else if (magnitude >= 448.0f) {
    code = 0x7eu;
  } else {
    code = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
  }
  return static_cast<uint8_t>(sign | code);
}

}  // namespace dflash

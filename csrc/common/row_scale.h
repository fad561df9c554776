// The scale of a row of activations in e4m3.
//
//   largest = max(max_c |x[c]|, 1e-30)        of what is not NaN
//   scale   = largest / 448                   codes[c] = e4m3( x[c] * (448 / largest) ), saturating, ties to even
//
// Each quotient and product is rounded to float32 by itself, so that host and device agree on every bit. A NaN has a
// NaN code; beside an infinity (scale infinite) every product is NaN. The least magnitude keeps both quotients normal
// numbers: a row of zeros has codes 0.
#pragma once

#include "common/host_device.h"

namespace dflash {

constexpr float kLargestE4m3 = 448.0f;
constexpr float kLeastMagnitude = 1e-30f;

struct RowScale {
  float scale, inverse;
};

DFLASH_HOST_DEVICE RowScale row_scale(float largest) {
  const float clamped = largest > kLeastMagnitude ? largest : kLeastMagnitude;
  return {clamped / kLargestE4m3, kLargestE4m3 / clamped};
}

}  // namespace dflash

// Quantised weights in tiles, in the terms of format.cuh: a tile is 16 KB of codes, followed by its scales, so that one
// bulk copy brings both. A lane finds the codes of a step's fragments in 16 consecutive bytes (fp8: of each m16), and
// the scales of its four rows, 32 part + 16 i + 8 e + l / 4, side by side as scale[i][e].
#pragma once

#include <cstdint>

#include "common/dequant.cuh"
#include "smxx/stream/format.cuh"
#include "smxx/stream/schedule.h"

namespace dflash::stream {

// 128 x 128 e4m3: [step 2][m16 8][half 2][lane 32][s 2][8 codes] | float scale[part 4][row of 8][i 2][e 2].
struct Fp8 {
  static constexpr int kSteps = 2;
  static constexpr Scales kScales = Scales::kOfRows;
  static constexpr int kScaleBytes = kTileRows * 4;
  static constexpr int kBytes = kTileBytes + kScaleBytes;

  static __device__ __forceinline__ void load(const unsigned char* tile, int step, int part, int half, int lane,
                                              uint32_t (&a)[2][2][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 v = *reinterpret_cast<const uint4*>(tile + ((8 * step + 2 * part + i) * 2 + half) * 512 + lane * 16);
      dequantize_e4m3(v.x, a[i][0][0], a[i][0][1]);
      dequantize_e4m3(v.y, a[i][0][2], a[i][0][3]);
      dequantize_e4m3(v.z, a[i][1][0], a[i][1][1]);
      dequantize_e4m3(v.w, a[i][1][2], a[i][1][3]);
    }
  }

  static __device__ __forceinline__ void load_scale(const unsigned char* tile, int /*step*/, int part, int lane,
                                                    float (&scale)[2][2]) {
    const float4 v = *reinterpret_cast<const float4*>(tile + kTileBytes + (8 * part + lane / 4) * 16);
    scale[0][0] = v.x;
    scale[0][1] = v.y;
    scale[1][0] = v.z;
    scale[1][1] = v.w;
  }
};

// 128 x 256 of 4 bits: [step 4][part 4][half 2][lane 32][i 2][s 2][8 codes] | bf16 scale[group][part 4][row of 8][i
// 2][e 2].
// `dequantize` gives 1 / kEven of the values in registers 0 and 2, rows l / 4, and 1 / kOdd in the others, rows l / 4 +
// 8.
template <int kGroup, void (*dequantize)(uint32_t, uint32_t (&)[4]), int kEven, int kOdd>
struct FourBit {
  static_assert(kGroup == 64 || kGroup == 128, "a group is one or two steps");
  static constexpr int kSteps = 4;
  static constexpr Scales kScales = Scales::kOfGroups;
  static constexpr int kScaleBytes = kTileRows * 2 * (64 * kSteps / kGroup);
  static constexpr int kBytes = kTileBytes + kScaleBytes;

  static __device__ __forceinline__ void load(const unsigned char* tile, int step, int part, int half, int lane,
                                              uint32_t (&a)[2][2][4]) {
    const uint4 v = *reinterpret_cast<const uint4*>(tile + ((4 * step + part) * 2 + half) * 512 + lane * 16);
    dequantize(v.x, a[0][0]);
    dequantize(v.y, a[0][1]);
    dequantize(v.z, a[1][0]);
    dequantize(v.w, a[1][1]);
  }

  static __device__ __forceinline__ void load_scale(const unsigned char* tile, int step, int part, int lane,
                                                    float (&scale)[2][2]) {
    const int group = step * 64 / kGroup;
    const uint2 v =
        *reinterpret_cast<const uint2*>(tile + kTileBytes + group * (2 * kTileRows) + (8 * part + lane / 4) * 8);
    scale[0][0] = kEven * __uint_as_float(v.x << 16);
    scale[0][1] = kOdd * __uint_as_float(v.x & 0xffff0000u);
    scale[1][0] = kEven * __uint_as_float(v.y << 16);
    scale[1][1] = kOdd * __uint_as_float(v.y & 0xffff0000u);
  }
};
template <int kGroup>
using Int4 = FourBit<kGroup, dequantize_int4, kInt4Even, kInt4Odd>;
template <int kGroup>
using E2m1 = FourBit<kGroup, dequantize_e2m1, 1, 1>;

template <typename Format>
constexpr bool is_described_by(WeightFormat format) {
  const TileFormat& tile = kTileFormats[static_cast<int>(format)];
  return tile.columns == 64 * Format::kSteps && tile.bytes == Format::kBytes;
}
static_assert(is_described_by<Bf16>(WeightFormat::kBf16) && is_described_by<Fp8>(WeightFormat::kFp8));
static_assert(is_described_by<Int4<64>>(WeightFormat::kInt4Of64) && is_described_by<E2m1<64>>(WeightFormat::kE2m1Of64));
static_assert(is_described_by<Int4<128>>(WeightFormat::kInt4Of128) &&
              is_described_by<E2m1<128>>(WeightFormat::kE2m1Of128));

// function(Format{}) for the format's policy.
template <typename Function>
void with_format(WeightFormat format, Function&& function) {
  switch (format) {
    case WeightFormat::kBf16:
      return function(Bf16{});
    case WeightFormat::kFp8:
      return function(Fp8{});
    case WeightFormat::kInt4Of64:
      return function(Int4<64>{});
    case WeightFormat::kInt4Of128:
      return function(Int4<128>{});
    case WeightFormat::kE2m1Of64:
      return function(E2m1<64>{});
    case WeightFormat::kE2m1Of128:
      return function(E2m1<128>{});
  }
}

}  // namespace dflash::stream

// Formats of the weights in a tile: how its bytes become A fragments of m16n8k16.
//
// A tile is consumed in steps of 64 columns of K. In a step a warp owns rows 32 * part .. + 31 of the tile's 128 and
// columns 32 * half .. + 31 of the step, so it needs 2 x 2 fragments, a[i][s]: rows 16 i.., k16 step s.
// Within these 32 columns, lane l holds columns 8 q .. 8 q + 7, q = l % 4, of a token as 16 consecutive bytes: step s
// takes columns 8 q + 4 s + {0, 1} where the instruction's order has 2 q + {0, 1}, and + {2, 3} where it has
// 2 q + 8 + {0, 1}. The weights are packed in the same order; a sum does not care.
#pragma once

#include <cstdint>

#include "smxx/stream/schedule.h"

namespace dflash::stream {

// When the scales of codes enter the sums, as scale * sum: at the end of a unit, whose tiles are all of the same rows,
// or in every step, whose 64 columns never lie in two groups.
enum class Scales { kNone, kOfRows, kOfGroups };

// 128 x 64 bf16: [m16 8][half 2][s 2][lane 32][register 4], registers as in the fragment: rows l / 4 and l / 4 + 8.
struct Bf16 {
  static constexpr int kSteps = 1;  // of 64 columns in a tile
  static constexpr int kBytes = kTileBytes;
  static constexpr Scales kScales = Scales::kNone;

  static __device__ __forceinline__ void load(const unsigned char* tile, int /*step*/, int part, int half, int lane,
                                              uint32_t (&a)[2][2][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int fragment = (2 * part + i) * 4 + 2 * half + s;
        const uint4 v = *reinterpret_cast<const uint4*>(tile + fragment * 512 + lane * 16);
        a[i][s][0] = v.x;
        a[i][s][1] = v.y;
        a[i][s][2] = v.z;
        a[i][s][3] = v.w;
      }
  }
};

}  // namespace dflash::stream

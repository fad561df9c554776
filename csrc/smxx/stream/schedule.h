// The data that a streaming kernel interprets. Made by dflash_kernels/stream.py, which describes it once more in
// Python.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dflash::stream {

constexpr int kTileRows = 128;     // rows of W in a tile
constexpr int kTileBytes = 16384;  // of a tile's weights, whatever their format; scales come behind them
// Of a tile's weights: bf16, e4m3 with a scale for each row, 4 bits with one for each group of 64 or 128 in a row.
enum class WeightFormat { kBf16, kFp8, kInt4Of64, kInt4Of128, kE2m1Of64, kE2m1Of128 };

struct TileFormat {
  const char* name;  // as in Python
  int columns;       // of a tile
  int bytes;         // of a tile, scales included
};
constexpr TileFormat kTileFormats[] = {
    // by WeightFormat
    {"bf16", 64, kTileBytes},
    {"fp8", 128, kTileBytes + 4 * kTileRows},
    {"int4-g64", 256, kTileBytes + 4 * 2 * kTileRows},
    {"int4-g128", 256, kTileBytes + 2 * 2 * kTileRows},
    {"e2m1-g64", 256, kTileBytes + 4 * 2 * kTileRows},
    {"e2m1-g128", 256, kTileBytes + 2 * 2 * kTileRows},
};

constexpr int kMaxTokens = 64;  // columns of the product
constexpr int kSlotFloats = kMaxTokens * kTileRows;
constexpr uint32_t kNothing = 0xffffffffu;  // a NaN that no sum is
constexpr int kFirstCounter = 2;            // 0 and 1 are the number of blocks that ever started, 64 bits

// What one block does next: `tiles` tiles of one row tile of W, along K. 64 bytes, 16 int32.
//
// A row tile whose K is cut over several units has `contributors` of them. Rank 0 is the last thing that its block does
// in a stage, higher ranks come first in theirs; so rank 0 adds the others' parts, which they leave in slots `slot +
// rank` of the partial sums, in the order of ranks, and finishes the tile. tiles == 0 is a job without weights:
// Policy::job. tiles < 0 ends the list of a block.
struct alignas(16) Unit {
  int32_t stage;         // what the policy makes of it: source of the tokens, end of the tile
  int32_t weight_tile;   // first tile in the packed weights
  int32_t tiles;         // consecutive there
  int32_t row_tile;      // rows kTileRows * row_tile .. of W
  int32_t k_tile;        // first tile along K
  int32_t contributors;  // units that share the row tile
  int32_t rank;          // of this one
  int32_t slot;          // of rank 0, which does not use it
  int32_t wait;          // K tile k needs counter wait + (k >> wait_shift); -1: none
  int32_t wait_shift;    // 31: one counter for all
  int32_t wait_target;   // how often a launch signals each of these
  int32_t signal;        // counter that the finished tile adds 1 to; -1: none
  int32_t index[4];      // of a job, as the policy likes
};
static_assert(sizeof(Unit) == 64, "16 integers in dflash_kernels/stream.py");

struct StreamParams {
  const uint8_t* weights = nullptr;  // tiles, 16-byte aligned
  const Unit* units = nullptr;       // [blocks][max_units], the last of every block an end
  int blocks = 0;                    // the grid
  int max_units = 0;
  // Zeroed once, when made. Counters only grow: launch e of a schedule waits for (e + 1) * target, modulo 2^32, so
  // nothing is ever cleared and a replayed graph needs no preparation. One launch at a time.
  uint32_t* counters = nullptr;
  // [slots][tokens, rounded up to 16, 32 or 64][kTileRows], parts of sums on their way. A word that is kNothing has not
  // been written yet; the block that reads a part puts kNothing back. Filled with it once, when made.
  float* partials = nullptr;
};

}  // namespace dflash::stream

// Checks of what a streaming kernel interprets: packed weights, units and counters (csrc/smxx/stream/schedule.h).
#pragma once

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "api/check.h"
#include "smxx/stream/schedule.h"

namespace dflash::api {

// Of packed weights; `name` as in Python: bf16, fp8, int4-g64, ...
inline stream::WeightFormat weight_format(const char* op, const std::string& name) {
  const auto* found = std::find_if(std::begin(stream::kTileFormats), std::end(stream::kTileFormats),
                                   [&](const stream::TileFormat& tile) { return name == tile.name; });
  if (found == std::end(stream::kTileFormats)) {
    std::string names;
    for (const stream::TileFormat& tile : stream::kTileFormats)
      names += (names.empty() ? "" : ", ") + std::string(tile.name);
    fail(op, "weight_format must be one of ", names, ", got ", name);
  }
  return static_cast<stream::WeightFormat>(found - std::begin(stream::kTileFormats));
}

inline const stream::TileFormat& tile_format(stream::WeightFormat format) {
  return stream::kTileFormats[static_cast<int>(format)];
}

// Tiles of a matrix [rows, K].
inline int64_t num_tiles(stream::WeightFormat format, int64_t rows, int64_t k) {
  const int64_t columns = tile_format(format).columns;
  return (rows + stream::kTileRows - 1) / stream::kTileRows * ((k + columns - 1) / columns);
}

// CUDA kernels read these 16 bytes at a time.
inline void check_aligned_16(const char* op, const char* argument, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  DFLASH_CHECK(op, tensor.is_cpu() || address % 16 == 0, argument, "start at a multiple of 16 bytes", address % 16);
}

// weights [tiles, elements of a tile], units [blocks, n, 16], counters [n] (Schedule.state in Python), on the device of
// `first`.
inline void check_packed(const char* op, const Tensor& weights, stream::WeightFormat format, int64_t tiles,
                         const Tensor& units, const Tensor& counters, int64_t slots, const Tensor& first) {
  const bool is_bf16 = format == stream::WeightFormat::kBf16;
  check_dtype(op, "weights", weights, {is_bf16 ? ScalarType::BFloat16 : ScalarType::Byte});
  check_shape(op, "weights", weights, {tiles, is_bf16 ? stream::kTileBytes / 2 : tile_format(format).bytes});
  check_shape(op, "units", units, {-1, -1, sizeof(stream::Unit) / 4});
  DFLASH_CHECK(op, units.size(0) >= 1 && units.size(1) >= 1, "units", "have a unit", units.size(0) * units.size(1));
  check_shape(op, "counters", counters, {-1});
  check_dtype(op, "units", units, {ScalarType::Int});
  check_dtype(op, "counters", counters, {ScalarType::Int});
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor*>{"weights", &weights}, {"units", &units}, {"counters", &counters}}) {
    check_same_device(op, name, *tensor, first);
    check_contiguous(op, name, *tensor);
    check_aligned_16(op, name, *tensor);
  }
  DFLASH_CHECK(op, slots >= 0 && slots < (1 << 20), "slots", "be in 0..2^20", slots);
  const int64_t parts = slots * stream::kSlotFloats, others = counters.numel() - parts;
  DFLASH_CHECK(op, others > stream::kFirstCounter && others % 4 == 0, "counters",
               "hold a multiple of 4 counters and " + std::to_string(parts) + " words of parts of sums",
               counters.numel());
}

// The parts of sums behind the counters.
inline float* packed_partials(const Tensor& counters, int64_t slots) {
  return static_cast<float*>(counters.data_ptr()) + (counters.numel() - slots * stream::kSlotFloats);
}

}  // namespace dflash::api

// How a GEMM of many rows is cut into tiles: a score for each candidate, the lowest wins.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dflash::many_rows {

struct Plan {
  int columns = 0;  // BN
  int pair = 1;     // row tiles that share W through multicast: 1 or 2
  int splits = 1;   // parts of K, one block each, added up over the cluster
  double cycles = 0.0;
};

constexpr int kColumnChoices[] = {128, 160, 192, 256};
constexpr int64_t kMinSteps = 8;  // steps of K that a part keeps, so that its pipeline fills

// What a candidate is judged by; bytes are per cycle of an SM.
struct Rates {
  double column;     // cycles that the tensor cores of an SM take for 64 of K of [128, 1]
  double l2_per_sm;  // operands that one SM can take from L2
  double l2;         // all SMs together
  double dram;       // W comes from there, once
};

// Measured on an H100 at 1.755 GHz; 2048 multiply-adds a cycle and SM.
constexpr Rates kH100Rates = {4.0, 64, 3300, 1800};

// A B200 at 1.85 GHz as published, nothing measured: 4096 multiply-adds a cycle and SM; L2 to an SM as on an H100;
// 7.3 TB/s of DRAM.
constexpr Rates kB200Rates = {2.0, 64, 9400, 3950};

// Estimated cycles of one candidate.
inline double estimate(const Plan& plan, int64_t rows, int64_t n, int64_t k_steps, int num_sms, const Rates& rates) {
  constexpr double kFill = 3000, kReduce = 3000;
  const int64_t pairs = (rows + 128 * plan.pair - 1) / (128 * plan.pair);
  const int64_t tiles = pairs * ((n + plan.columns - 1) / plan.columns);
  const int64_t slots = std::max(num_sms / (plan.pair * plan.splits), 1);
  const int64_t waves = (tiles + slots - 1) / slots;
  const double busy = static_cast<double>(std::min(tiles, slots) * plan.pair * plan.splits);
  const double step_bytes = 128 * 128 + plan.columns * 128.0 / plan.pair;
  const double step =
      std::max({rates.column * plan.columns, step_bytes / rates.l2_per_sm, step_bytes * busy / rates.l2});
  const double steps = static_cast<double>((k_steps + plan.splits - 1) / plan.splits);
  const double compute = static_cast<double>(waves) * (steps * step + kFill);
  const double stream = static_cast<double>(n * k_steps) * 128 / rates.dram + kFill;
  return std::max(compute, stream) + (plan.splits > 1 ? kReduce : 0);
}

// Tiles hold whole groups of `granule` columns, which divides 256.
inline Plan choose_plan(int64_t rows, int64_t n, int64_t k_steps, int granule, int num_sms, const Rates& rates) {
  Plan best;
  for (int columns : kColumnChoices) {
    if (columns % granule != 0) continue;
    for (int pair = 1; pair <= (rows > 128 ? 2 : 1); ++pair) {
      for (int splits = 1; splits <= 4; splits *= 2) {
        Plan plan{columns, pair, splits};
        const int64_t tiles = (rows + 128 * pair - 1) / (128 * pair) * ((n + columns - 1) / columns);
        // Parts of K only where the SMs would not be filled: a cluster with a second tile would wait for its sums.
        if (splits > 1 && (tiles * pair * splits > num_sms || k_steps / splits < kMinSteps)) continue;
        plan.cycles = estimate(plan, rows, n, k_steps, num_sms, rates);
        if (best.columns == 0 || plan.cycles < best.cycles) best = plan;
      }
    }
  }
  return best;
}

}  // namespace dflash::many_rows

// How a GEMM of many rows is cut into tiles: a score for each candidate, the lowest wins. A step of K is 128 bytes, 64
// of bf16, 128 of e4m3 or 256 of e2m1, and the tensor cores take as many cycles for any.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dflash::many_rows {

struct Plan {
  int columns = 0;  // BN
  int pair = 1;     // row tiles that share W through multicast: 1 or 2
  int splits = 1;   // parts of K, one block each, added up over the cluster
  int across = 1;   // column tiles that share A through multicast: 1 or 2
  double cycles = 0.0;
  int blocks() const { return pair * splits * across; }
};

constexpr int kColumnChoices[] = {64, 96, 128, 160, 192, 256};
constexpr int64_t kMinSteps = 8;    // steps of K that a part keeps, so that its pipeline fills
constexpr int64_t kMaxCluster = 4;  // blocks of 8 fit some parts of the chip once where there are SMs for two

// What a candidate is judged by; bytes are per cycle.
struct Rates {
  double column;  // cycles that the tensor cores of an SM take for a step of K of [128, 1]
  double l2;      // operands from L2 to all SMs together
  double dram;    // W comes from there, once
  bool shares_a;  // the kernels know of column tiles that share A
};

// Fitted to the times of up to 30 candidates for 54 GEMMs on an H200: tools/plan_regret.py. An H100 has the same SMs
// and slower memory (about 1750); its choices with these were not measured.
constexpr Rates kHopperRates = {4.1, 4660, 2500, true};

// A B200 at 1.85 GHz as published, nothing measured: 4096 multiply-adds of bf16 a cycle and SM; L2 to an SM as on an
// H100; 7.3 TB/s of DRAM.
constexpr Rates kB200Rates = {2.0, 6280, 3950, false};

// Estimated cycles of one candidate. Of the two bounds the smaller one is not wholly hidden behind the larger.
inline double estimate(const Plan& plan, int64_t rows, int64_t n, int64_t k_steps, int num_sms, const Rates& rates) {
  constexpr double kFill = 1640, kClusterFill = 900, kStep = 31, kEpilogue = 8.3, kUnhidden = 0.23;
  const int blocks = plan.blocks();
  const int64_t pairs = (rows + 128 * plan.pair - 1) / (128 * plan.pair);
  const int64_t tiles = pairs * ((n + plan.columns * plan.across - 1) / (plan.columns * plan.across));
  // Clusters of four leave some SMs of every part of the chip without one.
  const int64_t slots = std::max(blocks == 4 ? num_sms * 30 / 132 : num_sms / blocks, 1);
  const int64_t waves = (tiles + slots - 1) / slots;
  const double busy = static_cast<double>(std::min(tiles, slots) * blocks);
  const double step_bytes =
      128 * static_cast<double>(std::min<int64_t>(rows, 128)) / plan.across + plan.columns * 128.0 / plan.pair;
  const double step = std::max(rates.column * plan.columns + kStep, step_bytes * busy / rates.l2);
  const double steps = static_cast<double>((k_steps + plan.splits - 1) / plan.splits);
  const double tile_end = plan.columns * kEpilogue;
  const double fill = kFill + (blocks > 1 ? kClusterFill : 0);
  const double compute = static_cast<double>(waves) * (steps * step + tile_end) + fill;
  const double stream = static_cast<double>(n * k_steps) * 128 / rates.dram + fill;
  return std::max(compute, stream) + kUnhidden * std::min(compute, stream);
}

// Tiles hold whole groups of `granule` columns, which divides 256, `narrowest` to `widest`. counted: how many rows are
// live is known on the device only. Where there are several row tiles, blocks of a cluster share W; with one row tile,
// or counted rows, which come in small boxes, they share A where the kernels can (measured, not understood: counted
// rows are a sixth faster so, others a little slower).
inline Plan choose_plan(int64_t rows, int64_t n, int64_t k_steps, int granule, int num_sms, const Rates& rates,
                        int narrowest, int widest, bool counted) {
  Plan best;
  const bool share_a = rates.shares_a && (counted || rows <= 128);
  const int most_across = share_a ? 2 : 1, most_pairs = !share_a && rows > 128 ? 2 : 1;
  for (int columns : kColumnChoices) {
    if (columns < narrowest || columns > widest || columns % granule != 0) continue;
    for (int pair = 1; pair <= most_pairs; ++pair) {
      for (int across = 1; across <= most_across; ++across) {
        for (int splits = 1; splits <= 4; splits *= 2) {
          Plan plan{columns, pair, splits, across};
          if (plan.blocks() > kMaxCluster) continue;
          const int64_t pairs = (rows + 128 * pair - 1) / (128 * pair);
          const int64_t tiles = pairs * ((n + columns * across - 1) / (columns * across));
          // Parts of K only where the SMs would not be filled: a cluster with a second tile would wait for its sums.
          if (splits > 1 && (tiles * plan.blocks() > num_sms || k_steps / splits < kMinSteps)) continue;
          plan.cycles = estimate(plan, rows, n, k_steps, num_sms, rates);
          if (best.columns == 0 || plan.cycles < best.cycles) best = plan;
        }
      }
    }
  }
  return best;
}

}  // namespace dflash::many_rows

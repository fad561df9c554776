// Sizes of one drafter pass and what follows from them: the number of attention splits and the workspace's layout.
#pragma once

#include <algorithm>
#include <cstdint>

#include "smxx/attention/params.h"

namespace dflash::draft {

// What the four products of a layer multiply.
enum class Products { kBf16, kFp8, kNvfp4 };

struct DraftSizes {
  int64_t batch = 0;         // B
  int64_t block_size = 0;    // T
  int64_t hidden = 0;        // H
  int64_t intermediate = 0;  // I
  int64_t q_heads = 0;       // Hq
  int64_t kv_heads = 0;      // Hkv
  int64_t head_dim = 0;      // D
  Products products = Products::kBf16;

  int64_t tokens() const { return batch * block_size; }
  int64_t qkv_width() const { return (q_heads + 2 * kv_heads) * head_dim; }
};

// Blocks of threads that the attention aims at by cutting the keys: two waves on any current part (2 x 132 SMs).
constexpr int64_t kWantedBlocks = 264;

// Blocks of one request with its keys whole.
inline int64_t attention_blocks(const DraftSizes& s) {
  const int64_t rows = s.block_size * (s.q_heads / s.kv_heads);
  return s.kv_heads * ((rows + attention::kRowTile - 1) / attention::kRowTile);
}

inline int64_t attention_splits(const DraftSizes& s) {
  if (s.batch == 0) return 1;
  return std::clamp<int64_t>(kWantedBlocks / (s.batch * attention_blocks(s)), 1, attention::kMaxSplits);
}

// The most splits, summed over the requests, that this batch or any smaller one has; 0: none is split. So that the
// workspace of a batch serves every smaller one.
inline int64_t most_partial_requests(const DraftSizes& s) {
  const int64_t wanted = kWantedBlocks / attention_blocks(s);  // bounds B * splits wherever splits > 1
  return wanted > 1 ? std::min(s.batch * attention::kMaxSplits, wanted) : 0;
}

// Byte offsets; every part starts at a multiple of 256 bytes.
struct WorkspacePlan {
  int64_t x = 0;              // [B * T, H] bf16, the residual stream
  int64_t normed = 0;         // [B * T, H] bf16
  int64_t qkv = 0;            // [B * T, (Hq + 2 * Hkv) * D] bf16: also the block's own keys and values
  int64_t attended = 0;       // [B * T, Hq * D] bf16
  int64_t activated = 0;      // [B * T, I] bf16
  int64_t partial_out = 0;    // [B, Hkv, splits, T * G, D] fp32
  int64_t partial_stats = 0;  // [B, Hkv, splits, T * G, 2] fp32
  int64_t codes = 0;          // not bf16: [B * T, K of the widest product], the input of the product under way
  int64_t row_scales = 0;     // not bf16: [B * T] fp32
  int64_t blocks = 0;         // nvfp4: its scales of groups, as of quantize::QuantizeParams
  int64_t bytes = 0;
  int64_t splits = 1;
};

inline WorkspacePlan plan_workspace(const DraftSizes& s) {
  WorkspacePlan plan;
  plan.splits = attention_splits(s);
  auto take = [&plan](int64_t bytes) {
    const int64_t offset = plan.bytes;
    plan.bytes += (bytes + 255) / 256 * 256;
    return offset;
  };
  const int64_t tokens = s.tokens();
  const int64_t partial_rows = most_partial_requests(s) * s.block_size * s.q_heads;
  plan.x = take(tokens * s.hidden * 2);
  plan.normed = take(tokens * s.hidden * 2);
  plan.qkv = take(tokens * s.qkv_width() * 2);
  plan.attended = take(tokens * s.q_heads * s.head_dim * 2);
  plan.activated = take(tokens * s.intermediate * 2);
  plan.partial_out = take(partial_rows * s.head_dim * 4);
  plan.partial_stats = take(partial_rows * 2 * 4);
  const int64_t widest = std::max({s.hidden, s.q_heads * s.head_dim, s.intermediate});
  if (s.products != Products::kBf16) {
    plan.codes = take(s.products == Products::kFp8 ? tokens * widest : tokens * widest / 2);
    plan.row_scales = take(tokens * 4);
  }
  if (s.products == Products::kNvfp4) plan.blocks = take((tokens + 127) / 128 * ((widest + 63) / 64) * 512);
  plan.bytes = std::max<int64_t>(plan.bytes, 256);
  return plan;
}

}  // namespace dflash::draft

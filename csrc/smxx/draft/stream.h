// Plain parameters of draft_forward for at most 64 rows as one kernel over packed weights; see stream.cuh.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/exchange.h"
#include "common/int_view.h"
#include "smxx/draft/plan.h"
#include "smxx/stream/schedule.h"

namespace dflash::draft {

constexpr int kMaxStreamLayers = 64;
constexpr int kStreamQueryRows = 64;  // query rows of one unit of the attention
constexpr int kMaxStreamSplits = 128;

// Kinds of stages; a unit's stage is kKinds * layer + kind (dflash_kernels/draft_plan.py).
enum Kind { kQkv, kOut, kGateUp, kDown, kAttend, kEmbed, kFinal, kKinds };

struct StreamLayer {
  const uint16_t* k = nullptr;  // [S, Hkv, D], slots strided
  const uint16_t* v = nullptr;
  int64_t k_slot_stride = 0;  // elements
  int64_t v_slot_stride = 0;
  int64_t num_slots = 0;
  int32_t window = 0;  // 0: none
  int32_t causal = 0;
};

// The ranks of a tensor-parallel drafter, each with its part of heads, MLP features and vocabulary; see stream.cuh.
struct StreamRanks : Peers {
  bool one_device = false;             // simulated ranks: they are all on this device
  int64_t vocab = 0, vocab_start = 0;  // of all ranks; embed_weight holds rows vocab_start .. of it
};

// An exchange holds fp32 sums [out, down][from rank][row tile of H][token 64][128], then bf16 embedding rows
// [token 64][H].
constexpr int kSlotPieces = stream::kSlotFloats / 4;  // of 16 bytes

inline int64_t exchange_words(int64_t world, int64_t hidden) {
  return 2 * world * ((hidden + stream::kTileRows - 1) / stream::kTileRows) * stream::kSlotFloats +
         stream::kMaxTokens * hidden / 2;
}

struct StreamDraftParams {
  stream::StreamParams stream;
  StreamRanks ranks;
  int batch = 0, block_size = 0, hidden = 0, intermediate = 0, q_heads = 0, kv_heads = 0;
  int rotary_dim = 0, num_layers = 0;
  int splits = 1;     // parts the keys of a request are cut into
  int row_tiles = 1;  // of kStreamQueryRows of the T * G query rows of a KV head
  int units = 0;      // of the attention of a layer: batch * kv_heads * splits * row_tiles
  int64_t vocab = 0, max_positions = 0, rows = 0, width = 0;
  IntView block_ids, positions;            // [B, T]
  IntView prefix_lens, req_pool_indices;   // [B]
  IntView req_to_token;                    // [rows, width]
  const uint16_t* embed_weight = nullptr;  // [V, H]
  const uint16_t* input_norm = nullptr;    // [L, H]
  const uint16_t* qkv_bias = nullptr;      // [L, (Hq + 2 * Hkv) * D] or nullptr
  const uint16_t* q_norm = nullptr;        // [L, D] or nullptr
  const uint16_t* k_norm = nullptr;
  const uint16_t* o_bias = nullptr;     // [L, H] or nullptr
  const uint16_t* post_norm = nullptr;  // [L, H]
  const uint16_t* final_norm = nullptr;
  const float* cos_sin = nullptr;  // [max_positions, rotary_dim]
  float eps = 1e-6f, scale = 1.0f;

  uint16_t* x = nullptr;          // [B * T, H], the residual stream
  uint16_t* weighted = nullptr;   // [B * T, H], x times the weights of the norm that follows
  uint16_t* qkv = nullptr;        // [B * T, (Hq + 2 * Hkv) * D], q and k normed and rotated
  uint16_t* attended = nullptr;   // [B * T, Hq * D]
  uint16_t* activated = nullptr;  // [B * T, I]
  float* squares = nullptr;       // [B * T, row tiles of H]: sums of 128 squares of x
  // [splits, B * T, Hq, D + 4]: a split's output, not yet divided by the sum, the maximum (times log2 e), the sum, two
  // words of padding. On their way as parts of sums are: kNothing until written, and again when read.
  float* attention_parts = nullptr;
  uint16_t* out = nullptr;  // [B * T, H]
  StreamLayer layers[kMaxStreamLayers];
};

inline int64_t stream_row_tiles(const DraftSizes& s) {
  return (s.block_size * (s.q_heads / s.kv_heads) + kStreamQueryRows - 1) / kStreamQueryRows;
}

inline int64_t stream_splits(const DraftSizes& s, int64_t blocks) {
  if (s.batch == 0) return 1;
  return std::clamp<int64_t>(blocks / (s.batch * s.kv_heads * stream_row_tiles(s)), 1, kMaxStreamSplits);
}

// Slots that hold the attention's parts of any batch: a block has kStreamQueryRows query rows of one split at most, or
// there is one split of all query rows. They follow those of the products.
inline int64_t stream_attention_slots(int64_t q_heads, int64_t head_dim, int64_t blocks) {
  const int64_t rows = std::max(blocks, q_heads) * stream::kMaxTokens;
  return (rows * (head_dim + 4) + stream::kSlotFloats - 1) / stream::kSlotFloats;
}

// Byte offsets; every part starts at a multiple of 256 bytes.
struct StreamWorkspacePlan {
  int64_t x = 0, weighted = 0, qkv = 0, attended = 0, activated = 0, squares = 0;
  int64_t bytes = 0;
};

// Grows with the batch.
inline StreamWorkspacePlan plan_stream_workspace(const DraftSizes& s) {
  StreamWorkspacePlan plan;
  auto take = [&plan](int64_t bytes) {
    const int64_t offset = plan.bytes;
    plan.bytes += (bytes + 255) / 256 * 256;
    return offset;
  };
  const int64_t tokens = s.tokens();
  plan.x = take(tokens * s.hidden * 2);
  plan.weighted = take(tokens * s.hidden * 2);
  plan.qkv = take(tokens * s.qkv_width() * 2);
  plan.attended = take(tokens * s.q_heads * s.head_dim * 2);
  plan.activated = take(tokens * s.intermediate * 2);
  plan.squares = take(tokens * ((s.hidden + stream::kTileRows - 1) / stream::kTileRows) * 4);
  plan.bytes = std::max<int64_t>(plan.bytes, 256);
  return plan;
}

inline bool is_stream_head_dim(int64_t head_dim) { return head_dim == 64 || head_dim == 128; }

}  // namespace dflash::draft

// Plain parameters of chain verification; filled by csrc/api/verify.cpp, read by the CPU and CUDA implementations.
#pragma once

#include <cstdint>

#include "common/exchange.h"
#include "common/host_device.h"
#include "common/int_view.h"

namespace dflash::verify {

constexpr int kMaxBlockSize = 32;  // T: one warp holds a block
// Largest vocabulary of verify_block_sampled on CUDA: a row must fit in the shared memory of a cluster.
constexpr int kMaxSampledVocab = 450560;

// verify_block and argmax_logits count tiles of at least kTileElements of a row in 32 bits.
constexpr int kTileElements = 1024;
constexpr int64_t kMaxTiles = (int64_t{1} << 31) - 1;

enum class LogitType : int { kFloat32, kBFloat16, kFloat16 };

// Target logits [B, T, V]; the vocabulary is contiguous, strides in elements.
struct Logits {
  const void* data = nullptr;
  int64_t stride_request = 0;
  int64_t stride_row = 0;
  LogitType type = LogitType::kFloat32;
};

struct Outputs {
  int32_t* accept_lens = nullptr;   // [B]
  int32_t* commit_lens = nullptr;   // [B]
  int64_t* bonus_ids = nullptr;     // [B]
  int64_t* out_tokens = nullptr;    // [B, T]
  int64_t* new_seq_lens = nullptr;  // [B]
};

// Device scratch of verify_block from logits and argmax_logits: B * (2 T + 2) words, zero before the call and zero
// after it.
struct Workspace {
  uint64_t* words = nullptr;
  int64_t batch = 0;
  int block_size = 0;

  static DFLASH_HOST_DEVICE int64_t size(int64_t batch, int64_t block_size) { return batch * (2 * block_size + 2); }
  // Lazily, in the first B words: blocks of the grid that have left; half a word for each request, T - j for the first
  // row j that is known to mismatch, 0 if none is.
  DFLASH_HOST_DEVICE uint32_t* blocks_left() const { return reinterpret_cast<uint32_t*>(words); }
  DFLASH_HOST_DEVICE uint32_t* known_end(int64_t b) const { return reinterpret_cast<uint32_t*>(words) + 1 + b; }
  // What is known of the rows of a request.
  DFLASH_HOST_DEVICE unsigned long long* state(int64_t b) const { return word(batch + b); }
  // Two words for each row: what is known of it; the second one for rows of millions only.
  DFLASH_HOST_DEVICE unsigned long long* row(int64_t b, int j) const {
    return word(2 * batch + 2 * (b * block_size + j));
  }

 private:
  DFLASH_HOST_DEVICE unsigned long long* word(int64_t i) const {
    return reinterpret_cast<unsigned long long*>(words) + i;
  }
};

// Device scratch of verify_block_sampled. The front of the tensor, `words` and `keys`, is zero before the call and zero
// after it; `scratch`, at its end, has any content. So a tensor may serve smaller batches, blocks and vocabularies too,
// and verify_block: what one call leaves in its scratch is never in the front part of another.
struct SampledWorkspace {
  static constexpr int kKeyElements = 256;  // logits whose largest is one key of a row
  static constexpr int kMaxKept = 256;      // tokens of a row that the top-k path can hold
  static constexpr int kRowHeader = 4;      // words: RowStats, how many tokens the list has, and one for alignment
  static constexpr int kRowWords = kRowHeader + kMaxKept;  // the header, then the list of the row's tokens

  uint64_t* words = nullptr;
  uint32_t* keys = nullptr;     // 16-byte aligned
  uint64_t* scratch = nullptr;  // 16-byte aligned
  int64_t batch = 0;
  int block_size = 0;
  int64_t row_keys = 0;

  // 32-bit keys of a row: of whole runs of kKeyElements, in 16s, and four for what is left at its ends.
  static int64_t keys_of_row(int64_t vocab_size) {
    return (vocab_size + 16 * kKeyElements - 1) / (16 * kKeyElements) * 16 + 4;
  }
  static int64_t front_words(int64_t batch, int64_t block_size) { return batch * (2 * block_size + 2) + 2; }
  // One more, so that the keys can start at a multiple of 16 bytes; scratch likewise.
  static int64_t front_size(int64_t batch, int64_t block_size, int64_t vocab_size) {
    return front_words(batch, block_size) + 1 + batch * block_size * keys_of_row(vocab_size) / 2;
  }
  static int64_t scratch_size(int64_t batch, int64_t block_size) { return batch * (block_size * kRowWords + 1) + 1; }

  // ---- zero between calls: 2 + B (T + 3) words, and the keys ----
  // Requests that the top-k path leaves to the cluster path, and clusters that have ended.
  DFLASH_HOST_DEVICE unsigned long long* left_count() const { return word(0); }
  DFLASH_HOST_DEVICE unsigned long long* exits() const { return word(1); }
  // Top-k path: bit j: row j is done; bit 32 + j: it ends the accepted prefix.
  DFLASH_HOST_DEVICE unsigned long long* progress(int64_t b) const { return word(2 + b); }
  // Top-k path: tiles of the row that were read; in the high half: how many of them prove that it ends the prefix.
  DFLASH_HOST_DEVICE unsigned long long* tiles_read(int64_t b, int j) const {
    return word(2 + batch + b * block_size + j);
  }
  // Cluster path: rows that have arrived; T - j for the smallest j known to end the accepted prefix, 0: none known.
  DFLASH_HOST_DEVICE unsigned long long* arrivals(int64_t b) const { return word(2 + batch * (block_size + 1) + b); }
  DFLASH_HOST_DEVICE unsigned long long* stop(int64_t b) const { return word(2 + batch * (block_size + 2) + b); }

  // Top-k path: the row's keys. 0: not there yet.
  DFLASH_HOST_DEVICE uint32_t* keys_of(int64_t b, int j) const { return keys + (b * block_size + j) * row_keys; }

  // ---- any content ----
  DFLASH_HOST_DEVICE unsigned long long* row(int64_t b, int j) const {
    return reinterpret_cast<unsigned long long*>(scratch) + (b * block_size + j) * kRowWords;
  }
  // Request i of those left to the cluster path.
  DFLASH_HOST_DEVICE unsigned long long* left(int64_t i) const {
    return reinterpret_cast<unsigned long long*>(scratch) + batch * block_size * kRowWords + i;
  }

 private:
  DFLASH_HOST_DEVICE unsigned long long* word(int64_t i) const {
    return reinterpret_cast<unsigned long long*>(words) + i;
  }
};

// Whether rows past a request's first mismatch are skipped once that is known.
enum class Lazy : int { kAuto = -1, kOff = 0, kOn = 1 };

struct BlockParams {
  int64_t batch = 0;
  int block_size = 0;   // T
  int vocab_size = 0;   // V; 0 when target_ids is given
  IntView candidates;   // [B, T]
  IntView target_ids;   // [B, T], or data == nullptr: take the argmax of logits
  Logits logits;        // [B, T, V]
  IntView prefix_lens;  // [B]
  Lazy lazy = Lazy::kAuto;
  Workspace workspace;  // CUDA, from logits
  Outputs out;
};

struct SampledParams {
  int64_t batch = 0;
  int block_size = 0;                  // T
  int vocab_size = 0;                  // V
  IntView candidates;                  // [B, T]
  Logits logits;                       // [B, T, V]
  IntView prefix_lens;                 // [B]
  const float* temperature = nullptr;  // [B]; 0: greedy
  IntView top_k;                       // [B]; <= 0 or >= V: off
  const float* top_p = nullptr;        // [B]; >= 1: off
  const float* min_p = nullptr;        // [B]; <= 0: off
  const int64_t* seeds = nullptr;      // [B]
  const int64_t* offsets = nullptr;    // [B]
  // The draft's distribution q, sparse: draft_width (id, probability) pairs for each of the T - 1 draft tokens.
  // draft_probs == nullptr: all mass on the candidate.
  int draft_width = 0;                     // Kd
  IntView draft_ids;                       // rows b * (T - 1) + j, columns k
  const float* draft_probs = nullptr;      // [B, T - 1, Kd] contiguous
  const int32_t* token_bitmask = nullptr;  // [B, T, ceil(V / 32)] contiguous; bit 1: allowed
  const float* logit_bias = nullptr;       // [B, V] contiguous
  bool block_rule = false;
  SampledWorkspace workspace;  // CUDA
  Outputs out;
};

// Row-wise argmax of [N, V] logits, ids counted from vocab_start.
struct ArgmaxParams {
  int64_t rows = 0;
  int vocab_size = 0;
  int64_t vocab_start = 0;
  Logits logits;            // stride_request: from row to row
  int64_t* ids = nullptr;   // [N]
  float* values = nullptr;  // [N]
  Workspace workspace;      // CUDA; batch N, block_size 1
};

// The best (value, id) of S shards for each of N rows.
struct MergeParams {
  int64_t shards = 0;
  int64_t rows = 0;
  const int64_t* shard_ids = nullptr;   // [S, N] contiguous
  const float* shard_values = nullptr;  // [S, N] contiguous
  int64_t* ids = nullptr;               // [N]
  float* values = nullptr;              // [N]
};

// The same over ranks, of each of which this is one (merge_ranks.cu). Ids fit 32 bits.
struct MergeRanksParams {
  Peers peers;
  int rows = 0;
  const int64_t* ids = nullptr;  // [N], of this rank
  const float* values = nullptr;
  int64_t* out_ids = nullptr;
  float* out_values = nullptr;
};

constexpr int kMostMergedRows = 1024;
constexpr int kMergeCounterWords = 4;
// [launch % 2][rank][row] pairs of value and id; the number of launches.
DFLASH_HOST_DEVICE constexpr int merge_exchange_words(int world) {
  return 2 * world * kMostMergedRows * 2 + kMergeCounterWords;
}

}  // namespace dflash::verify

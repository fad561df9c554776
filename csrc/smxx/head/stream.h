// Plain parameters of lm_head_argmax for at most 64 rows as one kernel over packed weights; see stream.cu.
#pragma once

#include <cstdint>

#include "smxx/stream/schedule.h"

namespace dflash::head {

// Kinds of units (dflash_kernels/head_stream.py).
enum StreamStage { kScore, kPublish, kChoose };

struct StreamHeadParams {
  stream::StreamParams stream;
  const uint16_t* hidden = nullptr;    // [N, H], bf16, N <= 64
  int64_t hidden_stride = 0;           // elements between rows
  int rows = 0;                        // N
  int hidden_size = 0;                 // H
  int vocab = 0;                       // V, rows of W
  const uint16_t* bias = nullptr;      // [V] or nullptr
  const int64_t* token_ids = nullptr;  // [V], what row v stands for; nullptr: v
  int64_t vocab_start = 0;
  unsigned long long* best = nullptr;  // [blocks, 64] scratch: keys of what each block has seen
  int64_t* ids = nullptr;              // [N]
  float* values = nullptr;             // [N]
};

}  // namespace dflash::head

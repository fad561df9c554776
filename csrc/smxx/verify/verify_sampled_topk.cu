// Sampled verification of requests that keep few tokens of a row: greedy ones, and those with 1 <= top-k <= 64.
//
//   p_j(v) = softmax((logits[b, j, v] + bias[b, v]) / temperature), masked, top-k, then top-p, then min-p
//   token rule: x_{j+1} accepted iff u_j q_j(x_{j+1}) < p_j(x_{j+1}); block rule: common/accept.h
//   bonus at accept_len: a draw from max(scale p - q, 0), after all T - 1 drafts from p
//
// Floors. Bytes: the rows up to the first that ends the accepted prefix, once: 4.9 MB for 16 rows of V = 151936 in
// bfloat16, 1.2 us at an H200's 4.2 TB/s; 37 us for all rows of 32 blocks, 15 us for the needed ones where 6.5 tokens
// are committed. Arithmetic: a third of an instruction for each element. What sets the time of one block, and adds some
// 10 us to many, is the chain behind the last bytes: count, keys, groups, vectors, accept test, draw, and the next
// launch.
//
// The bound. The k-th largest of the maxima of *groups* of 256 neighbouring logits is no larger than the k-th largest
// logit. So one 32-bit key a group (594 a row) tells which groups, 20-odd, can hold one of the k tokens, and only these
// are read again, from L2. Nothing is sorted, and a row's distribution is a list of k tokens and a few more.
//
// Partition. A warp is the unit of everything; after the start no barrier joins warps. A row is cut into tiles of 16
// groups (8 KB of a 16-bit row; half of that with a bias or a mask, or where there are fewer tiles than warps). All
// tiles of all rows, the block position outermost, are units 0, 1, 2, ..; unit n belongs to block n % gridDim, one
// block an SM, of which fifteen warps read (120 KB under way) and take the next unit off a counter. A warp leaves the
// keys of its tile in the workspace and counts it; the one that counts the last tile of a row *completes* the row, the
// others read on. Completing: keys -> largest -> bound -> groups -> vectors that reach the bound -> tokens in the order
// of ids -> top-k, top-p, min-p, total -> does the row end the accepted prefix? -> one bit or two to the request's
// progress word. The warp whose bit makes the rows up to the first ending one complete draws the bonus and writes the
// outputs.
//
// Lazy. What counts is how long after a rejection rows behind it are still asked for: in the 10 us that completing a
// row takes while others read, 130 rows go by. So it is not the complete row that tells. A tile with a logit above the
// draft token's bounds the token's probability (proves_end); where that bound already rejects, the first tile of the
// row to know it, as its count's answer says, sets the row's bit. The sixteenth warp of a block does nothing but
// listen: it copies the progress words into shared memory, where the others look. (All of these words lie in a few
// lines. When each warp looked for itself, at every tile, half of the SMs waited 10 us for an answer.) Tiles of rows
// behind a rejection are left out, or not counted if they are there already; such a row is never completed, which
// nobody waits for.
//
// Order of memory. A release waits for all that its SM has under way, 8 us and more, so no tile has one. A key is its
// own flag: keys are zero before the launch and nothing that is written is zero, so who completes a row reads its keys
// until all are there, however late they come after their count; all accesses are relaxed. A row's list and numbers are
// read by another warp only if rows before it are completed later, or by the block rule. Then they are written, and a
// fence stands before the atomic that sets the row's bit; the warp that sees the bit in its own atomic's answer has a
// fence behind it. Otherwise the warp that completes the row draws from what it has, and needs no order.
//
// What is left to the cluster path (verify_block_sampled.cu, the next launch): requests without top-k or with more than
// 64, found by their parameters; and requests one of whose rows, up to the first that ends the prefix, has more than
// 256 tokens (or groups) at its bound: flat rows, and ties. Such a row counts as one that ends the prefix until then.
// The next launch also sets the front of the workspace, words and keys, to zero again.
//
// Shared memory: 256 tokens of 16 bytes, 256 vectors and 256 groups for each of 15 warps, 83 KB, and a word a request.
#include <algorithm>

#include "common/cuda_check.h"
#include "common/divisor.h"
#include "smxx/verify/launch.h"
#include "smxx/verify/sampled.cuh"

namespace dflash::verify {
namespace {

constexpr int kReaders = 15;  // warps that read; one more listens
constexpr int kThreads = 32 * (kReaders + 1);
// 16-byte loads of a lane that are in flight together. Bias and mask are loads too, and need the registers.
template <bool kEdit>
constexpr int kLoads = kEdit ? 8 : 16;
constexpr int kMostHeard = 8192;        // requests of which a block has a word in shared memory
constexpr unsigned kListenPause = 500;  // ns
constexpr uint32_t kNoElement = 1;      // key of a group beyond the row's end: 0 is a key that is not there yet
constexpr int kMaxTopK = 64;
constexpr int kKept = SampledWorkspace::kMaxKept;
constexpr int kQuads = 14;                      // 128 keys a warp holds in registers with each
constexpr int kBoundBits = 12;                  // of a depth, by which the bound is found: 1/4096 of 44 octaves or more
constexpr unsigned long long kTooMany = ~0ull;  // tokens of a row's list
static_assert(kMaxTopK <= kKept, "the tokens of a row without ties must fit");
static_assert(kMaxSampledVocab / SampledWorkspace::kKeyElements + 20 <= kQuads * 128, "a warp holds the keys of a row");

// Groups of 256 elements: kVectors loads of a warp.
template <LogitType kType>
constexpr int kVectors = SampledWorkspace::kKeyElements / 32 / Element<kType>::kPerVector;

// How rows are cut: tiles of `loads` loads of a warp.
struct Tiling {
  uint32_t units;  // tiles of all rows
  int loads;
  Divisor tiles;  // of a row
  Divisor batch;
};

struct Token {
  uint32_t depth, id;
  uint64_t weight;
};

struct WarpMemory {
  Token tokens[kKept];
  uint32_t vectors[kKept];
  uint16_t groups[kKept];
};

// Tile `tile` of row (b, j); b < 0: there is none.
struct Place {
  int b;
  int j;
  int tile;
};

// Unit k of this block.
__device__ __forceinline__ Place place_of(const Tiling& tiling, unsigned k) {
  const uint32_t unit = blockIdx.x + gridDim.x * k;
  if (unit >= tiling.units) return Place{-1, 0, 0};
  const uint32_t row = tiling.tiles.divide(unit), j = tiling.batch.divide(row);
  return Place{static_cast<int>(row - j * tiling.batch.value), static_cast<int>(j),
               static_cast<int>(unit - row * tiling.tiles.value)};
}

// A row in vectors of 16 bytes, with the elements before and behind them: its edges.
template <LogitType kType>
struct Row {
  static constexpr int kPerVector = Element<kType>::kPerVector;
  const typename Element<kType>::Bits* data;
  int head, vectors, vocab_size;

  __device__ Row(const SampledParams& p, int64_t b, int j)
      : data(logits_row<kType>(p.logits, b, j)),
        head(unaligned_head(data, p.vocab_size)),
        vectors((p.vocab_size - head) / kPerVector),
        vocab_size(p.vocab_size) {}

  __device__ uint4 vector(int i) const { return __ldg(reinterpret_cast<const uint4*>(data + head) + i); }
  __device__ int vector_id(int i) const { return head + i * kPerVector; }
  // The edge element of a lane, -1: none. Those before the vectors have the lower half of the lanes.
  __device__ int edge_id(int lane) const {
    if (lane < 16) return lane < head ? lane : -1;
    const int id = vector_id(vectors) + lane - 16;
    return id < vocab_size ? id : -1;
  }
};

__device__ __forceinline__ bool is_greedy(const SampledParams& p, int64_t b) { return !(p.temperature[b] > 0.0f); }

__device__ __forceinline__ bool takes_topk_path(const SampledParams& p, int64_t b) {
  const int64_t k = p.top_k.at(b);
  return is_greedy(p, b) || (k >= 1 && k <= kMaxTopK && k < p.vocab_size);
}

// What a block has heard of the requests, a word each: bit 0: it is left to the clusters; bit 1 + i: row i is known to
// end the accepted prefix. Requests beyond kMostHeard are looked up where the news is.
struct Heard {
  const SampledParams& p;
  uint32_t* words;  // shared

  __device__ __forceinline__ int count() const { return static_cast<int>(min(p.batch, int64_t{kMostHeard})); }

  __device__ __forceinline__ uint32_t ends(int b) const {
    return static_cast<uint32_t>(load_relaxed(p.workspace.progress(b)) >> 32) << 1;
  }

  __device__ __forceinline__ void start() const {
    for (int b = threadIdx.x; b < count(); b += kThreads) words[b] = takes_topk_path(p, b) ? 0 : 1;
  }

  // Called by a warp, the only one that writes by now.
  __device__ __forceinline__ void listen() const {
    for (int b = threadIdx.x % 32; b < count(); b += 32) {
      store_relaxed_shared(words + b, ends(b) | (load_relaxed_shared(words + b) & 1));
    }
    pause(kListenPause);
  }

  __device__ __forceinline__ uint32_t of(int b) const {
    if (b < kMostHeard) return load_relaxed_shared(words + b);
    return ends(b) | (takes_topk_path(p, b) ? 0 : 1);
  }

  static __device__ __forceinline__ bool is_needed(uint32_t word, int j) { return (word & ((2u << j) - 1)) == 0; }
  static __device__ __forceinline__ bool is_end(uint32_t word, int j) { return j < 31 && (word >> (j + 1) & 1) != 0; }
};

// Bias and mask on the elements of one vector.
template <int kCount>
__device__ __forceinline__ void edit(const SampledParams& p, int64_t b, int j, int id, float (&x)[kCount]) {
  if (p.logit_bias != nullptr) {
    const float* bias = p.logit_bias + b * p.vocab_size + id;
    if ((reinterpret_cast<uintptr_t>(bias) & 15) == 0) {
#pragma unroll
      for (int e = 0; e < kCount; e += 4) {
        const float4 add = __ldg(reinterpret_cast<const float4*>(bias + e));
        x[e] += add.x, x[e + 1] += add.y, x[e + 2] += add.z, x[e + 3] += add.w;
      }
    } else {
#pragma unroll
      for (int e = 0; e < kCount; ++e) x[e] += __ldg(bias + e);
    }
  }
  if (p.token_bitmask != nullptr) {
    const int64_t words = (p.vocab_size + 31) / 32;
    const int32_t* mask = p.token_bitmask + (b * p.block_size + j) * words + (id >> 5);
    uint64_t bits = static_cast<uint32_t>(__ldg(mask));
    if ((id & 31) + kCount > 32) bits |= static_cast<uint64_t>(static_cast<uint32_t>(__ldg(mask + 1))) << 32;
    bits >>= id & 31;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (((bits >> e) & 1) == 0) x[e] = __int_as_float(0xff800000);
    }
  }
}

// The elements of a vector, edited, and the largest of them (NaN if there is one).
template <LogitType kType, bool kEdit>
__device__ __forceinline__ void vector_values(const SampledParams& p, int64_t b, int j, int id, const uint4& v,
                                              float (&x)[Element<kType>::kPerVector]) {
  Element<kType>::unpack(v, x);
  if constexpr (kEdit) edit(p, b, j, id, x);
}

template <LogitType kType, bool kEdit>
__device__ __forceinline__ float vector_max(const SampledParams& p, int64_t b, int j, int id, const uint4& v) {
  if constexpr (!kEdit) return Element<kType>::max_of(v);
  float x[Element<kType>::kPerVector];
  vector_values<kType, kEdit>(p, b, j, id, v, x);
#pragma unroll
  for (int e = 1; e < Element<kType>::kPerVector; ++e) x[0] = max_nan(x[0], x[e]);
  return x[0];
}

template <LogitType kType, bool kEdit>
__device__ __forceinline__ float edge_value(const SampledParams& p, int64_t b, int j, const Row<kType>& row, int id) {
  const float value = Element<kType>::value(row.data[id]);
  return kEdit ? masked_logit(p, b, j, id, value) : value;
}

__device__ __forceinline__ uint32_t warp_min(uint32_t value) { return ~__reduce_max_sync(kFullWarp, ~value); }

// How many of the lanes before this one, in all, if this one has `count` (below 2^kBits); the warp's total is added to
// `total`.
template <int kBits>
__device__ __forceinline__ int warp_places(unsigned count, int lane, int& total) {
  int before = total;
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) {
    const unsigned lanes = __ballot_sync(kFullWarp, (count >> bit) & 1);
    before += __popc(lanes & ((1u << lane) - 1)) << bit;
    total += __popc(lanes) << bit;
  }
  return before;
}

// Of `keys`, those of a row, four of a lane in each; the last key of the row but three is that of its edges.
struct Keys {
  uint4 quads[kQuads];
  int count;  // quads of the row

  // All tiles have been counted; a key of 0 is still on its way.
  __device__ Keys(const uint32_t* keys, int count, int lane) : count(count) {
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        quads[q] = make_uint4(0, 0, 0, 0);
        if (q * 32 + lane < count) quads[q] = load_relaxed(reinterpret_cast<const uint4*>(keys) + q * 32 + lane);
      }
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const uint4& quad = quads[q];
        missing |= q * 32 + lane < count && (quad.x == 0 || quad.y == 0 || quad.z == 0 || quad.w == 0);
      }
    } while (__ballot_sync(kFullWarp, missing) != 0);
  }

  // Calls body(key) for each, or body(quad, index of the quad).
  template <typename Body>
  __device__ __forceinline__ void each(Body body) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (q * 32 >= count) break;
      body(quads[q].x), body(quads[q].y), body(quads[q].z), body(quads[q].w);
    }
  }
  template <typename Body>
  __device__ __forceinline__ void each_quad(int lane, Body body) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (q * 32 >= count) break;
      body(quads[q], q * 32 + lane);
    }
  }
};

// The first token whose key is `max_key`, the largest of the row.
template <LogitType kType, bool kEdit>
__device__ uint32_t first_largest(const SampledParams& p, int64_t b, int j, const Row<kType>& row, Keys& keys,
                                  uint32_t max_key, bool in_edges, int lane) {
  uint32_t group = kOut;
  keys.each_quad(lane, [&](const uint4& quad, int index) {
    const uint32_t key[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int c = 3; c >= 0; --c) {
      if (key[c] == max_key && index != keys.count - 1) group = min(group, static_cast<uint32_t>(4 * index + c));
    }
  });
  group = warp_min(group);
  uint32_t id = kOut;
  if (group != kOut) {
#pragma unroll
    for (int u = 0; u < kVectors<kType>; ++u) {
      const int i = static_cast<int>(group) * kVectors<kType> * 32 + u * 32 + lane;
      if (i >= row.vectors) continue;
      float x[Row<kType>::kPerVector];
      vector_values<kType, kEdit>(p, b, j, row.vector_id(i), row.vector(i), x);
#pragma unroll
      for (int e = 0; e < Row<kType>::kPerVector; ++e) {
        if (order_key(x[e]) == max_key) id = min(id, static_cast<uint32_t>(row.vector_id(i) + e));
      }
    }
  }
  if (in_edges) {
    const int edge = row.edge_id(lane);
    if (edge >= 0 && order_key(edge_value<kType, kEdit>(p, b, j, row, edge)) == max_key) {
      id = min(id, static_cast<uint32_t>(edge));
    }
  }
  return warp_min(id);
}

// Replaces the keys by depths, and finds one within which there are at least k groups: so at least k tokens too.
__device__ __forceinline__ uint32_t find_bound(Keys& keys, const Depths& depths, float max, uint32_t k) {
  keys.each([&](uint32_t& key) {
    key = key <= kNegInfOrderKey ? kOut : depths.depth(max, order_value(key));  // or no element, whose key is lower
  });
  uint32_t prefix = 0;
#pragma unroll 1
  for (uint32_t bit = 1u << 31; bit >= 1u << (32 - kBoundBits); bit >>= 1) {
    const uint32_t limit = prefix | bit;
    uint32_t below = 0;
    keys.each([&](uint32_t depth) { below += depth < limit; });
    if (__reduce_add_sync(kFullWarp, below) < k) prefix = limit;
  }
  return min(prefix | ((1u << (32 - kBoundBits)) - 1), kOut - 1);
}

// Lists the tokens with depth <= bound in the order of ids. Returns how many there are; more than kKept: too many, and
// the list is of no use.
template <LogitType kType, bool kEdit>
__device__ int collect(const SampledParams& p, int64_t b, int j, const Row<kType>& row, Keys& keys,
                       const Depths& depths, float max, uint32_t bound, WarpMemory& memory, int lane) {
  constexpr int kPerVector = Row<kType>::kPerVector;
  int groups = 0;
  keys.each_quad(lane, [&](const uint4& quad, int index) {
    const uint32_t depth[4] = {quad.x, quad.y, quad.z, quad.w};
    unsigned hits = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) hits |= (depth[c] <= bound && index != keys.count - 1) ? 1u << c : 0u;
    int place = warp_places<3>(__popc(hits), lane, groups);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if ((hits >> c) & 1) {
        if (place < kKept) memory.groups[place] = static_cast<uint16_t>(4 * index + c);
        ++place;
      }
    }
  });
  if (groups > kKept) return groups;
  __syncwarp();

  const int edge = row.edge_id(lane);
  uint32_t edge_depth = kOut;
  if (edge >= 0) edge_depth = depths.depth(max, edge_value<kType, kEdit>(p, b, j, row, edge));

  int vectors = 0;
#pragma unroll 1
  for (int first = 0; first < groups; first += kLoads<kEdit> / kVectors<kType>) {
    uint4 v[kLoads<kEdit>];
    const auto place_of = [&](int u) {
      const int at = first + u / kVectors<kType>;
      return at < groups ? (memory.groups[at] * kVectors<kType> + u % kVectors<kType>)*32 + lane : row.vectors;
    };
#pragma unroll
    for (int u = 0; u < kLoads<kEdit>; ++u) {
      const int place = place_of(u);
      v[u] = make_uint4(0, 0, 0, 0);
      if (place < row.vectors) v[u] = row.vector(place);
    }
#pragma unroll
    for (int u = 0; u < kLoads<kEdit>; ++u) {
      if (first + u / kVectors<kType> >= groups) break;
      const int place = place_of(u);
      bool hit = false;
      if (place < row.vectors) {
        hit = depths.depth(max, vector_max<kType, kEdit>(p, b, j, row.vector_id(place), v[u])) <= bound;
      }
      const int at = warp_places<1>(hit, lane, vectors);
      if (hit && at < kKept) memory.vectors[at] = place;
    }
  }
  if (vectors > kKept) return vectors;
  __syncwarp();

  int count = 0;
  const auto list_edges = [&](bool mine) {
    const bool hit = mine && edge_depth <= bound;
    const int at = warp_places<1>(hit, lane, count);
    if (hit && at < kKept) memory.tokens[at] = Token{edge_depth, static_cast<uint32_t>(edge), 0};
  };
  list_edges(lane < 16);
#pragma unroll 1
  for (int first = 0; first < vectors; first += 32) {
    unsigned hits = 0;
    uint32_t depth[kPerVector];
    int id = 0;
    if (first + lane < vectors) {
      const int i = static_cast<int>(memory.vectors[first + lane]);
      id = row.vector_id(i);
      float x[kPerVector];
      vector_values<kType, kEdit>(p, b, j, id, row.vector(i), x);
#pragma unroll
      for (int e = 0; e < kPerVector; ++e) {
        depth[e] = depths.depth(max, x[e]);
        hits |= depth[e] <= bound ? 1u << e : 0u;
      }
    }
    int at = warp_places<4>(__popc(hits), lane, count);
#pragma unroll
    for (int e = 0; e < kPerVector; ++e) {
      if ((hits >> e) & 1) {
        if (at < kKept) memory.tokens[at] = Token{depth[e], static_cast<uint32_t>(id + e), 0};
        ++at;
      }
    }
  }
  list_edges(lane >= 16);
  __syncwarp();
  return count;
}

// The k-th smallest depth of the list, counting equal ones; its largest if there are fewer.
__device__ __forceinline__ uint32_t kth_depth(const Token* tokens, int count, uint32_t k, uint32_t bound, int lane) {
  if (static_cast<uint32_t>(count) <= k) return bound;
  if (count <= 64) {  // every token counts those that are not beyond it
    uint32_t cut = kOut;
#pragma unroll 1
    for (int mine = lane; mine < 64; mine += 32) {
      const uint32_t depth = mine < count ? tokens[mine].depth : kOut;
      uint32_t within = 0;
#pragma unroll 4
      for (int i = 0; i < count; ++i) within += tokens[i].depth <= depth;
      if (within >= k) cut = min(cut, depth);
    }
    return warp_min(cut);
  }
  uint32_t low = 0;
  while (low < bound) {
    const uint32_t middle = low + (bound - low) / 2;
    uint32_t within = 0;
#pragma unroll 1
    for (int i = lane; i < count; i += 32) within += tokens[i].depth <= middle;
    if (__reduce_add_sync(kFullWarp, within) >= k) {
      bound = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// The smallest depth within which lies at least `need` of the list's mass.
__device__ __forceinline__ uint32_t depth_of_mass(const Token* tokens, int count, uint64_t need, int lane) {
  uint32_t cut = kOut;
#pragma unroll 1
  for (int mine = lane; mine < count; mine += 32) {
    const uint32_t depth = tokens[mine].depth;
    uint64_t mass = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) mass += tokens[i].depth <= depth ? tokens[i].weight : 0;
    if (mass >= need) cut = min(cut, depth);
  }
  return warp_min(cut);
}

// Drops the tokens beyond `cut`. Returns how many are left and adds up their weights, in all lanes.
__device__ __forceinline__ int drop_beyond(Token* tokens, int count, uint32_t cut, uint64_t& mass, int lane) {
  int kept = 0;
  mass = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    Token token{kOut, 0, 0};
    if (first + lane < count) token = tokens[first + lane];
    const bool keep = token.depth <= cut;
    __syncwarp();
    const int at = warp_places<1>(keep, lane, kept);  // never behind where it was
    if (keep) {
      tokens[at] = token;
      mass += token.weight;
    }
  }
  __syncwarp();
  mass = warp_sum(mass);
  return kept;
}

// The list and the distribution of row (b, j); `count` becomes the list's. More than kKept: nothing is known.
template <LogitType kType, bool kEdit>
__device__ __forceinline__ RowStats distribution(const SampledParams& p, int64_t b, int j, int quads,
                                                 const Depths& depths, WarpMemory& memory, int& count, int lane) {
  const Row<kType> row(p, b, j);
  const bool greedy = is_greedy(p, b);
  const auto top_k = static_cast<uint32_t>(p.top_k.at(b));
  const float top_p = p.top_p[b], min_p = p.min_p[b];
  Keys keys(p.workspace.keys_of(b, j), quads, lane);
  uint32_t max_key = 0;
  keys.each([&](uint32_t key) { max_key = key > max_key ? key : max_key; });
  max_key = __reduce_max_sync(kFullWarp, max_key);
  count = 0;
  if (greedy || max_key >= kPosInfOrderKey || max_key <= kNegInfOrderKey) {
    // Greedy; or a NaN or +inf on top, or nothing allowed at all.
    bool in_edges = false;
    keys.each_quad(lane, [&](const uint4& quad, int index) { in_edges |= index == quads - 1 && quad.x == max_key; });
    in_edges = __ballot_sync(kFullWarp, in_edges) != 0;
    return RowStats{0.0f, first_largest<kType, kEdit>(p, b, j, row, keys, max_key, in_edges, lane), 0, false};
  }
  RowStats stats{order_value(max_key), 0, 0, false};
  const uint32_t bound = find_bound(keys, depths, stats.max, top_k);
  count = collect<kType, kEdit>(p, b, j, row, keys, depths, stats.max, bound, memory, lane);
  if (count > kKept) return stats;
  Token* tokens = memory.tokens;
  stats.cut = kth_depth(tokens, count, top_k, bound, lane);
  for (int i = lane; i < count; i += 32) tokens[i].weight = depths.weight(tokens[i].depth);
  count = drop_beyond(tokens, count, stats.cut, stats.total, lane);
  if (top_p < 1.0f) {
    const uint64_t total = stats.total;
    auto need = static_cast<uint64_t>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
    need = need < 1 ? 1 : need > total ? total : need;
    stats.cut = depth_of_mass(tokens, count, need, lane);
    count = drop_beyond(tokens, count, stats.cut, stats.total, lane);
  }
  if (min_p > 0.0f) {
    stats.cut = depths.depth_of_ratio(min_p, stats.cut);
    count = drop_beyond(tokens, count, stats.cut, stats.total, lane);
  }
  return stats;
}

// The list of row (b, j), as its warp left it in the workspace.
__device__ __forceinline__ int load_list(const SampledParams& p, int64_t b, int j, RowStats& row, WarpMemory& memory,
                                         int lane) {
  const unsigned long long* words = p.workspace.row(b, j);
  row = RowStats::load(words);
  const auto count = static_cast<int>(__ldcg(words + 2));
  for (int i = lane; i < count; i += 32) {
    const unsigned long long word = __ldcg(words + SampledWorkspace::kRowHeader + i);
    memory.tokens[i] = Token{static_cast<uint32_t>(word >> 32), static_cast<uint32_t>(word), 0};
  }
  return count;
}

// Draws the bonus of request b from row accept.accept_len, whose `count` tokens `memory` holds, and writes the outputs.
template <LogitType kType>
__device__ __forceinline__ void draw_bonus(const SampledParams& p, int64_t b, const Accept& accept, const RowStats& row,
                                           int count, const Depths& depths, WarpMemory& memory, int lane) {
  const int j = accept.accept_len;
  const auto write = [&](int64_t bonus) {
    write_outputs(p.out, p.candidates, p.prefix_lens, p.block_size, b, lane, Accepted{j, bonus});
  };
  if (row.point()) return write(row.cut);
  Token* tokens = memory.tokens;
  const int64_t draft_row = b * (p.block_size - 1) + j;
  const auto is_drafted = [&](uint32_t id) {
    if (p.draft_probs == nullptr) return p.candidates.at(b, j + 1) == id;
    bool found = false;
    for (int k = 0; k < p.draft_width; ++k) {
      found |= p.draft_probs[draft_row * p.draft_width + k] > 0.0f && p.draft_ids.at(draft_row, k) == id;
    }
    return found;
  };
  bool subtract = j < p.block_size - 1;
#pragma unroll 1
  for (int attempt = 0; attempt < 2; ++attempt) {
    uint64_t base = 0, tail = 0;
    for (int i = lane; i < count; i += 32) {
      tokens[i].weight = subtract && is_drafted(tokens[i].id) ? 0 : depths.weight(tokens[i].depth);
      base += tokens[i].weight;
    }
    base = warp_sum(base);
    if (subtract && p.draft_probs != nullptr) {
      for (int k = lane; k < p.draft_width; k += 32) {
        tail += pair_residual<kType>(p, b, j, k, row, accept.scale, depths);
      }
      tail = warp_sum(tail);
    }
    const uint64_t total = base + tail;
    subtract = false;  // nothing left: target and draft agree here, draw from the target
    if (total == 0) continue;
    // u <= 1 - 2^-24, so the target is below the total, rounded or not.
    const auto target = static_cast<uint64_t>(uniforms(p, b, j).sample * static_cast<double>(total));
    if (target >= base) {
      uint64_t cumulative = base;
      int k = -1;
      while (cumulative <= target) cumulative += pair_residual<kType>(p, b, j, ++k, row, accept.scale, depths);
      return write(p.draft_ids.at(draft_row, k));
    }
    uint64_t before = 0;
    for (int first = 0; first < count; first += 32) {
      const int i = first + lane;
      const uint64_t inclusive = before + warp_inclusive_scan(i < count ? tokens[i].weight : 0);
      const unsigned found = __ballot_sync(kFullWarp, inclusive > target);
      if (found != 0) return write(__shfl_sync(kFullWarp, i < count ? tokens[i].id : 0, __ffs(found) - 1));
      before = __shfl_sync(kFullWarp, inclusive, 31);
    }
    return;
  }
}

// The first row that ends the accepted prefix, if all rows up to it are done; else -1.
__device__ __forceinline__ int ending_row(unsigned long long progress) {
  const int j = __ffs(static_cast<unsigned>(progress >> 32)) - 1;
  if (j < 0) return -1;
  const uint32_t needed = kFullWarp >> (31 - j);
  return (static_cast<uint32_t>(progress) & needed) == needed ? j : -1;
}

__device__ __forceinline__ void leave_to_clusters(const SampledWorkspace& workspace, int64_t b) {
  *workspace.left(static_cast<int64_t>(atomicAdd(workspace.left_count(), 1ull))) = b;
}

// All tiles of row (b, j) have been counted; `rival` is the key of its draft token's logit.
template <LogitType kType, bool kEdit>
__device__ __forceinline__ void complete_row(const SampledParams& p, int64_t b, int j, uint32_t rival, int quads,
                                             WarpMemory& memory, int lane) {
  const Depths depths(p.temperature[b]);
  int count = 0;
  RowStats stats = distribution<kType, kEdit>(p, b, j, quads, depths, memory, count, lane);
  const bool too_many = count > kKept;
  // Rows of the request: one lane's look, since those of two may differ.
  const auto done = __shfl_sync(kFullWarp, static_cast<uint32_t>(load_relaxed(p.workspace.progress(b))), 0);
  if (too_many || j == p.block_size - 1) {
    stats.stops = true;
  } else if (const int64_t guess = p.candidates.at(b, j + 1); is_greedy(p, b)) {
    stats.stops = guess != stats.cut;
  } else {
    double probability = guess == stats.cut ? 1.0 : 0.0;
    if (!stats.point()) {
      const uint32_t depth = depths.depth(stats.max, order_value(rival));
      const bool kept = guess >= 0 && guess < p.vocab_size && depth <= stats.cut;
      probability = static_cast<double>(kept ? depths.weight(depth) : 0) / static_cast<double>(stats.total);
    }
    stats.stops = p.block_rule ? probability == 0.0
                               : !accept_token(uniforms(p, b, j).accept, probability, draft_probability(p, b, j));
  }
  // Who else may draw from this row, or wants its numbers? None of those to come, by the token rule, if no row before
  // it is missing, or if it does not end the prefix.
  const bool by_block = p.block_rule && !is_greedy(p, b);
  const uint32_t missing = ~done & ((1u << j) - 1);
  if (by_block || (stats.stops && missing != 0)) {
    unsigned long long* words = p.workspace.row(b, j);
    if (lane == 0) {
      stats.store(words);
      words[2] = too_many ? kTooMany : static_cast<unsigned long long>(count);
    }
    if (!too_many) {
      for (int i = lane; i < count; i += 32) {
        words[SampledWorkspace::kRowHeader + i] =
            static_cast<unsigned long long>(memory.tokens[i].depth) << 32 | memory.tokens[i].id;
      }
    }
    __syncwarp();
    if (lane == 0) fence_device();
  }
  const unsigned long long bits = 1ull << j | (stats.stops ? 1ull << (32 + j) : 0);
  unsigned long long before = 0;
  if (lane == 0) before = atomicOr(p.workspace.progress(b), bits);
  before = __shfl_sync(kFullWarp, before, 0);
  const int last = ending_row(before | bits);
  if (last < 0 || ending_row(before) >= 0) return;

  if (by_block || last != j) {
    if (lane == 0) fence_device();
    __syncwarp();
  }
  if (last == j ? too_many : __ldcg(p.workspace.row(b, last) + 2) == kTooMany) {
    if (lane == 0) leave_to_clusters(p.workspace, b);
    return;
  }
  Accept accept{last, 1.0};
  if (by_block) accept = accept_block<kType>(p, b, lane, depths);
  if (accept.accept_len != j) {
    __syncwarp();
    count = load_list(p, b, accept.accept_len, stats, memory, lane);
  }
  draw_bonus<kType>(p, b, accept, stats, count, depths, memory, lane);
  __syncwarp();
}

// The lower half of the draft token that follows row j. If that is another token's, as the whole is beyond the
// vocabulary, the row ends the prefix anyway.
__device__ __forceinline__ uint32_t draft_token(const SampledParams& p, int64_t b, int j) {
  const int64_t offset = b * p.candidates.stride0 + (j + 1) * p.candidates.stride1;
  return static_cast<const uint32_t*>(p.candidates.data)[p.candidates.is_int64 ? 2 * offset : offset];
}

// q of the draft token that follows row j, summed by a warp.
__device__ __forceinline__ double warp_draft_probability(const SampledParams& p, int64_t b, int j, uint32_t guess,
                                                         int lane) {
  if (p.draft_probs == nullptr) return 1.0;
  const int64_t row = b * (p.block_size - 1) + j;
  double q = 0.0;
#pragma unroll 1
  for (int k = lane; k < p.draft_width; k += 32) {
    if (p.draft_ids.at(row, k) == guess) q += p.draft_probs[row * p.draft_width + k];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) q += __shfl_xor_sync(kFullWarp, q, offset);
  return q;
}

// Whether row (b, j) is certain to end the prefix, as one of its logits, with key `top`, is above the draft token's.
// With w the weight of the draft token if `top` were the row's largest: nothing else can make its weight larger, and
// the total has the largest's 2^44 beside it, so p <= w / (2^44 + w). The last bits of exponentials may be in any
// order: one unit and 2^-18 of w are far beyond them. A weight of zero is zero whatever the largest.
__device__ __forceinline__ bool proves_end(const SampledParams& p, int64_t b, int j, uint32_t guess, uint32_t rival,
                                           uint32_t top, int lane) {
  if (is_greedy(p, b) || top >= kPosInfOrderKey) return true;
  const Depths depths(p.temperature[b]);
  const uint64_t weight = depths.weight(depths.depth(order_value(top), order_value(rival)));
  if (weight == 0) return true;
  if (p.block_rule) return false;
  const double most = static_cast<double>(weight + 1), largest = static_cast<double>(1ull << kMassBits);
  const double chance = uniforms(p, b, j).accept * warp_draft_probability(p, b, j, guess, lane);
  return chance * (largest + most) >= most * (1.0 + 1.0 / (1 << 18));
}

template <LogitType kType, bool kEdit>
__global__ void __launch_bounds__(kThreads, 1)
    verify_topk_kernel(const __grid_constant__ SampledParams p, const __grid_constant__ Tiling tiling) {
  __shared__ unsigned next;  // unit of this block
  auto* memories = reinterpret_cast<WarpMemory*>(dynamic_shared());
  const Heard heard{p, reinterpret_cast<uint32_t*>(memories + kReaders)};
  grid_dependency_launch();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int groups_per_tile = tiling.loads / kVectors<kType>;
  const int quads = static_cast<int>(tiling.tiles.value) * groups_per_tile / 4 + 1;

  const auto take = [&] {
    unsigned k = 0;
    if (lane == 0) k = atomicAdd(&next, 1u);
    return __shfl_sync(kFullWarp, k, 0);
  };
  const auto take_needed = [&] {
    unsigned k = take();
    while (true) {
      const Place mine = place_of(tiling, k + static_cast<unsigned>(lane));
      const bool needed = mine.b < 0 || Heard::is_needed(heard.of(mine.b), mine.j);
      const unsigned lanes = __ballot_sync(kFullWarp, needed);
      if ((lanes & 1) != 0) break;
      // For the whole block: nobody has to look at those again.
      const unsigned from = k, unneeded = lanes == 0 ? 32 : static_cast<unsigned>(__ffs(lanes)) - 1;
      if (lane == 0) atomicMax(&next, from + unneeded);
      k = take();
      if (k - from < 32 && (lanes >> (k - from) & 1) != 0) break;
    }
    return place_of(tiling, k);
  };

  Place at = warp < kReaders ? place_of(tiling, static_cast<unsigned>(warp)) : Place{-1, 0, 0};
  uint4 v[kLoads<kEdit>];
  uint32_t guess;  // the draft token that the row is compared with
  uint32_t rival;  // its key; if there is none, one that no other is above
  const auto load = [&] {
    // Zero, or those of the last tile would have to be kept.
    guess = kOut;
    rival = kNanOrderKey;
#pragma unroll
    for (int u = 0; u < kLoads<kEdit>; ++u) v[u] = make_uint4(0, 0, 0, 0);
    if (at.b < 0) return;
    const Row<kType> row(p, at.b, at.j);
    if (at.j < p.block_size - 1) guess = draft_token(p, at.b, at.j);
    const int first = at.tile * tiling.loads * 32 + lane;
#pragma unroll
    for (int u = 0; u < kLoads<kEdit>; ++u) {
      if (u < tiling.loads && first + u * 32 < row.vectors) v[u] = row.vector(first + u * 32);
    }
    // Two trips, one behind the other, in the time that the tile takes.
    if (guess < static_cast<uint32_t>(p.vocab_size)) {
      rival = order_key(edge_value<kType, kEdit>(p, at.b, at.j, row, static_cast<int>(guess)));
    }
  };
  load();
  if (threadIdx.x == 0) next = kReaders;
  heard.start();
  __syncthreads();

  if (warp == kReaders) {
    while (__ballot_sync(kFullWarp, place_of(tiling, load_relaxed_shared(&next)).b >= 0) != 0) heard.listen();
  }
#pragma unroll 1
  while (at.b >= 0) {
    const Row<kType> row(p, at.b, at.j);
    const int first = at.tile * tiling.loads * 32 + lane;
    const bool is_last_tile = at.tile == static_cast<int>(tiling.tiles.value) - 1;
    // Each group's largest of a lane first, without a branch; then those of the warp, of which lane i keeps group i's.
    const int end = min(row.vectors, (at.tile + 1) * tiling.loads * 32);
    constexpr int kGroups = kLoads<kEdit> / kVectors<kType>;
    uint32_t largest[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      largest[g] = kNoElement;
#pragma unroll
      for (int w = g * kVectors<kType>; w < (g + 1) * kVectors<kType>; ++w) {
        const int i = first + w * 32;
        if constexpr (kEdit) {
          if (i >= end) continue;
        }
        const uint32_t best = order_key(vector_max<kType, kEdit>(p, at.b, at.j, row.vector_id(i), v[w]));
        const auto kept = static_cast<uint32_t>(opaque(static_cast<int>(best)));  // or it becomes a branch's
        largest[g] = max(largest[g], i < end ? kept : kNoElement);
      }
    }
    uint32_t key = kNoElement, top = kNoElement, edge_key = kNoElement;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const uint32_t group_key = __reduce_max_sync(kFullWarp, largest[g]);
      key = lane == g ? group_key : key;
      top = max(top, group_key);
    }
    if (is_last_tile) {
      const int edge = row.edge_id(lane);
      if (edge >= 0) edge_key = order_key(edge_value<kType, kEdit>(p, at.b, at.j, row, edge));
      edge_key = __reduce_max_sync(kFullWarp, edge_key);
      top = max(top, edge_key);
    }
    const uint32_t news = __shfl_sync(kFullWarp, heard.of(at.b), 0);
    if (Heard::is_needed(news, at.j)) {
      const bool proof =
          top > rival && !Heard::is_end(news, at.j) && proves_end(p, at.b, at.j, guess, rival, top, lane);
      uint32_t* keys = p.workspace.keys_of(at.b, at.j);
      if (lane < groups_per_tile) store_relaxed(keys + at.tile * groups_per_tile + lane, key);
      if (is_last_tile && lane < 4) store_relaxed(keys + 4 * (quads - 1) + lane, lane == 0 ? edge_key : kNoElement);
      uint32_t counted = 0;
      if (lane == 0) {
        const unsigned long long before =
            atomicAdd(p.workspace.tiles_read(at.b, at.j), 1ull | (proof ? 1ull << 32 : 0));
        if (proof && before >> 32 == 0) atomicOr(p.workspace.progress(at.b), 1ull << (32 + at.j));
        counted = static_cast<uint32_t>(before);
      }
      counted = __shfl_sync(kFullWarp, counted, 0);
      if (counted == tiling.tiles.value - 1) {
        complete_row<kType, kEdit>(p, at.b, at.j, rival, quads, memories[warp], lane);
      }
    }
    at = take_needed();
    load();
  }

  for (int64_t b = int64_t{blockIdx.x} * kThreads + threadIdx.x; b < p.batch; b += int64_t{gridDim.x} * kThreads) {
    if (!takes_topk_path(p, b)) leave_to_clusters(p.workspace, b);
  }
}

template <LogitType kType, bool kEdit>
void launch(const SampledParams& p, int sms, cudaStream_t stream) {
  constexpr int kMostBytes = kReaders * sizeof(WarpMemory) + kMostHeard * sizeof(uint32_t);
  cuda_check(
      cudaFuncSetAttribute(verify_topk_kernel<kType, kEdit>, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes),
      "verify_block_sampled");
  const int64_t groups = (p.vocab_size + SampledWorkspace::kKeyElements - 1) / SampledWorkspace::kKeyElements;
  const int64_t rows = p.batch * p.block_size;
  const auto tiles = [&](int loads) {
    const int per_tile = loads / kVectors<kType>;
    return (groups + per_tile - 1) / per_tile;
  };
  const int loads = rows * tiles(8) <= int64_t{kReaders} * sms ? 8 : kLoads<kEdit>;
  const Tiling tiling{static_cast<uint32_t>(rows * tiles(loads)), loads, Divisor(tiles(loads)), Divisor(p.batch)};
  const auto grid = static_cast<unsigned>(std::min<int64_t>(sms, tiling.units));
  const size_t bytes = kReaders * sizeof(WarpMemory) + std::min<int64_t>(p.batch, kMostHeard) * sizeof(uint32_t);
  verify_topk_kernel<kType, kEdit><<<grid, kThreads, bytes, stream>>>(p, tiling);
}

}  // namespace

void launch_verify_topk(const SampledParams& p, int sms, cudaStream_t stream) {
  const bool edited = p.logit_bias != nullptr || p.token_bitmask != nullptr;
  dispatch_logit_type(p.logits.type, [&](auto type) {
    constexpr LogitType kType = decltype(type)::value;
    edited ? launch<kType, true>(p, sms, stream) : launch<kType, false>(p, sms, stream);
  });
  cuda_check_launch("verify_block_sampled");
}

}  // namespace dflash::verify

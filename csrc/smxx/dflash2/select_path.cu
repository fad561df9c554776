// select_path: DFlash2's walk through the candidates of a block, one token a slot.
//
//   prev_0 = anchor;  for slot j = 0 .. G-1, candidate c = 0 .. Kd-1:
//     m[r]   = bf16( A[prev_j, r] * hidden[b, j, r] )                 A: predecessor codebook [V, R]
//     s[c]   = base_logits[b, j, c] + bf16( sum_r m[r] * B[id_c, r] )  B: successor codebook [V, R]
//     greedy: c* = argmax s (first NaN, first index on ties), q = 1 at c*
//     else:   q = softmax(s / temperature), c* drawn from q with uniforms[b, j]
//     path[b, j] = prev_{j+1} = id_{c*}
//
// Floors. Latency (B 1): 2 * G * Kd rows of 512 bytes (T 8: 115 KB) move in well under a microsecond; what there is, is
// the chain ids -> rows (two trips to memory), then G dependent steps (a dot product, a barrier, an argmax: some 0.3 us
// each). Throughput: G * Kd successor rows and as many predecessor rows a request at bandwidth (T 8, B 256: 29 MB).
// Only G predecessor rows a request are used, but which ones is known a step at a time: reading on demand would halve
// the bytes and put a trip to memory in every step.
//
// Partition. A CTA is a request, a warp a candidate, a lane 8 elements of the rank. Nothing of the walk depends on
// more than one barrier a step:
//   * lane j of warp c holds id, logit and uniform of slot j for the whole kernel;
//   * cp.async brings row A[id] and row B[id] of a warp's own candidate kRing slots ahead. A lane reads the 16 bytes it
//   copied
//     itself, so a wait is enough and no barrier belongs to the copies;
//   * before the barrier of step j each warp replaces its row A by the product m that step j + 1 would need if its
//     candidate won. After the barrier all warps read the winner's product and, from the Kd scores, all find the same
//     winner.
//
// Shared memory: successor[kRing][Kd][32] and predecessor[kRing][Kd][32] of 16 bytes (Kd 16: 96 KB, two CTAs on an SM;
// Kd 32: 192 KB), scores[2][32]. Hazards:
//   * scores[j % 2] is written before barrier j, read before barrier j + 1, written again after barrier j + 1;
//   * predecessor[i % kRing] is rewritten (product, step i, own lane) before barrier i, read by all warps before
//     barrier i + 1, refilled (cp.async) after barrier i + 1.
// Copy groups: group i < kRing carries rows of slot i; step j commits group kRing + j with B of slot j + kRing and A of
// slot j + kRing - 1. Step j needs B of slot j (group j) and A of slot j (group j, or j + 1 if refilled): with kRing +
// j groups committed, all but the newest kRing - 2 must have landed.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "common/ptx.cuh"
#include "smxx/dflash2/launch.h"

namespace dflash::dflash2 {
namespace {

constexpr int kWarp = 32;
constexpr int kRing = 6;  // slots of rows in flight
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kCheckThreads = 128;

struct alignas(16) Piece {  // a lane's 8 bf16 of a row
  uint32_t words[4];

  __device__ float low(int i) const { return __uint_as_float(words[i] << 16); }
  __device__ float high(int i) const { return __uint_as_float(words[i] & 0xffff0000u); }
};

constexpr size_t shared_bytes(int top_k) { return size_t{2} * kRing * top_k * kWarp * sizeof(Piece); }
static_assert(shared_bytes(kMaxTopK) + 2 * kWarp * sizeof(float) <= 232448, "shared memory of a CTA");
static_assert(kMaxRank == kWarp * kRankVector, "a lane holds one piece of a row");

// Copies 16 bytes, or writes zeros and reads nothing.
__device__ void copy_async(Piece* shared, const void* global, bool valid) {
  copy_async_16(shared, global, valid ? 16 : 0);
}

__device__ Piece multiply(const Piece& a, const Piece& b) {
  Piece product;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a.low(i) * b.low(i), a.high(i) * b.high(i));
    product.words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return product;
}

// Products of two bf16 are exact in float32, so fused or not is the same.
__device__ float dot(const Piece& a, const Piece& b) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(a.low(i), b.low(i), sum);
    sum = fmaf(a.high(i), b.high(i), sum);
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

struct Choice {
  int winner;  // the same in all lanes
  float prob;  // q of this lane's candidate
};

// Lane c holds the score of candidate c < top_k; all lanes call.
__device__ Choice choose(float score, int lane, int top_k, float temperature, float uniform) {
  const bool live = lane < top_k;
  if (temperature > 0.0f) {
    const float scaled = score / fmaxf(temperature, kMinTemperature);
    const uint32_t key = live ? order_key(scaled) : 0u;
    const uint32_t largest_key = __reduce_max_sync(kAllLanes, key);
    if (has_softmax(largest_key)) {
      const int holder = __ffs(__ballot_sync(kAllLanes, key == largest_key)) - 1;
      const float largest = __shfl_sync(kAllLanes, scaled, holder);
      const float mass = live ? expf(scaled - largest) : 0.0f;
      float total = 0.0f, cumulated = 0.0f;
#pragma unroll 4
      for (int c = 0; c < top_k; ++c) {
        total += __shfl_sync(kAllLanes, mass, c);
        if (c == lane) cumulated = total;
      }
      const unsigned reached = __ballot_sync(kAllLanes, live && uniform * total < cumulated);
      const unsigned positive = __ballot_sync(kAllLanes, mass > 0.0f);
      return Choice{reached != 0 ? __ffs(reached) - 1 : kWarp - 1 - __clz(positive), mass / total};
    }
  }
  const uint32_t key = live ? order_key(score) : 0u;  // every float's key is above 0
  const uint32_t largest_key = __reduce_max_sync(kAllLanes, key);
  const int winner = __ffs(__ballot_sync(kAllLanes, key == largest_key)) - 1;
  return Choice{winner, lane == winner ? 1.0f : 0.0f};
}

__global__ void __launch_bounds__(kMaxTopK* kWarp) select_path_kernel(SelectParams p) {
  extern __shared__ Piece rows[];
  __shared__ float scores[2][kWarp];
  const int64_t b = blockIdx.x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int slots = p.slots, top_k = p.top_k;
  Piece* const successor = rows;                            // [kRing][Kd][32]
  Piece* const predecessor = rows + kRing * top_k * kWarp;  // [kRing][Kd][32]
  const int element = lane * kRankVector;
  const bool holds = element < p.rank;

  const auto place = [&](int slot, int candidate) { return (slot % kRing * top_k + candidate) * kWarp + lane; };
  const auto row_of = [&](const void* codebook, int64_t id) {
    return static_cast<const __nv_bfloat16*>(codebook) + id * p.rank + element;
  };
  const auto known = [&](int64_t id) { return holds && id >= 0 && id < p.vocab_size; };
  const auto fetch = [&](Piece* shared, const void* codebook, int64_t id) {
    copy_async(shared, known(id) ? row_of(codebook, id) : codebook, known(id));
  };
  const auto load_hidden = [&](int slot) {
    if (slot >= slots || !holds) return Piece{};
    const auto* row = static_cast<const __nv_bfloat16*>(p.hidden) + p.hidden_offset(b, slot);
    return *reinterpret_cast<const Piece*>(row + element);
  };

  const bool in_path = lane < slots;
  const int64_t own_id = in_path ? p.candidate_at(b, lane, warp) : -1;
  const auto id_of = [&](int slot) { return __shfl_sync(kAllLanes, own_id, slot); };
#pragma unroll
  for (int slot = 0; slot < kRing; ++slot) {
    if (slot < slots) {
      const int64_t id = id_of(slot);
      fetch(successor + place(slot, warp), p.successors, id);
      if (slot + 1 < slots) fetch(predecessor + place(slot, warp), p.predecessors, id);
    }
    copy_async_commit();
  }
  const float own_logit = in_path ? p.logit_at(b, lane, warp) : 0.0f;
  const float temperature = p.temperature != nullptr ? p.temperature[b] : 0.0f;
  const float own_uniform = in_path && p.uniforms != nullptr ? p.uniforms[b * slots + lane] : 0.0f;
  const int64_t anchor = p.anchor_ids.at(b);
  const Piece anchor_row = known(anchor) ? *reinterpret_cast<const Piece*>(row_of(p.predecessors, anchor)) : Piece{};
  const Piece first_product = multiply(anchor_row, load_hidden(0));
  Piece next_hidden = load_hidden(1);

  int winner = 0;
  for (int slot = 0; slot < slots; ++slot) {
    copy_async_wait<kRing - 2>();
    const Piece product = slot == 0 ? first_product : predecessor[place(slot - 1, winner)];
    const float edge = dot(product, successor[place(slot, warp)]);
    if (slot + 1 < slots) {
      Piece& own = predecessor[place(slot, warp)];
      own = multiply(own, next_hidden);
      next_hidden = load_hidden(slot + 2);
    }
    const float logit = __shfl_sync(kAllLanes, own_logit, slot);
    if (lane == 0) scores[slot % 2][warp] = logit + round_to_bf16(edge);
    __syncthreads();

    const float score = lane < top_k ? scores[slot % 2][lane] : 0.0f;
    const float uniform = __shfl_sync(kAllLanes, own_uniform, slot);
    const Choice choice = choose(score, lane, top_k, temperature, uniform);
    winner = choice.winner;
    const int64_t id = id_of(slot);
    const int64_t out = b * slots + slot;
    if (warp == winner && lane == 0) p.path_ids[out] = id;
    if (warp == 0 && lane < top_k) p.draft_probs[out * top_k + lane] = choice.prob;

    if (slot + kRing < slots) fetch(successor + place(slot, warp), p.successors, id_of(slot + kRing));
    if (slot > 0 && slot + kRing < slots) {
      fetch(predecessor + place(slot - 1, warp), p.predecessors, id_of(slot + kRing - 1));
    }
    copy_async_commit();
  }
}

__global__ void __launch_bounds__(kCheckThreads) check_select_kernel(SelectParams p, unsigned long long* first) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kCheckThreads + threadIdx.x;
  if (b >= p.batch) return;
  const Fault fault = find_fault(p, b);
  if (fault != Fault::kNone) {
    atomicMin(first, static_cast<unsigned long long>(b) << 8 | static_cast<unsigned long long>(fault));
  }
}

}  // namespace

void launch_select_path(const SelectParams& params, cudaStream_t stream) {
  const size_t bytes = shared_bytes(params.top_k);
  cuda_check(cudaFuncSetAttribute(select_path_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes(kMaxTopK))),
             "select_path");
  select_path_kernel<<<static_cast<unsigned>(params.batch), params.top_k * kWarp, bytes, stream>>>(params);
  cuda_check_launch("select_path");
}

SelectFault check_select_cuda(const SelectParams& params, cudaStream_t stream) {
  constexpr unsigned long long kClean = ~0ull;
  unsigned long long* first = nullptr;
  unsigned long long found = kClean;
  cuda_check(cudaMallocAsync(reinterpret_cast<void**>(&first), sizeof(found), stream), "select_path");
  cuda_check(cudaMemsetAsync(first, 0xff, sizeof(found), stream), "select_path");
  const auto blocks = static_cast<unsigned>((params.batch + kCheckThreads - 1) / kCheckThreads);
  check_select_kernel<<<blocks, kCheckThreads, 0, stream>>>(params, first);
  cuda_check_launch("select_path");
  cuda_check(cudaMemcpyAsync(&found, first, sizeof(found), cudaMemcpyDeviceToHost, stream), "select_path");
  cuda_check(cudaFreeAsync(first, stream), "select_path");
  cuda_check(cudaStreamSynchronize(stream), "select_path");
  if (found == kClean) return SelectFault{};
  return SelectFault{static_cast<Fault>(found & 0xff), static_cast<int64_t>(found >> 8)};
}

}  // namespace dflash::dflash2

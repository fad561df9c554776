// Greedy verification from logits that reads, of each request, the rows up to the first mismatch and few more.
//
// Floor. With 6.5 tokens committed of 16 on average, 32 requests, V = 151936 in bfloat16: 208 of 512
// rows, 63 MB, 20 us.
//
// Partition. A unit is 16 KB of a row (four 16-byte vectors a thread), 19 a row. CTAs that stay, two an SM, claim
// units: a request has a cursor over its units in the order of rows, and a CTA goes round the requests that still need
// some. So all requests advance together, a dead request costs nothing but a look, and what is left is shared by all
// CTAs to the end. A fixed split of the rows would leave the CTAs of requests that stop early idle; one cursor for all
// would deal out the dead rows' units one by one, at 1 us each.
//
// Pipeline. kReaders threads read, a ring of kStages units (96 KB an SM in flight), each thread its own vectors; one
// more warp, the desk, claims and reports. One barrier a unit: before it the readers have put the maxima of unit n into
// shared memory and the desk has written down unit n + kStages; after it the readers start that unit's copies and the
// desk reports unit n and asks for the next claim and for the state of the requests. The claim is looked at one unit
// later, the answer to the report two units later, so the desk waits once a unit, for the release of its report and
// with it for what it asked. The first kStages units of a CTA are fixed by its number: bytes are asked for at once.
//
// Words (Workspace; zero between calls).
//   arrivals(b)  low half: units of request b claimed, beside the fixed ones; high half, request 0: CTAs that have left
//   stop(b)      bit j: row j is complete; bit 32 + j: and it ends the accepted prefix (or is the last row)
//   row(b, j)    the row's argmax_key so far; units that have reported
// The desk whose report completes a row compares it. The one that completes the last row up to the first that ends the
// prefix finds bits 0..m of stop(b) set for the first time: it writes the request's outputs. Rows behind may be
// complete or not, now or later; nobody looks. The last CTA to leave clears all words.
//
// Overshoot. Rows behind a mismatch that are read anyway: when a row's last unit arrives, the other CTAs have kStages
// units under way each, 132 * 2 * 3 * 16 KB = 13 MB in all, 43 rows, 1.3 a request of 32.
#include <algorithm>
#include <type_traits>

#include "common/cuda_check.h"
#include "common/order_key.h"
#include "common/ptx.cuh"
#include "smxx/verify/finish.cuh"
#include "smxx/verify/launch.h"
#include "smxx/verify/row_argmax.cuh"
#include "smxx/verify/row_reader.cuh"

namespace dflash::verify {
namespace {

constexpr int kReaders = 256;
constexpr int kReaderWarps = kReaders / 32;
constexpr int kThreads = kReaders + 32;
constexpr int kCtasPerSm = 2;
constexpr int kVectors = 4;  // of a thread in a unit
constexpr int kUnitVectors = kVectors * kReaders;
// Two stages are 64 KB an SM when both are under way, half of that just before a copy starts. More overshoots more.
constexpr int kStages = 3;
constexpr int kRingBytes = kStages * kUnitVectors * static_cast<int>(sizeof(uint4));

constexpr int kNone = -1;  // nothing was left to claim this time
constexpr int kEnd = -2;   // nor will be

struct Unit {
  int b;  // or kNone, kEnd
  int j;
  int piece;  // of the row
};

struct Claims {
  int pieces;  // of a row
  // kStages * gridDim units are fixed, not claimed: unit i of them is unit i / B of request i % B.
  int fixed_each;  // of every request,
  int fixed_more;  // and one more of the first requests

  __device__ __forceinline__ int fixed(int b) const { return fixed_each + (b < fixed_more ? 1 : 0); }
  __device__ __forceinline__ Unit unit(int b, int of_request) const {
    return Unit{b, of_request / pieces, of_request % pieces};
  }
};

// Rows 0..last_row(state) of a request decide; a later one may turn out not to.
__device__ __forceinline__ int last_row(uint64_t state, int block_size) {
  const int first = __ffs(static_cast<unsigned>(state >> 32));
  return first == 0 ? block_size - 1 : first - 1;
}

// All rows up to the first that ends the prefix are complete.
__device__ __forceinline__ bool is_decided(uint64_t state) {
  const unsigned ends = static_cast<unsigned>(state >> 32), complete = static_cast<unsigned>(state);
  const unsigned up_to_first = ends ^ (ends - 1);  // all bits if there is none
  return ends != 0 && (complete & up_to_first) == up_to_first;
}

// One warp's part in the pipeline. All lanes call all functions.
struct Desk {
  const BlockParams& p;
  const Claims& claims;
  const int lane;
  int b;                // the request asked, and the first of 32 looked at, one a lane
  bool claims_of_b;     // a claim was made, too
  int unneeded = 0;     // requests looked at in a row that need no more units
  unsigned ticket = 0;  // lane 0
  unsigned claimed = 0;
  uint64_t state = 0;
  // Of the last even and the last odd unit: its row, and the reports of that row before this one (lane 0).
  Unit reported[2] = {{kNone, 0, 0}, {kNone, 0, 0}};
  unsigned long long reports[2] = {};

  __device__ __forceinline__ Desk(const BlockParams& params, const Claims& rules, int first, bool claim)
      : p(params), claims(rules), lane(threadIdx.x % 32), b(first), claims_of_b(claim) {}

  // Request b + lane, cyclically; B or more: none.
  __device__ __forceinline__ int looked_at() const {
    const auto batch = static_cast<int>(p.batch);
    if (lane >= batch) return batch;
    return b < batch - lane ? b + lane : b - (batch - lane);
  }

  __device__ __forceinline__ void ask() {
    if (unneeded >= p.batch) return;
    const int request = looked_at();
    if (request < p.batch) {
      claimed = static_cast<unsigned>(__ldcg(p.workspace.arrivals(request)));
      state = __ldcg(p.workspace.stop(request));
    }
    if (lane == 0 && claims_of_b) ticket = static_cast<unsigned>(atomicAdd(p.workspace.arrivals(b), 1ull));
  }

  // The answers: a unit, and whom to ask next.
  __device__ __forceinline__ Unit next() {
    Unit unit{kNone, 0, 0};
    if (unneeded >= p.batch) {
      unit.b = kEnd;
      return unit;
    }
    const int request = looked_at();
    const bool valid = request < p.batch;
    const int needed = (last_row(state, p.block_size) + 1) * claims.pieces;
    const bool needs = valid && static_cast<int>(claimed) + claims.fixed(request) < needed;
    const unsigned needing = __ballot_sync(kFullWarp, needs);
    if (claims_of_b) {
      const int of_request = static_cast<int>(__shfl_sync(kFullWarp, ticket, 0)) + claims.fixed(b);
      if (of_request < __shfl_sync(kFullWarp, needed, 0)) unit = claims.unit(b, of_request);
    }
    const auto batch = static_cast<int>(p.batch);
    const unsigned others = needing & ~1u;
    int step = 0;
    claims_of_b = needing != 0;
    if (claims_of_b) {
      unneeded = 0;
      if (others != 0) step = __ffs(others) - 1;
    } else {
      step = min(32, batch);
      unneeded += step;
    }
    b = b < batch - step ? b + step : b - (batch - step);
    return unit;
  }

  template <int kParity>
  __device__ __forceinline__ void report(const Unit& unit, uint64_t key) {
    reported[kParity] = unit;
    if (unit.b < 0 || lane != 0) return;
    unsigned long long* words = p.workspace.row(unit.b, unit.j);
    atomicMax(words, static_cast<unsigned long long>(key));
    reports[kParity] = atomic_add_release(words + 1, 1);
  }

  // Once for each report.
  template <int kParity>
  __device__ __forceinline__ void settle() {
    if (reported[kParity].b < 0) return;
    const auto before = static_cast<int>(__shfl_sync(kFullWarp, reports[kParity], 0));
    if (before == claims.pieces - 1) complete_row(reported[kParity].b, reported[kParity].j);
  }

 private:
  __device__ __forceinline__ void complete_row(int request_b, int j) {
    const int block_size = p.block_size;
    fence_device();  // the reports of others
    const uint64_t key = __ldcg(p.workspace.row(request_b, j));
    const Request request = load_request(p.candidates, p.prefix_lens, block_size, request_b, lane);
    const int64_t guess = __shfl_sync(kFullWarp, request.guess, j);
    const bool ends = j == block_size - 1 || static_cast<int64_t>(argmax_index(key)) != guess;
    const uint64_t mine = uint64_t{1} << j | uint64_t{ends} << (32 + j);
    uint64_t before = 0;
    if (lane == 0) before = atomic_add_release(p.workspace.stop(request_b), mine);  // a row is completed once
    before = __shfl_sync(kFullWarp, before, 0);
    const uint64_t after = before | mine;
    if (is_decided(before) || !is_decided(after)) return;
    const int accept_len = last_row(after, block_size);
    uint64_t bonus_key = key;
    if (accept_len != j) {
      fence_device();  // and those that another desk knew to be complete
      bonus_key = __ldcg(p.workspace.row(request_b, accept_len));
    }
    write_outputs(p.out, request, block_size, request_b, lane, Accepted{accept_len, argmax_index(bonus_key)});
  }
};

template <LogitType kType>
__device__ __forceinline__ void copy_unit(const BlockParams& p, const Unit& unit, uint4* stage) {
  if (unit.b >= 0) {
    const Row<kType> row(p.logits, unit.b, unit.j, p.vocab_size);
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int place = u * kReaders + threadIdx.x, i = unit.piece * kUnitVectors + place;
      if (i < row.vectors) copy_async_16(stage + place, row.vector(i), 16);
    }
  }
  copy_async_commit();
}

// argmax_key of what this thread has of the unit; 0: nothing.
template <LogitType kType>
__device__ __forceinline__ uint64_t unit_argmax(const BlockParams& p, const Unit& unit, int pieces,
                                                const uint4* stage) {
  const Row<kType> row(p.logits, unit.b, unit.j, p.vocab_size);
  const int thread = threadIdx.x, first = unit.piece * kUnitVectors + thread;
  Best<kType> best;
  best.start(first);
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const int i = first + u * kReaders;
    if (i < row.vectors) best.take(stage[u * kReaders + thread], i);
  }
  uint64_t key = first < row.vectors ? best.key(row.head) : 0;
  if (unit.piece == 0) key = row.template with_scalars<true>(key, p.vocab_size, thread);
  if (unit.piece == pieces - 1) key = row.template with_scalars<false>(key, p.vocab_size, thread);
  return key;
}

template <LogitType kType>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) verify_lazy_kernel(BlockParams p, Claims claims) {
  constexpr int kUnits = kStages + 1;
  extern __shared__ uint4 ring[];
  __shared__ Unit units[kUnits];                   // unit n at n % kUnits
  __shared__ uint64_t warp_best[2][kReaderWarps];  // of even and odd units
  __shared__ bool last;
  const int thread = threadIdx.x, lane = thread % 32;
  const bool reads = thread < kReaders;
  const auto batch = static_cast<int>(p.batch), ctas = static_cast<int>(gridDim.x);

  const int first_claim = (kStages * ctas + static_cast<int>(blockIdx.x)) % batch;
  Desk desk(p, claims, first_claim, true);
  if (!reads) {
    if (lane < kStages) {
      const int i = lane * ctas + static_cast<int>(blockIdx.x);
      Unit unit = claims.unit(i % batch, i / batch);
      if (unit.j >= p.block_size) unit.b = kNone;
      units[lane] = unit;
    }
    desk.ask();
  }
  __syncthreads();
  if (reads) {
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) copy_unit<kType>(p, units[stage], ring + stage * kUnitVectors);
  }

  int stage = 0, now = 0, later = kStages;
  // One unit, even or odd. The parity is a constant, so that an answer on its way stays in its register. False: the
  // end.
  const auto step = [&](auto parity_constant) {
    constexpr int kParity = decltype(parity_constant)::value;
    const Unit unit = units[now];
    if (unit.b == kEnd) return false;
    if (reads) {
      copy_async_wait<kStages - 1>();
      const uint64_t key = unit.b < 0 ? 0 : unit_argmax<kType>(p, unit, claims.pieces, ring + stage * kUnitVectors);
      const uint64_t best = warp_max(key);
      if (lane == 0) warp_best[kParity][thread / 32] = best;
    } else {
      const Unit claimed = desk.next();
      if (lane == 0) units[later] = claimed;
    }
    __syncthreads();
    if (reads) {
      copy_unit<kType>(p, units[later], ring + stage * kUnitVectors);
    } else {
      desk.template settle<kParity>();
      desk.ask();
      desk.template report<kParity>(unit, warp_max(lane < kReaderWarps ? warp_best[kParity][lane] : 0));
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
    now = now + 1 == kUnits ? 0 : now + 1;
    later = later + 1 == kUnits ? 0 : later + 1;
    return true;
  };
#pragma unroll 1
  while (step(std::integral_constant<int, 0>{}) && step(std::integral_constant<int, 1>{})) {
  }

  if (!reads) {
    desk.template settle<0>();
    desk.template settle<1>();
    __syncwarp();
    if (lane == 0) {
      const uint64_t left = atomic_add_release(p.workspace.arrivals(0), uint64_t{1} << 32) >> 32;
      last = left == gridDim.x - 1;
    }
  }
  __syncthreads();
  if (!last) return;
  fence_device();
  const int64_t words = Workspace::size(p.batch, p.block_size);
  for (int64_t i = thread; i < words; i += kThreads) p.workspace.words[i] = 0;
}

template <LogitType kType>
void launch(const BlockParams& p, cudaStream_t stream) {
  const char* op = "verify_block";
  constexpr int kElements = kUnitVectors * Element<kType>::kPerVector;
  const int pieces = (p.vocab_size - 1) / kElements + 1;
  const int64_t units = p.batch * p.block_size * pieces;
  const auto ctas = static_cast<int>(std::min<int64_t>(units, kCtasPerSm * sm_count(op)));
  const auto batch = static_cast<int>(p.batch);
  const Claims claims{pieces, kStages * ctas / batch, kStages * ctas % batch};
  cuda_check(cudaFuncSetAttribute(verify_lazy_kernel<kType>, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes),
             op);
  verify_lazy_kernel<kType><<<static_cast<unsigned>(ctas), kThreads, kRingBytes, stream>>>(p, claims);
}

}  // namespace

void launch_verify_block_lazy(const BlockParams& p, cudaStream_t stream) {
  dispatch_logit_type(p.logits.type, [&](auto type) { launch<decltype(type)::value>(p, stream); });
}

}  // namespace dflash::verify

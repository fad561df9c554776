// Probe: how many tiles of 16 KB must one SM have under way for the full read bandwidth, and what does that cost
// everybody else? One persistent block an SM reads by bulk copies into a ring of 12 tiles, of which `limit` may be
// under way; another warp times single operations meanwhile. csrc/smxx/stream/stream.cuh quotes what came out.
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a tools/probes/stream_latency.cu -o stream_latency &&
//   ./stream_latency
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kTileBytes = 16384, kStages = 12, kConsumerWarps = 8, kThreads = 64 + 32 * kConsumerWarps;
constexpr int kOperations = 4, kSkipped = 4, kRounds = 60;

void check(cudaError_t error, int line) {
  if (error == cudaSuccess) return;
  std::printf("line %d: %s\n", line, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, __LINE__)

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ void init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}
__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra end;\nbra "
      "again;\n"
      "end:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ void copy(void* to, const void* from, uint64_t* barrier, uint64_t policy) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(kTileBytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(to)),
      "l"(from), "r"(kTileBytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
__device__ uint32_t now() {
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return static_cast<uint32_t>(time);
}

// times: [blocks][kOperations] ns, or nullptr. counters: a line of 128 bytes a block. memory: 4 KB a block.
__global__ void __launch_bounds__(kThreads, 1)
    stream(const uint8_t* weights, long tiles, bool contiguous, int limit, unsigned* counters, uint32_t* times,
           float* memory, float* never) {
  extern __shared__ __align__(1024) uint8_t ring[];
  __shared__ uint64_t full[kStages], empty[kStages];
  __shared__ volatile int stop;
  if (threadIdx.x == 0) {
    stop = 0;
    for (int i = 0; i < kStages; ++i) init(full + i, 1), init(empty + i, kConsumerWarps);
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const long blocks = gridDim.x, block = blockIdx.x;
  const long first = contiguous ? tiles * block / blocks : block, step = contiguous ? 1 : blocks;
  const long count = contiguous ? tiles * (block + 1) / blocks - first : (tiles - block + blocks - 1) / blocks;
  if (warp == 0) {
    if (lane != 0) return;
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    for (long i = 0; i < count; ++i) {
      const int at = i % kStages;
      if (i >= kStages) wait(empty + at, (i / kStages - 1) & 1);
      if (i >= limit) wait(full + (i - limit) % kStages, (i - limit) / kStages & 1);
      copy(ring + at * kTileBytes, weights + (first + i * step) * kTileBytes, full + at, policy);
    }
    stop = 1;
  } else if (warp <= kConsumerWarps) {
    uint32_t all = 0;
    for (long i = 0; i < count; ++i) {
      const int at = i % kStages;
      wait(full + at, i / kStages & 1);
      const uint8_t* tile = ring + at * kTileBytes + (warp - 1) * (kTileBytes / kConsumerWarps) + lane * 16;
#pragma unroll
      for (int j = 0; j < kTileBytes / kConsumerWarps / 512; ++j) {
        const uint4 v = *reinterpret_cast<const uint4*>(tile + j * 512);
        all += v.x ^ v.y ^ v.z ^ v.w;
      }
      __syncwarp();
      if (lane == 0) arrive(empty + at);
    }
    if (all == 12345678u) never[0] = all;
  } else if (times != nullptr) {
    unsigned* counter = counters + block * 32;
    float* own = memory + block * 1024 + lane;
    uint32_t sums[kOperations] = {};
    int round = 0;
    for (; !stop && round < kRounds; ++round) {
      uint32_t t[kOperations + 1] = {now()};
      unsigned old = atomicAdd(counter, 1u);
      if (old == 0xffffffffu) never[1] = 1;
      t[1] = now();
      const float value = __ldcg(own);
      if (value == 12345.0f) never[0] = value;
      t[2] = now();
      __stcg(own + 64 * (round & 7), value + 1);
      asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(1) : "memory");
      t[3] = now();
      __stcg(own + 64 * (round & 7), value + 2);
      asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(1) : "memory");
      if (old == 0xffffffffu) never[1] = 1;
      t[4] = now();
      if (round >= kSkipped) {
        for (int i = 0; i < kOperations; ++i) sums[i] += t[i + 1] - t[i];
      }
      __nanosleep(200);
    }
    if (lane == 0 && round > kSkipped) {
      for (int i = 0; i < kOperations; ++i) times[block * kOperations + i] = sums[i] / (round - kSkipped);
    }
  }
}

template <typename T>
T median(std::vector<T> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  const int blocks = device.multiProcessorCount;
  std::printf("%s, %d SMs\n", device.name, blocks);
  constexpr long kLarge = 1929379840L / kTileBytes * kTileBytes, kSmall = 252000000L / kTileBytes * kTileBytes;
  constexpr int kSets = 3;
  uint8_t* weights;
  unsigned* counters;
  uint32_t* times;
  float *memory, *never;
  CHECK(cudaMalloc(&weights, kSets * kLarge));
  std::vector<uint32_t> noise(1 << 22);
  for (auto& word : noise) word = static_cast<uint32_t>(std::rand());
  const long chunk = static_cast<long>(noise.size()) * 4;
  for (long at = 0; at + chunk <= kSets * kLarge; at += chunk) {
    CHECK(cudaMemcpy(weights + at, noise.data(), chunk, cudaMemcpyHostToDevice));
  }
  CHECK(cudaMalloc(&counters, blocks * 128));
  CHECK(cudaMemset(counters, 0, blocks * 128));
  CHECK(cudaMalloc(&memory, blocks * 4096));
  CHECK(cudaMemset(memory, 0, blocks * 4096));
  CHECK(cudaMalloc(&times, blocks * kOperations * 4));
  CHECK(cudaMalloc(&never, 8));
  CHECK(cudaFuncSetAttribute(stream, cudaFuncAttributeMaxDynamicSharedMemorySize, kTileBytes * kStages));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  for (long bytes : {kLarge, kSmall}) {
    for (bool contiguous : {false, true}) {
      for (int limit : {2, 3, 4, 5, 6, 8, 10, 12}) {
        constexpr int kRuns = 10, kWarm = 3;
        std::vector<float> spans;
        CHECK(cudaMemset(times, 0, blocks * kOperations * 4));
        for (int run = 0; run < kRuns; ++run) {  // the last one is the one with the other warp
          const bool timed = run == kRuns - 1;
          CHECK(cudaEventRecord(begin));
          stream<<<blocks, kThreads, kTileBytes * kStages>>>(weights + run % kSets * kLarge, bytes / kTileBytes,
                                                             contiguous, limit, counters, timed ? times : nullptr,
                                                             memory, never);
          CHECK(cudaGetLastError());
          CHECK(cudaEventRecord(end));
          CHECK(cudaEventSynchronize(end));
          float ms;
          CHECK(cudaEventElapsedTime(&ms, begin, end));
          if (run >= kWarm && !timed) spans.push_back(ms);
        }
        std::vector<uint32_t> all(blocks * kOperations);
        CHECK(cudaMemcpy(all.data(), times, all.size() * 4, cudaMemcpyDeviceToHost));
        uint32_t typical[kOperations];
        for (int i = 0; i < kOperations; ++i) {
          std::vector<uint32_t> of_blocks;
          for (int b = 0; b < blocks; ++b) of_blocks.push_back(all[b * kOperations + i]);
          typical[i] = median(of_blocks);
        }
        const float ms = median(spans);
        std::printf(
            "%5ld MB, %s, %2d under way: %8.1f us, %.3f TB/s; ns: atomic %5u, L2 load %5u, store + red.release "
            "%5u, store + atom.acq_rel %5u\n",
            bytes >> 20, contiguous ? "contiguous  " : "grid-strided", limit, ms * 1e3, bytes / ms / 1e9, typical[0],
            typical[1], typical[2], typical[3]);
      }
    }
  }
}

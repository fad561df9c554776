// Runs CUDA kernels, compiled as C++, on one host thread: every CUDA thread is a fiber that runs until it waits for
// others. CTAs run one after another, the CTAs of a cluster and those of a cooperative launch together. Each host
// thread is a device of its own; kernels of several exchange words in memory.
//
// What a launch checks, beside what the kernel computes:
//   * threads that wait for each other for ever, and warp functions that not all lanes of a warp call;
//   * shared memory: poisoned (0xff, a NaN) at the start, guarded behind every variable, within the limits of a launch;
//   * shared memory of another CTA: read and written only while that CTA runs;
//   * limits of the grid, alignment of asynchronous copies and matrix loads;
//   * asynchronous operations that nobody waits for, and what tensor_cores.h adds for TMA, wgmma and tcgen05.
// A failure is a std::runtime_error in the thread that launched.
//
// A barrier that is missing shows where the order of fibers matters: run a test in several orders (see Order).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace dflash::emulator {

// Of the threads between two barriers, and of the CTAs of a grid.
enum class Order {
  kForward,   // asynchronous copies happen as late as they may
  kReversed,  // and as early
  kRandom     // some CTAs and warps run far ahead of others; copies happen at either end
};

struct Launch {
  const void* kernel = nullptr;
  dim3 grid, cluster;
  unsigned threads = 0;
  size_t shared_bytes = 0;  // dynamic
  bool cooperative = false;
};

// False: a GPU would refuse it.
bool is_valid(const Launch& launch);
void run(const Launch& launch, const std::function<void()>& thread);
void allow_shared_bytes(const void* kernel, size_t bytes);  // dynamic
void report_launch(bool accepted);                          // what cudaGetLastError will tell

// ---- for the thread that runs ------------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& what);

unsigned lane();
void block_barrier();
bool block_any(bool value);  // with a barrier
void cluster_arrive();
void cluster_wait();
unsigned cluster_rank();
unsigned cluster_size();

// One warp function, called by all 32 lanes: `words` of every lane, until the warp's next call.
enum class Collective { kBarrier, kShuffle, kBallot, kReduce, kLoadMatrix, kMultiply, kTensor };
constexpr int kWords = 6;
using LaneWords = uint64_t[kWords];
const LaneWords* exchange(Collective what, const uint64_t* words, int count);

unsigned char* dynamic_shared();
unsigned char* static_shared(int id, size_t bytes);              // variable `id` of this CTA
unsigned char* remote_shared(const void* local, unsigned rank);  // the same place in another CTA
uint32_t shared_address(const void* place);                      // of this CTA, in 32 bits
unsigned char* shared_place(uint32_t address, unsigned rank);    // in CTA `rank` of the cluster, while it runs
void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_for_copies(int pending);

void named_barrier(int id, unsigned threads);
void spin();  // before a look at memory that another thread will change: others run; fails if only such threads are
              // left
void spin_outside();  // the same, of memory that another device may change
void pause();         // others may run, in random order
void mbarrier_init(uint64_t* barrier, unsigned arrivals);
void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes);
bool mbarrier_passed(uint64_t* barrier, unsigned parity);
void mbarrier_wait(uint64_t* barrier, unsigned parity);
void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier);

// An operation that happens while threads go on: at once, or when a thread waits for one of `barriers` and no sooner
// (see Order). Those of one queue happen in the order in which they were started; nullptr: in any order.
void start(std::vector<uint64_t*> barriers, const void* queue, std::function<void()> operation);
void complete_bytes(uint64_t* barrier, unsigned bytes);  // what such an operation does to an mbarrier
void complete_arrival(uint64_t* barrier);
bool happens_at_once();  // for what has other ways to be waited for

enum class Product { kMma, kWgmma, kTcgen05, kKinds };
void count_product(Product kind);  // for emulator_products

// ---- what the compiler's own syntax becomes (build.py) -----------------------------------------------------------

template <typename T>
T& shared_variable(int id) {
  return *reinterpret_cast<T*>(static_shared(id, sizeof(T)));
}

template <typename... Parameters>
struct Launcher {
  void (*kernel)(Parameters...);
  Launch launch;
  // By value: the kernel sees copies, as on a GPU.
  void operator()(Parameters... arguments) const {
    const bool valid = is_valid(launch);
    if (valid) run(launch, [&] { kernel(arguments...); });
    report_launch(valid);
  }
};

template <typename... Parameters>
Launcher<Parameters...> launcher(void (*kernel)(Parameters...), dim3 cluster, dim3 grid, unsigned threads,
                                 size_t shared_bytes, const void* /*stream*/, bool cooperative = false) {
  return {kernel, Launch{reinterpret_cast<const void*>(kernel), grid, cluster, threads, shared_bytes, cooperative}};
}

}  // namespace dflash::emulator

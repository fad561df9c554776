#include "emulator.h"

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>

#include "tensor_cores.h"

__thread EMULATOR_TLS uint3 threadIdx, blockIdx;
__thread EMULATOR_TLS dim3 blockDim, gridDim;

namespace dflash::emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kMaxSharedBytes = 232448, kDefaultSharedBytes = 48 << 10;
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kPoison = 0xff;
constexpr int kIdleRounds = 1000;  // in a row, in which every thread that ran only looked whether it may go on
constexpr std::chrono::seconds kIdleTime{60};  // the same, where a thread waits for another device

uint64_t count(const dim3& size) { return uint64_t{size.x} * size.y * size.z; }

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
  // With this many threads to come the barrier opens.
  void open_if(unsigned expected) {
    if (arrived > 0 && arrived >= expected) arrived = 0, ++generation;
  }
};

struct Warp {
  Barrier barrier;
  Collective what = Collective::kBarrier;
  bool lane_ended = false;
  LaneWords words[2][kWarp] = {};  // of even and odd generations: a fast lane writes one while slow ones read the other
};

struct Region {  // of shared memory; a guard follows it
  size_t begin = 0, bytes = 0;
};

struct Cta {
  std::vector<unsigned char> memory;
  std::vector<unsigned char*> variables;  // by id, nullptr until declared
  std::vector<Warp> warps;
  Barrier barrier;
  Barrier named[16];
  unsigned live = 0;
  bool any[2] = {};  // of even and odd generations of the barrier
  uint3 index{};
  TensorMemory tensor_memory;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Operation {
  std::vector<uint64_t*> barriers;
  const void* queue;
  std::function<void()> happen;
};

// What the 8 bytes of an mbarrier hold here.
struct MBarrier {
  uint64_t phase : 1, arrivals : 12, pending : 12;
  int64_t bytes : 39;  // that are expected and have not come

  void complete_if_done() {
    if (pending == 0 && bytes == 0) phase ^= 1, pending = arrivals;
  }
};
static_assert(sizeof(MBarrier) == 8);

struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  ucontext_t start{};
  jmp_buf place;
  bool started = false, ended = false, spins = false;
  unsigned thread = 0, cta = 0;
  const Barrier* waits_for = nullptr;
  uint64_t generation = 0;  // that it waits to pass
  uint64_t cluster_generation = 0;
  std::vector<Copy> copies;
  int groups = 0;
  TensorState tensor;

  bool is_blocked() const { return waits_for != nullptr && waits_for->generation == generation; }
};

struct Settings {
  Order order = Order::kForward;
  uint64_t seed = 0;
  int sms = 132, major = 9;
};

Settings settings;  // of devices to come

// A device. Every host thread has one of its own.
struct Machine {
  Order order = settings.order;
  std::mt19937_64 random{settings.seed};
  int sms = settings.sms, major = settings.major;
  uint64_t products[static_cast<int>(Product::kKinds)] = {};
  bool last_launch_accepted = true;
  std::map<const void*, size_t> allowed_shared_bytes;

  // The cluster that runs.
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Cta> ctas;
  std::map<int, Region> regions;  // of static variables, alike in all CTAs
  size_t dynamic_bytes = 0, shared_end = 0;
  Barrier cluster_barrier;
  std::vector<Operation> operations;  // under way
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  bool looked_outside = false;
  jmp_buf scheduler;
  std::string error;

  Cta& cta() { return ctas[current->cta]; }
  unsigned live() const {
    return std::accumulate(ctas.begin(), ctas.end(), 0u, [](unsigned sum, const Cta& cta) { return sum + cta.live; });
  }
  bool coin() { return random() & 1; }
};

Machine& machine() {
  static thread_local const auto instance = std::make_unique<Machine>();  // a library has little room for its own
  return *instance;
}

void suspend() {
  Machine& m = machine();
  if (_setjmp(m.current->place) == 0) _longjmp(m.scheduler, 1);
}

void resume(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
  threadIdx = {fiber.thread, 0, 0};
  blockIdx = m.ctas[fiber.cta].index;
  if (_setjmp(m.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void end_thread() {
  Machine& m = machine();
  m.current->ended = true;
  Cta& cta = m.cta();
  --cta.live;
  cta.barrier.open_if(cta.live);
  m.cluster_barrier.open_if(m.live());
  Warp& warp = cta.warps[m.current->thread / kWarp];
  warp.lane_ended = true;
  if (warp.barrier.arrived > 0) fail("a lane ended while its warp waits for it");
}

// A fiber serves one thread after another.
void fiber_main() {
  while (true) {
    (*machine().body)();
    end_thread();
    suspend();
  }
}

void wait(const Barrier& barrier, uint64_t generation) {
  Fiber& fiber = *machine().current;
  fiber.waits_for = &barrier;
  fiber.generation = generation;
  while (fiber.is_blocked()) suspend();
  fiber.waits_for = nullptr;
}

void perform(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, copy.bytes);
}

MBarrier& state(uint64_t* barrier) { return *reinterpret_cast<MBarrier*>(barrier); }

// The operation at `at`, after those before it in its queue.
void happen(size_t at) {
  std::vector<Operation>& operations = machine().operations;
  const void* queue = operations[at].queue;
  std::vector<Operation> due;
  for (size_t i = 0; i <= at; ++i) {
    if (i == at || (queue != nullptr && operations[i].queue == queue)) due.push_back(std::move(operations[i]));
    if (i == at || (queue != nullptr && operations[i].queue == queue)) operations[i].happen = nullptr;
  }
  const auto has_happened = [](const Operation& operation) { return !operation.happen; };
  operations.erase(std::remove_if(operations.begin(), operations.end(), has_happened), operations.end());
  for (const Operation& operation : due) operation.happen();
}

void check_guards() {
  Machine& m = machine();
  const auto is_intact = [](const Cta& cta, size_t end) {
    const unsigned char* guard = cta.memory.data() + end;
    return std::all_of(guard, guard + kGuardBytes, [](unsigned char byte) { return byte == kPoison; });
  };
  for (const Cta& cta : m.ctas) {
    if (!is_intact(cta, m.dynamic_bytes)) throw std::runtime_error("emulator: written beyond dynamic shared memory");
    for (const auto& [id, region] : m.regions) {
      if (cta.variables.size() <= size_t(id) || cta.variables[id] == nullptr) continue;
      if (!is_intact(cta, region.begin + region.bytes)) {
        throw std::runtime_error("emulator: written beyond a variable in shared memory");
      }
    }
  }
}

void start_threads(const Launch& launch) {
  Machine& m = machine();
  const size_t count = launch.threads * m.ctas.size();
  while (m.fibers.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack.get();
    fiber->start.uc_stack.ss_size = kStackBytes;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, fiber_main, 0);
    m.fibers.push_back(std::move(fiber));
  }
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = *m.fibers[i];
    fiber.ended = false;
    fiber.thread = static_cast<unsigned>(i % launch.threads);
    fiber.cta = static_cast<unsigned>(i / launch.threads);
    fiber.waits_for = nullptr;
    fiber.spins = false;
    fiber.copies.clear();
    fiber.groups = 0;
    fiber.tensor = {};
  }
}

void run_cluster(const Launch& launch) {
  Machine& m = machine();
  for (Cta& cta : m.ctas) {
    cta.memory.resize(kMaxSharedBytes + 64 * kGuardBytes);
    std::memset(cta.memory.data(), kPoison, launch.shared_bytes + kGuardBytes);
    cta.variables.clear();
    cta.warps.assign(launch.threads / kWarp, Warp{});
    cta.barrier = {};
    for (Barrier& barrier : cta.named) barrier = {};
    cta.live = launch.threads;
    cta.tensor_memory = {};
  }
  m.cluster_barrier = {};
  m.operations.clear();
  start_threads(launch);

  // Random: the first warp that can run does, each one behind it half as often as the one before.
  const unsigned warps_of_cta = launch.threads / kWarp;
  std::vector<unsigned> warp_order, lane_order(kWarp), cta_order(m.ctas.size()), warps(warps_of_cta);
  std::iota(lane_order.begin(), lane_order.end(), 0u);
  std::iota(cta_order.begin(), cta_order.end(), 0u);
  std::iota(warps.begin(), warps.end(), 0u);
  if (m.order == Order::kRandom) std::shuffle(cta_order.begin(), cta_order.end(), m.random);
  for (const unsigned cta : cta_order) {
    if (m.order == Order::kRandom) std::shuffle(warps.begin(), warps.end(), m.random);
    for (const unsigned warp : warps) warp_order.push_back(cta * warps_of_cta + warp);
  }
  if (m.order == Order::kReversed) {
    std::reverse(warp_order.begin(), warp_order.end());
    std::reverse(lane_order.begin(), lane_order.end());
  }
  int idle_rounds = 0;
  auto idle_since = std::chrono::steady_clock::now();
  while (m.live() > 0) {
    bool progress = false, all_spin = true;
    if (m.order == Order::kRandom) std::shuffle(lane_order.begin(), lane_order.end(), m.random);
    for (const unsigned warp : warp_order) {
      const auto can_run = [&](unsigned lane) {
        const Fiber& fiber = *m.fibers[warp * kWarp + lane];
        return !fiber.ended && !fiber.is_blocked();
      };
      if (std::none_of(lane_order.begin(), lane_order.end(), can_run)) continue;
      progress = true;
      bool spins = true;
      for (const unsigned lane : lane_order) {
        if (!can_run(lane)) continue;
        m.fibers[warp * kWarp + lane]->spins = false;
        resume(*m.fibers[warp * kWarp + lane]);
        spins &= m.fibers[warp * kWarp + lane]->spins;
        if (!m.error.empty()) {
          m.fibers.clear();  // they hang in the middle of the kernel
          throw std::runtime_error("emulator: " + std::exchange(m.error, {}));
        }
      }
      all_spin &= spins;
      if (m.order == Order::kRandom && !spins && m.coin()) break;  // a warp that only looks holds nobody up
    }
    bool stuck = !progress;
    if (!all_spin) {
      idle_rounds = 0;
    } else if (std::exchange(m.looked_outside, false)) {
      const auto now = std::chrono::steady_clock::now();
      if (idle_rounds == 0) idle_rounds = 1, idle_since = now;
      stuck |= now - idle_since > kIdleTime;
      std::this_thread::yield();
    } else {
      stuck |= ++idle_rounds > kIdleRounds;
    }
    if (stuck && m.live() > 0) {
      m.fibers.clear();
      throw std::runtime_error("emulator: deadlock, threads wait at different barriers");
    }
  }
  check_guards();
  if (!m.operations.empty()) throw std::runtime_error("emulator: CTAs ended with asynchronous operations under way");
  for (const Cta& cta : m.ctas) {
    if (cta.tensor_memory.used.any()) throw std::runtime_error("emulator: a CTA ended and had not freed tensor memory");
  }
}

}  // namespace

bool is_valid(const Launch& launch) {
  const auto allowed = machine().allowed_shared_bytes.find(launch.kernel);
  const size_t limit = allowed == machine().allowed_shared_bytes.end() ? kDefaultSharedBytes
                                                                       : std::max(kDefaultSharedBytes, allowed->second);
  const dim3 &grid = launch.grid, &cluster = launch.cluster;
  return count(grid) > 0 && grid.x < (1u << 31) && grid.y <= 65535 && grid.z <= 65535 && launch.threads > 0 &&
         launch.threads <= 1024 && launch.shared_bytes <= limit &&
         (!launch.cooperative || (count(cluster) == 1 && count(grid) <= uint64_t(machine().sms))) &&
         count(cluster) > 0 && count(cluster) <= 8 && grid.x % cluster.x == 0 && grid.y % cluster.y == 0 &&
         grid.z % cluster.z == 0;
}

void run(const Launch& launch, const std::function<void()>& thread) {
  Machine& m = machine();
  if (launch.threads % kWarp != 0) throw std::runtime_error("emulator: a CTA must be whole warps");
  const dim3& group = launch.cooperative ? launch.grid : launch.cluster;
  m.ctas.resize(count(group));
  m.body = &thread;
  m.regions.clear();
  m.dynamic_bytes = launch.shared_bytes;
  m.shared_end = launch.shared_bytes + kGuardBytes;
  gridDim = launch.grid;
  blockDim = dim3(launch.threads);
  const dim3 clusters(launch.grid.x / group.x, launch.grid.y / group.y, launch.grid.z / group.z);
  std::vector<uint64_t> order(count(clusters));
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (m.order == Order::kReversed) std::reverse(order.begin(), order.end());
  if (m.order == Order::kRandom) std::shuffle(order.begin(), order.end(), m.random);
  for (const uint64_t i : order) {
    for (unsigned rank = 0; rank < m.ctas.size(); ++rank) {
      const dim3& cluster = group;
      m.ctas[rank].index = {
          static_cast<unsigned>(i % clusters.x * cluster.x + rank % cluster.x),
          static_cast<unsigned>(i / clusters.x % clusters.y * cluster.y + rank / cluster.x % cluster.y),
          static_cast<unsigned>(i / clusters.x / clusters.y * cluster.z + rank / cluster.x / cluster.y)};
    }
    run_cluster(launch);
  }
  size_t total = launch.shared_bytes;
  for (const auto& [id, region] : m.regions) total += region.bytes;
  const bool opted_in = m.allowed_shared_bytes.count(launch.kernel) > 0;
  if (total > (opted_in ? kMaxSharedBytes : kDefaultSharedBytes)) {
    throw std::runtime_error("emulator: " + std::to_string(total) + " bytes of shared memory are more than allowed");
  }
}

void allow_shared_bytes(const void* kernel, size_t bytes) { machine().allowed_shared_bytes[kernel] = bytes; }

void report_launch(bool accepted) { machine().last_launch_accepted = accepted; }

void fail(const std::string& what) {
  Machine& m = machine();
  m.error = what + ", thread " + std::to_string(threadIdx.x) + " of block " + std::to_string(blockIdx.x) + ", " +
            std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z);
  while (true) suspend();  // the scheduler drops this fiber
}

unsigned lane() { return machine().current->thread % kWarp; }

TensorState& tensor_state() { return machine().current->tensor; }
TensorMemory& tensor_memory(unsigned rank) { return machine().ctas.at(rank).tensor_memory; }
unsigned warp() { return machine().current->thread / kWarp; }

void block_barrier() {
  tensor_state().before_signal();
  Cta& cta = machine().cta();
  const uint64_t generation = cta.barrier.generation;
  ++cta.barrier.arrived;
  cta.barrier.open_if(cta.live);
  wait(cta.barrier, generation);
  tensor_state().waited = true;
}

bool block_any(bool value) {
  Cta& cta = machine().cta();
  const unsigned parity = cta.barrier.generation % 2;
  if (cta.barrier.arrived == 0) cta.any[parity] = false;
  cta.any[parity] |= value;
  block_barrier();
  return cta.any[parity];
}

void cluster_arrive() {
  tensor_state().before_signal();
  Machine& m = machine();
  m.current->cluster_generation = m.cluster_barrier.generation;
  ++m.cluster_barrier.arrived;
  m.cluster_barrier.open_if(m.live());
}

void cluster_wait() {
  wait(machine().cluster_barrier, machine().current->cluster_generation);
  tensor_state().waited = true;
}

unsigned cluster_rank() { return machine().current->cta; }
unsigned cluster_size() { return static_cast<unsigned>(machine().ctas.size()); }

const LaneWords* exchange(Collective what, const uint64_t* words, int count) {
  Machine& m = machine();
  Warp& warp = m.cta().warps[m.current->thread / kWarp];
  if (warp.lane_ended) fail("a warp function is called after a lane of the warp ended");
  if (warp.barrier.arrived > 0 && warp.what != what) fail("lanes of one warp call different warp functions");
  warp.what = what;
  const uint64_t generation = warp.barrier.generation;
  LaneWords* slots = warp.words[generation % 2];
  std::copy(words, words + count, slots[lane()]);
  ++warp.barrier.arrived;
  warp.barrier.open_if(kWarp);
  wait(warp.barrier, generation);
  return slots;
}

unsigned char* dynamic_shared() { return machine().cta().memory.data(); }

unsigned char* static_shared(int id, size_t bytes) {
  Machine& m = machine();
  Cta& cta = m.cta();
  if (cta.variables.size() <= size_t(id)) cta.variables.resize(id + 1);
  if (cta.variables[id] == nullptr) {
    auto found = m.regions.find(id);
    if (found == m.regions.end()) {
      const Region region{(m.shared_end + 127) / 128 * 128, bytes};
      if (region.begin + bytes + kGuardBytes > cta.memory.size()) fail("too much shared memory");
      m.shared_end = region.begin + bytes + kGuardBytes;
      found = m.regions.emplace(id, region).first;
    }
    cta.variables[id] = cta.memory.data() + found->second.begin;
    std::memset(cta.variables[id], kPoison, bytes + kGuardBytes);
  }
  return cta.variables[id];
}

unsigned char* remote_shared(const void* local, unsigned rank) {
  Machine& m = machine();
  const auto* place = static_cast<const unsigned char*>(local);
  const unsigned char* mine = m.cta().memory.data();
  if (place < mine || place >= mine + m.shared_end) fail("not an address in shared memory");
  if (rank >= m.ctas.size()) fail("no such CTA in the cluster");
  if (m.ctas[rank].live == 0) fail("shared memory of a CTA that has ended");
  return m.ctas[rank].memory.data() + (place - mine);
}

// No multiple of what tiles are aligned to, so that it shows where alignment is taken for granted.
constexpr uint32_t kSharedWindow = 1024 + 128;

uint32_t shared_address(const void* place) {
  return kSharedWindow + static_cast<uint32_t>(remote_shared(place, cluster_rank()) - machine().cta().memory.data());
}

unsigned char* shared_place(uint32_t address, unsigned rank) {
  const unsigned char* mine = machine().cta().memory.data();
  if (address < kSharedWindow) fail("not an address in shared memory");
  return remote_shared(mine + (address - kSharedWindow), rank);
}

void copy_async(void* shared, const void* global, int bytes) {
  Machine& m = machine();
  const auto* place = static_cast<unsigned char*>(shared);
  if (place < dynamic_shared() || place + 16 > dynamic_shared() + m.dynamic_bytes) fail("a copy beyond shared memory");
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) fail("a copy to an address that is not a multiple of 16");
  if (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("a copy from an unaligned address");
  const Copy copy{shared, global, bytes, m.current->groups};
  if (m.order == Order::kReversed || (m.order == Order::kRandom && m.coin())) {
    perform(copy);
  } else {
    m.current->copies.push_back(copy);
  }
}

void commit_copies() { ++machine().current->groups; }

void wait_for_copies(int pending) {
  Fiber& fiber = *machine().current;
  const auto is_pending = [&](const Copy& copy) { return copy.group >= fiber.groups - pending; };
  const auto first = std::stable_partition(fiber.copies.begin(), fiber.copies.end(), is_pending);
  std::for_each(first, fiber.copies.end(), perform);
  fiber.copies.erase(first, fiber.copies.end());
}

void named_barrier(int id, unsigned threads) {
  tensor_state().before_signal();
  if (id < 1 || id > 15 || threads == 0 || threads % kWarp != 0) fail("no such named barrier");
  Barrier& barrier = machine().cta().named[id];
  const uint64_t generation = barrier.generation;
  ++barrier.arrived;
  barrier.open_if(threads);
  wait(barrier, generation);
  tensor_state().waited = true;
}

void spin() {
  machine().current->spins = true;
  suspend();
}

void spin_outside() {
  machine().looked_outside = true;
  spin();
}

void pause() {
  if (machine().order == Order::kRandom && machine().coin()) suspend();
}

void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) fail("an mbarrier that is not aligned to 8 bytes");
  MBarrier& s = state(barrier);
  s.phase = 0, s.arrivals = arrivals, s.pending = arrivals, s.bytes = 0;
}

void mbarrier_arrive(uint64_t* barrier, unsigned expected_bytes) {
  tensor_state().before_signal();
  MBarrier& s = state(barrier);
  if (s.pending == 0) fail("more arrivals at an mbarrier than it was made for");
  s.bytes += expected_bytes;
  --s.pending;
  s.complete_if_done();
}

bool mbarrier_passed(uint64_t* barrier, unsigned parity) {
  const bool passed = state(barrier).phase != (parity & 1);
  if (passed) tensor_state().waited = true;
  return passed;
}

void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  std::vector<Operation>& operations = machine().operations;
  while (state(barrier).phase == (parity & 1)) {
    const auto awaited = [&](const Operation& operation) {
      return std::find(operation.barriers.begin(), operation.barriers.end(), barrier) != operation.barriers.end();
    };
    const auto due = std::find_if(operations.begin(), operations.end(), awaited);
    if (due == operations.end()) {
      spin();
    } else {
      happen(due - operations.begin());
    }
  }
  tensor_state().waited = true;
}

void complete_bytes(uint64_t* barrier, unsigned bytes) {
  state(barrier).bytes -= bytes;
  state(barrier).complete_if_done();
}

void complete_arrival(uint64_t* barrier) {
  MBarrier& s = state(barrier);
  if (s.pending == 0) fail("more arrivals at an mbarrier than it was made for");
  --s.pending;
  s.complete_if_done();
}

bool happens_at_once() {
  Machine& m = machine();
  return m.order == Order::kReversed || (m.order == Order::kRandom && m.coin());
}

void start(std::vector<uint64_t*> barriers, const void* queue, std::function<void()> operation) {
  Machine& m = machine();
  m.operations.push_back({std::move(barriers), queue, std::move(operation)});
  if (happens_at_once()) happen(m.operations.size() - 1);
}

void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  Machine& m = machine();
  const auto* place = static_cast<unsigned char*>(shared);
  if (place < dynamic_shared() || place + bytes > dynamic_shared() + m.dynamic_bytes)
    fail("a copy beyond shared memory");
  const auto bits = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes;
  if (bits % 16 != 0) fail("a bulk copy with an address or a size that is not a multiple of 16");
  start({barrier}, nullptr, [=] {
    std::memcpy(shared, global, bytes);
    complete_bytes(barrier, bytes);
  });
}

void count_product(Product kind) { ++machine().products[static_cast<int>(kind)]; }

// How many threads have issued products of a kind since the last call; of the device of this host thread.
extern "C" __attribute__((visibility("default"))) uint64_t emulator_products(int kind) {
  return std::exchange(machine().products[kind], 0);
}

extern "C" __attribute__((visibility("default"))) void emulator_configure(int order, uint64_t seed, int sms,
                                                                          int major) {
  settings = {static_cast<Order>(order), seed, sms, major};
  machine().order = settings.order;
  machine().random.seed(seed);
  machine().sms = sms;
  machine().major = major;
}

}  // namespace dflash::emulator

// ---- the CUDA runtime: memory is the host's, everything is done at once ------------------------------------------

using dflash::emulator::machine;

extern "C" {

cudaError_t cudaGetLastError() {
  const bool accepted = std::exchange(machine().last_launch_accepted, true);
  return accepted ? cudaSuccess : cudaErrorInvalidConfiguration;
}
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid launch"; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) return *value = machine().sms, cudaSuccess;
  if (attribute == cudaDevAttrComputeCapabilityMajor) return *value = machine().major, cudaSuccess;
  return cudaErrorInvalidValue;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t row = 0; row < height; ++row) {
    std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
  }
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t) {
  return *memory = std::malloc(bytes), cudaSuccess;
}
cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return std::free(memory), cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(dflash::emulator::encode_tensor_map) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

}  // extern "C"

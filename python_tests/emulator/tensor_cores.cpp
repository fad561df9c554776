#include "tensor_cores.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>

#include "emulator.h"

namespace dflash::emulator {

namespace {

float bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities.
float e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  if ((bits & 0x7f) == 0x7f) value = std::nanf("");
  return (bits & 0x80) != 0 ? -value : value;
}

const std::array<float, 256> kE4m3 = [] {
  std::array<float, 256> values;
  for (int bits = 0; bits < 256; ++bits) values[bits] = e4m3(static_cast<uint8_t>(bits));
  return values;
}();

uint64_t field(uint64_t word, int first, int last) { return word >> first & ((uint64_t{1} << (last - first + 1)) - 1); }

// Patterns of 8 rows of `width` bytes: the 16-byte chunk's number in its row (of 128, 64, 32 bytes) is xor-ed with the
// number of the 128-byte line in its 1024, 512, 256 bytes. A function of the address alone.
uint32_t swizzled(uint32_t address, unsigned width) {
  if (width == 0) return address;
  return address ^ ((address >> 7 & (width / 16 - 1)) << 4);
}

std::vector<unsigned> ranks_of(unsigned mask) {
  if (mask == 0) return {cluster_rank()};
  std::vector<unsigned> ranks;
  for (unsigned rank = 0; rank < 16; ++rank) {
    if (mask >> rank & 1) ranks.push_back(rank);
  }
  if (ranks.back() >= cluster_size()) fail("a mask with CTAs that the cluster has not");
  return ranks;
}

std::vector<uint64_t*> barriers_of(uint32_t barrier, unsigned mask) {
  if (barrier % 8 != 0) fail("an mbarrier that is not aligned to 8 bytes");
  std::vector<uint64_t*> barriers;
  for (const unsigned rank : ranks_of(mask)) {
    barriers.push_back(reinterpret_cast<uint64_t*>(shared_place(barrier, rank)));
  }
  return barriers;
}

// What the 128 bytes of a tensor map hold here.
struct Map {
  const unsigned char* base;
  uint64_t sizes[2], stride;
  uint32_t box[2], element, swizzle;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

// ---- operands of tensor cores --------------------------------------------------------------------------------------

constexpr unsigned kProductBytes = 32;  // of a row, that an instruction takes
constexpr unsigned kMostElements = 64;
using Row = std::array<float, kMostElements>;  // of which 16, 32 or 64 are there
constexpr float kE2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

// A K-major matrix in shared memory, of bf16 (16 bits), e4m3 (8) or e2m1 (4, the first in the low half of a byte).
struct Operand {
  int element_bits;
  const unsigned char* memory;  // address 0, were there such a place
  uint32_t start, leading, stride;
  unsigned swizzle;  // bytes; 0: none
  // Bytes k .. k + 15 of a row, k a multiple of 16.
  const unsigned char* sixteen(unsigned row, unsigned k) const {
    uint32_t at = start + row / 8 * stride;
    at += swizzle == 0 ? k / 16 * leading + row % 8 * 16 : row % 8 * swizzle + k;
    return memory + swizzled(at, swizzle);
  }
  void row(unsigned row, Row& values) const {
    float* to = values.data();
    for (unsigned k = 0; k < kProductBytes; k += 16) {
      const unsigned char* from = sixteen(row, k);
      for (int i = 0; i < 16; i += element_bits == 16 ? 2 : 1) {
        if (element_bits == 4) {
          *to++ = kE2m1[from[i] & 15];
          *to++ = kE2m1[from[i] >> 4];
        } else {
          *to++ = element_bits == 8 ? kE4m3[from[i]] : bf16(*reinterpret_cast<const uint16_t*>(from + i));
        }
      }
    }
  }
};

Operand operand_of(int element_bits, uint64_t descriptor, unsigned swizzle, unsigned rank) {
  Operand operand;
  operand.element_bits = element_bits;
  constexpr uint32_t kSomewhere = 4096;  // any address of shared memory
  operand.memory = shared_place(kSomewhere, rank) - kSomewhere;
  operand.start = static_cast<uint32_t>(field(descriptor, 0, 13)) << 4;
  operand.leading = static_cast<uint32_t>(field(descriptor, 16, 29)) << 4;
  operand.stride = static_cast<uint32_t>(field(descriptor, 32, 45)) << 4;
  operand.swizzle = swizzle;
  if (field(descriptor, 49, 51) != 0) fail("a matrix descriptor with a base offset");
  return operand;
}

Operand wgmma_operand(int element_bytes, uint64_t descriptor) {
  constexpr unsigned kSwizzles[] = {0, 128, 64, 32};
  if (field(descriptor, 14, 15) | field(descriptor, 30, 31) | field(descriptor, 46, 48) | field(descriptor, 52, 61))
    fail("a matrix descriptor of wgmma with bits that have no meaning");
  return operand_of(8 * element_bytes, descriptor, kSwizzles[field(descriptor, 62, 63)], cluster_rank());
}

Operand tcgen05_operand(int element_bits, uint64_t descriptor, unsigned rank) {
  const auto mode = field(descriptor, 61, 63);
  if (field(descriptor, 46, 48) != 0b001) fail("a matrix descriptor of tcgen05 without its constant");
  if (field(descriptor, 14, 15) | field(descriptor, 30, 31) | field(descriptor, 53, 60))
    fail("a matrix descriptor of tcgen05 with bits that have no meaning");
  if (field(descriptor, 52, 52) != 0) fail("a leading dimension that is an address");
  if (mode != 0 && mode != 2 && mode != 4 && mode != 6) fail("a swizzle that is not emulated");
  return operand_of(element_bits, descriptor, mode == 0 ? 0 : 256u >> (mode / 2), rank);
}

float dot(const Row& a, const Row& b, unsigned count) {
  float sum = 0.0f;
  for (unsigned k = 0; k < count; ++k) sum += a[k] * b[k];
  return sum;
}

uint32_t* cell(TensorMemory& memory, unsigned lane, unsigned column) {
  if (lane >= kLanes || column >= kColumns || !memory.used[column]) fail("tensor memory that is not allocated");
  return &memory.cells[lane * kColumns + column];
}

void same_group(int group) {
  TensorMemory& memory = tensor_memory(cluster_rank());
  if (group != 1 && group != 2) fail("no such .cta_group");
  if (memory.group != 0 && memory.group != group) fail("instructions with different .cta_group in one kernel");
  memory.group = group;
}

// All lanes of a warp with the same words, or it fails; what for.
void together(const char* what, std::initializer_list<uint64_t> words) {
  const auto* lanes = exchange(Collective::kTensor, words.begin(), static_cast<int>(words.size()));
  for (unsigned i = 0; i < 32; ++i) {
    if (!std::equal(words.begin(), words.end(), lanes[i])) fail(std::string("lanes disagree about ") + what);
  }
}

}  // namespace

// ---- TMA -----------------------------------------------------------------------------------------------------------

CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool known = rank == 2 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == 0 && steps[0] == 1 &&
                     steps[1] == 1 &&
                     (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ||
                      type == CU_TENSOR_MAP_DATA_TYPE_UINT64);
  if (!known) return CUDA_ERROR_NOT_SUPPORTED;  // here
  Map made = {};
  made.base = static_cast<const unsigned char*>(base);
  made.element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : type == CU_TENSOR_MAP_DATA_TYPE_UINT64 ? 8 : 2;
  made.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16u << swizzle;  // 32, 64, 128
  made.stride = strides[0];
  const uint64_t inner = box[0] * made.element;
  bool valid = swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
               strides[0] % 16 == 0 && strides[0] < uint64_t{1} << 40 && inner % 16 == 0 &&
               (made.swizzle == 0 || inner <= made.swizzle);
  for (int i = 0; i < 2; ++i) {
    valid = valid && 1 <= sizes[i] && sizes[i] <= uint64_t{1} << 32 && 1 <= box[i] && box[i] <= 256;
    made.sizes[i] = sizes[i];
    made.box[i] = box[i];
  }
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

// One operation a CTA: the copies of a multicast arrive at different times.
static void start_box(uint32_t to, const CUtensorMap* map, int column, int row, unsigned rank, uint64_t* barrier) {
  Map from;
  std::memcpy(&from, map, sizeof(from));
  if (to % 128 != 0) fail("a box to an address that is not a multiple of 128");
  const uint32_t width = from.box[0] * from.element, bytes = width * from.box[1];
  shared_place(to + bytes - 1, rank);
  unsigned char* const memory = shared_place(to, rank) - to;
  start({barrier}, nullptr, [=] {
    const int64_t row_bytes = static_cast<int64_t>(from.sizes[0]) * from.element,
                  first = int64_t{column} * from.element;
    for (uint32_t r = 0; r < from.box[1]; ++r) {
      const int64_t y = int64_t{row} + r;
      const bool inside = y >= 0 && y < static_cast<int64_t>(from.sizes[1]);
      for (uint32_t c = 0; c < width; c += 16) {
        unsigned char chunk[16] = {};  // outside of the tensor: zeros
        const int64_t begin = std::max(first + c, int64_t{0}), end = std::min(first + c + 16, row_bytes);
        if (inside && begin < end) {
          std::memcpy(chunk + (begin - first - c), from.base + y * static_cast<int64_t>(from.stride) + begin,
                      end - begin);
        }
        std::memcpy(memory + swizzled(to + r * width + c, from.swizzle), chunk, 16);
      }
    }
    complete_bytes(barrier, bytes);
  });
}

void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier, unsigned mask) {
  const auto barriers = barriers_of(barrier, mask);
  const auto ranks = ranks_of(mask);
  for (size_t i = 0; i < ranks.size(); ++i) start_box(to, map, column, row, ranks[i], barriers[i]);
}

void copy_box_of_pair(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier, unsigned rank) {
  if (rank / 2 != cluster_rank() / 2) fail("a barrier of a CTA that is not of the pair");
  start_box(to, map, column, row, cluster_rank(), barriers_of(barrier, 1u << rank)[0]);
}

// ---- tensor memory -------------------------------------------------------------------------------------------------

void TensorState::before_signal() const {
  if (!loads.empty()) fail("a signal before tcgen05.wait::ld");
  if (read) fail("a signal after tcgen05.ld without tcgen05.fence::before_thread_sync");
}

void TensorState::before_tcgen05() const {
  if (waited) fail("tcgen05 after a wait without tcgen05.fence::after_thread_sync");
}

bool elect_one() {
  together("elect.sync", {});
  return lane() == 0;
}

void tmem_allocate(int group, uint32_t place, unsigned columns) {
  same_group(group);
  together("tcgen05.alloc", {place, columns});
  TensorMemory& memory = tensor_memory(cluster_rank());
  if (columns < 32 || columns > kColumns || (columns & (columns - 1)) != 0) fail("no such number of columns");
  if (lane() == 0) {
    if (memory.relinquished) fail("tcgen05.alloc after tcgen05.relinquish_alloc_permit");
    memory.cells.resize(kLanes * kColumns, 0xffffffffu);
    unsigned first = 0;  // at the far end, so that it shows where address 0 is taken for granted
    for (first = kColumns - columns; first > 0 && memory.used[first]; first -= columns) {
    }
    if (memory.used[first]) fail("tcgen05.alloc would wait for ever");
    for (unsigned i = 0; i < columns; ++i) memory.used[first + i] = true;
    *reinterpret_cast<uint32_t*>(shared_place(place, cluster_rank())) = first;
  }
  together("tcgen05.alloc", {});
}

void tmem_relinquish(int group) {
  same_group(group);
  together("tcgen05.relinquish_alloc_permit", {});
  tensor_memory(cluster_rank()).relinquished = true;
}

void tmem_free(int group, uint32_t address, unsigned columns) {
  same_group(group);
  together("tcgen05.dealloc", {address, columns});
  tensor_state().before_tcgen05();
  if (lane() != 0) return;
  TensorMemory& memory = tensor_memory(cluster_rank());
  if (address % columns != 0 || address + columns > kColumns) fail("tcgen05.dealloc of what was not allocated");
  for (unsigned i = 0; i < columns; ++i) {
    if (!memory.used[address + i]) fail("tcgen05.dealloc of what was not allocated");
    memory.used[address + i] = false;
  }
}

// Register r of lane l: lane l / 4 + 8 * (r / 2 % 2), column 2 * (l % 4) + r % 2 + 8 * (r / 4).
static void deliver(const TensorState::Load& load) {
  TensorMemory& memory = tensor_memory(cluster_rank());
  const unsigned l = lane();
  for (int r = 0; r < 4; ++r) {
    const uint32_t* from =
        cell(memory, (load.address >> 16) + l / 4 + 8 * (r / 2 % 2), (load.address & 0xffff) + 2 * (l % 4) + r % 2);
    std::memcpy(load.to + r, from, 4);
  }
}

void tmem_load_16x256b(float* to, uint32_t address, int repeats) {
  together("tcgen05.ld", {address, static_cast<uint64_t>(repeats)});
  TensorState& state = tensor_state();
  state.before_tcgen05();
  const unsigned first = address >> 16;
  if (first % 16 != 0 || first / 32 != warp() % 4) fail("tcgen05.ld of lanes that the warp does not reach");
  state.read = true;
  for (int i = 0; i < repeats; ++i) {
    const TensorState::Load load{to + 4 * i, address + 8 * i};
    if (happens_at_once()) {
      deliver(load);
    } else {
      std::memset(load.to, 0xff, 16);
      state.loads.push_back(load);
    }
  }
}

void tmem_wait_loads() {
  together("tcgen05.wait::ld", {});
  for (const TensorState::Load& load : tensor_state().loads) deliver(load);
  tensor_state().loads.clear();
}

void tmem_copy_32x128b(int group, uint32_t address, uint64_t descriptor) {
  same_group(group);
  tensor_state().before_tcgen05();
  const unsigned first = cluster_rank(), column = address & 0xffff;
  if (address >> 16 != 0) fail("tcgen05.cp of 32 lanes for each warp that does not begin at lane 0");
  if (group == 2 && first % 2 != 0) fail("the second CTA of a pair copies to tensor memory");
  Operand from[2];
  TensorMemory* memories[2] = {};
  for (int i = 0; i < group; ++i) {
    from[i] = tcgen05_operand(8, descriptor, first + i);
    if (from[i].swizzle != 0) fail("a block of scales that is swizzled");
    memories[i] = &tensor_memory(first + i);
    cell(*memories[i], 0, column), cell(*memories[i], 0, column + 3);
  }
  start({}, memories[0], [=] {
    for (int i = 0; i < group; ++i) {
      for (unsigned lane = 0; lane < kLanes; ++lane) {
        std::memcpy(&memories[i]->cells[lane * kColumns + column], from[i].sixteen(lane % 32, 0), 16);
      }
    }
  });
}

namespace {

// A scale for each 16 elements of row `row` of a CTA, from the words at column `column`: all four parts of 32 lanes
// have them. The sign is no part of them, and NaN is what memory that was never written gives.
std::array<float, 4> scales_of(const TensorMemory& memory, unsigned column, unsigned row) {
  std::array<float, 4> scales;
  const uint32_t* const words = &memory.cells[row % 32 * kColumns + column + row / 32];
  for (unsigned part = 1; part < 4; ++part) {
    if (words[part * 32 * kColumns] != *words) fail("scales that are not there for all parts of tensor memory");
  }
  for (unsigned g = 0; g < 4; ++g) scales[g] = kE4m3[*words >> (8 * g) & 0x7f];
  return scales;
}

struct Scales {
  uint32_t a, b;  // columns of tensor memory
};

// One CTA: D [128, N] of A [128, K] and B [N, K], all its own. Two, issued by the one of even rank: M = 256; each has
// half of A's and D's rows and half of B's, at the same addresses, and with scales those of its rows of A and all of
// B's.
void multiply(int element_bits, int group, uint32_t d, uint64_t a, uint64_t b, unsigned m, unsigned n,
              const Scales* scales, bool accumulate) {
  count_product(Product::kTcgen05);
  same_group(group);
  tensor_state().before_tcgen05();
  if (m != kLanes * group || n % (16 * group) != 0 || n == 0 || n > 256) fail("a shape that tcgen05.mma has not");
  if (d >> 16 != 0) fail("an accumulator of 128 lanes that does not begin at lane 0");
  const unsigned first = cluster_rank();
  if (group == 2 && first % 2 != 0) fail("the second CTA of a pair issues products");
  Operand x[2], y[2];
  TensorMemory* memories[2] = {};
  for (int i = 0; i < group; ++i) {
    x[i] = tcgen05_operand(element_bits, a, first + i);
    y[i] = tcgen05_operand(element_bits, b, first + i);
    memories[i] = &tensor_memory(first + i);
    cell(*memories[i], 0, d), cell(*memories[i], 0, d + n - 1);
    if (scales == nullptr) continue;
    if (scales->a >> 16 != 0 || scales->b >> 16 != 0) fail("scales that do not begin at lane 0");
    cell(*memories[i], 0, scales->a), cell(*memories[i], 0, scales->a + kLanes / 32 - 1);
    cell(*memories[i], 0, scales->b), cell(*memories[i], 0, scales->b + (n - 1) / 32);
  }
  const bool scaled = scales != nullptr;
  const Scales at = scaled ? *scales : Scales{};
  start({}, memories[0], [=] {
    const unsigned depth = kProductBytes * 8 / element_bits;
    std::vector<float> columns(depth * n), sums(n);   // columns [k][n], so that the inner loop runs along n
    std::vector<std::array<float, 4>> of_columns[2];  // for the rows of each CTA, whose own scales of B they take
    for (unsigned j = 0; j < n; ++j) {
      Row column;
      y[j / (n / group)].row(j % (n / group), column);
      for (unsigned k = 0; k < depth; ++k) columns[k * n + j] = column[k];
      for (int i = 0; scaled && i < group; ++i) of_columns[i].push_back(scales_of(*memories[i], at.b, j));
    }
    for (unsigned i = 0; i < m; ++i) {
      Row row;
      x[i / kLanes].row(i % kLanes, row);
      auto* to = reinterpret_cast<float*>(&memories[i / kLanes]->cells[i % kLanes * kColumns + d]);
      for (unsigned j = 0; !accumulate && j < n; ++j) to[j] = 0.0f;
      const unsigned part = scaled ? 16 : depth;  // elements that are added up before they are scaled
      std::array<float, 4> of_row = {};
      if (scaled) of_row = scales_of(*memories[i / kLanes], at.a, i % kLanes);
      for (unsigned k0 = 0; k0 < depth; k0 += part) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (unsigned k = k0; k < k0 + part; ++k) {
          for (unsigned j = 0; j < n; ++j) sums[j] += row[k] * columns[k * n + j];
        }
        for (unsigned j = 0; j < n; ++j) {
          to[j] += scaled ? sums[j] * of_row[k0 / 16] * of_columns[i / kLanes][j][k0 / 16] : sums[j];
        }
      }
    }
  });
}

}  // namespace

void multiply(int element_bytes, int group, uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, bool accumulate) {
  if (field(instruction, 0, 3) != 0 || field(instruction, 13, 16) != 0) fail("products that are not emulated");
  if (field(instruction, 6, 6) | field(instruction, 23, 23) | field(instruction, 29, 31))
    fail("an instruction descriptor with bits that have no meaning");
  if (field(instruction, 4, 5) != 1) fail("accumulators that are not emulated");
  const uint64_t type = element_bytes == 2 ? 1 : 0;  // .kind::f16: bf16; .kind::f8f6f4: e4m3
  if (field(instruction, 7, 9) != type || field(instruction, 10, 12) != type) fail("operands that are not emulated");
  multiply(8 * element_bytes, group, d, a, b, static_cast<unsigned>(field(instruction, 24, 28)) << 4,
           static_cast<unsigned>(field(instruction, 17, 22)) << 3, nullptr, accumulate);
}

void multiply_nvfp4(int group, uint32_t d, uint64_t a, uint64_t b, uint32_t a_scales, uint32_t b_scales,
                    uint32_t instruction, bool accumulate) {
  if (field(instruction, 0, 3) != 0 || field(instruction, 13, 16) != 0) fail("products that are not emulated");
  if (field(instruction, 6, 6) | field(instruction, 24, 26))
    fail("an instruction descriptor with bits that have no meaning");
  if (field(instruction, 4, 5) | field(instruction, 29, 30)) fail("four scales that do not begin with a word");
  if (field(instruction, 7, 9) != 1 || field(instruction, 10, 12) != 1) fail("operands that are not e2m1");
  if (field(instruction, 23, 23) != 0) fail("scales that are not emulated");
  if (field(instruction, 31, 31) != 0) fail("K that is not 64");
  const Scales scales{a_scales, b_scales};
  multiply(4, group, d, a, b, static_cast<unsigned>(field(instruction, 27, 28)) << 7,
           static_cast<unsigned>(field(instruction, 17, 22)) << 3, &scales, accumulate);
}

void commit(int group, uint32_t barrier, unsigned mask) {
  // One operation for this thread's products, from which each barrier is signalled by itself.
  same_group(group);
  tensor_state().before_tcgen05();
  const std::vector<uint64_t*> barriers = barriers_of(barrier, mask);
  start(barriers, &tensor_memory(cluster_rank()), [=] {
    for (uint64_t* signalled : barriers) complete_arrival(signalled);
  });
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------

void wgmma(int element_bytes, float* d, int n, uint64_t a, uint64_t b, bool accumulate) {
  count_product(Product::kWgmma);
  const Operand x = wgmma_operand(element_bytes, a), y = wgmma_operand(element_bytes, b);
  const unsigned first = 16 * (warp() % 4) + lane() / 4, column = 2 * (lane() % 4);
  const auto happen = [=] {
    Row rows[2], w;
    x.row(first, rows[0]);
    x.row(first + 8, rows[1]);
    for (int j = 0; j < n / 8; ++j) {
      for (int e = 0; e < 2; ++e) {
        y.row(8 * j + column + e, w);
        for (int half = 0; half < 2; ++half) {
          float& sum = d[4 * j + 2 * half + e];
          sum = (accumulate ? sum : 0.0f) + dot(rows[half], w, kProductBytes / element_bytes);
        }
      }
    }
  };
  TensorState& state = tensor_state();
  state.products.push_back({happen, state.groups});
}

// All but the last `pending` groups of this thread.
static void finish_products(int pending) {
  TensorState& state = tensor_state();
  const auto due = [&](const TensorState::Product& product) { return product.group < state.groups - pending; };
  for (const TensorState::Product& product : state.products) {
    if (due(product)) product.happen();
  }
  state.products.erase(std::remove_if(state.products.begin(), state.products.end(), due), state.products.end());
}

void wgmma_fence() { together("wgmma.fence", {}); }

void wgmma_commit() {
  together("wgmma.commit_group", {});
  ++tensor_state().groups;
  if (happens_at_once()) finish_products(0);
}

void wgmma_wait(int pending) {
  together("wgmma.wait_group", {static_cast<uint64_t>(pending)});
  finish_products(pending);
  together("wgmma.wait_group", {});  // no lane goes on while others read shared memory
}

}  // namespace dflash::emulator

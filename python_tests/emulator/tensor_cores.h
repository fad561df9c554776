// TMA, wgmma and tcgen05 for the emulator, from what the CUDA driver API and the PTX ISA (9.0) say about tensor maps,
// matrix descriptors, instruction descriptors and tensor memory. Nothing here knows the kernels: where operands lie,
// how they are swizzled, their shapes and types come from the descriptors that a kernel made.
//
// What is checked, beside the limits of each instruction:
//   * tensor memory: poisoned (a NaN) when it is allocated, used only while it is, freed before the CTA ends;
//   * a warp reads its own 32 lanes only; what it reads is there after the wait, and not before;
//   * products read shared memory, and write tensor memory or registers, at once or as late as a wait allows;
//   * a thread that has waited issues tcgen05 only after tcgen05.fence::after_thread_sync, and signals after
//     tcgen05.ld only when that has been waited for and after tcgen05.fence::before_thread_sync. (PTX asks for the
//     first only where the wait was for other threads' tcgen05.)
#pragma once

#include <cuda.h>

#include <bitset>
#include <cstdint>
#include <functional>
#include <vector>

namespace dflash::emulator {

// ---- TMA -----------------------------------------------------------------------------------------------------------

CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

// The box at (column, row) into the CTAs `mask` of the cluster, 0: this one; signals its bytes to the barrier of each.
void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier, unsigned mask);
// .cta_group::2: to this CTA; the barrier is that of CTA `rank`, this one or the other of its pair (ranks 2 i, 2 i +
// 1).
void copy_box_of_pair(uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier, unsigned rank);

// ---- tensor memory -------------------------------------------------------------------------------------------------

constexpr unsigned kLanes = 128, kColumns = 512;

struct TensorMemory {
  std::vector<uint32_t> cells;  // [kLanes][kColumns], once something is allocated
  std::bitset<kColumns> used;
  bool relinquished = false;
  int group = 0;  // .cta_group of all instructions so far
};

// Of one thread.
struct TensorState {
  struct Load {
    float* to;
    uint32_t address;
  };
  std::vector<Load> loads;  // that have not been waited for
  bool read = false;        // tensor memory, since the last fence before a signal
  bool waited = false;      // for other threads, since the last fence after a wait
  struct Product {
    std::function<void()> happen;
    int group;
  };
  std::vector<Product> products;  // of wgmma
  int groups = 0;
  void before_signal() const;
  void before_tcgen05() const;
};

TensorState& tensor_state();
TensorMemory& tensor_memory(unsigned rank);  // of a CTA of the cluster
unsigned warp();

// group: .cta_group of the instruction, alike in all of a kernel.
bool elect_one();
void tmem_allocate(int group, uint32_t place, unsigned columns);
void tmem_relinquish(int group);
void tmem_free(int group, uint32_t address, unsigned columns);
void tmem_load_16x256b(float* to, uint32_t address, int repeats);
void tmem_wait_loads();
// element_bytes: 2, .kind::f16 of bf16, or 1, .kind::f8f6f4 of e4m3.
void multiply(int element_bytes, int group, uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, bool accumulate);
// tcgen05.cp.32x128b.warpx4: 32 rows of 16 bytes to four columns of each part of 32 lanes, in each CTA of the group.
void tmem_copy_32x128b(int group, uint32_t address, uint64_t descriptor);
// .kind::mxf4nvf4.block16: e2m1 with scales in ue4m3, which are applied to fp32 sums of 16 here.
void multiply_nvfp4(int group, uint32_t d, uint64_t a, uint64_t b, uint32_t a_scales, uint32_t b_scales,
                    uint32_t instruction, bool accumulate);
void commit(int group, uint32_t barrier, unsigned mask);  // 0: this CTA's

// ---- wgmma: m64, K = 16 of bf16 or 32 of e4m3, whose sums are fp32 here ---------------------------------------------

void wgmma(int element_bytes, float* d, int n, uint64_t a, uint64_t b, bool accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace dflash::emulator

// Rows of bf16 to codes of e4m3 with a scale each; the formula is in common/row_scale.h.
//
// Floor: 3 M N bytes, two thirds of them read, at the rate of L2, where the preceding kernel has just left the rows: of
// the drafter's gated activation (N = 12288) 4.7 MB for 128 rows, 1 us at 5 TB/s. Below that, and for most of the
// rows of a draft, what counts is the chain of one trip to L2, one barrier and one store.
//
// Partition: one block a row, so that the largest magnitude needs no second kernel. A thread holds its part in
// registers, 8 columns to each 16-byte load, all loads under way at once: the row is read once. Registers for 1, 3, 8
// or 16 loads; three are the 6144 columns of a wide attention.
#include "common/dependent_launch.cuh"
#include "smxx/quantize/launch.h"
#include "smxx/quantize/rows.cuh"

namespace dflash::quantize {
namespace {

constexpr int kThreads = 256;
constexpr int kPassColumns = 8 * kThreads;  // of one load of all threads
static_assert(kMaxColumns == 16 * kPassColumns);

template <int kVectors>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(const __grid_constant__ QuantizeParams p) {
  const int64_t row = blockIdx.x;
  const int columns = static_cast<int>(p.n);
  grid_dependency_launch();
  grid_dependency_wait();
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + row * p.n;
  uint4 part[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = i * kPassColumns + 8 * static_cast<int>(threadIdx.x);
    part[i] = column < columns ? *reinterpret_cast<const uint4*>(x + column) : make_uint4(0, 0, 0, 0);
  }
  __shared__ float partial[kThreads / 32];
  __nv_bfloat162 largest = __float2bfloat162_rn(0.0f);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) largest = largest_of(part[i], largest);
  const RowScale scale = row_scale(largest_of_block(largest, partial));
  if (threadIdx.x == 0) p.scale[row] = scale.scale;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = i * kPassColumns + 8 * static_cast<int>(threadIdx.x);
    if (column < columns) {
      *reinterpret_cast<uint2*>(p.codes + row * p.n + column) = codes_of(part[i], scale.inverse);
    }
  }
}

}  // namespace

void launch_quantize_rows(const QuantizeParams& p, cudaStream_t stream) {
  if (p.m == 0) return;
  const int64_t passes = (p.n + kPassColumns - 1) / kPassColumns;
  const auto kernel = passes <= 1   ? quantize_rows_kernel<1>
                      : passes <= 3 ? quantize_rows_kernel<3>
                      : passes <= 8 ? quantize_rows_kernel<8>
                                    : quantize_rows_kernel<16>;
  launch_kernel(kernel, dim3(static_cast<unsigned>(p.m)), kThreads, 0, stream, p.early_start, "quantize_rows", p);
}

}  // namespace dflash::quantize

// Rows of bf16 to nvfp4: e2m1 codes, a scale in e4m3 for 16 neighbours and one in fp32 a row.
//
//   largest = max(max_c |x[c]|, 1e-30)                        of what is not NaN
//   scale   = largest / (6 * 448)
//   s[g]    = e4m3( max_{c in g} |x[c]| * (448 / largest) )   NaN where the group has one
//   code[c] = e2m1( x[c] * (1 / (s[g] * scale)) )             to the nearest, ties to even; 0 where s[g] is 0 or NaN
//
// Each quotient and product is rounded to float32 by itself, so that host and device agree on every bit. The scales
// come in the order that the tensor cores read (formats.py, scale_blocks), edges filled up with zeros: rows beyond M to
// a multiple of 128, for which the grid has blocks too, and groups to a multiple of four.
//
// Floor: 2.6 M N bytes, of which 2 are read, at the rate of L2; otherwise as quantize_rows.cu, with the same partition.
// A group's sixteen columns are two neighbouring lanes' loads, the word of four scales that of eight lanes.
#include "common/dependent_launch.cuh"
#include "smxx/quantize/launch.h"
#include "smxx/quantize/rows.cuh"

namespace dflash::quantize {
namespace {

constexpr int kThreads = 256;
constexpr int kPassColumns = 8 * kThreads;  // of one load of all threads
constexpr int kBlockRows = 128, kBlockColumns = 64, kBlockBytes = 512;
constexpr float kLargestNvfp4 = 6.0f * kLargestE4m3;
static_assert(kMaxColumns == 16 * kPassColumns);

// Of a code without sign: its bits are those of float32 with another bias, also below the normal numbers.
__device__ __forceinline__ float e4m3_value(uint32_t code) { return __uint_as_float(code << 20) * 0x1p120f; }

// Sign, two bits of exponent, one of mantissa; beyond +-6 saturates, of NaN no matter what.
__device__ __forceinline__ uint32_t e2m1(float x) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = __float_as_uint(__uint_as_float(magnitude) + 0x1p22f) & 3u;  // steps of 1/2
  const uint32_t normal = ((magnitude + 0x1fffffu + (magnitude >> 22 & 1u)) >> 22) - (126u << 1);
  return (magnitude < 0x3f800000u ? subnormal : min(normal, 7u)) | (bits >> 28 & 8u);
}

// Eight bf16: their codes, the first in the low bits, and their group's scale in e4m3. Whole warps.
__device__ __forceinline__ uint32_t codes_of(uint4 part, const float scale, float up, uint32_t& group_scale) {
  const uint32_t words[4] = {part.x, part.y, part.z, part.w};
  float largest = 0.0f;
  bool nan = false;
#pragma unroll
  for (const uint32_t word : words) {
    const float2 v = pair_of(word);
    largest = fmaxf(largest, fmaxf(fabsf(v.x), fabsf(v.y)));
    nan = nan || v.x != v.x || v.y != v.y;
  }
  if (nan) largest = __uint_as_float(0x7fffffffu);
  const float other = __shfl_xor_sync(0xffffffffu, largest, 1);
  largest = other > largest || other != other ? other : largest;  // a NaN stays
  group_scale = e4m3_pair(__fmul_rn(largest, up), 0.0f) & 0x7fu;
  if (group_scale == 0 || group_scale == 0x7f) return 0;
  const float inverse = 1.0f / __fmul_rn(e4m3_value(group_scale), scale);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 v = pair_of(words[i]);
    codes |= (e2m1(__fmul_rn(v.x, inverse)) | e2m1(__fmul_rn(v.y, inverse)) << 4) << 8 * i;
  }
  return codes;
}

template <int kVectors>
__global__ void __launch_bounds__(kThreads) quantize_rows_nvfp4_kernel(const __grid_constant__ QuantizeParams p) {
  const int64_t row = blockIdx.x;
  const int columns = static_cast<int>(p.n), lane = static_cast<int>(threadIdx.x) % 32;
  const bool live = row < p.m;
  grid_dependency_launch();
  grid_dependency_wait();
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + row * p.n;
  uint4 part[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = i * kPassColumns + 8 * static_cast<int>(threadIdx.x);
    part[i] = live && column < columns ? *reinterpret_cast<const uint4*>(x + column) : make_uint4(0, 0, 0, 0);
  }
  __shared__ float partial[kThreads / 32];
  __nv_bfloat162 pair = __float2bfloat162_rn(0.0f);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) pair = largest_of(part[i], pair);
  const float largest = fmaxf(largest_of_block(pair, partial), kLeastMagnitude);
  const float scale = largest / kLargestNvfp4, up = kLargestE4m3 / largest;
  if (live && threadIdx.x == 0) p.scale[row] = scale;
  const int64_t k_blocks = (p.n + kBlockColumns - 1) / kBlockColumns;
  const int row_in_block = static_cast<int>(row % kBlockRows);
  uint8_t* const blocks =
      p.blocks + row / kBlockRows * k_blocks * kBlockBytes + row_in_block % 32 * 16 + row_in_block / 32 * 4;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = i * kPassColumns + 8 * static_cast<int>(threadIdx.x);
    uint32_t group_scale;
    const uint32_t codes = codes_of(part[i], scale, up, group_scale);
    if (live && column < columns) {
      *reinterpret_cast<uint32_t*>(p.codes + (row * p.n + column) / 2) = codes;
    }
    uint32_t word = group_scale << lane / 2 % 4 * 8;
    word |= __shfl_xor_sync(0xffffffffu, word, 2);
    word |= __shfl_xor_sync(0xffffffffu, word, 4);
    if (lane % 8 == 0 && column < columns) {
      *reinterpret_cast<uint32_t*>(blocks + column / kBlockColumns * int64_t{kBlockBytes}) = word;
    }
  }
}

}  // namespace

void launch_quantize_rows_nvfp4(const QuantizeParams& p, cudaStream_t stream) {
  if (p.m == 0) return;
  const int64_t passes = (p.n + kPassColumns - 1) / kPassColumns;
  const int64_t rows = (p.m + kBlockRows - 1) / kBlockRows * kBlockRows;
  const auto kernel = passes <= 1   ? quantize_rows_nvfp4_kernel<1>
                      : passes <= 3 ? quantize_rows_nvfp4_kernel<3>
                      : passes <= 8 ? quantize_rows_nvfp4_kernel<8>
                                    : quantize_rows_nvfp4_kernel<16>;
  launch_kernel(kernel, dim3(static_cast<unsigned>(rows)), kThreads, 0, stream, p.early_start, "quantize_rows_nvfp4",
                p);
}

}  // namespace dflash::quantize

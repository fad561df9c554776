// grouped_conv: a depthwise convolution over the tokens of a block, its kernel partly per token.
//
//   out[n, h] = bf16( sum over tap of (base[tap, h] + delta[n, tap, h / group_size]) * x[n - tap, h] )
//   x[n - tap] counts as 0 where it lies in another block, n % T < tap; taps in order, float32, each operation rounded
//
// Floors. Latency (a block of 8 rows, H 5120): 170 KB move, 60 ns at the card's bandwidth: the launch and one round
// trip to memory (about 2 us) are all there is, so every load of a thread is in flight before the first is used.
// Throughput: 2 * N * H reads and writes of bf16 plus delta (taps / group_size of x): a copy at bandwidth.
//
// Partition. taps = 2: a thread owns 8 neighbouring channels (16 bytes; one delta a tap, as group_size is a multiple
// of 8) of kRows neighbouring rows. It reads kRows + 1 rows of x: the row above is kept, not read twice, and base is
// read once. kRows 4 costs 1.25 reads of x for one of output, in L2 traffic only; kRows 1 where 4 would leave SMs idle.
// Other taps, group sizes or alignments: a thread owns 8 or 1 channels of one row and walks the taps.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "smxx/dflash2/launch.h"

namespace dflash::dflash2 {
namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;  // channels in 16 bytes
// Below this many threads (about four CTAs on each of 132 SMs) more rows a thread only lengthens the critical path.
constexpr int64_t kFewThreads = 132 * 4 * kThreads;

struct alignas(16) Vector {
  uint32_t words[4];

  // Channel 2 * i is the low half of word i.
  __device__ float at(int channel) const {
    const uint32_t word = words[channel / 2];
    return __uint_as_float(channel % 2 ? word & 0xffff0000u : word << 16);
  }
};

__device__ Vector load_vector(const void* base, int64_t element) {
  return *reinterpret_cast<const Vector*>(static_cast<const __nv_bfloat16*>(base) + element);
}

__device__ float load_scalar(const void* base, int64_t element) {
  return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[element]);
}

__device__ void store_vector(void* base, int64_t element, const float (&values)[kVector]) {
  Vector packed;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    packed.words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  *reinterpret_cast<Vector*>(static_cast<__nv_bfloat16*>(base) + element) = packed;
}

template <int kRows>
__global__ void __launch_bounds__(kThreads) two_tap_kernel(ConvParams p) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;  // below 2^31 + kThreads: csrc/api checks N * H
  const unsigned vectors = p.hidden_size / kVector;
  const int64_t first = static_cast<int64_t>(i / vectors) * kRows;
  if (first >= p.rows) return;
  const int channel = static_cast<int>(i % vectors) * kVector;
  const int64_t group = channel / p.group_size;
  const int rows = p.rows - first < kRows ? static_cast<int>(p.rows - first) : kRows;
  const int first_position = static_cast<int>(first % p.block_size);

  const Vector base[2] = {load_vector(p.base, channel), load_vector(p.base, p.hidden_size + channel)};
  Vector x[kRows + 1] = {};  // x[r + 1] is row first + r
  float delta[kRows][2] = {};
  if (first_position > 0) x[0] = load_vector(p.x, (first - 1) * p.x_stride + channel);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < rows) {
      const int64_t d = (first + r) * p.delta_row_stride + group;
      x[r + 1] = load_vector(p.x, (first + r) * p.x_stride + channel);
      delta[r][0] = load_scalar(p.delta, d);
      delta[r][1] = load_scalar(p.delta, d + p.delta_tap_stride);
    }
  }
  int position = first_position;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < rows) {
      float sums[kVector];
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        const float above = position > 0 ? x[r].at(c) : 0.0f;
        sums[c] = add_tap(first_tap(base[0].at(c), delta[r][0], x[r + 1].at(c)), base[1].at(c), delta[r][1], above);
      }
      store_vector(p.out, (first + r) * p.hidden_size + channel, sums);
    }
    position = position + 1 == p.block_size ? 0 : position + 1;
  }
}

template <int kWidth>  // channels of a thread: 8 or 1
__global__ void __launch_bounds__(kThreads) any_tap_kernel(ConvParams p) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  const unsigned columns = p.hidden_size / kWidth;
  const int64_t n = i / columns;
  if (n >= p.rows) return;
  const int channel = static_cast<int>(i % columns) * kWidth;
  const int64_t group = channel / p.group_size;
  const int position = static_cast<int>(n % p.block_size);
  float sums[kWidth] = {};
  for (int tap = 0; tap < p.taps; ++tap) {
    const float delta = load_scalar(p.delta, n * p.delta_row_stride + tap * p.delta_tap_stride + group);
    const int64_t base_at = static_cast<int64_t>(tap) * p.hidden_size + channel;
    const int64_t x_at = (n - tap) * p.x_stride + channel;
    const bool inside = position >= tap;
    if constexpr (kWidth == kVector) {
      const Vector base = load_vector(p.base, base_at);
      const Vector x = inside ? load_vector(p.x, x_at) : Vector{};
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        sums[c] = tap == 0 ? first_tap(base.at(c), delta, x.at(c)) : add_tap(sums[c], base.at(c), delta, x.at(c));
      }
    } else {
      const float base = load_scalar(p.base, base_at);
      const float x = inside ? load_scalar(p.x, x_at) : 0.0f;
      sums[0] = tap == 0 ? first_tap(base, delta, x) : add_tap(sums[0], base, delta, x);
    }
  }
  if constexpr (kWidth == kVector) {
    store_vector(p.out, n * p.hidden_size + channel, sums);
  } else {
    static_cast<__nv_bfloat16*>(p.out)[n * p.hidden_size + channel] = __float2bfloat16_rn(sums[0]);
  }
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vector) == 0; }

}  // namespace

void launch_grouped_conv(const ConvParams& p, cudaStream_t stream) {
  const bool vector = p.group_size % kVector == 0 && p.x_stride % kVector == 0 && aligned(p.x) && aligned(p.base) &&
                      aligned(p.out);  // H is a multiple of group_size
  const int64_t vectors = p.hidden_size / kVector;
  if (vector && p.taps == 2) {
    const int64_t chunks = (p.rows + 3) / 4;
    if (chunks * vectors < kFewThreads) {
      two_tap_kernel<1><<<blocks_for(p.rows * vectors), kThreads, 0, stream>>>(p);
    } else {
      two_tap_kernel<4><<<blocks_for(chunks * vectors), kThreads, 0, stream>>>(p);
    }
  } else if (vector) {
    any_tap_kernel<kVector><<<blocks_for(p.rows * vectors), kThreads, 0, stream>>>(p);
  } else {
    any_tap_kernel<1><<<blocks_for(p.rows * p.hidden_size), kThreads, 0, stream>>>(p);
  }
  cuda_check_launch("grouped_conv");
}

}  // namespace dflash::dflash2

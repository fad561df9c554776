// inject_kv: the target's hidden states of committed tokens become the drafter's context KV; formula in params.h.
//
// Launches, for each chunk of rows: fc (GEMM over K sources), RMSNorm in place, KV projection of all layers (one GEMM),
// then K-norm + RoPE + paged write of all layers. For more than 64 rows and heads of 64 or 128, where the
// device has wgmma or tcgen05, the projection's epilogue does the last of these (write_heads.cuh): K and V go from the
// accumulators to the caches. All but the first start while their predecessor still runs (dependent_launch.cuh), so
// that the projection's first weights are on their way while fc and the norm finish.
//
// More than 64 rows with commit lengths: a first launch puts the live tokens' taps together (gather.cu), and from there
// on the live rows are the first ones. So all tiles but the last are full, and a step that commits 6 of 16 tokens does
// little more than 6/16 of the work. The host does not know how many there are: the grid is for all, tiles are chosen
// for half of them, tiles without a live row leave at once. Otherwise rows >= commit_lens are skipped by each launch:
// they change nothing, and their slots are not looked at.
//
// Floors. Latency (B * T <= 64 rows): the weights, (K * H * H + L * 2 * Hkv * D * H) * 2 bytes, at the HBM read rate;
// the activations between the launches stay in L2. Throughput: 2 * M * (K * H * H + L * 2 * Hkv * D * H) tensor-core
// flops with M live rows; gathering reads and writes M * K * H * 2 bytes; a last kernel of its own reads and writes
// M * L * 2 * Hkv * D * 2 bytes, through L2 while a chunk fits there.
//
// The last kernel has two forms. Heads of 64, 128 or 256, rotated whole, in caches of 16-byte rows: a warp for eight
// rows of one head of K or V, a quad of lanes for a row (head.cuh, which the projection's epilogue uses likewise). Any
// other: one warp for one (row, layer, KV head), K and V; a block of 4 warps takes neighbouring heads, whose cache
// lines adjoin. The rotation pairs element i with i + rotary_dim / 2, which another lane holds: the normed head goes
// through 4 * D bytes of shared memory of the warp's own, so __syncwarp is the only barrier.
#include <cuda_bf16.h>

#include <algorithm>

#include "common/cuda_check.h"
#include "common/dependent_launch.cuh"
#include "common/device.h"
#include "sm100/inject/launch.h"
#include "sm90/inject/launch.h"
#include "smxx/gemm/launch.h"
#include "smxx/inject/gather.h"
#include "smxx/inject/head.cuh"
#include "smxx/inject/launch.h"
#include "smxx/norm/launch.h"

namespace dflash::inject {
namespace {

constexpr int kWarps = 4;
constexpr int64_t kMaxChunkRows = 65536;  // keeps rows * L * Hkv of a launch in 31 bits
constexpr int kCheckThreads = 256;
constexpr int kHeadRows = 8;  // of a warp of write_heads_kernel
constexpr unsigned long long kNoFault = ~0ull;

__global__ void __launch_bounds__(32 * kWarps) write_kernel(const __grid_constant__ WriteParams p) {
  __shared__ float normed[kWarps][kMaxHeadDim];
  grid_dependency_launch();
  grid_dependency_wait();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned item = blockIdx.x * kWarps + warp;
  const unsigned per_row = static_cast<unsigned>(p.layers * p.kv_heads);
  const int64_t row = item / per_row;
  if (row >= p.rows || !p.live.at(row)) return;  // whole warps leave
  const int64_t token = p.order == nullptr ? row : p.order[row];
  const int64_t slot = p.slots.at(token), position = p.positions.at(token);
  if (slot < 0 || slot >= p.pool_size || position < 0 || position >= p.max_positions) return;
  const int layer = item % per_row / p.kv_heads, head = item % per_row % p.kv_heads;
  const int dim = p.head_dim, half = p.rotary_dim / 2;

  const uint16_t* kv = static_cast<const uint16_t*>(p.kv);
  const uint16_t* k = kv + ((row * p.layers + layer) * 2 * p.kv_heads + head) * dim;
  const uint16_t* v = k + p.kv_heads * dim;
  const CacheView k_view = p.k[layer], v_view = p.v[layer];
  const int64_t k_at = slot * k_view.slot_stride + head * k_view.head_stride;
  const int64_t v_at = slot * v_view.slot_stride + head * v_view.head_stride;
  const auto store = [&](const CacheView& view, int64_t at, float value, float inverse) {
    if (p.is_fp8) {
      static_cast<uint8_t*>(view.data)[at] = static_cast<uint8_t>(e4m3_pair(value * inverse, 0.0f));
    } else {
      static_cast<uint16_t*>(view.data)[at] = __bfloat16_as_ushort(__float2bfloat16_rn(value));
    }
  };
  const float k_inverse = inverse_scale(p, layer, false), v_inverse = inverse_scale(p, layer, true);

  // Element-wise 16-bit accesses: caches and biases of any alignment, and D of any even size.
  float* x = normed[warp];
  float sum = 0.0f;
  for (int i = lane; i < dim; i += 32) {
    const float value = __bfloat162float(__ushort_as_bfloat16(k[i]));
    const float scaled = __bfloat162float(__ushort_as_bfloat16(v[i])) * p.value_scale;
    store(v_view, v_at + i, __bfloat162float(__float2bfloat16_rn(scaled)), v_inverse);
    x[i] = value;
    sum += value * value;
  }
  if (p.k_norm != nullptr) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    const float scale = rsqrtf(sum / static_cast<float>(dim) + p.eps);
    const uint16_t* weight = static_cast<const uint16_t*>(p.k_norm) + layer * dim;
    for (int i = lane; i < dim; i += 32) x[i] = x[i] * scale * __bfloat162float(__ushort_as_bfloat16(weight[i]));
  }
  __syncwarp();
  const float* cosines = p.cos_sin + position * p.cos_sin_stride;
  const float* sines = cosines + half;
  for (int i = lane; i < dim; i += 32) {
    float out = x[i];
    if (i < half) {
      out = x[i] * cosines[i] - x[i + half] * sines[i];
    } else if (i < 2 * half) {
      out = x[i] * cosines[i - half] + x[i - half] * sines[i - half];
    }
    store(k_view, k_at + i, out, k_inverse);
  }
}

template <int kDim>
__global__ void __launch_bounds__(32 * kWarps) write_heads_kernel(const __grid_constant__ WriteParams p) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int lane = threadIdx.x % 32, heads = 2 * p.layers * p.kv_heads;
  const unsigned item = blockIdx.x * kWarps + threadIdx.x / 32;
  const int64_t row = int64_t{item / heads} * kHeadRows + lane / 4;
  const int n = static_cast<int>(item % heads);
  const bool live = row < p.rows && p.live.at(row);
  if (__ballot_sync(0xffffffffu, live) == 0) return;
  const RowPlace place = find_place(p, row, live);
  const uint16_t* from = static_cast<const uint16_t*>(p.kv) + (row * heads + n) * kDim + 8 * (lane % 4);
  float2 x[kDim / 8];
#pragma unroll
  for (int g = 0; g < kDim / 32; ++g) {
    uint4 loaded = make_uint4(0, 0, 0, 0);
    if (live) loaded = *reinterpret_cast<const uint4*>(from + 32 * g);
    uint32_t v[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
    transpose_4x4(v);
#pragma unroll
    for (int r = 0; r < 4; ++r) x[4 * g + r] = pair_of(v[r]);
  }
  finish_head<kDim>(p, x, HeadPlace(p, n), place);
}

__global__ void __launch_bounds__(kCheckThreads)
    check_kernel(const __grid_constant__ WriteParams p, unsigned long long* first) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCheckThreads + threadIdx.x;
  if (row >= p.rows) return;
  const Fault fault = find_fault(p, row);
  if (fault != Fault::kNone) atomicMin(first, static_cast<unsigned long long>(row * 4 + static_cast<int>(fault)));
}

template <int kDim>
void launch_write_heads(const WriteParams& p, cudaStream_t stream) {
  const int64_t items = (p.rows + kHeadRows - 1) / kHeadRows * 2 * p.layers * p.kv_heads;
  const auto blocks = static_cast<unsigned>((items + kWarps - 1) / kWarps);
  launch_kernel(write_heads_kernel<kDim>, dim3(blocks), 32 * kWarps, 0, stream, true, "inject_kv", p);
}

void launch_write(const WriteParams& p, cudaStream_t stream) {
  if (takes_whole_heads(p)) {
    if (p.head_dim == 64) return launch_write_heads<64>(p, stream);
    if (p.head_dim == 128) return launch_write_heads<128>(p, stream);
    return launch_write_heads<256>(p, stream);
  }
  const int64_t items = p.rows * p.layers * p.kv_heads;
  const auto blocks = static_cast<unsigned>((items + kWarps - 1) / kWarps);
  launch_kernel(write_kernel, dim3(blocks), 32 * kWarps, 0, stream, true, "inject_kv", p);
}

IntView advanced(IntView view, int64_t count) {
  if (view.data != nullptr) {
    view.data = static_cast<const char*>(view.data) + count * view.stride0 * (view.is_int64 ? 8 : 4);
  }
  return view;
}

// The projection with K-norm, RoPE and the paged write in one launch. False, with nothing launched, where the device
// has no kernel that does it, or for operands that it does not take.
bool launch_project([[maybe_unused]] const gemm::GemmParams& project, [[maybe_unused]] const WriteParams& write,
                    [[maybe_unused]] cudaStream_t stream) {
  [[maybe_unused]] const Device device = current_device("inject_kv");
#if DFLASH_WITH_SM90
  if (device.major == 9) return sm90::inject::launch_project(project, write, device.num_sms, stream);
#endif
#if DFLASH_WITH_SM100
  if (device.major == 10) return sm100::inject::launch_project(project, write, device.num_sms, stream);
#endif
  return false;
}

}  // namespace

void launch_inject_kv(const InjectParams& p, cudaStream_t stream) {
  const int64_t kv_width = static_cast<int64_t>(p.write.layers) * 2 * p.write.kv_heads * p.write.head_dim;
  const int64_t per_request = p.write.live.rows_per_request;
  const bool counted = p.write.live.commit_lens.data != nullptr;
  const Chunks chunks = plan_chunks(p);
  int64_t most_rows = kMaxChunkRows / per_request;
  if (chunks.gather && counted) most_rows = std::min<int64_t>(most_rows, kMaxGatherRequests);
  most_rows = std::max(most_rows, int64_t{1}) * per_request;
  const int64_t step = std::min(chunks.rows, most_rows);
  const int64_t chunk_rows = std::min(step, p.write.rows);
  auto* count = reinterpret_cast<int64_t*>(p.workspace);
  uint16_t* gathered = p.workspace + kHeaderElements;
  uint16_t* fused = gathered + (chunks.gather ? chunk_rows * p.num_taps * p.tap_width : 0);
  uint16_t* kv = fused + (p.fused == nullptr ? chunk_rows * p.hidden : 0);
  auto* order = reinterpret_cast<int32_t*>(kv + chunk_rows * kv_width);  // kv_width is even: 4-byte aligned
  for (int64_t start = 0; start < p.write.rows; start += step) {
    const int64_t rows = std::min(step, p.write.rows - start);
    WriteParams write = p.write;
    write.kv = kv;
    write.rows = rows;
    write.positions = advanced(p.write.positions, start);
    write.slots = advanced(p.write.slots, start);
    write.live.commit_lens = advanced(p.write.live.commit_lens, start / per_request);

    const bool early_start = chunks.gather;  // of what follows the gathering
    if (chunks.gather) {
      GatherParams gather;
      gather.num_taps = p.num_taps > 0 ? p.num_taps : p.num_shards;
      for (int i = 0; i < gather.num_taps; ++i) {
        gather.tap_stride[i] = p.num_taps > 0 ? p.tap_stride[i] : p.shard_stride;
        gather.taps[i] = (p.num_taps > 0 ? p.taps[i] : p.shards[i]) + start * gather.tap_stride[i];
      }
      gather.width = static_cast<int>(p.num_taps > 0 ? p.tap_width : p.hidden / p.num_shards);
      gather.norm = p.tap_norm;
      gather.eps = p.write.eps;
      gather.live = write.live;
      if (!counted) gather.live.rows_per_request = rows;
      gather.batch = static_cast<int>(counted ? rows / per_request : 1);
      gather.rows = p.num_taps > 0 ? gathered : fused;
      gather.order = order;
      gather.count = count;
      launch_gather(gather, stream);
      if (counted) {
        write.order = order;
        write.live.commit_lens = IntView{count, 0, 0, true};  // one request: rows 0..count - 1 are live
        write.live.rows_per_request = rows;
      }
    }
    const int64_t expected_live = chunks.gather && counted ? (rows + 1) / 2 : 0;

    if (p.num_taps > 0) {
      gemm::GemmParams fc;
      if (chunks.gather) {
        fc.a[0] = gathered;
        fc.a_stride[0] = p.num_taps * p.tap_width;
      } else {
        fc.num_sources = p.num_taps;
        for (int i = 0; i < p.num_taps; ++i) {
          fc.a[i] = p.taps[i] + start * p.tap_stride[i];
          fc.a_stride[i] = p.tap_stride[i];
        }
      }
      fc.w = p.fc_weight;
      fc.c = p.fused == nullptr ? fused : p.fused + start * p.fused_stride;
      fc.c_stride = p.fused == nullptr ? p.hidden : p.fused_stride;
      fc.c_rows = p.fused == nullptr ? nullptr : write.order;
      fc.m = rows;
      fc.n = p.hidden;
      fc.k = p.num_taps * p.tap_width;
      fc.live = write.live;
      fc.expected_live = expected_live;
      fc.early_start = early_start;
      gemm::launch_gemm_bf16(fc, stream);
      if (p.fused != nullptr) continue;
    }

    norm::RmsNormParams norm;
    norm.x = fused;
    norm.x_stride = p.hidden;
    if (p.num_taps == 0 && !chunks.gather) {
      norm.x = p.shards[0] + start * p.shard_stride;
      norm.x_stride = p.shard_stride;
      norm.parts = p.num_shards;
      norm.part_stride = p.num_shards > 1 ? p.shards[1] - p.shards[0] : 0;
    }
    norm.weight = p.hidden_norm;
    norm.out = fused;
    norm.out_stride = p.hidden;
    norm.m = rows;
    norm.n = p.hidden;
    norm.eps = p.write.eps;
    norm.live = write.live;
    norm.early_start = p.num_taps > 0 || early_start;
    norm::launch_rmsnorm(norm, stream);

    gemm::GemmParams project;
    project.a[0] = fused;
    project.a_stride[0] = p.hidden;
    project.w = p.kv_weight;
    project.bias = p.kv_bias;
    project.c = kv;
    project.c_stride = kv_width;
    project.m = rows;
    project.n = kv_width;
    project.k = p.hidden;
    project.live = write.live;
    project.expected_live = expected_live;
    project.early_start = true;
    if (rows > kGatherRows && takes_whole_heads(write) && launch_project(project, write, stream)) continue;
    gemm::launch_gemm_bf16(project, stream);

    launch_write(write, stream);
  }
}

RowFault check_inject_cuda(const WriteParams& p, void* scratch, cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cuda_check(cudaStreamIsCapturing(stream, &status), "inject_kv");
  if (status != cudaStreamCaptureStatusNone || p.rows == 0) return {};
  auto* first = static_cast<unsigned long long*>(scratch);
  cuda_check(cudaMemsetAsync(first, 0xff, sizeof(*first), stream), "inject_kv");
  const auto blocks = static_cast<unsigned>((p.rows + kCheckThreads - 1) / kCheckThreads);
  check_kernel<<<blocks, kCheckThreads, 0, stream>>>(p, first);
  cuda_check_launch("inject_kv");
  unsigned long long found = kNoFault;
  cuda_check(cudaMemcpyAsync(&found, first, sizeof(found), cudaMemcpyDeviceToHost, stream), "inject_kv");
  cuda_check(cudaStreamSynchronize(stream), "inject_kv");
  if (found == kNoFault) return {};
  return {static_cast<Fault>(found % 4), static_cast<int64_t>(found / 4)};
}

}  // namespace dflash::inject

// inject_kv: schema, checks, dispatch. On the CPU the GEMMs are torch's, called from Python between the two internal
// ops defined here: _inject_kv_check (every check, nothing written) and _inject_kv_write (the index half).
#include <utility>

#include "api/check.h"
#include "api/cuda_stream.h"
#include "cpu/inject.h"
#if DFLASH_WITH_CUDA
#include "smxx/inject/launch.h"
#include "smxx/inject/stream.h"
#endif

namespace dflash::inject {
namespace {

using api::ScalarType;
using api::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

constexpr const char* kOp = "inject_kv";

std::string element_name(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

void check_float(const char* name, const Tensor& tensor, const Tensor& first) {
  api::check_same_device(kOp, name, tensor, first);
  api::check_dtype(kOp, name, tensor, {first.scalar_type()});
}

void check_cache(const char* list, size_t i, const Tensor& cache, int64_t pool_size, int64_t kv_heads, int64_t head_dim,
                 const Tensor& first, CacheView* view) {
  const std::string name = element_name(list, i);
  api::check_shape(kOp, name.c_str(), cache, {pool_size, kv_heads, head_dim});
  check_float(name.c_str(), cache, first);
  api::check_last_dim_contiguous(kOp, name.c_str(), cache);
  view->data = cache.data_ptr();
  view->slot_stride = cache.stride(0);
  view->head_stride = cache.stride(1);
}

// Everything of the write step but kv. `first` is the tensor that sets dtype and device.
WriteParams write_params(const Tensor& first, int64_t rows, const MaybeTensor& k_norm, const Tensor& cos_sin,
                         const Tensor& positions, const Tensor& slots, const MaybeTensor& commit_lens,
                         const Tensors& k_caches, const Tensors& v_caches, double eps) {
  const auto layers = static_cast<int64_t>(k_caches.size());
  DFLASH_CHECK(kOp, layers >= 1 && layers <= kMaxLayers, "k_caches", "hold 1 to 16 layers", layers);
  DFLASH_CHECK(kOp, v_caches.size() == k_caches.size(), "v_caches",
               "hold as many layers as k_caches (" + std::to_string(layers) + ")", v_caches.size());
  api::check_shape(kOp, "k_caches[0]", k_caches[0], {-1, -1, -1});
  const int64_t pool_size = k_caches[0].size(0), kv_heads = k_caches[0].size(1), head_dim = k_caches[0].size(2);
  DFLASH_CHECK(kOp, kv_heads >= 1 && kv_heads <= 1024, "k_caches[0].size(1)", "be in 1..1024", kv_heads);
  DFLASH_CHECK(kOp, head_dim >= 2 && head_dim % 2 == 0 && head_dim <= kMaxHeadDim, "k_caches[0].size(2)",
               "be even and in 2..256", head_dim);
  WriteParams p;
  for (size_t i = 0; i < k_caches.size(); ++i) {
    check_cache("k_caches", i, k_caches[i], pool_size, kv_heads, head_dim, first, &p.k[i]);
    check_cache("v_caches", i, v_caches[i], pool_size, kv_heads, head_dim, first, &p.v[i]);
  }
  if (k_norm) {
    api::check_shape(kOp, "k_norm", *k_norm, {layers, head_dim});
    check_float("k_norm", *k_norm, first);
    api::check_contiguous(kOp, "k_norm", *k_norm);
    p.k_norm = k_norm->data_ptr();
  }
  api::check_shape(kOp, "cos_sin", cos_sin, {-1, -1});
  const int64_t rotary_dim = cos_sin.size(1);
  DFLASH_CHECK(kOp, rotary_dim >= 2 && rotary_dim % 2 == 0 && rotary_dim <= head_dim, "cos_sin.size(1)",
               "be even and in 2.." + std::to_string(head_dim), rotary_dim);
  api::check_dtype(kOp, "cos_sin", cos_sin, {ScalarType::Float});
  api::check_same_device(kOp, "cos_sin", cos_sin, first);
  api::check_last_dim_contiguous(kOp, "cos_sin", cos_sin);
  const std::pair<const char*, const Tensor*> indices[] = {{"positions", &positions}, {"slots", &slots}};
  for (const auto& [name, tensor] : indices) {
    api::check_shape(kOp, name, *tensor, {rows});
    api::check_index_dtype(kOp, name, *tensor);
    api::check_same_device(kOp, name, *tensor, first);
  }
  if (commit_lens) {
    api::check_shape(kOp, "commit_lens", *commit_lens, {-1});
    api::check_index_dtype(kOp, "commit_lens", *commit_lens);
    api::check_same_device(kOp, "commit_lens", *commit_lens, first);
    p.batch = commit_lens->size(0);
    DFLASH_CHECK(kOp, p.batch == 0 ? rows == 0 : rows % p.batch == 0, "commit_lens",
                 "have a size that divides the " + std::to_string(rows) + " rows", p.batch);
    if (rows > 0) {
      p.live.commit_lens = api::int_view(*commit_lens);
      p.live.rows_per_request = rows / p.batch;
    }
  }
  p.rows = rows;
  p.layers = static_cast<int>(layers);
  p.kv_heads = static_cast<int>(kv_heads);
  p.head_dim = static_cast<int>(head_dim);
  p.rotary_dim = static_cast<int>(rotary_dim);
  p.cos_sin = static_cast<const float*>(cos_sin.data_ptr());
  p.cos_sin_stride = cos_sin.stride(0);
  p.max_positions = cos_sin.size(0);
  p.pool_size = pool_size;
  p.positions = api::int_view(positions);
  p.slots = api::int_view(slots);
  p.eps = static_cast<float>(eps);
  return p;
}

InjectParams inject_params(const Tensors& taps, const Tensor& fc_weight, const Tensor& hidden_norm,
                           const Tensor& kv_weight, const MaybeTensor& kv_bias, const MaybeTensor& k_norm,
                           const Tensor& cos_sin, const Tensor& positions, const Tensor& slots,
                           const MaybeTensor& commit_lens, const Tensors& k_caches, const Tensors& v_caches,
                           const Tensor& workspace, double eps) {
  const auto num_taps = static_cast<int64_t>(taps.size());
  DFLASH_CHECK(kOp, num_taps >= 1 && num_taps <= kMaxTaps, "taps", "hold 1 to 8 tensors", num_taps);
  api::check_shape(kOp, "taps[0]", taps[0], {-1, -1});
  const int64_t rows = taps[0].size(0), hidden = taps[0].size(1);
  DFLASH_CHECK(kOp, hidden >= 1, "taps[0].size(1)", "be at least 1", hidden);
  if (fc_weight.is_cpu()) {
    api::check_dtype(kOp, "fc_weight", fc_weight, {ScalarType::BFloat16, ScalarType::Float});
  } else {
    api::check_dtype(kOp, "fc_weight", fc_weight, {ScalarType::BFloat16});
  }
  InjectParams p;
  for (size_t i = 0; i < taps.size(); ++i) {
    const std::string name = element_name("taps", i);
    api::check_shape(kOp, name.c_str(), taps[i], {rows, hidden});
    check_float(name.c_str(), taps[i], fc_weight);
    api::check_last_dim_contiguous(kOp, name.c_str(), taps[i]);
    p.taps[i] = static_cast<const uint16_t*>(taps[i].data_ptr());
    p.tap_stride[i] = taps[i].stride(0);
  }
  p.write = write_params(fc_weight, rows, k_norm, cos_sin, positions, slots, commit_lens, k_caches, v_caches, eps);
  const int64_t layer_width = int64_t{2} * p.write.kv_heads * p.write.head_dim;
  api::check_shape(kOp, "fc_weight", fc_weight, {hidden, num_taps * hidden});
  api::check_shape(kOp, "hidden_norm", hidden_norm, {hidden});
  api::check_shape(kOp, "kv_weight", kv_weight, {p.write.layers, layer_width, hidden});
  if (kv_bias) api::check_shape(kOp, "kv_bias", *kv_bias, {p.write.layers, layer_width});
  const std::pair<const char*, const Tensor*> weights[] = {{"fc_weight", &fc_weight},
                                                           {"hidden_norm", &hidden_norm},
                                                           {"kv_weight", &kv_weight},
                                                           {"kv_bias", kv_bias ? &*kv_bias : nullptr}};
  for (const auto& [name, tensor] : weights) {
    if (tensor == nullptr) continue;
    check_float(name, *tensor, fc_weight);
    api::check_contiguous(kOp, name, *tensor);
  }
  check_float("workspace", workspace, fc_weight);
  api::check_contiguous(kOp, "workspace", workspace);
  const int64_t row_elements = hidden + p.write.layers * layer_width;
  const int64_t needed = kHeaderElements + p.write.live.rows_per_request * row_elements;
  DFLASH_CHECK(kOp, rows == 0 || workspace.numel() >= needed, "workspace",
               "hold at least " + std::to_string(needed) + " elements", workspace.numel());
  p.workspace_elements = workspace.numel();
  p.num_taps = static_cast<int>(num_taps);
  p.hidden = hidden;
  p.fc_weight = static_cast<const uint16_t*>(fc_weight.data_ptr());
  p.hidden_norm = static_cast<const uint16_t*>(hidden_norm.data_ptr());
  p.kv_weight = static_cast<const uint16_t*>(kv_weight.data_ptr());
  if (kv_bias) p.kv_bias = static_cast<const uint16_t*>(kv_bias->data_ptr());
  p.workspace = static_cast<uint16_t*>(workspace.data_ptr());
  return p;
}

void raise_fault(const WriteParams& p, Fault fault, int64_t row) {
  const std::string at = " at row " + std::to_string(row);
  switch (fault) {
    case Fault::kNone:
      return;
    case Fault::kCommitLen:
      api::fail(kOp, "commit_lens must be in 0..", p.live.rows_per_request, ", got another value at request ",
                row / p.live.rows_per_request);
    case Fault::kSlot:
      api::fail(kOp, "slots must be in [0, ", p.pool_size, "), got another value", at);
    case Fault::kPosition:
      api::fail(kOp, "positions must be in [0, ", p.max_positions, "), the rows of cos_sin, got another value", at);
  }
}

void check_values(const WriteParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) raise_fault(p, find_fault(p, row), row);
}

void check_cpu(Tensors taps, Tensor fc_weight, Tensor hidden_norm, Tensor kv_weight, MaybeTensor kv_bias,
               MaybeTensor k_norm, Tensor cos_sin, Tensor positions, Tensor slots, MaybeTensor commit_lens,
               Tensors k_caches, Tensors v_caches, Tensor workspace, double eps) {
  check_values(inject_params(taps, fc_weight, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots,
                             commit_lens, k_caches, v_caches, workspace, eps)
                   .write);
}

void write_cpu(Tensor kv, MaybeTensor k_norm, Tensor cos_sin, Tensor positions, Tensor slots, MaybeTensor commit_lens,
               Tensors k_caches, Tensors v_caches, double eps) {
  api::check_shape(kOp, "kv", kv, {-1, -1});
  api::check_dtype(kOp, "kv", kv, {ScalarType::BFloat16, ScalarType::Float});
  api::check_contiguous(kOp, "kv", kv);
  WriteParams p = write_params(kv, kv.size(0), k_norm, cos_sin, positions, slots, commit_lens, k_caches, v_caches, eps);
  api::check_shape(kOp, "kv", kv, {p.rows, int64_t{2} * p.layers * p.kv_heads * p.head_dim});
  check_values(p);
  p.kv = kv.data_ptr();
  write_kv_cpu(p, kv.scalar_type() == ScalarType::Float ? FloatType::kFloat32 : FloatType::kBFloat16);
}

#if DFLASH_WITH_CUDA
void check_aligned(const char* name, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  DFLASH_CHECK(kOp, address % 16 == 0, name, "be aligned to 16 bytes",
               "an address " + std::to_string(address % 16) + " bytes off");
}

void inject_cuda(Tensors taps, Tensor fc_weight, Tensor hidden_norm, Tensor kv_weight, MaybeTensor kv_bias,
                 MaybeTensor k_norm, Tensor cos_sin, Tensor positions, Tensor slots, MaybeTensor commit_lens,
                 Tensors k_caches, Tensors v_caches, Tensor workspace, double eps) {
  const InjectParams p = inject_params(taps, fc_weight, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions,
                                       slots, commit_lens, k_caches, v_caches, workspace, eps);
  if (p.write.rows == 0) return;
  DFLASH_CHECK(kOp, p.hidden % 8 == 0, "taps[0].size(1)", "be a multiple of 8 on CUDA", p.hidden);
  for (size_t i = 0; i < taps.size(); ++i) {
    const std::string name = element_name("taps", i);
    check_aligned(name.c_str(), taps[i]);
    DFLASH_CHECK(kOp, p.write.rows == 1 || p.tap_stride[i] % 8 == 0, name,
                 "have a row stride that is a multiple of 8 elements", p.tap_stride[i]);
  }
  check_aligned("fc_weight", fc_weight);
  check_aligned("hidden_norm", hidden_norm);
  check_aligned("kv_weight", kv_weight);
  if (kv_bias) check_aligned("kv_bias", *kv_bias);
  check_aligned("workspace", workspace);
  const torch::stable::accelerator::DeviceGuard guard(fc_weight.get_device_index());
  const cudaStream_t stream = api::current_stream(kOp, fc_weight);
  if (api::debug_enabled()) {
    const RowFault found = check_inject_cuda(p.write, p.workspace, stream);
    raise_fault(p.write, found.fault, found.row);
  }
  launch_inject_kv(p, stream);
}

// Rows, taps and caches as in inject_kv; the weights are those of an InjectPlan (dflash_kernels/ops/inject.py).
void stream_inject_cuda(Tensors taps, Tensor tiles, Tensor units, Tensor hidden_norm, MaybeTensor kv_bias,
                        MaybeTensor k_norm, Tensor cos_sin, Tensor positions, Tensor slots, MaybeTensor commit_lens,
                        Tensors k_caches, Tensors v_caches, Tensor counters, Tensor workspace, double eps) {
  const auto num_taps = static_cast<int64_t>(taps.size());
  DFLASH_CHECK(kOp, num_taps >= 1 && num_taps <= kMaxTaps, "taps", "hold 1 to 8 tensors", num_taps);
  api::check_shape(kOp, "taps[0]", taps[0], {-1, -1});
  const int64_t rows = taps[0].size(0), hidden = taps[0].size(1);
  DFLASH_CHECK(kOp, rows <= stream::kMaxTokens, "taps[0].size(0)", "be at most 64 with a plan's weights", rows);
  DFLASH_CHECK(kOp, hidden >= 8 && hidden % 8 == 0 && hidden < (1 << 20), "taps[0].size(1)", "be a multiple of 8",
               hidden);
  api::check_dtype(kOp, "hidden_norm", hidden_norm, {ScalarType::BFloat16});
  StreamInjectParams p;
  for (size_t i = 0; i < taps.size(); ++i) {
    const std::string name = element_name("taps", i);
    api::check_shape(kOp, name.c_str(), taps[i], {rows, hidden});
    check_float(name.c_str(), taps[i], hidden_norm);
    api::check_last_dim_contiguous(kOp, name.c_str(), taps[i]);
    check_aligned(name.c_str(), taps[i]);
    DFLASH_CHECK(kOp, rows <= 1 || taps[i].stride(0) % 8 == 0, name,
                 "have a row stride that is a multiple of 8 elements", taps[i].stride(0));
    p.taps[i] = static_cast<const uint16_t*>(taps[i].data_ptr());
    p.tap_stride[i] = taps[i].stride(0);
  }
  p.write = write_params(hidden_norm, rows, k_norm, cos_sin, positions, slots, commit_lens, k_caches, v_caches, eps);
  const int64_t head_dim = p.write.head_dim, heads = int64_t{2} * p.write.layers * p.write.kv_heads;
  DFLASH_CHECK(kOp, head_dim <= kMaxStreamHeadDim, "k_caches[0].size(2)", "be at most 128 with a plan's weights",
               head_dim);
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t fc_tiles = ceil_div(hidden, stream::kTileRows);
  const int64_t kv_tiles = ceil_div(heads, stream::kTileRows / head_dim);
  const int64_t num_tiles = fc_tiles * ceil_div(num_taps * hidden, 64) + kv_tiles * ceil_div(hidden, 64);
  api::check_shape(kOp, "hidden_norm", hidden_norm, {hidden});
  api::check_shape(kOp, "tiles", tiles, {num_tiles, stream::kTileBytes / 2});
  check_float("tiles", tiles, hidden_norm);
  if (kv_bias) {
    api::check_shape(kOp, "kv_bias", *kv_bias, {p.write.layers, int64_t{2} * p.write.kv_heads * head_dim});
    check_float("kv_bias", *kv_bias, hidden_norm);
    api::check_contiguous(kOp, "kv_bias", *kv_bias);
    p.kv_bias = static_cast<const uint16_t*>(kv_bias->data_ptr());
  }
  api::check_shape(kOp, "units", units, {-1, -1, sizeof(stream::Unit) / 4});
  api::check_shape(kOp, "counters", counters, {-1});
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor*>{"units", &units}, {"counters", &counters}}) {
    api::check_dtype(kOp, name, *tensor, {ScalarType::Int});
    api::check_same_device(kOp, name, *tensor, hidden_norm);
  }
  api::check_dtype(kOp, "workspace", workspace, {ScalarType::Byte});
  api::check_same_device(kOp, "workspace", workspace, hidden_norm);
  const std::pair<const char*, const Tensor*> whole[] = {{"hidden_norm", &hidden_norm},
                                                         {"tiles", &tiles},
                                                         {"units", &units},
                                                         {"counters", &counters},
                                                         {"workspace", &workspace}};
  for (const auto& [name, tensor] : whole) {
    api::check_contiguous(kOp, name, *tensor);
    check_aligned(name, *tensor);
  }
  const int64_t blocks = units.size(0);
  const int64_t num_counters = stream::kFirstCounter + 1 + fc_tiles + kv_tiles;
  DFLASH_CHECK(kOp, counters.numel() >= num_counters, "counters",
               "hold at least " + std::to_string(num_counters) + " elements", counters.numel());
  // Parts of sums: a block shares its first and its last row tile of each of two stages.
  const int64_t squares_bytes = fc_tiles * stream::kMaxTokens * 4, fused_bytes = hidden * stream::kMaxTokens * 2;
  const int64_t needed = squares_bytes + fused_bytes + 4 * blocks * stream::kMaxTokens * stream::kTileRows * 4;
  DFLASH_CHECK(kOp, workspace.numel() >= needed, "workspace", "hold at least " + std::to_string(needed) + " bytes",
               workspace.numel());
  if (rows == 0) return;

  auto* scratch = static_cast<uint8_t*>(workspace.data_ptr());
  p.squares = reinterpret_cast<float*>(scratch);
  p.fused = reinterpret_cast<uint16_t*>(scratch + squares_bytes);
  p.stream.partials = reinterpret_cast<float*>(scratch + squares_bytes + fused_bytes);
  p.stream.weights = static_cast<const uint8_t*>(tiles.data_ptr());
  p.stream.units = static_cast<const stream::Unit*>(units.data_ptr());
  p.stream.blocks = static_cast<int>(blocks);
  p.stream.max_units = static_cast<int>(units.size(1));
  p.stream.counters = static_cast<uint32_t*>(counters.data_ptr());
  p.num_taps = static_cast<int>(num_taps);
  p.hidden = static_cast<int>(hidden);
  p.fc_tiles = static_cast<int>(fc_tiles);
  p.hidden_norm = static_cast<const uint16_t*>(hidden_norm.data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(hidden_norm.get_device_index());
  const cudaStream_t stream = api::current_stream(kOp, hidden_norm);
  if (api::debug_enabled()) {
    const RowFault found = check_inject_cuda(p.write, p.squares, stream);
    raise_fault(p.write, found.fault, found.row);
  }
  launch_stream_inject_kv(p, stream);
}
#endif

}  // namespace
}  // namespace dflash::inject

#define DFLASH_INJECT_INPUTS                                                                                 \
  "Tensor[] taps, Tensor fc_weight, Tensor hidden_norm, Tensor kv_weight, Tensor? kv_bias, Tensor? k_norm, " \
  "Tensor cos_sin, Tensor positions, Tensor slots, Tensor? commit_lens, "

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def("inject_kv(" DFLASH_INJECT_INPUTS
        "Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor(c!) workspace, float eps) -> ()");
  m.def(
      "_inject_kv_stream(Tensor[] taps, Tensor tiles, Tensor units, Tensor hidden_norm, Tensor? kv_bias, "
      "Tensor? k_norm, Tensor cos_sin, Tensor positions, Tensor slots, Tensor? commit_lens, "
      "Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor(c!) counters, Tensor(d!) workspace, float eps) -> ()");
  m.def("_inject_kv_check(" DFLASH_INJECT_INPUTS
        "Tensor[] k_caches, Tensor[] v_caches, Tensor workspace, float eps) -> ()");
  m.def(
      "_inject_kv_write(Tensor kv, Tensor? k_norm, Tensor cos_sin, Tensor positions, Tensor slots, "
      "Tensor? commit_lens, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) {
  m.impl("_inject_kv_check", TORCH_BOX(&dflash::inject::check_cpu));
  m.impl("_inject_kv_write", TORCH_BOX(&dflash::inject::write_cpu));
}

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("inject_kv", TORCH_BOX(&dflash::inject::inject_cuda));
  m.impl("_inject_kv_stream", TORCH_BOX(&dflash::inject::stream_inject_cuda));
}
#endif

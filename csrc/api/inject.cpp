// inject_kv, and its two halves for a sharded fc, inject_kv_fuse and inject_kv_project: schemas, checks, dispatch. On
// the CPU the GEMMs are torch's, called from Python between internal ops defined here: _inject_kv*_check (every check,
// nothing written) and _inject_kv_write (the index half).
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

// Of the caches: what K and V are multiplied with on their way.
struct CacheScales {
  double value_scale = 1.0;
  const MaybeTensor* k_scale = nullptr;
  const MaybeTensor* v_scale = nullptr;
};

std::string element_name(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

void check_float(const char* name, const Tensor& tensor, const Tensor& first) {
  api::check_same_device(kOp, name, tensor, first);
  api::check_dtype(kOp, name, tensor, {first.scalar_type()});
}

void check_cache(const char* list, size_t i, const Tensor& cache, int64_t pool_size, int64_t kv_heads, int64_t head_dim,
                 ScalarType type, const Tensor& first, CacheView* view) {
  const std::string name = element_name(list, i);
  api::check_shape(kOp, name.c_str(), cache, {pool_size, kv_heads, head_dim});
  api::check_same_device(kOp, name.c_str(), cache, first);
  api::check_dtype(kOp, name.c_str(), cache, {type});
  api::check_last_dim_contiguous(kOp, name.c_str(), cache);
  view->data = cache.data_ptr();
  view->slot_stride = cache.stride(0);
  view->head_stride = cache.stride(1);
}

const float* check_scale(const char* name, const MaybeTensor* scale, int64_t layers, bool is_fp8, const Tensor& first) {
  if (scale == nullptr || !*scale) return nullptr;
  DFLASH_CHECK(kOp, is_fp8, name, "be None with caches of the weights' dtype", "a tensor");
  api::check_shape(kOp, name, **scale, {layers});
  api::check_dtype(kOp, name, **scale, {ScalarType::Float});
  api::check_same_device(kOp, name, **scale, first);
  api::check_contiguous(kOp, name, **scale);
  return static_cast<const float*>((*scale)->data_ptr());
}

void check_commit_lens(const MaybeTensor& commit_lens, int64_t rows, const Tensor& first, WriteParams* p) {
  if (!commit_lens) return;
  api::check_shape(kOp, "commit_lens", *commit_lens, {-1});
  api::check_index_dtype(kOp, "commit_lens", *commit_lens);
  api::check_same_device(kOp, "commit_lens", *commit_lens, first);
  p->batch = commit_lens->size(0);
  DFLASH_CHECK(kOp, p->batch == 0 ? rows == 0 : rows % p->batch == 0, "commit_lens",
               "have a size that divides the " + std::to_string(rows) + " rows", p->batch);
  if (rows > 0) {
    p->live.commit_lens = api::int_view(*commit_lens);
    p->live.rows_per_request = rows / p->batch;
  }
}

// Everything of the write step but kv. `first` is the tensor that sets dtype and device. Caches of e4m3, as uint8, only
// with `scales`.
WriteParams write_params(const Tensor& first, int64_t rows, const MaybeTensor& k_norm, const Tensor& cos_sin,
                         const Tensor& positions, const Tensor& slots, const MaybeTensor& commit_lens,
                         const Tensors& k_caches, const Tensors& v_caches, double eps,
                         const CacheScales* scales = nullptr) {
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
  p.is_fp8 = scales != nullptr && k_caches[0].scalar_type() == ScalarType::Byte;
  const ScalarType type = p.is_fp8 ? ScalarType::Byte : first.scalar_type();
  for (size_t i = 0; i < k_caches.size(); ++i) {
    check_cache("k_caches", i, k_caches[i], pool_size, kv_heads, head_dim, type, first, &p.k[i]);
    check_cache("v_caches", i, v_caches[i], pool_size, kv_heads, head_dim, type, first, &p.v[i]);
  }
  if (scales != nullptr) {
    p.value_scale = static_cast<float>(scales->value_scale);
    p.k_scale = check_scale("k_scale", scales->k_scale, layers, p.is_fp8, first);
    p.v_scale = check_scale("v_scale", scales->v_scale, layers, p.is_fp8, first);
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
  check_commit_lens(commit_lens, rows, first, &p);
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

void check_weight(const char* name, const Tensor& tensor, const Tensor& first) {
  check_float(name, tensor, first);
  api::check_contiguous(kOp, name, tensor);
}

void check_weight_dtype(const char* name, const Tensor& tensor) {
  if (tensor.is_cpu()) {
    api::check_dtype(kOp, name, tensor, {ScalarType::BFloat16, ScalarType::Float});
  } else {
    api::check_dtype(kOp, name, tensor, {ScalarType::BFloat16});
  }
}

// Taps, fc and its norms; rows and width of the taps are returned. fc_weight's rows are checked by the caller.
std::pair<int64_t, int64_t> fc_params(const Tensors& taps, const Tensor& fc_weight, const MaybeTensor& tap_norm,
                                      InjectParams* p) {
  const auto num_taps = static_cast<int64_t>(taps.size());
  DFLASH_CHECK(kOp, num_taps >= 1 && num_taps <= kMaxTaps, "taps", "hold 1 to 8 tensors", num_taps);
  api::check_shape(kOp, "taps[0]", taps[0], {-1, -1});
  const int64_t rows = taps[0].size(0), width = taps[0].size(1);
  DFLASH_CHECK(kOp, width >= 1, "taps[0].size(1)", "be at least 1", width);
  check_weight_dtype("fc_weight", fc_weight);
  for (size_t i = 0; i < taps.size(); ++i) {
    const std::string name = element_name("taps", i);
    api::check_shape(kOp, name.c_str(), taps[i], {rows, width});
    check_float(name.c_str(), taps[i], fc_weight);
    api::check_last_dim_contiguous(kOp, name.c_str(), taps[i]);
    p->taps[i] = static_cast<const uint16_t*>(taps[i].data_ptr());
    p->tap_stride[i] = taps[i].stride(0);
  }
  if (tap_norm) {
    api::check_shape(kOp, "tap_norm", *tap_norm, {num_taps, width});
    check_weight("tap_norm", *tap_norm, fc_weight);
    p->tap_norm = static_cast<const uint16_t*>(tap_norm->data_ptr());
  }
  p->num_taps = static_cast<int>(num_taps);
  p->tap_width = width;
  p->fc_weight = static_cast<const uint16_t*>(fc_weight.data_ptr());
  return {rows, width};
}

// Norm and projection; the write step's parameters are there.
void project_params(const Tensor& hidden_norm, const Tensor& kv_weight, const MaybeTensor& kv_bias, int64_t hidden,
                    const Tensor& first, InjectParams* p) {
  const int64_t layer_width = int64_t{2} * p->write.kv_heads * p->write.head_dim;
  api::check_shape(kOp, "hidden_norm", hidden_norm, {hidden});
  api::check_shape(kOp, "kv_weight", kv_weight, {p->write.layers, layer_width, hidden});
  check_weight("hidden_norm", hidden_norm, first);
  check_weight("kv_weight", kv_weight, first);
  if (kv_bias) {
    api::check_shape(kOp, "kv_bias", *kv_bias, {p->write.layers, layer_width});
    check_weight("kv_bias", *kv_bias, first);
    p->kv_bias = static_cast<const uint16_t*>(kv_bias->data_ptr());
  }
  p->hidden = hidden;
  p->hidden_norm = static_cast<const uint16_t*>(hidden_norm.data_ptr());
  p->kv_weight = static_cast<const uint16_t*>(kv_weight.data_ptr());
}

void workspace_params(const Tensor& workspace, const Tensor& first, InjectParams* p) {
  check_float("workspace", workspace, first);
  api::check_contiguous(kOp, "workspace", workspace);
  p->workspace = static_cast<uint16_t*>(workspace.data_ptr());
  p->workspace_elements = workspace.numel();
  if (p->write.rows == 0) return;
  const Chunks chunks = plan_chunks(*p);
  const int64_t needed = kHeaderElements + p->write.live.rows_per_request * chunks.elements;
  DFLASH_CHECK(kOp, chunks.rows > 0, "workspace", "hold at least " + std::to_string(needed) + " elements",
               workspace.numel());
}

InjectParams inject_params(const Tensors& taps, const Tensor& fc_weight, const Tensor& hidden_norm,
                           const Tensor& kv_weight, const MaybeTensor& kv_bias, const MaybeTensor& k_norm,
                           const Tensor& cos_sin, const Tensor& positions, const Tensor& slots,
                           const MaybeTensor& commit_lens, const Tensors& k_caches, const Tensors& v_caches,
                           const Tensor& workspace, double eps, const MaybeTensor& tap_norm,
                           const CacheScales& scales) {
  InjectParams p;
  const auto [rows, hidden] = fc_params(taps, fc_weight, tap_norm, &p);
  p.write =
      write_params(fc_weight, rows, k_norm, cos_sin, positions, slots, commit_lens, k_caches, v_caches, eps, &scales);
  api::check_shape(kOp, "fc_weight", fc_weight, {hidden, p.num_taps * hidden});
  check_weight("fc_weight", fc_weight, fc_weight);
  project_params(hidden_norm, kv_weight, kv_bias, hidden, fc_weight, &p);
  workspace_params(workspace, fc_weight, &p);
  return p;
}

InjectParams fuse_params(const Tensors& taps, const Tensor& fc_weight, const MaybeTensor& commit_lens,
                         const Tensor& fused, const Tensor& workspace, double eps, const MaybeTensor& tap_norm) {
  InjectParams p;
  const auto [rows, width] = fc_params(taps, fc_weight, tap_norm, &p);
  api::check_shape(kOp, "fc_weight", fc_weight, {-1, p.num_taps * width});
  check_weight("fc_weight", fc_weight, fc_weight);
  check_commit_lens(commit_lens, rows, fc_weight, &p.write);
  p.write.rows = rows;
  p.write.eps = static_cast<float>(eps);
  p.hidden = fc_weight.size(0);
  api::check_shape(kOp, "fused", fused, {rows, p.hidden});
  check_float("fused", fused, fc_weight);
  api::check_last_dim_contiguous(kOp, "fused", fused);
  p.fused = static_cast<uint16_t*>(fused.data_ptr());
  p.fused_stride = fused.stride(0);
  workspace_params(workspace, fc_weight, &p);
  return p;
}

InjectParams shard_params(const Tensor& fused, const Tensor& hidden_norm, const Tensor& kv_weight,
                          const MaybeTensor& kv_bias, const MaybeTensor& k_norm, const Tensor& cos_sin,
                          const Tensor& positions, const Tensor& slots, const MaybeTensor& commit_lens,
                          const Tensors& k_caches, const Tensors& v_caches, const Tensor& workspace, double eps,
                          const CacheScales& scales) {
  InjectParams p;
  api::check_shape(kOp, "fused", fused, {-1, -1, -1});
  check_weight_dtype("fused", fused);
  const int64_t shards = fused.size(0), rows = fused.size(1), width = fused.size(2);
  DFLASH_CHECK(kOp, shards >= 1 && shards <= kMaxTaps, "fused.size(0)", "be in 1..8", shards);
  DFLASH_CHECK(kOp, width >= 1, "fused.size(2)", "be at least 1", width);
  api::check_contiguous(kOp, "fused", fused);
  p.write = write_params(fused, rows, k_norm, cos_sin, positions, slots, commit_lens, k_caches, v_caches, eps, &scales);
  project_params(hidden_norm, kv_weight, kv_bias, shards * width, fused, &p);
  for (int64_t i = 0; i < shards; ++i) p.shards[i] = static_cast<const uint16_t*>(fused.data_ptr()) + i * rows * width;
  p.shard_stride = width;
  p.num_shards = static_cast<int>(shards);
  workspace_params(workspace, fused, &p);
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
               Tensors k_caches, Tensors v_caches, Tensor workspace, double eps, MaybeTensor tap_norm,
               double value_scale, MaybeTensor k_scale, MaybeTensor v_scale) {
  check_values(inject_params(taps, fc_weight, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots,
                             commit_lens, k_caches, v_caches, workspace, eps, tap_norm,
                             {value_scale, &k_scale, &v_scale})
                   .write);
}

// Commit lengths alone.
void check_lengths(const WriteParams& p) {
  for (int64_t b = 0; b < p.batch && p.rows > 0; ++b) {
    const int64_t length = p.live.commit_lens.at(b);
    if (length < 0 || length > p.live.rows_per_request) raise_fault(p, Fault::kCommitLen, b * p.live.rows_per_request);
  }
}

void check_fuse_cpu(Tensors taps, Tensor fc_weight, MaybeTensor commit_lens, Tensor fused, Tensor workspace, double eps,
                    MaybeTensor tap_norm) {
  check_lengths(fuse_params(taps, fc_weight, commit_lens, fused, workspace, eps, tap_norm).write);
}

void check_project_cpu(Tensor fused, Tensor hidden_norm, Tensor kv_weight, MaybeTensor kv_bias, MaybeTensor k_norm,
                       Tensor cos_sin, Tensor positions, Tensor slots, MaybeTensor commit_lens, Tensors k_caches,
                       Tensors v_caches, Tensor workspace, double eps, double value_scale, MaybeTensor k_scale,
                       MaybeTensor v_scale) {
  check_values(shard_params(fused, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots, commit_lens,
                            k_caches, v_caches, workspace, eps, {value_scale, &k_scale, &v_scale})
                   .write);
}

void write_cpu(Tensor kv, MaybeTensor k_norm, Tensor cos_sin, Tensor positions, Tensor slots, MaybeTensor commit_lens,
               Tensors k_caches, Tensors v_caches, double eps, double value_scale, MaybeTensor k_scale,
               MaybeTensor v_scale) {
  api::check_shape(kOp, "kv", kv, {-1, -1});
  api::check_dtype(kOp, "kv", kv, {ScalarType::BFloat16, ScalarType::Float});
  api::check_contiguous(kOp, "kv", kv);
  const CacheScales scales{value_scale, &k_scale, &v_scale};
  WriteParams p =
      write_params(kv, kv.size(0), k_norm, cos_sin, positions, slots, commit_lens, k_caches, v_caches, eps, &scales);
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

void check_taps_cuda(const Tensors& taps, const InjectParams& p) {
  DFLASH_CHECK(kOp, p.tap_width % 8 == 0, "taps[0].size(1)", "be a multiple of 8 on CUDA", p.tap_width);
  for (size_t i = 0; i < taps.size(); ++i) {
    const std::string name = element_name("taps", i);
    check_aligned(name.c_str(), taps[i]);
    DFLASH_CHECK(kOp, p.write.rows == 1 || p.tap_stride[i] % 8 == 0, name,
                 "have a row stride that is a multiple of 8 elements", p.tap_stride[i]);
  }
}

void check_all_aligned(std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (tensor != nullptr) check_aligned(name, *tensor);
  }
}

const Tensor* pointer_to(const MaybeTensor& tensor) { return tensor ? &*tensor : nullptr; }

void launch_checked(const InjectParams& p, const Tensor& first) {
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  const cudaStream_t stream = api::current_stream(kOp, first);
  if (api::debug_enabled() && p.fused == nullptr) {
    const RowFault found = check_inject_cuda(p.write, p.workspace, stream);
    raise_fault(p.write, found.fault, found.row);
  }
  launch_inject_kv(p, stream);
}

void inject_cuda(Tensors taps, Tensor fc_weight, Tensor hidden_norm, Tensor kv_weight, MaybeTensor kv_bias,
                 MaybeTensor k_norm, Tensor cos_sin, Tensor positions, Tensor slots, MaybeTensor commit_lens,
                 Tensors k_caches, Tensors v_caches, Tensor workspace, double eps, MaybeTensor tap_norm,
                 double value_scale, MaybeTensor k_scale, MaybeTensor v_scale) {
  const InjectParams p =
      inject_params(taps, fc_weight, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots, commit_lens,
                    k_caches, v_caches, workspace, eps, tap_norm, {value_scale, &k_scale, &v_scale});
  if (p.write.rows == 0) return;
  check_taps_cuda(taps, p);
  check_all_aligned({{"fc_weight", &fc_weight},
                     {"hidden_norm", &hidden_norm},
                     {"kv_weight", &kv_weight},
                     {"kv_bias", pointer_to(kv_bias)},
                     {"tap_norm", pointer_to(tap_norm)},
                     {"workspace", &workspace}});
  launch_checked(p, fc_weight);
}

void fuse_cuda(Tensors taps, Tensor fc_weight, MaybeTensor commit_lens, Tensor fused, Tensor workspace, double eps,
               MaybeTensor tap_norm) {
  const InjectParams p = fuse_params(taps, fc_weight, commit_lens, fused, workspace, eps, tap_norm);
  if (p.write.rows == 0 || p.hidden == 0) return;
  check_taps_cuda(taps, p);
  DFLASH_CHECK(kOp, p.hidden % 8 == 0, "fc_weight.size(0)", "be a multiple of 8 on CUDA", p.hidden);
  DFLASH_CHECK(kOp, p.write.rows == 1 || p.fused_stride % 8 == 0, "fused",
               "have a row stride that is a multiple of 8 elements", p.fused_stride);
  check_all_aligned(
      {{"fc_weight", &fc_weight}, {"tap_norm", pointer_to(tap_norm)}, {"fused", &fused}, {"workspace", &workspace}});
  launch_checked(p, fc_weight);
}

void project_cuda(Tensor fused, Tensor hidden_norm, Tensor kv_weight, MaybeTensor kv_bias, MaybeTensor k_norm,
                  Tensor cos_sin, Tensor positions, Tensor slots, MaybeTensor commit_lens, Tensors k_caches,
                  Tensors v_caches, Tensor workspace, double eps, double value_scale, MaybeTensor k_scale,
                  MaybeTensor v_scale) {
  const InjectParams p =
      shard_params(fused, hidden_norm, kv_weight, kv_bias, k_norm, cos_sin, positions, slots, commit_lens, k_caches,
                   v_caches, workspace, eps, {value_scale, &k_scale, &v_scale});
  if (p.write.rows == 0) return;
  DFLASH_CHECK(kOp, p.shard_stride % 8 == 0, "fused.size(2)", "be a multiple of 8 on CUDA", p.shard_stride);
  check_all_aligned({{"fused", &fused},
                     {"hidden_norm", &hidden_norm},
                     {"kv_weight", &kv_weight},
                     {"kv_bias", pointer_to(kv_bias)},
                     {"workspace", &workspace}});
  launch_checked(p, fused);
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
  // Behind the counters the parts of sums: a block shares its first and its last row tile of each of two stages.
  const int64_t parts = 4 * blocks * stream::kSlotFloats;
  DFLASH_CHECK(kOp, counters.numel() >= parts + 4 && counters.numel() % 4 == 0, "counters",
               "hold a multiple of 4 elements, at least " + std::to_string(parts + 4), counters.numel());
  const int64_t squares_bytes = fc_tiles * stream::kMaxTokens * 4, fused_bytes = hidden * stream::kMaxTokens * 2;
  const int64_t needed = squares_bytes + fused_bytes;
  DFLASH_CHECK(kOp, workspace.numel() >= needed, "workspace", "hold at least " + std::to_string(needed) + " bytes",
               workspace.numel());
  if (rows == 0) return;

  auto* scratch = static_cast<uint8_t*>(workspace.data_ptr());
  p.squares = reinterpret_cast<float*>(scratch);
  p.fused = reinterpret_cast<uint16_t*>(scratch + squares_bytes);
  p.stream.partials = static_cast<float*>(counters.data_ptr()) + (counters.numel() - parts);
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

#define DFLASH_INJECT_REST                                                                                    \
  "Tensor hidden_norm, Tensor kv_weight, Tensor? kv_bias, Tensor? k_norm, Tensor cos_sin, Tensor positions, " \
  "Tensor slots, Tensor? commit_lens, "
#define DFLASH_CACHES "Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor(c!) workspace, float eps"
#define DFLASH_UNWRITTEN "Tensor[] k_caches, Tensor[] v_caches, Tensor workspace, float eps"
#define DFLASH_TAP_NORM ", Tensor? tap_norm=None"
#define DFLASH_SCALES ", float value_scale=1.0, Tensor? k_scale=None, Tensor? v_scale=None) -> ()"

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def("inject_kv(Tensor[] taps, Tensor fc_weight, " DFLASH_INJECT_REST DFLASH_CACHES DFLASH_TAP_NORM DFLASH_SCALES);
  m.def(
      "inject_kv_fuse(Tensor[] taps, Tensor fc_weight, Tensor? commit_lens, Tensor(a!) fused, Tensor(b!) workspace, "
      "float eps" DFLASH_TAP_NORM ") -> ()");
  m.def("inject_kv_project(Tensor fused, " DFLASH_INJECT_REST DFLASH_CACHES DFLASH_SCALES);
  m.def(
      "_inject_kv_stream(Tensor[] taps, Tensor tiles, Tensor units, Tensor hidden_norm, Tensor? kv_bias, "
      "Tensor? k_norm, Tensor cos_sin, Tensor positions, Tensor slots, Tensor? commit_lens, "
      "Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor(c!) counters, Tensor(d!) workspace, float eps) -> ()");
  m.def("_inject_kv_check(Tensor[] taps, Tensor fc_weight, " DFLASH_INJECT_REST DFLASH_UNWRITTEN DFLASH_TAP_NORM
            DFLASH_SCALES);
  m.def(
      "_inject_kv_fuse_check(Tensor[] taps, Tensor fc_weight, Tensor? commit_lens, Tensor fused, Tensor workspace, "
      "float eps" DFLASH_TAP_NORM ") -> ()");
  m.def("_inject_kv_project_check(Tensor fused, " DFLASH_INJECT_REST DFLASH_UNWRITTEN DFLASH_SCALES);
  m.def(
      "_inject_kv_write(Tensor kv, Tensor? k_norm, Tensor cos_sin, Tensor positions, Tensor slots, "
      "Tensor? commit_lens, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, float eps" DFLASH_SCALES);
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) {
  m.impl("_inject_kv_check", TORCH_BOX(&dflash::inject::check_cpu));
  m.impl("_inject_kv_fuse_check", TORCH_BOX(&dflash::inject::check_fuse_cpu));
  m.impl("_inject_kv_project_check", TORCH_BOX(&dflash::inject::check_project_cpu));
  m.impl("_inject_kv_write", TORCH_BOX(&dflash::inject::write_cpu));
}

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("inject_kv", TORCH_BOX(&dflash::inject::inject_cuda));
  m.impl("inject_kv_fuse", TORCH_BOX(&dflash::inject::fuse_cuda));
  m.impl("inject_kv_project", TORCH_BOX(&dflash::inject::project_cuda));
  m.impl("_inject_kv_stream", TORCH_BOX(&dflash::inject::stream_inject_cuda));
}
#endif

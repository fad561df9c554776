// lm_head_argmax_fp8: schema, checks, dispatch. The CPU implementation is registered from Python
// (dflash_kernels/ops/head_fp8.py) and has its arguments checked here, by _lm_head_argmax_fp8_check.
#include <tuple>
#include <utility>

#include "api/check.h"
#include "api/cuda_stream.h"
#include "smxx/head/params.h"
#if DFLASH_WITH_CUDA
#include "smxx/gemm/launch.h"
#include "smxx/head/launch.h"
#endif

namespace dflash::head {
namespace {

using api::ScalarType;
using api::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr const char* kOp = "lm_head_argmax_fp8";

void check_aligned(const char* argument, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  DFLASH_CHECK(kOp, tensor.is_cpu() || address % 16 == 0, argument, "start at a multiple of 16 bytes", address % 16);
}

// Of the shape and dtype given, on hidden's device, contiguous.
void check_tensor(const char* argument, const Tensor& tensor, ScalarType type, const Tensor& hidden,
                  std::initializer_list<int64_t> shape) {
  api::check_shape(kOp, argument, tensor, shape);
  api::check_dtype(kOp, argument, tensor, {type});
  api::check_same_device(kOp, argument, tensor, hidden);
  api::check_contiguous(kOp, argument, tensor);
}

#define DFLASH_FP8_PARAMETERS \
  Tensor hidden, Tensor hidden_scale, Tensor weight, Tensor weight_scale, MaybeTensor bias, int64_t vocab_start
#define DFLASH_FP8_ARGUMENTS hidden, hidden_scale, weight, weight_scale, bias, vocab_start

HeadParams fp8_params(DFLASH_FP8_PARAMETERS) {
  api::check_shape(kOp, "hidden", hidden, {-1, -1});
  api::check_dtype(kOp, "hidden", hidden, {ScalarType::Byte});
  api::check_last_dim_contiguous(kOp, "hidden", hidden);
  check_aligned("hidden", hidden);
  HeadParams p;
  gemm::GemmParams& g = p.gemm;
  g.m = hidden.size(0);
  g.k = hidden.size(1);
  DFLASH_CHECK(kOp, g.k >= 16 && g.k % 16 == 0, "hidden.size(1)", "be a multiple of 16", g.k);
  g.a_stride[0] = g.m > 1 ? hidden.stride(0) : g.k;
  DFLASH_CHECK(kOp, g.a_stride[0] >= g.k && g.a_stride[0] % 16 == 0, "hidden",
               "have a row stride that is a multiple of 16 and at least " + std::to_string(g.k), g.a_stride[0]);
  check_tensor("hidden_scale", hidden_scale, ScalarType::Float, hidden, {g.m, 1});
  check_tensor("weight", weight, ScalarType::Byte, hidden, {-1, g.k});
  check_aligned("weight", weight);
  g.n = weight.size(0);
  DFLASH_CHECK(kOp, g.n >= 1 && g.n <= (int64_t{1} << 22), "weight.size(0)", "be in 1..2**22", g.n);
  check_tensor("weight_scale", weight_scale, ScalarType::Float, hidden, {g.n, 1});
  if (bias) check_tensor("bias", *bias, ScalarType::BFloat16, hidden, {g.n});
  DFLASH_CHECK(kOp, vocab_start >= 0, "vocab_start", "be at least 0", vocab_start);
  g.a[0] = static_cast<const uint16_t*>(hidden.data_ptr());
  g.a_scale = static_cast<const float*>(hidden_scale.data_ptr());
  g.w = static_cast<const uint16_t*>(weight.data_ptr());
  g.w_scale = static_cast<const float*>(weight_scale.data_ptr());
  if (bias) g.bias = static_cast<const uint16_t*>(bias->data_ptr());
  p.vocab_start = vocab_start;
  return p;
}

void check_outputs(const Tensor& hidden, const Tensor& ids, const Tensor& values, const Tensor& workspace) {
  const int64_t rows = hidden.size(0);
  check_tensor("ids", ids, ScalarType::Long, hidden, {rows});
  check_tensor("values", values, ScalarType::Float, hidden, {rows});
  check_tensor("workspace", workspace, ScalarType::Long, hidden, {-1});
  DFLASH_CHECK(kOp, workspace.numel() >= 1 + rows, "workspace",
               "hold at least " + std::to_string(1 + rows) + " elements", workspace.numel());
}

void fp8_check(DFLASH_FP8_PARAMETERS, MaybeTensor ids, MaybeTensor values, MaybeTensor workspace) {
  fp8_params(DFLASH_FP8_ARGUMENTS);
  if (ids && values && workspace) check_outputs(hidden, *ids, *values, *workspace);
}

#if DFLASH_WITH_CUDA
void fp8_out_cuda(DFLASH_FP8_PARAMETERS, Tensor ids, Tensor values, Tensor workspace) {
  HeadParams p = fp8_params(DFLASH_FP8_ARGUMENTS);
  check_outputs(hidden, ids, values, workspace);
  DFLASH_CHECK(kOp, gemm::is_fp8_supported(hidden.get_device_index()), "hidden",
               "be on a device whose kernel was built, of compute capability 9.0 or 10.x", "another device");
  p.ids = static_cast<int64_t*>(ids.data_ptr());
  p.values = static_cast<float*>(values.data_ptr());
  p.workspace = static_cast<unsigned long long*>(workspace.data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  launch_argmax_fp8(p, api::current_stream(kOp, hidden));
}

std::tuple<Tensor, Tensor> fp8_cuda(DFLASH_FP8_PARAMETERS) {
  fp8_params(DFLASH_FP8_ARGUMENTS);
  const int64_t rows = hidden.size(0);
  const Tensor ids = api::new_empty(hidden, {rows}, ScalarType::Long);
  const Tensor values = api::new_empty(hidden, {rows}, ScalarType::Float);
  const Tensor workspace = torch::stable::new_zeros(hidden, {1 + rows}, ScalarType::Long);
  fp8_out_cuda(DFLASH_FP8_ARGUMENTS, ids, values, workspace);
  return {ids, values};
}
#endif

#undef DFLASH_FP8_PARAMETERS
#undef DFLASH_FP8_ARGUMENTS

}  // namespace
}  // namespace dflash::head

#define DFLASH_FP8_SCHEMA \
  "Tensor hidden, Tensor hidden_scale, Tensor weight, Tensor weight_scale, Tensor? bias=None, int vocab_start=0"

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def("lm_head_argmax_fp8(" DFLASH_FP8_SCHEMA ") -> (Tensor ids, Tensor values)");
  m.def("lm_head_argmax_fp8.out(" DFLASH_FP8_SCHEMA
        ", *, Tensor(a!) ids, Tensor(b!) values, Tensor(c!) workspace) -> ()");
  m.def("_lm_head_argmax_fp8_check(" DFLASH_FP8_SCHEMA
        ", *, Tensor? ids=None, Tensor? values=None, Tensor? workspace=None) -> ()");
}
#undef DFLASH_FP8_SCHEMA

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) { m.impl("_lm_head_argmax_fp8_check", TORCH_BOX(&dflash::head::fp8_check)); }

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("lm_head_argmax_fp8", TORCH_BOX(&dflash::head::fp8_cuda));
  m.impl("lm_head_argmax_fp8.out", TORCH_BOX(&dflash::head::fp8_out_cuda));
}
#endif

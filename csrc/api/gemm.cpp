// gemm_fp8: schema, checks, dispatch. The CPU implementation is registered from Python (dflash_kernels/ops/gemm.py) and
// has its arguments checked here, by _gemm_fp8_check.
#include <utility>

#include "api/check.h"
#include "api/cuda_stream.h"
#include "smxx/gemm/params.h"
#if DFLASH_WITH_CUDA
#include "smxx/gemm/launch.h"
#endif

namespace dflash::gemm {
namespace {

using api::ScalarType;
using api::Tensor;

constexpr const char* kOp = "gemm_fp8";

void check_aligned(const char* argument, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  DFLASH_CHECK(kOp, tensor.is_cpu() || address % 16 == 0, argument, "start at a multiple of 16 bytes", address % 16);
}

// Of the shape and dtype given, on a's device, contiguous, aligned.
void check_matrix(const char* argument, const Tensor& tensor, ScalarType type, const Tensor& a,
                  std::initializer_list<int64_t> shape) {
  api::check_shape(kOp, argument, tensor, shape);
  api::check_dtype(kOp, argument, tensor, {type});
  api::check_same_device(kOp, argument, tensor, a);
  api::check_contiguous(kOp, argument, tensor);
  check_aligned(argument, tensor);
}

#define DFLASH_FP8_PARAMETERS                                                                                     \
  Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, std::optional<Tensor> bias, std::optional<Tensor> residual, \
      bool gated
#define DFLASH_FP8_ARGUMENTS a, a_scale, w, w_scale, bias, residual, gated

const uint16_t* bf16_data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const uint16_t*>(tensor->data_ptr()) : nullptr;
}

int64_t out_width(const Tensor& w, bool gated) { return gated ? w.size(0) / 2 : w.size(0); }

GemmParams fp8_params(DFLASH_FP8_PARAMETERS) {
  api::check_shape(kOp, "a", a, {-1, -1});
  api::check_dtype(kOp, "a", a, {ScalarType::Byte});
  api::check_last_dim_contiguous(kOp, "a", a);
  check_aligned("a", a);
  GemmParams p;
  p.m = a.size(0);
  p.k = a.size(1);
  DFLASH_CHECK(kOp, p.k >= 16 && p.k % 16 == 0, "a.size(1)", "be a multiple of 16", p.k);
  p.a_stride[0] = p.m > 1 ? a.stride(0) : p.k;
  DFLASH_CHECK(kOp, p.a_stride[0] >= p.k && p.a_stride[0] % 16 == 0, "a",
               "have a row stride that is a multiple of 16 and at least " + std::to_string(p.k), p.a_stride[0]);
  check_matrix("a_scale", a_scale, ScalarType::Float, a, {p.m, 1});
  check_matrix("w", w, ScalarType::Byte, a, {-1, p.k});
  p.n = w.size(0);
  const int64_t unit = gated ? 16 : 8;
  DFLASH_CHECK(kOp, p.n >= unit && p.n % unit == 0, "w.size(0)", "be a multiple of " + std::to_string(unit), p.n);
  check_matrix("w_scale", w_scale, ScalarType::Float, a, {p.n, 1});
  if (bias) check_matrix("bias", *bias, ScalarType::BFloat16, a, {p.n});
  DFLASH_CHECK(kOp, !residual || !gated, "residual", "be None where gated", "a tensor");
  if (residual) check_matrix("residual", *residual, ScalarType::BFloat16, a, {p.m, p.n});
  p.a[0] = static_cast<const uint16_t*>(a.data_ptr());
  p.a_scale = static_cast<const float*>(a_scale.data_ptr());
  p.w = static_cast<const uint16_t*>(w.data_ptr());
  p.w_scale = static_cast<const float*>(w_scale.data_ptr());
  p.bias = bf16_data(bias);
  p.residual = bf16_data(residual);
  p.residual_stride = p.n;
  p.gated = gated;
  p.c_stride = out_width(w, gated);
  return p;
}

// May be `residual` itself.
void check_out(const Tensor& out, const Tensor& a, const Tensor& w, bool gated) {
  check_matrix("out", out, ScalarType::BFloat16, a, {a.size(0), out_width(w, gated)});
}

void fp8_check(DFLASH_FP8_PARAMETERS, std::optional<Tensor> out) {
  fp8_params(DFLASH_FP8_ARGUMENTS);
  if (out) check_out(*out, a, w, gated);
}

#if DFLASH_WITH_CUDA
void fp8_out_cuda(DFLASH_FP8_PARAMETERS, Tensor out) {
  GemmParams p = fp8_params(DFLASH_FP8_ARGUMENTS);
  check_out(out, a, w, gated);
  DFLASH_CHECK(kOp, is_fp8_supported(a.get_device_index()), "a",
               "be on a device whose kernel was built, of compute capability 9.0 or 10.x", "another device");
  p.c = static_cast<uint16_t*>(out.data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  launch_gemm_fp8(p, api::current_stream(kOp, a));
}

Tensor fp8_cuda(DFLASH_FP8_PARAMETERS) {
  fp8_params(DFLASH_FP8_ARGUMENTS);
  const Tensor out = api::new_empty(a, {a.size(0), out_width(w, gated)}, ScalarType::BFloat16);
  fp8_out_cuda(DFLASH_FP8_ARGUMENTS, out);
  return out;
}
#endif

#undef DFLASH_FP8_PARAMETERS
#undef DFLASH_FP8_ARGUMENTS

}  // namespace
}  // namespace dflash::gemm

#define DFLASH_FP8_SCHEMA \
  "Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias=None, Tensor? residual=None, bool gated=False"

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def("gemm_fp8(" DFLASH_FP8_SCHEMA ") -> Tensor");
  m.def("gemm_fp8.out(" DFLASH_FP8_SCHEMA ", *, Tensor(a!) out) -> ()");
  m.def("_gemm_fp8_check(" DFLASH_FP8_SCHEMA ", *, Tensor? out=None) -> ()");
}
#undef DFLASH_FP8_SCHEMA

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) { m.impl("_gemm_fp8_check", TORCH_BOX(&dflash::gemm::fp8_check)); }

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("gemm_fp8", TORCH_BOX(&dflash::gemm::fp8_cuda));
  m.impl("gemm_fp8.out", TORCH_BOX(&dflash::gemm::fp8_out_cuda));
}
#endif

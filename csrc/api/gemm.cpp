// gemm_fp8, gemm_nvfp4: schemas, checks, dispatch. The CPU implementations are registered from Python
// (dflash_kernels/ops/gemm.py) and have their arguments checked here, by _gemm_fp8_check and _gemm_nvfp4_check.
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

constexpr const char* kFp8 = "gemm_fp8";
constexpr const char* kNvfp4 = "gemm_nvfp4";

void check_aligned(const char* op, const char* argument, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  DFLASH_CHECK(op, tensor.is_cpu() || address % 16 == 0, argument, "start at a multiple of 16 bytes", address % 16);
}

// Of the shape and dtype given, on a's device, contiguous, aligned.
void check_matrix(const char* op, const char* argument, const Tensor& tensor, ScalarType type, const Tensor& a,
                  std::initializer_list<int64_t> shape) {
  api::check_shape(op, argument, tensor, shape);
  api::check_dtype(op, argument, tensor, {type});
  api::check_same_device(op, argument, tensor, a);
  api::check_contiguous(op, argument, tensor);
  check_aligned(op, argument, tensor);
}

// Both formats: nvfp4 has the blocks.
struct Inputs {
  const char* op;
  Tensor a, a_scale, w, w_scale;
  std::optional<Tensor> a_blocks, w_blocks, bias, residual;
  bool gated;
};

#define DFLASH_FP8_PARAMETERS                                                                                     \
  Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, std::optional<Tensor> bias, std::optional<Tensor> residual, \
      bool gated
#define DFLASH_FP8_INPUTS \
  Inputs { kFp8, a, a_scale, w, w_scale, std::nullopt, std::nullopt, bias, residual, gated }

#define DFLASH_NVFP4_PARAMETERS                                                                                     \
  Tensor a, Tensor a_blocks, Tensor a_scale, Tensor w, Tensor w_blocks, Tensor w_scale, std::optional<Tensor> bias, \
      std::optional<Tensor> residual, bool gated
#define DFLASH_NVFP4_INPUTS \
  Inputs { kNvfp4, a, a_scale, w, w_scale, a_blocks, w_blocks, bias, residual, gated }

const uint16_t* bf16_data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const uint16_t*>(tensor->data_ptr()) : nullptr;
}

int64_t out_width(const Tensor& w, bool gated) { return gated ? w.size(0) / 2 : w.size(0); }

GemmParams gemm_params(const Inputs& in) {
  const char* const op = in.op;
  const Tensor &a = in.a, &w = in.w;
  api::check_shape(op, "a", a, {-1, -1});
  api::check_dtype(op, "a", a, {ScalarType::Byte});
  api::check_last_dim_contiguous(op, "a", a);
  check_aligned(op, "a", a);
  GemmParams p;
  p.m = a.size(0);
  p.k = a.size(1);
  DFLASH_CHECK(op, p.k >= 16 && p.k % 16 == 0, "a.size(1)", "be a multiple of 16", p.k);
  p.a_stride[0] = p.m > 1 ? a.stride(0) : p.k;
  DFLASH_CHECK(op, p.a_stride[0] >= p.k && p.a_stride[0] % 16 == 0, "a",
               "have a row stride that is a multiple of 16 and at least " + std::to_string(p.k), p.a_stride[0]);
  check_matrix(op, "a_scale", in.a_scale, ScalarType::Float, a, {p.m, 1});
  check_matrix(op, "w", w, ScalarType::Byte, a, {-1, p.k});
  p.n = w.size(0);
  const int64_t unit = in.gated ? 16 : 8;
  DFLASH_CHECK(op, p.n >= unit && p.n % unit == 0, "w.size(0)", "be a multiple of " + std::to_string(unit), p.n);
  check_matrix(op, "w_scale", in.w_scale, ScalarType::Float, a, {p.n, 1});
  if (in.a_blocks) {
    const int64_t k_blocks = (p.k + 31) / 32, w_blocks = in.gated ? (p.n / 2 + 63) / 64 : (p.n + 127) / 128;
    check_matrix(op, "a_blocks", *in.a_blocks, ScalarType::Byte, a, {(p.m + 127) / 128, k_blocks, 512});
    check_matrix(op, "w_blocks", *in.w_blocks, ScalarType::Byte, a, {w_blocks, k_blocks, 512});
    p.a_blocks = static_cast<const uint8_t*>(in.a_blocks->data_ptr());
    p.w_blocks = static_cast<const uint8_t*>(in.w_blocks->data_ptr());
  }
  if (in.bias) check_matrix(op, "bias", *in.bias, ScalarType::BFloat16, a, {p.n});
  DFLASH_CHECK(op, !in.residual || !in.gated, "residual", "be None where gated", "a tensor");
  if (in.residual) check_matrix(op, "residual", *in.residual, ScalarType::BFloat16, a, {p.m, p.n});
  p.a[0] = static_cast<const uint16_t*>(a.data_ptr());
  p.a_scale = static_cast<const float*>(in.a_scale.data_ptr());
  p.w = static_cast<const uint16_t*>(w.data_ptr());
  p.w_scale = static_cast<const float*>(in.w_scale.data_ptr());
  p.bias = bf16_data(in.bias);
  p.residual = bf16_data(in.residual);
  p.residual_stride = p.n;
  p.gated = in.gated;
  p.c_stride = out_width(w, in.gated);
  return p;
}

// May be the residual itself.
void check_out(const Tensor& out, const Inputs& in) {
  check_matrix(in.op, "out", out, ScalarType::BFloat16, in.a, {in.a.size(0), out_width(in.w, in.gated)});
}

void check(const Inputs& in, const std::optional<Tensor>& out) {
  gemm_params(in);
  if (out) check_out(*out, in);
}

void fp8_check(DFLASH_FP8_PARAMETERS, std::optional<Tensor> out) { check(DFLASH_FP8_INPUTS, out); }
void nvfp4_check(DFLASH_NVFP4_PARAMETERS, std::optional<Tensor> out) { check(DFLASH_NVFP4_INPUTS, out); }

#if DFLASH_WITH_CUDA
void out_cuda(const Inputs& in, const Tensor& out) {
  GemmParams p = gemm_params(in);
  check_out(out, in);
  const int device = in.a.get_device_index();
  if (in.a_blocks) {
    DFLASH_CHECK(in.op, is_nvfp4_supported(device), "a",
                 "be on a device whose kernel was built, of compute capability 10.x", "another device");
  } else {
    DFLASH_CHECK(in.op, is_fp8_supported(device), "a",
                 "be on a device whose kernel was built, of compute capability 9.0 or 10.x", "another device");
  }
  p.c = static_cast<uint16_t*>(out.data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = api::current_stream(in.op, in.a);
  in.a_blocks ? launch_gemm_nvfp4(p, stream) : launch_gemm_fp8(p, stream);
}

Tensor new_cuda(const Inputs& in) {
  gemm_params(in);
  const Tensor out = api::new_empty(in.a, {in.a.size(0), out_width(in.w, in.gated)}, ScalarType::BFloat16);
  out_cuda(in, out);
  return out;
}

void fp8_out_cuda(DFLASH_FP8_PARAMETERS, Tensor out) { out_cuda(DFLASH_FP8_INPUTS, out); }
Tensor fp8_cuda(DFLASH_FP8_PARAMETERS) { return new_cuda(DFLASH_FP8_INPUTS); }
void nvfp4_out_cuda(DFLASH_NVFP4_PARAMETERS, Tensor out) { out_cuda(DFLASH_NVFP4_INPUTS, out); }
Tensor nvfp4_cuda(DFLASH_NVFP4_PARAMETERS) { return new_cuda(DFLASH_NVFP4_INPUTS); }
#endif

// For callers that choose between this and another way.
bool nvfp4_supported([[maybe_unused]] int64_t device) {
#if DFLASH_WITH_CUDA
  return is_nvfp4_supported(static_cast<int>(device));
#else
  return false;
#endif
}

#undef DFLASH_FP8_PARAMETERS
#undef DFLASH_FP8_INPUTS
#undef DFLASH_NVFP4_PARAMETERS
#undef DFLASH_NVFP4_INPUTS

}  // namespace
}  // namespace dflash::gemm

#define DFLASH_FP8_SCHEMA \
  "Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias=None, Tensor? residual=None, bool gated=False"
#define DFLASH_NVFP4_SCHEMA                                                                \
  "Tensor a, Tensor a_blocks, Tensor a_scale, Tensor w, Tensor w_blocks, Tensor w_scale, " \
  "Tensor? bias=None, Tensor? residual=None, bool gated=False"

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def("gemm_fp8(" DFLASH_FP8_SCHEMA ") -> Tensor");
  m.def("gemm_fp8.out(" DFLASH_FP8_SCHEMA ", *, Tensor(a!) out) -> ()");
  m.def("_gemm_fp8_check(" DFLASH_FP8_SCHEMA ", *, Tensor? out=None) -> ()");
  m.def("gemm_nvfp4(" DFLASH_NVFP4_SCHEMA ") -> Tensor");
  m.def("gemm_nvfp4.out(" DFLASH_NVFP4_SCHEMA ", *, Tensor(a!) out) -> ()");
  m.def("_gemm_nvfp4_check(" DFLASH_NVFP4_SCHEMA ", *, Tensor? out=None) -> ()");
  m.def("gemm_nvfp4_supported(int device) -> bool");
}
#undef DFLASH_FP8_SCHEMA
#undef DFLASH_NVFP4_SCHEMA

STABLE_TORCH_LIBRARY_IMPL(dflash, CompositeExplicitAutograd, m) {
  m.impl("gemm_nvfp4_supported", TORCH_BOX(&dflash::gemm::nvfp4_supported));
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) {
  m.impl("_gemm_fp8_check", TORCH_BOX(&dflash::gemm::fp8_check));
  m.impl("_gemm_nvfp4_check", TORCH_BOX(&dflash::gemm::nvfp4_check));
}

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("gemm_fp8", TORCH_BOX(&dflash::gemm::fp8_cuda));
  m.impl("gemm_fp8.out", TORCH_BOX(&dflash::gemm::fp8_out_cuda));
  m.impl("gemm_nvfp4", TORCH_BOX(&dflash::gemm::nvfp4_cuda));
  m.impl("gemm_nvfp4.out", TORCH_BOX(&dflash::gemm::nvfp4_out_cuda));
}
#endif

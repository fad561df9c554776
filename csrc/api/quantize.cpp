// quantize_rows, rmsnorm_quantize_rows, quantize_rows_nvfp4: schemas, checks, dispatch. The CPU implementations of the
// last two are registered from Python (dflash_kernels/ops/quantize.py) and have their arguments checked here, by
// _rmsnorm_quantize_rows_check and _quantize_rows_nvfp4_check.
#include <array>
#include <tuple>

#include "api/check.h"
#include "api/cuda_stream.h"
#include "cpu/quantize.h"
#include "smxx/norm/params.h"
#if DFLASH_WITH_CUDA
#include "smxx/norm/launch.h"
#include "smxx/quantize/launch.h"
#endif

namespace dflash::quantize {
namespace {

using api::ScalarType;
using api::Tensor;

constexpr const char* kQuantize = "quantize_rows";
constexpr const char* kNorm = "rmsnorm_quantize_rows";
constexpr const char* kNvfp4 = "quantize_rows_nvfp4";

void check_aligned(const char* op, const char* argument, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  DFLASH_CHECK(op, tensor.is_cpu() || address % 16 == 0, argument, "start at a multiple of 16 bytes", address % 16);
}

// x [M, N]: bfloat16, float32 on the CPU only.
void check_rows(const char* op, const Tensor& x, int64_t max_columns, int64_t unit = 8) {
  api::check_shape(op, "x", x, {-1, -1});
  if (x.is_cpu()) {
    api::check_dtype(op, "x", x, {ScalarType::BFloat16, ScalarType::Float});
  } else {
    api::check_dtype(op, "x", x, {ScalarType::BFloat16});
  }
  const int64_t columns = x.size(1);
  DFLASH_CHECK(
      op, columns >= unit && columns % unit == 0 && columns <= max_columns, "x.size(1)",
      "be a multiple of " + std::to_string(unit) + " in " + std::to_string(unit) + ".." + std::to_string(max_columns),
      columns);
  api::check_contiguous(op, "x", x);
  check_aligned(op, "x", x);
}

void check_output(const char* op, const char* name, const Tensor& tensor, ScalarType type, const Tensor& x) {
  api::check_dtype(op, name, tensor, {type});
  api::check_same_device(op, name, tensor, x);
  api::check_contiguous(op, name, tensor);
  check_aligned(op, name, tensor);
}

void check_outputs(const char* op, const Tensor& x, const Tensor& codes, const Tensor& scale,
                   int64_t codes_a_byte = 1) {
  api::check_shape(op, "codes", codes, {x.size(0), x.size(1) / codes_a_byte});
  api::check_shape(op, "scale", scale, {x.size(0), 1});
  check_output(op, "codes", codes, ScalarType::Byte, x);
  check_output(op, "scale", scale, ScalarType::Float, x);
}

std::tuple<Tensor, Tensor> new_outputs(const Tensor& x) {
  return {api::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Byte),
          api::new_empty(x, {x.size(0), 1}, ScalarType::Float)};
}

QuantizeParams quantize_params(const Tensor& x, const Tensor& codes, const Tensor& scale) {
  check_rows(kQuantize, x, kMaxColumns);
  check_outputs(kQuantize, x, codes, scale);
  QuantizeParams p;
  p.x = x.data_ptr();
  p.is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  p.codes = static_cast<uint8_t*>(codes.data_ptr());
  p.scale = static_cast<float*>(scale.data_ptr());
  p.m = x.size(0);
  p.n = x.size(1);
  return p;
}

void quantize_rows_out_cpu(Tensor x, Tensor codes, Tensor scale) {
  quantize_rows_cpu(quantize_params(x, codes, scale));
}

void check_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_rows(kNorm, x, norm::kMaxHeldColumns);
  api::check_shape(kNorm, "weight", weight, {x.size(1)});
  api::check_dtype(kNorm, "weight", weight, {x.scalar_type()});
  api::check_same_device(kNorm, "weight", weight, x);
  api::check_contiguous(kNorm, "weight", weight);
  check_aligned(kNorm, "weight", weight);
  DFLASH_CHECK(kNorm, eps >= 0.0, "eps", "be at least 0", eps);
}

void rmsnorm_quantize_rows_check(Tensor x, Tensor weight, double eps, std::optional<Tensor> codes,
                                 std::optional<Tensor> scale) {
  check_norm(x, weight, eps);
  if (codes && scale) check_outputs(kNorm, x, *codes, *scale);
}

std::array<int64_t, 3> blocks_shape(const Tensor& x) { return {(x.size(0) + 127) / 128, (x.size(1) + 63) / 64, 512}; }

void check_nvfp4(const Tensor& x) { check_rows(kNvfp4, x, kMaxColumns, 32); }

void check_nvfp4_outputs(const Tensor& x, const Tensor& codes, const Tensor& blocks, const Tensor& scale) {
  check_outputs(kNvfp4, x, codes, scale, 2);
  const auto [rows, columns, bytes] = blocks_shape(x);
  api::check_shape(kNvfp4, "blocks", blocks, {rows, columns, bytes});
  check_output(kNvfp4, "blocks", blocks, ScalarType::Byte, x);
}

void quantize_rows_nvfp4_check(Tensor x, std::optional<Tensor> codes, std::optional<Tensor> blocks,
                               std::optional<Tensor> scale) {
  check_nvfp4(x);
  if (codes && blocks && scale) check_nvfp4_outputs(x, *codes, *blocks, *scale);
}

#if DFLASH_WITH_CUDA
void quantize_rows_nvfp4_out_cuda(Tensor x, Tensor codes, Tensor blocks, Tensor scale) {
  check_nvfp4(x);
  check_nvfp4_outputs(x, codes, blocks, scale);
  QuantizeParams p;
  p.x = x.data_ptr();
  p.codes = static_cast<uint8_t*>(codes.data_ptr());
  p.blocks = static_cast<uint8_t*>(blocks.data_ptr());
  p.scale = static_cast<float*>(scale.data_ptr());
  p.m = x.size(0);
  p.n = x.size(1);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  launch_quantize_rows_nvfp4(p, api::current_stream(kNvfp4, x));
}

std::tuple<Tensor, Tensor, Tensor> quantize_rows_nvfp4_cuda(Tensor x) {
  check_nvfp4(x);
  const auto [rows, columns, bytes] = blocks_shape(x);
  const Tensor codes = api::new_empty(x, {x.size(0), x.size(1) / 2}, ScalarType::Byte);
  const Tensor blocks = api::new_empty(x, {rows, columns, bytes}, ScalarType::Byte);
  const Tensor scale = api::new_empty(x, {x.size(0), 1}, ScalarType::Float);
  quantize_rows_nvfp4_out_cuda(x, codes, blocks, scale);
  return {codes, blocks, scale};
}

void quantize_rows_out_cuda(Tensor x, Tensor codes, Tensor scale) {
  const QuantizeParams p = quantize_params(x, codes, scale);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  launch_quantize_rows(p, api::current_stream(kQuantize, x));
}

void rmsnorm_quantize_rows_out_cuda(Tensor x, Tensor weight, double eps, Tensor codes, Tensor scale) {
  check_norm(x, weight, eps);
  check_outputs(kNorm, x, codes, scale);
  norm::RmsNormParams p;
  p.x = static_cast<const uint16_t*>(x.data_ptr());
  p.weight = static_cast<const uint16_t*>(weight.data_ptr());
  p.codes = static_cast<uint8_t*>(codes.data_ptr());
  p.row_scales = static_cast<float*>(scale.data_ptr());
  p.m = x.size(0);
  p.n = p.x_stride = p.out_stride = x.size(1);
  p.eps = static_cast<float>(eps);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  norm::launch_rmsnorm(p, api::current_stream(kNorm, x));
}

std::tuple<Tensor, Tensor> rmsnorm_quantize_rows_cuda(Tensor x, Tensor weight, double eps) {
  check_norm(x, weight, eps);
  auto [codes, scale] = new_outputs(x);
  rmsnorm_quantize_rows_out_cuda(x, weight, eps, codes, scale);
  return {codes, scale};
}
#endif

template <auto kOut>
std::tuple<Tensor, Tensor> quantize_rows(Tensor x) {
  check_rows(kQuantize, x, kMaxColumns);
  auto [codes, scale] = new_outputs(x);
  kOut(x, codes, scale);
  return {codes, scale};
}

}  // namespace
}  // namespace dflash::quantize

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def("quantize_rows(Tensor x) -> (Tensor codes, Tensor scale)");
  m.def("quantize_rows.out(Tensor x, *, Tensor(a!) codes, Tensor(b!) scale) -> ()");
  m.def("rmsnorm_quantize_rows(Tensor x, Tensor weight, float eps) -> (Tensor codes, Tensor scale)");
  m.def(
      "rmsnorm_quantize_rows.out(Tensor x, Tensor weight, float eps, *, Tensor(a!) codes, Tensor(b!) scale) "
      "-> ()");
  m.def("quantize_rows_nvfp4(Tensor x) -> (Tensor codes, Tensor blocks, Tensor scale)");
  m.def("quantize_rows_nvfp4.out(Tensor x, *, Tensor(a!) codes, Tensor(b!) blocks, Tensor(c!) scale) -> ()");
  m.def("_quantize_rows_nvfp4_check(Tensor x, *, Tensor? codes=None, Tensor? blocks=None, Tensor? scale=None) -> ()");
  m.def(
      "_rmsnorm_quantize_rows_check(Tensor x, Tensor weight, float eps, *, Tensor? codes=None, Tensor? scale=None) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&dflash::quantize::quantize_rows<&dflash::quantize::quantize_rows_out_cpu>));
  m.impl("quantize_rows.out", TORCH_BOX(&dflash::quantize::quantize_rows_out_cpu));
  m.impl("_rmsnorm_quantize_rows_check", TORCH_BOX(&dflash::quantize::rmsnorm_quantize_rows_check));
  m.impl("_quantize_rows_nvfp4_check", TORCH_BOX(&dflash::quantize::quantize_rows_nvfp4_check));
}

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("quantize_rows", TORCH_BOX(&dflash::quantize::quantize_rows<&dflash::quantize::quantize_rows_out_cuda>));
  m.impl("quantize_rows.out", TORCH_BOX(&dflash::quantize::quantize_rows_out_cuda));
  m.impl("quantize_rows_nvfp4", TORCH_BOX(&dflash::quantize::quantize_rows_nvfp4_cuda));
  m.impl("quantize_rows_nvfp4.out", TORCH_BOX(&dflash::quantize::quantize_rows_nvfp4_out_cuda));
  m.impl("rmsnorm_quantize_rows", TORCH_BOX(&dflash::quantize::rmsnorm_quantize_rows_cuda));
  m.impl("rmsnorm_quantize_rows.out", TORCH_BOX(&dflash::quantize::rmsnorm_quantize_rows_out_cuda));
}
#endif

// Argument checks and torch access shared by every csrc/api file. The only torch-facing helpers of the library:
// LibTorch stable ABI only. Every message reads "dflash::<op>: <argument> must <expected>, got <got>".
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/int_view.h"

namespace dflash::api {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "dflash::" << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// DFLASH_CHECK("verify_block", t <= 32, "candidates", "have at most 32 columns", t)
#define DFLASH_CHECK(op, condition, argument, expected, got)                                \
  do {                                                                                      \
    if (!(condition)) ::dflash::api::fail(op, argument, " must ", expected, ", got ", got); \
  } while (0)

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

inline void check_dtype(const char* op, const char* argument, const Tensor& tensor,
                        std::initializer_list<ScalarType> allowed) {
  const ScalarType got = tensor.scalar_type();
  for (ScalarType type : allowed) {
    if (got == type) return;
  }
  std::string expected;
  for (ScalarType type : allowed) expected += (expected.empty() ? "" : " or ") + std::string(dtype_name(type));
  fail(op, argument, " must have dtype ", expected, ", got ", dtype_name(got));
}

inline void check_index_dtype(const char* op, const char* argument, const Tensor& tensor) {
  check_dtype(op, argument, tensor, {ScalarType::Int, ScalarType::Long});
}

// -1 in `expected` leaves that size free. Builds text only to complain: some ops check a dozen tensors a call.
inline void check_shape(const char* op, const char* argument, const Tensor& tensor,
                        std::initializer_list<int64_t> expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t axis = 0;
  for (int64_t size : expected) {
    if (!same) break;
    same = size < 0 || tensor.size(axis) == size;
    ++axis;
  }
  if (same) return;
  std::ostringstream text;
  const char* separator = "[";
  for (int64_t size : expected) {
    text << separator;
    size < 0 ? text << '*' : text << size;
    separator = ", ";
  }
  if (expected.size() == 0) text << '[';
  fail(op, argument, " must have shape ", text.str(), "], got ", shape_text(tensor));
}

inline void check_same_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& first) {
  const bool same = tensor.is_cpu() == first.is_cpu() && tensor.get_device_index() == first.get_device_index();
  DFLASH_CHECK(op, same, argument, "be on " + device_text(first), device_text(tensor));
}

inline void check_contiguous(const char* op, const char* argument, const Tensor& tensor) {
  DFLASH_CHECK(op, tensor.is_contiguous(), argument, "be contiguous", "strided " + shape_text(tensor));
}

inline void check_last_dim_contiguous(const char* op, const char* argument, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  DFLASH_CHECK(op, last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1, argument,
               "have a contiguous last dimension", "stride " + std::to_string(tensor.stride(last)));
}

// An index tensor of one or two dimensions as a plain view; dtype must have been checked.
inline IntView int_view(const Tensor& tensor) {
  IntView view;
  view.data = tensor.data_ptr();
  view.stride0 = tensor.dim() > 0 ? tensor.stride(0) : 0;
  view.stride1 = tensor.dim() > 1 ? tensor.stride(1) : 0;
  view.is_int64 = tensor.scalar_type() == ScalarType::Long;
  return view;
}

// DFLASH_DEBUG=1: CUDA ops check indices on the device, synchronously, before anything is written.
inline bool debug_enabled() {
  const char* value = std::getenv("DFLASH_DEBUG");
  return value != nullptr && value[0] != '\0' && std::string(value) != "0";
}

inline Tensor new_empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

}  // namespace dflash::api

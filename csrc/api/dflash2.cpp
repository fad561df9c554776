// select_path, grouped_conv (DFlash2's candidate walk and grouped convolution): schemas, checks, dispatch.
#include <optional>
#include <tuple>

#include "api/check.h"
#include "api/cuda_stream.h"
#include "cpu/dflash2.h"
#include "smxx/dflash2/rules.h"
#if DFLASH_WITH_CUDA
#include "smxx/dflash2/launch.h"
#endif

namespace dflash::dflash2 {
namespace {

using api::ScalarType;
using api::Tensor;

constexpr const char* kSelect = "select_path";
constexpr const char* kConv = "grouped_conv";

// bfloat16 everywhere, float32 on the CPU only.
void check_float_dtype(const char* op, const char* argument, const Tensor& tensor) {
  if (tensor.is_cpu()) {
    api::check_dtype(op, argument, tensor, {ScalarType::BFloat16, ScalarType::Float});
  } else {
    api::check_dtype(op, argument, tensor, {ScalarType::BFloat16});
  }
}

// Rows that a CUDA lane reads 16 bytes at a time.
void check_vector_rows(const char* op, const char* argument, const Tensor& tensor) {
  if (tensor.is_cpu() || tensor.numel() == 0) return;
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  DFLASH_CHECK(op, address % 16 == 0, argument, "start at a multiple of 16 bytes", address % 16);
  for (int64_t axis = 0; axis + 1 < tensor.dim(); ++axis) {
    DFLASH_CHECK(op, tensor.size(axis) <= 1 || tensor.stride(axis) % kRankVector == 0, argument,
                 "have strides that are multiples of 8", tensor.stride(axis));
  }
}

SelectParams select_params(const Tensor& candidate_ids, const Tensor& base_logits, const Tensor& hidden,
                           const Tensor& anchor_ids, const Tensor& predecessors, const Tensor& successors,
                           const std::optional<Tensor>& temperature, const std::optional<Tensor>& uniforms,
                           const Tensor& path_ids, const Tensor& draft_probs) {
  const char* op = kSelect;
  api::check_shape(op, "candidate_ids", candidate_ids, {-1, -1, -1});
  const int64_t batch = candidate_ids.size(0), slots = candidate_ids.size(1), top_k = candidate_ids.size(2);
  DFLASH_CHECK(op, slots <= kMaxSlots, "candidate_ids", "have at most 32 slots", slots);
  DFLASH_CHECK(op, top_k >= 1 && top_k <= kMaxTopK, "candidate_ids", "have 1..32 candidates a slot", top_k);
  api::check_shape(op, "base_logits", base_logits, {batch, slots, top_k});
  api::check_shape(op, "predecessor_codebook", predecessors, {-1, -1});
  const int64_t vocab_size = predecessors.size(0), rank = predecessors.size(1);
  DFLASH_CHECK(op, rank >= kRankVector && rank <= kMaxRank && rank % kRankVector == 0, "predecessor_codebook",
               "have a rank that is a multiple of 8 in 8..256", rank);
  DFLASH_CHECK(op, vocab_size >= 1, "predecessor_codebook", "have at least 1 row", vocab_size);
  api::check_shape(op, "successor_codebook", successors, {vocab_size, rank});
  api::check_shape(op, "hidden", hidden, {batch, slots, rank});
  api::check_shape(op, "anchor_ids", anchor_ids, {batch});
  DFLASH_CHECK(op, temperature.has_value() == uniforms.has_value(), "uniforms", "be given iff temperature is",
               uniforms.has_value() ? "uniforms only" : "temperature only");
  api::check_shape(op, "path_ids", path_ids, {batch, slots});
  api::check_shape(op, "draft_probs", draft_probs, {batch, slots, top_k});

  api::check_index_dtype(op, "candidate_ids", candidate_ids);
  api::check_index_dtype(op, "anchor_ids", anchor_ids);
  api::check_dtype(op, "base_logits", base_logits, {ScalarType::Float});
  check_float_dtype(op, "hidden", hidden);
  api::check_dtype(op, "predecessor_codebook", predecessors, {hidden.scalar_type()});
  api::check_dtype(op, "successor_codebook", successors, {hidden.scalar_type()});
  api::check_dtype(op, "path_ids", path_ids, {ScalarType::Long});
  api::check_dtype(op, "draft_probs", draft_probs, {ScalarType::Float});
  api::check_last_dim_contiguous(op, "candidate_ids", candidate_ids);
  api::check_last_dim_contiguous(op, "base_logits", base_logits);
  api::check_last_dim_contiguous(op, "hidden", hidden);
  api::check_contiguous(op, "predecessor_codebook", predecessors);
  api::check_contiguous(op, "successor_codebook", successors);
  api::check_contiguous(op, "path_ids", path_ids);
  api::check_contiguous(op, "draft_probs", draft_probs);
  if (temperature.has_value()) {
    api::check_shape(op, "temperature", *temperature, {batch});
    api::check_shape(op, "uniforms", *uniforms, {batch, slots});
    for (const auto& [name, tensor] : {std::pair<const char*, const Tensor*>{"temperature", &*temperature},
                                       std::pair<const char*, const Tensor*>{"uniforms", &*uniforms}}) {
      api::check_dtype(op, name, *tensor, {ScalarType::Float});
      api::check_contiguous(op, name, *tensor);
      api::check_same_device(op, name, *tensor, candidate_ids);
    }
  }
  const std::pair<const char*, const Tensor*> others[] = {
      {"base_logits", &base_logits},       {"hidden", &hidden},
      {"anchor_ids", &anchor_ids},         {"predecessor_codebook", &predecessors},
      {"successor_codebook", &successors}, {"path_ids", &path_ids},
      {"draft_probs", &draft_probs}};
  for (const auto& [name, tensor] : others) api::check_same_device(op, name, *tensor, candidate_ids);
  check_vector_rows(op, "hidden", hidden);
  check_vector_rows(op, "predecessor_codebook", predecessors);
  check_vector_rows(op, "successor_codebook", successors);

  SelectParams p;
  p.batch = batch;
  p.slots = static_cast<int>(slots);
  p.top_k = static_cast<int>(top_k);
  p.rank = static_cast<int>(rank);
  p.vocab_size = vocab_size;
  p.is_bf16 = hidden.scalar_type() == ScalarType::BFloat16;
  p.candidate_ids = api::int_view(candidate_ids);
  p.candidate_ids.stride0 = 1;
  p.candidate_ids.stride1 = 0;
  p.candidate_strides = {candidate_ids.stride(0), candidate_ids.stride(1)};
  p.base_logits = static_cast<const float*>(base_logits.data_ptr());
  p.logit_strides = {base_logits.stride(0), base_logits.stride(1)};
  p.hidden = hidden.data_ptr();
  p.hidden_strides = {hidden.stride(0), hidden.stride(1)};
  p.anchor_ids = api::int_view(anchor_ids);
  p.predecessors = predecessors.data_ptr();
  p.successors = successors.data_ptr();
  p.temperature = temperature.has_value() ? static_cast<const float*>(temperature->data_ptr()) : nullptr;
  p.uniforms = uniforms.has_value() ? static_cast<const float*>(uniforms->data_ptr()) : nullptr;
  p.path_ids = static_cast<int64_t*>(path_ids.data_ptr());
  p.draft_probs = static_cast<float*>(draft_probs.data_ptr());
  return p;
}

void report(const SelectParams& p, const SelectFault& found) {
  const std::string ids = "hold ids in [0, " + std::to_string(p.vocab_size) + ")";
  const std::string got = "another value in request " + std::to_string(found.request);
  switch (found.fault) {
    case Fault::kNone:
      return;
    case Fault::kAnchor:
      DFLASH_CHECK(kSelect, false, "anchor_ids", ids, got);
      return;
    case Fault::kCandidate:
      DFLASH_CHECK(kSelect, false, "candidate_ids", ids, got);
      return;
    case Fault::kTemperature:
      DFLASH_CHECK(kSelect, false, "temperature", "be at least 0", got);
      return;
    case Fault::kUniform:
      DFLASH_CHECK(kSelect, false, "uniforms", "be in [0, 1)", got);
      return;
  }
}

void select_path_out_cpu(Tensor candidate_ids, Tensor base_logits, Tensor hidden, Tensor anchor_ids,
                         Tensor predecessor_codebook, Tensor successor_codebook, std::optional<Tensor> temperature,
                         std::optional<Tensor> uniforms, Tensor path_ids, Tensor draft_probs) {
  const SelectParams p = select_params(candidate_ids, base_logits, hidden, anchor_ids, predecessor_codebook,
                                       successor_codebook, temperature, uniforms, path_ids, draft_probs);
  for (int64_t b = 0; b < p.batch; ++b) report(p, SelectFault{find_fault(p, b), b});
  select_path_cpu(p);
}

#if DFLASH_WITH_CUDA
void select_path_out_cuda(Tensor candidate_ids, Tensor base_logits, Tensor hidden, Tensor anchor_ids,
                          Tensor predecessor_codebook, Tensor successor_codebook, std::optional<Tensor> temperature,
                          std::optional<Tensor> uniforms, Tensor path_ids, Tensor draft_probs) {
  const SelectParams p = select_params(candidate_ids, base_logits, hidden, anchor_ids, predecessor_codebook,
                                       successor_codebook, temperature, uniforms, path_ids, draft_probs);
  if (p.batch == 0 || p.slots == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(candidate_ids.get_device_index());
  const cudaStream_t stream = api::current_stream(kSelect, candidate_ids);
  if (api::checks_values(kSelect, stream)) report(p, check_select_cuda(p, stream));
  launch_select_path(p, stream);
}
#endif

template <auto kOut>
std::tuple<Tensor, Tensor> select_path(Tensor candidate_ids, Tensor base_logits, Tensor hidden, Tensor anchor_ids,
                                       Tensor predecessor_codebook, Tensor successor_codebook,
                                       std::optional<Tensor> temperature, std::optional<Tensor> uniforms) {
  api::check_shape(kSelect, "candidate_ids", candidate_ids, {-1, -1, -1});
  const int64_t batch = candidate_ids.size(0), slots = candidate_ids.size(1), top_k = candidate_ids.size(2);
  const Tensor path_ids = api::new_empty(candidate_ids, {batch, slots}, ScalarType::Long);
  const Tensor draft_probs = api::new_empty(candidate_ids, {batch, slots, top_k}, ScalarType::Float);
  kOut(candidate_ids, base_logits, hidden, anchor_ids, predecessor_codebook, successor_codebook, temperature, uniforms,
       path_ids, draft_probs);
  return {path_ids, draft_probs};
}

// Byte range that the elements of a tensor with non-negative strides lie in.
std::pair<uintptr_t, uintptr_t> byte_range(const Tensor& tensor) {
  const auto first = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  if (tensor.numel() == 0) return {first, first};
  int64_t last = 0;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) last += (tensor.size(axis) - 1) * tensor.stride(axis);
  return {first, first + static_cast<uintptr_t>(last + 1) * tensor.element_size()};
}

ConvParams conv_params(const Tensor& x, const Tensor& delta, const Tensor& base, int64_t block_size,
                       const Tensor& out) {
  const char* op = kConv;
  api::check_shape(op, "x", x, {-1, -1});
  const int64_t rows = x.size(0), hidden_size = x.size(1);
  DFLASH_CHECK(op, block_size >= 1 && block_size <= INT32_MAX, "block_size", "be at least 1", block_size);
  DFLASH_CHECK(op, rows % block_size == 0, "x", "have a multiple of " + std::to_string(block_size) + " rows", rows);
  DFLASH_CHECK(op, rows * hidden_size <= INT32_MAX, "x", "have fewer than 2**31 elements", rows * hidden_size);
  api::check_shape(op, "delta", delta, {rows, -1, -1});
  const int64_t taps = delta.size(1), groups = delta.size(2);
  DFLASH_CHECK(op, taps >= 1 && taps <= INT32_MAX, "delta", "have at least 1 tap", taps);
  DFLASH_CHECK(op, groups >= 1 && hidden_size >= groups && hidden_size % groups == 0, "delta",
               "have a number of groups that divides H (" + std::to_string(hidden_size) + ")", groups);
  api::check_shape(op, "base", base, {taps, hidden_size});
  api::check_shape(op, "out", out, {rows, hidden_size});
  check_float_dtype(op, "x", x);
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor*>{"delta", &delta}, std::pair<const char*, const Tensor*>{"base", &base},
        std::pair<const char*, const Tensor*>{"out", &out}}) {
    api::check_dtype(op, name, *tensor, {x.scalar_type()});
    api::check_same_device(op, name, *tensor, x);
  }
  api::check_last_dim_contiguous(op, "x", x);
  api::check_last_dim_contiguous(op, "delta", delta);
  api::check_contiguous(op, "base", base);
  api::check_contiguous(op, "out", out);
  const auto written = byte_range(out);
  for (const auto& [name, tensor] :
       {std::pair<const char*, const Tensor*>{"x", &x}, std::pair<const char*, const Tensor*>{"delta", &delta},
        std::pair<const char*, const Tensor*>{"base", &base}}) {
    const auto read = byte_range(*tensor);
    const bool apart = read.second <= written.first || written.second <= read.first;
    DFLASH_CHECK(op, apart, "out", "not share memory with an input", std::string("memory of ") + name);
  }
  ConvParams p;
  p.rows = rows;
  p.hidden_size = static_cast<int>(hidden_size);
  p.taps = static_cast<int>(taps);
  p.group_size = static_cast<int>(hidden_size / groups);
  p.block_size = static_cast<int>(block_size);
  p.is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  p.x = x.data_ptr();
  p.x_stride = x.stride(0);
  p.delta = delta.data_ptr();
  p.delta_row_stride = delta.stride(0);
  p.delta_tap_stride = delta.stride(1);
  p.base = base.data_ptr();
  p.out = out.data_ptr();
  return p;
}

void grouped_conv_out_cpu(Tensor x, Tensor delta, Tensor base, int64_t block_size, Tensor out) {
  grouped_conv_cpu(conv_params(x, delta, base, block_size, out));
}

#if DFLASH_WITH_CUDA
void grouped_conv_out_cuda(Tensor x, Tensor delta, Tensor base, int64_t block_size, Tensor out) {
  const ConvParams p = conv_params(x, delta, base, block_size, out);
  if (p.rows == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  launch_grouped_conv(p, api::current_stream(kConv, x));
}
#endif

template <auto kOut>
Tensor grouped_conv(Tensor x, Tensor delta, Tensor base, int64_t block_size) {
  api::check_shape(kConv, "x", x, {-1, -1});
  check_float_dtype(kConv, "x", x);
  const Tensor out = api::new_empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  kOut(x, delta, base, block_size, out);
  return out;
}

}  // namespace
}  // namespace dflash::dflash2

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def(
      "select_path(Tensor candidate_ids, Tensor base_logits, Tensor hidden, Tensor anchor_ids, "
      "Tensor predecessor_codebook, Tensor successor_codebook, Tensor? temperature=None, Tensor? uniforms=None) "
      "-> (Tensor path_ids, Tensor draft_probs)");
  m.def(
      "select_path.out(Tensor candidate_ids, Tensor base_logits, Tensor hidden, Tensor anchor_ids, "
      "Tensor predecessor_codebook, Tensor successor_codebook, Tensor? temperature=None, Tensor? uniforms=None, *, "
      "Tensor(a!) path_ids, Tensor(b!) draft_probs) -> ()");
  m.def("grouped_conv(Tensor x, Tensor delta, Tensor base, int block_size) -> Tensor");
  m.def("grouped_conv.out(Tensor x, Tensor delta, Tensor base, int block_size, *, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) {
  m.impl("select_path", TORCH_BOX(&dflash::dflash2::select_path<&dflash::dflash2::select_path_out_cpu>));
  m.impl("select_path.out", TORCH_BOX(&dflash::dflash2::select_path_out_cpu));
  m.impl("grouped_conv", TORCH_BOX(&dflash::dflash2::grouped_conv<&dflash::dflash2::grouped_conv_out_cpu>));
  m.impl("grouped_conv.out", TORCH_BOX(&dflash::dflash2::grouped_conv_out_cpu));
}

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("select_path", TORCH_BOX(&dflash::dflash2::select_path<&dflash::dflash2::select_path_out_cuda>));
  m.impl("select_path.out", TORCH_BOX(&dflash::dflash2::select_path_out_cuda));
  m.impl("grouped_conv", TORCH_BOX(&dflash::dflash2::grouped_conv<&dflash::dflash2::grouped_conv_out_cuda>));
  m.impl("grouped_conv.out", TORCH_BOX(&dflash::dflash2::grouped_conv_out_cuda));
}
#endif

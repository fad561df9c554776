// lm_head_argmax, lm_head_argmax_packed, lm_head_topk, verify_block_from_hidden: schemas, checks, dispatch. On the CPU
// they are torch ops registered from Python; _lm_head_check gives those the checks of this file.
#include <algorithm>
#include <tuple>
#include <utility>

#include "api/check.h"
#include "api/cuda_stream.h"
#include "api/packed.h"
#include "smxx/head/params.h"
#include "smxx/head/stream.h"
#if DFLASH_WITH_CUDA
#include "smxx/head/launch.h"
#endif

namespace dflash::head {
namespace {

using api::ScalarType;
using api::Tensor;
using MaybeTensor = std::optional<Tensor>;

// hidden, weight and bias; k = 0 for argmax.
void check_inputs(const char* op, const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias, int64_t k,
                  int64_t vocab_start) {
  api::check_shape(op, "hidden", hidden, {-1, -1});
  api::check_shape(op, "weight", weight, {-1, hidden.size(1)});
  const int64_t vocab = weight.size(0);
  DFLASH_CHECK(op, vocab >= 1 && vocab <= (int64_t{1} << 22), "weight.size(0)", "be in 1..2**22", vocab);
  DFLASH_CHECK(op, hidden.size(1) >= 1, "hidden.size(1)", "be at least 1", hidden.size(1));
  if (bias) api::check_shape(op, "bias", *bias, {vocab});
  if (hidden.is_cpu()) {
    api::check_dtype(op, "hidden", hidden, {ScalarType::BFloat16, ScalarType::Float});
  } else {
    api::check_dtype(op, "hidden", hidden, {ScalarType::BFloat16});
  }
  api::check_last_dim_contiguous(op, "hidden", hidden);
  const std::pair<const char*, const Tensor*> others[] = {{"weight", &weight}, {"bias", bias ? &*bias : nullptr}};
  for (const auto& [name, tensor] : others) {
    if (tensor == nullptr) continue;
    api::check_dtype(op, name, *tensor, {hidden.scalar_type()});
    api::check_same_device(op, name, *tensor, hidden);
    api::check_contiguous(op, name, *tensor);
  }
  if (k > 0 || std::string(op) == "lm_head_topk") {
    const int64_t limit = std::min<int64_t>(kMaxTopK, vocab);
    DFLASH_CHECK(op, k >= 1 && k <= limit, "k", "be in 1.." + std::to_string(limit), k);
  }
  DFLASH_CHECK(op, vocab_start >= 0, "vocab_start", "be at least 0", vocab_start);
}

void check_output(const char* op, const char* name, const Tensor& tensor, const Tensor& hidden, ScalarType type) {
  api::check_dtype(op, name, tensor, {type});
  api::check_same_device(op, name, tensor, hidden);
  api::check_contiguous(op, name, tensor);
}

int64_t workspace_size(const Tensor& hidden, const Tensor& weight, int64_t k) {
  return k == 0 ? 1 + hidden.size(0) : hidden.size(0) * num_tiles(weight.size(0)) * k;
}

void check_workspace(const char* op, const Tensor& workspace, const Tensor& hidden, const Tensor& weight, int64_t k) {
  check_output(op, "workspace", workspace, hidden, ScalarType::Long);
  const int64_t needed = workspace_size(hidden, weight, k);
  DFLASH_CHECK(op, workspace.numel() >= needed, "workspace", "hold at least " + std::to_string(needed) + " elements",
               workspace.numel());
}

void check_outputs(const char* op, const Tensor& hidden, const Tensor& weight, int64_t k, const Tensor& ids,
                   const Tensor& values, const Tensor& workspace) {
  const std::pair<const char*, const Tensor*> outputs[] = {{"ids", &ids}, {"values", &values}};
  for (const auto& [name, tensor] : outputs) {
    if (k == 0) {
      api::check_shape(op, name, *tensor, {hidden.size(0)});
    } else {
      api::check_shape(op, name, *tensor, {hidden.size(0), k});
    }
  }
  check_output(op, "ids", ids, hidden, ScalarType::Long);
  check_output(op, "values", values, hidden, ScalarType::Float);
  check_workspace(op, workspace, hidden, weight, k);
}

struct VerifyTensors {
  Tensor accept_lens, commit_lens, bonus_ids, out_tokens, new_seq_lens;
};

constexpr const char* kVerifyOp = "verify_block_from_hidden";

void check_verify_inputs(const Tensor& candidates, const Tensor& hidden, const Tensor& prefix_lens) {
  api::check_shape(kVerifyOp, "candidates", candidates, {-1, -1});
  DFLASH_CHECK(kVerifyOp, candidates.size(1) >= 1, "candidates.size(1)", "be at least 1", candidates.size(1));
  api::check_shape(kVerifyOp, "hidden", hidden, {candidates.size(0) * candidates.size(1), -1});
  api::check_shape(kVerifyOp, "prefix_lens", prefix_lens, {candidates.size(0)});
  api::check_index_dtype(kVerifyOp, "candidates", candidates);
  api::check_index_dtype(kVerifyOp, "prefix_lens", prefix_lens);
  api::check_same_device(kVerifyOp, "candidates", candidates, hidden);
  api::check_same_device(kVerifyOp, "prefix_lens", prefix_lens, hidden);
}

void check_verify_outputs(const Tensor& candidates, const Tensor& hidden, const VerifyTensors& out) {
  const int64_t batch = candidates.size(0);
  api::check_shape(kVerifyOp, "accept_lens", out.accept_lens, {batch});
  api::check_shape(kVerifyOp, "commit_lens", out.commit_lens, {batch});
  api::check_shape(kVerifyOp, "bonus_ids", out.bonus_ids, {batch});
  api::check_shape(kVerifyOp, "out_tokens", out.out_tokens, {batch, candidates.size(1)});
  api::check_shape(kVerifyOp, "new_seq_lens", out.new_seq_lens, {batch});
  check_output(kVerifyOp, "accept_lens", out.accept_lens, hidden, ScalarType::Int);
  check_output(kVerifyOp, "commit_lens", out.commit_lens, hidden, ScalarType::Int);
  check_output(kVerifyOp, "bonus_ids", out.bonus_ids, hidden, ScalarType::Long);
  check_output(kVerifyOp, "out_tokens", out.out_tokens, hidden, ScalarType::Long);
  check_output(kVerifyOp, "new_seq_lens", out.new_seq_lens, hidden, ScalarType::Long);
}

void check_cpu(std::string op, Tensor hidden, Tensor weight, MaybeTensor bias, int64_t k, int64_t vocab_start,
               MaybeTensor ids, MaybeTensor values, MaybeTensor workspace) {
  check_inputs(op.c_str(), hidden, weight, bias, k, vocab_start);
  if (ids && values && workspace) check_outputs(op.c_str(), hidden, weight, k, *ids, *values, *workspace);
}

void check_verify_cpu(Tensor candidates, Tensor hidden, Tensor weight, Tensor prefix_lens, MaybeTensor bias,
                      MaybeTensor accept_lens, MaybeTensor commit_lens, MaybeTensor bonus_ids, MaybeTensor out_tokens,
                      MaybeTensor new_seq_lens, MaybeTensor workspace) {
  check_verify_inputs(candidates, hidden, prefix_lens);
  check_inputs(kVerifyOp, hidden, weight, bias, 0, 0);
  if (!accept_lens || !commit_lens || !bonus_ids || !out_tokens || !new_seq_lens || !workspace) return;
  check_verify_outputs(candidates, hidden, {*accept_lens, *commit_lens, *bonus_ids, *out_tokens, *new_seq_lens});
  check_workspace(kVerifyOp, *workspace, hidden, weight, 0);
}

// ---- over packed weights (dflash_kernels/head_stream.py) -----------------------------------------------------------

constexpr const char* kPackedOp = "lm_head_argmax_packed";

struct PackedHead {
  Tensor weights;
  std::string format;
  Tensor units, counters;
  int64_t slots, vocab;
  MaybeTensor bias, token_ids;
};

void check_packed_inputs(const Tensor& hidden, const PackedHead& head, int64_t vocab_start) {
  api::check_shape(kPackedOp, "hidden", hidden, {-1, -1});
  api::check_dtype(kPackedOp, "hidden", hidden, {ScalarType::BFloat16});
  api::check_last_dim_contiguous(kPackedOp, "hidden", hidden);
  const int64_t rows = hidden.size(0), width = hidden.size(1);
  DFLASH_CHECK(kPackedOp, rows <= stream::kMaxTokens, "hidden.size(0)", "be at most 64", rows);
  DFLASH_CHECK(kPackedOp, width >= 8 && width % 8 == 0, "hidden.size(1)", "be a multiple of 8", width);
  DFLASH_CHECK(kPackedOp, hidden.is_cpu() || rows <= 1 || hidden.stride(0) % 8 == 0, "hidden",
               "have a row stride that is a multiple of 8 elements", hidden.stride(0));
  if (rows > 0) api::check_aligned_16(kPackedOp, "hidden", hidden);
  DFLASH_CHECK(kPackedOp, head.vocab >= 1 && head.vocab <= (int64_t{1} << 22), "vocab_size", "be in 1..2**22",
               head.vocab);
  const stream::WeightFormat format = api::weight_format(kPackedOp, head.format);
  api::check_packed(kPackedOp, head.weights, format, api::num_tiles(format, head.vocab, width), head.units,
                    head.counters, head.slots, hidden);
  const std::pair<const char*, const MaybeTensor*> rest[] = {{"bias", &head.bias}, {"token_ids", &head.token_ids}};
  for (const auto& [name, tensor] : rest) {
    if (!*tensor) continue;
    api::check_shape(kPackedOp, name, **tensor, {head.vocab});
    api::check_same_device(kPackedOp, name, **tensor, hidden);
    api::check_contiguous(kPackedOp, name, **tensor);
  }
  if (head.bias) api::check_dtype(kPackedOp, "bias", *head.bias, {ScalarType::BFloat16});
  if (head.token_ids) api::check_dtype(kPackedOp, "token_ids", *head.token_ids, {ScalarType::Long});
  DFLASH_CHECK(kPackedOp, vocab_start >= 0, "vocab_start", "be at least 0", vocab_start);
}

// Keys of all blocks.
int64_t packed_workspace_bytes(int64_t blocks) { return stream::kMaxTokens * blocks * 8; }

int64_t packed_workspace(int64_t blocks) {
  DFLASH_CHECK("lm_head_argmax_packed_workspace", blocks >= 1, "blocks", "be at least 1", blocks);
  return packed_workspace_bytes(blocks);
}

void check_packed_outputs(const Tensor& hidden, const PackedHead& head, const Tensor& ids, const Tensor& values,
                          const Tensor& workspace) {
  const std::pair<const char*, const Tensor*> outputs[] = {{"ids", &ids}, {"values", &values}};
  for (const auto& [name, tensor] : outputs) api::check_shape(kPackedOp, name, *tensor, {hidden.size(0)});
  check_output(kPackedOp, "ids", ids, hidden, ScalarType::Long);
  check_output(kPackedOp, "values", values, hidden, ScalarType::Float);
  check_output(kPackedOp, "workspace", workspace, hidden, ScalarType::Byte);
  const int64_t needed = packed_workspace_bytes(head.units.size(0));
  DFLASH_CHECK(kPackedOp, workspace.numel() >= needed, "workspace",
               "hold at least " + std::to_string(needed) + " bytes", workspace.numel());
  api::check_aligned_16(kPackedOp, "workspace", workspace);
}

#define DFLASH_PACKED_HEAD_PARAMETERS                                                                     \
  Tensor hidden, Tensor weights, std::string weight_format, Tensor units, Tensor counters, int64_t slots, \
      int64_t vocab_size, MaybeTensor bias, MaybeTensor token_ids, int64_t vocab_start
#define DFLASH_PACKED_HEAD \
  PackedHead { weights, weight_format, units, counters, slots, vocab_size, bias, token_ids }

void check_packed_cpu(DFLASH_PACKED_HEAD_PARAMETERS, MaybeTensor ids, MaybeTensor values, MaybeTensor workspace) {
  const PackedHead head = DFLASH_PACKED_HEAD;
  check_packed_inputs(hidden, head, vocab_start);
  if (ids && values && workspace) check_packed_outputs(hidden, head, *ids, *values, *workspace);
}

#if DFLASH_WITH_CUDA
void packed_out_cuda(DFLASH_PACKED_HEAD_PARAMETERS, Tensor ids, Tensor values, Tensor workspace) {
  const PackedHead head = DFLASH_PACKED_HEAD;
  check_packed_inputs(hidden, head, vocab_start);
  check_packed_outputs(hidden, head, ids, values, workspace);
  if (hidden.size(0) == 0) return;
  StreamHeadParams p;
  auto* scratch = static_cast<uint8_t*>(workspace.data_ptr());
  p.stream.weights = static_cast<const uint8_t*>(weights.data_ptr());
  p.stream.units = static_cast<const stream::Unit*>(units.data_ptr());
  p.stream.blocks = static_cast<int>(units.size(0));
  p.stream.max_units = static_cast<int>(units.size(1));
  p.stream.counters = static_cast<uint32_t*>(counters.data_ptr());
  p.stream.partials = api::packed_partials(counters, slots);
  p.hidden = static_cast<const uint16_t*>(hidden.data_ptr());
  p.hidden_stride = hidden.stride(0);
  p.rows = static_cast<int>(hidden.size(0));
  p.hidden_size = static_cast<int>(hidden.size(1));
  p.vocab = static_cast<int>(vocab_size);
  if (bias) p.bias = static_cast<const uint16_t*>(bias->data_ptr());
  if (token_ids) p.token_ids = static_cast<const int64_t*>(token_ids->data_ptr());
  p.vocab_start = vocab_start;
  p.best = reinterpret_cast<unsigned long long*>(scratch);
  p.ids = static_cast<int64_t*>(ids.data_ptr());
  p.values = static_cast<float*>(values.data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  launch_stream_argmax(p, api::weight_format(kPackedOp, weight_format), api::current_stream(kPackedOp, hidden));
}

std::tuple<Tensor, Tensor> packed_cuda(DFLASH_PACKED_HEAD_PARAMETERS) {
  check_packed_inputs(hidden, DFLASH_PACKED_HEAD, vocab_start);
  const std::vector<int64_t> shape{hidden.size(0)};
  const Tensor ids = api::new_empty(hidden, shape, ScalarType::Long);
  const Tensor values = api::new_empty(hidden, shape, ScalarType::Float);
  const Tensor workspace = api::new_empty(hidden, {packed_workspace_bytes(units.size(0))}, ScalarType::Byte);
  packed_out_cuda(hidden, weights, weight_format, units, counters, slots, vocab_size, bias, token_ids, vocab_start, ids,
                  values, workspace);
  return {ids, values};
}
#endif

#undef DFLASH_PACKED_HEAD
#undef DFLASH_PACKED_HEAD_PARAMETERS

// ---- over weights as they are --------------------------------------------------------------------------------------

#if DFLASH_WITH_CUDA
void check_aligned(const char* op, const char* name, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  DFLASH_CHECK(op, address % 16 == 0, name, "be aligned to 16 bytes",
               "an address " + std::to_string(address % 16) + " bytes off");
}

HeadParams head_params(const char* op, const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias, int64_t k,
                       int64_t vocab_start, const Tensor& workspace) {
  HeadParams p;
  p.gemm.m = hidden.size(0);
  p.gemm.n = weight.size(0);
  p.gemm.k = hidden.size(1);
  DFLASH_CHECK(op, p.gemm.k % 8 == 0, "hidden.size(1)", "be a multiple of 8 on CUDA", p.gemm.k);
  DFLASH_CHECK(op, p.gemm.m <= 1 || hidden.stride(0) % 8 == 0, "hidden",
               "have a row stride that is a multiple of 8 elements", hidden.stride(0));
  if (p.gemm.m > 0) check_aligned(op, "hidden", hidden);
  check_aligned(op, "weight", weight);
  p.gemm.a[0] = static_cast<const uint16_t*>(hidden.data_ptr());
  p.gemm.a_stride[0] = hidden.stride(0);
  p.gemm.w = static_cast<const uint16_t*>(weight.data_ptr());
  if (bias) p.gemm.bias = static_cast<const uint16_t*>(bias->data_ptr());
  p.vocab_start = vocab_start;
  p.k = static_cast<int>(k);
  p.workspace = static_cast<unsigned long long*>(workspace.data_ptr());
  return p;
}

// k = 0: argmax.
void head_out_cuda(const char* op, const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias, int64_t k,
                   int64_t vocab_start, const Tensor& ids, const Tensor& values, const Tensor& workspace) {
  check_outputs(op, hidden, weight, k, ids, values, workspace);
  HeadParams p = head_params(op, hidden, weight, bias, k, vocab_start, workspace);
  p.ids = static_cast<int64_t*>(ids.data_ptr());
  p.values = static_cast<float*>(values.data_ptr());
  if (p.gemm.m == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  const cudaStream_t stream = api::current_stream(op, hidden);
  k == 0 ? launch_argmax(p, stream) : launch_topk(p, stream);
}

void argmax_out_cuda(Tensor hidden, Tensor weight, MaybeTensor bias, int64_t vocab_start, Tensor ids, Tensor values,
                     Tensor workspace) {
  check_inputs("lm_head_argmax", hidden, weight, bias, 0, vocab_start);
  head_out_cuda("lm_head_argmax", hidden, weight, bias, 0, vocab_start, ids, values, workspace);
}

void topk_out_cuda(Tensor hidden, Tensor weight, int64_t k, MaybeTensor bias, int64_t vocab_start, Tensor ids,
                   Tensor values, Tensor workspace) {
  check_inputs("lm_head_topk", hidden, weight, bias, k, vocab_start);
  head_out_cuda("lm_head_topk", hidden, weight, bias, k, vocab_start, ids, values, workspace);
}

std::tuple<Tensor, Tensor> argmax_cuda(Tensor hidden, Tensor weight, MaybeTensor bias, int64_t vocab_start) {
  check_inputs("lm_head_argmax", hidden, weight, bias, 0, vocab_start);
  const std::vector<int64_t> shape{hidden.size(0)};
  const Tensor ids = api::new_empty(hidden, shape, ScalarType::Long);
  const Tensor values = api::new_empty(hidden, shape, ScalarType::Float);
  const Tensor workspace = torch::stable::new_zeros(hidden, {workspace_size(hidden, weight, 0)}, ScalarType::Long);
  argmax_out_cuda(hidden, weight, bias, vocab_start, ids, values, workspace);
  return {ids, values};
}

std::tuple<Tensor, Tensor> topk_cuda(Tensor hidden, Tensor weight, int64_t k, MaybeTensor bias, int64_t vocab_start) {
  check_inputs("lm_head_topk", hidden, weight, bias, k, vocab_start);
  const std::vector<int64_t> shape{hidden.size(0), k};
  const Tensor ids = api::new_empty(hidden, shape, ScalarType::Long);
  const Tensor values = api::new_empty(hidden, shape, ScalarType::Float);
  const Tensor workspace = api::new_empty(hidden, {workspace_size(hidden, weight, k)}, ScalarType::Long);
  topk_out_cuda(hidden, weight, k, bias, vocab_start, ids, values, workspace);
  return {ids, values};
}

void verify_out_cuda(Tensor candidates, Tensor hidden, Tensor weight, Tensor prefix_lens, MaybeTensor bias,
                     Tensor accept_lens, Tensor commit_lens, Tensor bonus_ids, Tensor out_tokens, Tensor new_seq_lens,
                     Tensor workspace) {
  check_verify_inputs(candidates, hidden, prefix_lens);
  check_inputs(kVerifyOp, hidden, weight, bias, 0, 0);
  check_verify_outputs(candidates, hidden, {accept_lens, commit_lens, bonus_ids, out_tokens, new_seq_lens});
  check_workspace(kVerifyOp, workspace, hidden, weight, 0);
  HeadParams p = head_params(kVerifyOp, hidden, weight, bias, 0, 0, workspace);
  p.verify.batch = candidates.size(0);
  p.verify.block_size = static_cast<int>(candidates.size(1));
  p.verify.candidates = api::int_view(candidates);
  p.verify.prefix_lens = api::int_view(prefix_lens);
  p.verify.accept_lens = static_cast<int32_t*>(accept_lens.data_ptr());
  p.verify.commit_lens = static_cast<int32_t*>(commit_lens.data_ptr());
  p.verify.bonus_ids = static_cast<int64_t*>(bonus_ids.data_ptr());
  p.verify.out_tokens = static_cast<int64_t*>(out_tokens.data_ptr());
  p.verify.new_seq_lens = static_cast<int64_t*>(new_seq_lens.data_ptr());
  if (p.gemm.m == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  launch_argmax(p, api::current_stream(kVerifyOp, hidden));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> verify_cuda(Tensor candidates, Tensor hidden, Tensor weight,
                                                               Tensor prefix_lens, MaybeTensor bias) {
  check_verify_inputs(candidates, hidden, prefix_lens);
  check_inputs(kVerifyOp, hidden, weight, bias, 0, 0);
  const int64_t batch = candidates.size(0);
  const VerifyTensors out{api::new_empty(hidden, {batch}, ScalarType::Int),
                          api::new_empty(hidden, {batch}, ScalarType::Int),
                          api::new_empty(hidden, {batch}, ScalarType::Long),
                          api::new_empty(hidden, {batch, candidates.size(1)}, ScalarType::Long),
                          api::new_empty(hidden, {batch}, ScalarType::Long)};
  const Tensor workspace = torch::stable::new_zeros(hidden, {workspace_size(hidden, weight, 0)}, ScalarType::Long);
  verify_out_cuda(candidates, hidden, weight, prefix_lens, bias, out.accept_lens, out.commit_lens, out.bonus_ids,
                  out.out_tokens, out.new_seq_lens, workspace);
  return {out.accept_lens, out.commit_lens, out.bonus_ids, out.out_tokens, out.new_seq_lens};
}
#endif

}  // namespace
}  // namespace dflash::head

#define DFLASH_PACKED_HEAD_SCHEMA                                                                    \
  "Tensor hidden, Tensor weights, str weight_format, Tensor units, Tensor(d!) counters, int slots, " \
  "int vocab_size, Tensor? bias=None, Tensor? token_ids=None, int vocab_start=0"

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def("lm_head_argmax_packed(" DFLASH_PACKED_HEAD_SCHEMA ") -> (Tensor ids, Tensor values)");
  m.def("lm_head_argmax_packed.out(" DFLASH_PACKED_HEAD_SCHEMA
        ", *, Tensor(a!) ids, Tensor(b!) values, Tensor(c!) workspace) -> ()");
  m.def("_lm_head_argmax_packed_check(" DFLASH_PACKED_HEAD_SCHEMA
        ", *, Tensor? ids=None, Tensor? values=None, Tensor? workspace=None) -> ()");
  m.def("lm_head_argmax_packed_workspace(int blocks) -> int");
  m.def(
      "lm_head_argmax(Tensor hidden, Tensor weight, Tensor? bias=None, int vocab_start=0) "
      "-> (Tensor ids, Tensor values)");
  m.def(
      "lm_head_argmax.out(Tensor hidden, Tensor weight, Tensor? bias=None, int vocab_start=0, *, Tensor(a!) ids, "
      "Tensor(b!) values, Tensor(c!) workspace) -> ()");
  m.def(
      "lm_head_topk(Tensor hidden, Tensor weight, int k, Tensor? bias=None, int vocab_start=0) "
      "-> (Tensor ids, Tensor values)");
  m.def(
      "lm_head_topk.out(Tensor hidden, Tensor weight, int k, Tensor? bias=None, int vocab_start=0, *, "
      "Tensor(a!) ids, Tensor(b!) values, Tensor(c!) workspace) -> ()");
  m.def(
      "verify_block_from_hidden(Tensor candidates, Tensor hidden, Tensor weight, Tensor prefix_lens, "
      "Tensor? bias=None) -> (Tensor accept_lens, Tensor commit_lens, Tensor bonus_ids, Tensor out_tokens, "
      "Tensor new_seq_lens)");
  m.def(
      "verify_block_from_hidden.out(Tensor candidates, Tensor hidden, Tensor weight, Tensor prefix_lens, "
      "Tensor? bias=None, *, Tensor(a!) accept_lens, Tensor(b!) commit_lens, Tensor(c!) bonus_ids, "
      "Tensor(d!) out_tokens, Tensor(e!) new_seq_lens, Tensor(f!) workspace) -> ()");
  m.def(
      "_lm_head_check(str op, Tensor hidden, Tensor weight, Tensor? bias, int k, int vocab_start, Tensor? ids, "
      "Tensor? values, Tensor? workspace) -> ()");
  m.def(
      "_verify_block_from_hidden_check(Tensor candidates, Tensor hidden, Tensor weight, Tensor prefix_lens, "
      "Tensor? bias, Tensor? accept_lens, Tensor? commit_lens, Tensor? bonus_ids, Tensor? out_tokens, "
      "Tensor? new_seq_lens, Tensor? workspace) -> ()");
}

#undef DFLASH_PACKED_HEAD_SCHEMA

STABLE_TORCH_LIBRARY_IMPL(dflash, CompositeExplicitAutograd, m) {
  m.impl("lm_head_argmax_packed_workspace", TORCH_BOX(&dflash::head::packed_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) {
  m.impl("_lm_head_argmax_packed_check", TORCH_BOX(&dflash::head::check_packed_cpu));
  m.impl("_lm_head_check", TORCH_BOX(&dflash::head::check_cpu));
  m.impl("_verify_block_from_hidden_check", TORCH_BOX(&dflash::head::check_verify_cpu));
}

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("lm_head_argmax_packed", TORCH_BOX(&dflash::head::packed_cuda));
  m.impl("lm_head_argmax_packed.out", TORCH_BOX(&dflash::head::packed_out_cuda));
  m.impl("lm_head_argmax", TORCH_BOX(&dflash::head::argmax_cuda));
  m.impl("lm_head_argmax.out", TORCH_BOX(&dflash::head::argmax_out_cuda));
  m.impl("lm_head_topk", TORCH_BOX(&dflash::head::topk_cuda));
  m.impl("lm_head_topk.out", TORCH_BOX(&dflash::head::topk_out_cuda));
  m.impl("verify_block_from_hidden", TORCH_BOX(&dflash::head::verify_cuda));
  m.impl("verify_block_from_hidden.out", TORCH_BOX(&dflash::head::verify_out_cuda));
}
#endif

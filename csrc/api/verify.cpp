// verify_block, verify_block_sampled, argmax_logits, merge_vocab_shards: schemas, checks, dispatch.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "api/check.h"
#include "api/cuda_stream.h"
#include "api/peers.h"
#include "cpu/verify.h"
#if DFLASH_WITH_CUDA
#include "smxx/verify/launch.h"
#endif

namespace dflash::verify {
namespace {

using api::ScalarType;
using api::Tensor;
using OptionalTensor = std::optional<Tensor>;
using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Named = std::pair<const char*, const Tensor*>;

bool is_index(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Sizes and dtype of logits were checked by the caller, except for the float types allowed here.
Logits logits_view(const char* op, const char* name, const Tensor& logits) {
  api::check_dtype(op, name, logits, {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float});
  api::check_last_dim_contiguous(op, name, logits);
  const int64_t columns = logits.size(logits.dim() - 1);
  DFLASH_CHECK(op, columns >= 1 && columns < (int64_t{1} << 31), name, "have 1 to 2^31 - 1 columns", columns);
  Logits view;
  view.data = logits.data_ptr();
  view.stride_request = logits.stride(0);
  view.stride_row = logits.dim() == 3 ? logits.stride(1) : 0;
  view.type = logits.scalar_type() == ScalarType::BFloat16 ? LogitType::kBFloat16
              : logits.scalar_type() == ScalarType::Half   ? LogitType::kFloat16
                                                           : LogitType::kFloat32;
  return view;
}

// Only views that repeat their rows can be as large as this.
void check_rows(const char* op, const char* name, int64_t rows, int64_t columns) {
  const int64_t limit = kMaxTiles / ((columns - 1) / kTileElements + 1);
  DFLASH_CHECK(op, rows <= limit, name, "have at most " + std::to_string(limit) + " rows of its size", rows);
}

// B and T of [B, T] candidates.
std::pair<int64_t, int> block_sizes(const char* op, const Tensor& candidates) {
  api::check_shape(op, "candidates", candidates, {-1, -1});
  const int64_t block_size = candidates.size(1);
  DFLASH_CHECK(op, block_size >= 1 && block_size <= kMaxBlockSize, "candidates",
               "have 1 to " + std::to_string(kMaxBlockSize) + " columns", block_size);
  return {candidates.size(0), static_cast<int>(block_size)};
}

Outputs outputs(const char* op, const Tensor& candidates, const FiveTensors& out) {
  const auto& [accept_lens, commit_lens, bonus_ids, out_tokens, new_seq_lens] = out;
  const int64_t batch = candidates.size(0);
  const Named ints[] = {{"accept_lens", &accept_lens}, {"commit_lens", &commit_lens}};
  const Named longs[] = {{"bonus_ids", &bonus_ids}, {"new_seq_lens", &new_seq_lens}};
  for (const auto& [name, tensor] : ints) api::check_dtype(op, name, *tensor, {ScalarType::Int});
  for (const auto& [name, tensor] : longs) api::check_dtype(op, name, *tensor, {ScalarType::Long});
  api::check_dtype(op, "out_tokens", out_tokens, {ScalarType::Long});
  for (const auto& [name, tensor] : ints) api::check_shape(op, name, *tensor, {batch});
  for (const auto& [name, tensor] : longs) api::check_shape(op, name, *tensor, {batch});
  api::check_shape(op, "out_tokens", out_tokens, {batch, candidates.size(1)});
  const Named all[] = {ints[0], ints[1], longs[0], longs[1], {"out_tokens", &out_tokens}};
  for (const auto& [name, tensor] : all) {
    api::check_same_device(op, name, *tensor, candidates);
    api::check_contiguous(op, name, *tensor);
  }
  return Outputs{data<int32_t>(accept_lens), data<int32_t>(commit_lens), data<int64_t>(bonus_ids),
                 data<int64_t>(out_tokens), data<int64_t>(new_seq_lens)};
}

FiveTensors new_outputs(const Tensor& candidates, int64_t batch, int64_t block_size) {
  return {api::new_empty(candidates, {batch}, ScalarType::Int), api::new_empty(candidates, {batch}, ScalarType::Int),
          api::new_empty(candidates, {batch}, ScalarType::Long),
          api::new_empty(candidates, {batch, block_size}, ScalarType::Long),
          api::new_empty(candidates, {batch}, ScalarType::Long)};
}

Tensor new_workspace(const Tensor& like, int64_t words) {
  return torch::stable::new_zeros(like, std::vector<int64_t>{words}, ScalarType::Long);
}

void check_workspace(const char* op, const Tensor& workspace, const Tensor& first, int64_t words) {
  api::check_dtype(op, "workspace", workspace, {ScalarType::Long});
  api::check_same_device(op, "workspace", workspace, first);
  api::check_shape(op, "workspace", workspace, {-1});
  api::check_contiguous(op, "workspace", workspace);
  DFLASH_CHECK(op, workspace.size(0) >= words, "workspace", "have at least " + std::to_string(words) + " elements",
               workspace.size(0));
}

Workspace workspace_view(const char* op, const Tensor& workspace, const Tensor& first, int64_t batch, int block_size) {
  check_workspace(op, workspace, first, Workspace::size(batch, block_size));
  return Workspace{data<uint64_t>(workspace), batch, block_size};
}

SampledWorkspace sampled_workspace_view(const char* op, const Tensor& workspace, const Tensor& first, int64_t batch,
                                        int block_size, int64_t vocab_size) {
  const int64_t scratch = SampledWorkspace::scratch_size(batch, block_size);
  const int64_t words = SampledWorkspace::front_size(batch, block_size, vocab_size) + scratch;
  check_workspace(op, workspace, first, words);
  SampledWorkspace view;
  view.words = data<uint64_t>(workspace);
  view.batch = batch;
  view.block_size = block_size;
  view.row_keys = SampledWorkspace::keys_of_row(vocab_size);
  const auto keys = reinterpret_cast<uintptr_t>(view.words + SampledWorkspace::front_words(batch, block_size));
  view.keys = reinterpret_cast<uint32_t*>((keys + 15) / 16 * 16);
  const auto begin = reinterpret_cast<uintptr_t>(view.words + workspace.size(0) - (scratch - 1));
  view.scratch = reinterpret_cast<uint64_t*>(begin / 16 * 16);
  return view;
}

// ---- verify_block ----------------------------------------------------------------------------------------------

constexpr const char* kBlock = "verify_block";

BlockParams block_params(const Tensor& candidates, const Tensor& target, const Tensor& prefix_lens, int64_t lazy,
                         const FiveTensors& out, const Tensor& workspace) {
  BlockParams p;
  std::tie(p.batch, p.block_size) = block_sizes(kBlock, candidates);
  api::check_index_dtype(kBlock, "candidates", candidates);
  api::check_same_device(kBlock, "target", target, candidates);
  if (is_index(target)) {
    api::check_shape(kBlock, "target", target, {p.batch, p.block_size});
    p.target_ids = api::int_view(target);
  } else {
    api::check_shape(kBlock, "target", target, {p.batch, p.block_size, -1});
    p.logits = logits_view(kBlock, "target", target);
    p.vocab_size = static_cast<int>(target.size(2));
    check_rows(kBlock, "target", p.batch * p.block_size, p.vocab_size);
    p.workspace = workspace_view(kBlock, workspace, candidates, p.batch, p.block_size);
  }
  api::check_shape(kBlock, "prefix_lens", prefix_lens, {p.batch});
  api::check_index_dtype(kBlock, "prefix_lens", prefix_lens);
  api::check_same_device(kBlock, "prefix_lens", prefix_lens, candidates);
  DFLASH_CHECK(kBlock, lazy >= -1 && lazy <= 1, "lazy", "be -1, 0 or 1", lazy);
  p.lazy = static_cast<Lazy>(lazy);
  p.candidates = api::int_view(candidates);
  p.prefix_lens = api::int_view(prefix_lens);
  p.out = outputs(kBlock, candidates, out);
  return p;
}

void verify_block_out_cpu(Tensor candidates, Tensor target, Tensor prefix_lens, int64_t lazy, Tensor accept_lens,
                          Tensor commit_lens, Tensor bonus_ids, Tensor out_tokens, Tensor new_seq_lens,
                          Tensor workspace) {
  verify_block_cpu(block_params(candidates, target, prefix_lens, lazy,
                                {accept_lens, commit_lens, bonus_ids, out_tokens, new_seq_lens}, workspace));
}

#if DFLASH_WITH_CUDA
void verify_block_out_cuda(Tensor candidates, Tensor target, Tensor prefix_lens, int64_t lazy, Tensor accept_lens,
                           Tensor commit_lens, Tensor bonus_ids, Tensor out_tokens, Tensor new_seq_lens,
                           Tensor workspace) {
  const BlockParams p = block_params(candidates, target, prefix_lens, lazy,
                                     {accept_lens, commit_lens, bonus_ids, out_tokens, new_seq_lens}, workspace);
  if (p.batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(candidates.get_device_index());
  launch_verify_block(p, api::current_stream(kBlock, candidates));
}
#endif

template <auto kOut>
FiveTensors verify_block(Tensor candidates, Tensor target, Tensor prefix_lens, int64_t lazy) {
  const auto [batch, block_size] = block_sizes(kBlock, candidates);
  const FiveTensors out = new_outputs(candidates, batch, block_size);
  const Tensor workspace = new_workspace(candidates, is_index(target) ? 0 : Workspace::size(batch, block_size));
  const auto& [accept_lens, commit_lens, bonus_ids, out_tokens, new_seq_lens] = out;
  kOut(candidates, target, prefix_lens, lazy, accept_lens, commit_lens, bonus_ids, out_tokens, new_seq_lens, workspace);
  return out;
}

// ---- verify_block_sampled --------------------------------------------------------------------------------------

constexpr const char* kSampled = "verify_block_sampled";

// The inputs of verify_block_sampled, as they come from the dispatcher.
struct SampledInputs {
  Tensor candidates, logits, prefix_lens, temperature, top_k, top_p, min_p, seeds, offsets;
  OptionalTensor draft_ids, draft_probs, token_bitmask, logit_bias;
  std::string rule;
};

SampledParams sampled_params(const SampledInputs& in, const FiveTensors& out, const Tensor& workspace) {
  SampledParams p;
  std::tie(p.batch, p.block_size) = block_sizes(kSampled, in.candidates);
  const int64_t drafts = p.block_size - 1;
  api::check_index_dtype(kSampled, "candidates", in.candidates);
  api::check_same_device(kSampled, "logits", in.logits, in.candidates);
  api::check_shape(kSampled, "logits", in.logits, {p.batch, p.block_size, -1});
  p.logits = logits_view(kSampled, "logits", in.logits);
  p.vocab_size = static_cast<int>(in.logits.size(2));

  const Named vectors[] = {{"prefix_lens", &in.prefix_lens},
                           {"temperature", &in.temperature},
                           {"top_k", &in.top_k},
                           {"top_p", &in.top_p},
                           {"min_p", &in.min_p},
                           {"seeds", &in.seeds},
                           {"offsets", &in.offsets}};
  for (const auto& [name, tensor] : vectors) {
    api::check_shape(kSampled, name, *tensor, {p.batch});
    api::check_same_device(kSampled, name, *tensor, in.candidates);
  }
  for (const auto& [name, tensor] : {vectors[0], vectors[2]}) api::check_index_dtype(kSampled, name, *tensor);
  for (const auto& [name, tensor] : {vectors[1], vectors[3], vectors[4]}) {
    api::check_dtype(kSampled, name, *tensor, {ScalarType::Float});
    api::check_contiguous(kSampled, name, *tensor);
  }
  for (const auto& [name, tensor] : {vectors[5], vectors[6]}) {
    api::check_dtype(kSampled, name, *tensor, {ScalarType::Long});
    api::check_contiguous(kSampled, name, *tensor);
  }
  p.candidates = api::int_view(in.candidates);
  p.prefix_lens = api::int_view(in.prefix_lens);
  p.temperature = data<float>(in.temperature);
  p.top_k = api::int_view(in.top_k);
  p.top_p = data<float>(in.top_p);
  p.min_p = data<float>(in.min_p);
  p.seeds = data<int64_t>(in.seeds);
  p.offsets = data<int64_t>(in.offsets);

  DFLASH_CHECK(kSampled, in.draft_ids.has_value() == in.draft_probs.has_value(), "draft_ids and draft_probs",
               "be given together", in.draft_ids.has_value() ? "draft_ids only" : "draft_probs only");
  if (in.draft_ids.has_value()) {
    const Tensor &ids = *in.draft_ids, &probs = *in.draft_probs;
    api::check_shape(kSampled, "draft_ids", ids, {p.batch, drafts, -1});
    api::check_shape(kSampled, "draft_probs", probs, {p.batch, drafts, ids.size(2)});
    api::check_index_dtype(kSampled, "draft_ids", ids);
    api::check_dtype(kSampled, "draft_probs", probs, {ScalarType::Float});
    for (const auto& [name, tensor] : {Named{"draft_ids", &ids}, Named{"draft_probs", &probs}}) {
      api::check_same_device(kSampled, name, *tensor, in.candidates);
      api::check_contiguous(kSampled, name, *tensor);
    }
    DFLASH_CHECK(kSampled, ids.size(2) >= 1 && ids.size(2) < (int64_t{1} << 31), "draft_ids", "have at least 1 column",
                 ids.size(2));
    p.draft_width = static_cast<int>(ids.size(2));
    p.draft_ids = api::int_view(ids);
    p.draft_ids.stride0 = ids.size(2);
    p.draft_ids.stride1 = 1;
    p.draft_probs = data<float>(probs);
  }
  if (in.token_bitmask.has_value()) {
    const Tensor& mask = *in.token_bitmask;
    api::check_shape(kSampled, "token_bitmask", mask, {p.batch, p.block_size, (p.vocab_size + int64_t{31}) / 32});
    api::check_dtype(kSampled, "token_bitmask", mask, {ScalarType::Int});
    api::check_same_device(kSampled, "token_bitmask", mask, in.candidates);
    api::check_contiguous(kSampled, "token_bitmask", mask);
    p.token_bitmask = data<int32_t>(mask);
  }
  if (in.logit_bias.has_value()) {
    const Tensor& bias = *in.logit_bias;
    api::check_shape(kSampled, "logit_bias", bias, {p.batch, p.vocab_size});
    api::check_dtype(kSampled, "logit_bias", bias, {ScalarType::Float});
    api::check_same_device(kSampled, "logit_bias", bias, in.candidates);
    api::check_contiguous(kSampled, "logit_bias", bias);
    p.logit_bias = data<float>(bias);
  }
  DFLASH_CHECK(kSampled, in.rule == "token" || in.rule == "block", "rule", "be \"token\" or \"block\"",
               "\"" + in.rule + "\"");
  p.block_rule = in.rule == "block";
  p.workspace = sampled_workspace_view(kSampled, workspace, in.candidates, p.batch, p.block_size, p.vocab_size);
  p.out = outputs(kSampled, in.candidates, out);
  return p;
}

void raise_fault(const SampledFault& found) {
  const char *argument = nullptr, *expected = nullptr, *got = "another value";
  switch (found.fault) {
    case Fault::kNone:
      return;
    case Fault::kTemperature:
      argument = "temperature", expected = "be at least 0", got = "less or NaN";
      break;
    case Fault::kTopP:
      argument = "top_p", expected = "be in [0, 1]";
      break;
    case Fault::kMinP:
      argument = "min_p", expected = "be in [0, 1]";
      break;
    case Fault::kCandidate:
      argument = "candidates", expected = "hold draft tokens in [0, V)";
      break;
    case Fault::kDraftProb:
      argument = "draft_probs", expected = "be finite and at least 0";
      break;
    case Fault::kDraftId:
      argument = "draft_ids", expected = "be in [0, V) where draft_probs > 0";
      break;
    case Fault::kDraftDuplicate:
      argument = "draft_ids", expected = "be distinct in a row where draft_probs > 0", got = "one id twice";
      break;
  }
  api::fail(kSampled, argument, " must ", expected, ", got ", got, " in request ", found.request);
}

void sampled_cpu(const SampledInputs& in, const FiveTensors& out, const Tensor& workspace) {
  const SampledParams p = sampled_params(in, out, workspace);
  raise_fault(check_sampled_cpu(p));
  verify_block_sampled_cpu(p);
}

#if DFLASH_WITH_CUDA
void sampled_cuda(const SampledInputs& in, const FiveTensors& out, const Tensor& workspace) {
  const SampledParams p = sampled_params(in, out, workspace);
  DFLASH_CHECK(kSampled, p.vocab_size <= kMaxSampledVocab, "logits",
               "have at most " + std::to_string(kMaxSampledVocab) + " columns", p.vocab_size);
  if (p.batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(in.candidates.get_device_index());
  const cudaStream_t stream = api::current_stream(kSampled, in.candidates);
  if (api::checks_values(kSampled, stream)) raise_fault(check_sampled_cuda(p, stream));
  launch_verify_block_sampled(p, stream);
}
#endif

template <auto kRun>
void verify_block_sampled_out(Tensor candidates, Tensor logits, Tensor prefix_lens, Tensor temperature, Tensor top_k,
                              Tensor top_p, Tensor min_p, Tensor seeds, Tensor offsets, OptionalTensor draft_ids,
                              OptionalTensor draft_probs, OptionalTensor token_bitmask, OptionalTensor logit_bias,
                              std::string rule, Tensor accept_lens, Tensor commit_lens, Tensor bonus_ids,
                              Tensor out_tokens, Tensor new_seq_lens, Tensor workspace) {
  kRun({candidates, logits, prefix_lens, temperature, top_k, top_p, min_p, seeds, offsets, draft_ids, draft_probs,
        token_bitmask, logit_bias, rule},
       {accept_lens, commit_lens, bonus_ids, out_tokens, new_seq_lens}, workspace);
}

template <auto kRun>
FiveTensors verify_block_sampled(Tensor candidates, Tensor logits, Tensor prefix_lens, Tensor temperature, Tensor top_k,
                                 Tensor top_p, Tensor min_p, Tensor seeds, Tensor offsets, OptionalTensor draft_ids,
                                 OptionalTensor draft_probs, OptionalTensor token_bitmask, OptionalTensor logit_bias,
                                 std::string rule) {
  const auto [batch, block_size] = block_sizes(kSampled, candidates);
  api::check_shape(kSampled, "logits", logits, {batch, block_size, -1});
  const FiveTensors out = new_outputs(candidates, batch, block_size);
  const int64_t words = SampledWorkspace::front_size(batch, block_size, logits.size(2)) +
                        SampledWorkspace::scratch_size(batch, block_size);
  kRun({candidates, logits, prefix_lens, temperature, top_k, top_p, min_p, seeds, offsets, draft_ids, draft_probs,
        token_bitmask, logit_bias, rule},
       out, new_workspace(candidates, words));
  return out;
}

// ---- vocabulary shards -----------------------------------------------------------------------------------------

constexpr const char* kArgmax = "argmax_logits";
constexpr const char* kMerge = "merge_vocab_shards";

void check_best(const char* op, const Tensor& like, int64_t rows, const Tensor& ids, const Tensor& values) {
  for (const auto& [name, tensor] : {Named{"out_ids", &ids}, Named{"out_values", &values}}) {
    api::check_shape(op, name, *tensor, {rows});
    api::check_same_device(op, name, *tensor, like);
    api::check_contiguous(op, name, *tensor);
  }
  api::check_dtype(op, "out_ids", ids, {ScalarType::Long});
  api::check_dtype(op, "out_values", values, {ScalarType::Float});
}

ArgmaxParams argmax_params(const Tensor& logits, int64_t vocab_start, const Tensor& ids, const Tensor& values,
                           const Tensor& workspace) {
  api::check_shape(kArgmax, "logits", logits, {-1, -1});
  ArgmaxParams p;
  p.rows = logits.size(0);
  p.logits = logits_view(kArgmax, "logits", logits);
  p.vocab_size = static_cast<int>(logits.size(1));
  check_rows(kArgmax, "logits", p.rows, p.vocab_size);
  DFLASH_CHECK(kArgmax, vocab_start >= 0, "vocab_start", "be at least 0", vocab_start);
  p.vocab_start = vocab_start;
  check_best(kArgmax, logits, p.rows, ids, values);
  p.ids = data<int64_t>(ids);
  p.values = data<float>(values);
  p.workspace = workspace_view(kArgmax, workspace, logits, p.rows, 1);
  return p;
}

void argmax_logits_out_cpu(Tensor logits, int64_t vocab_start, Tensor ids, Tensor values, Tensor workspace) {
  argmax_logits_cpu(argmax_params(logits, vocab_start, ids, values, workspace));
}

#if DFLASH_WITH_CUDA
void argmax_logits_out_cuda(Tensor logits, int64_t vocab_start, Tensor ids, Tensor values, Tensor workspace) {
  const ArgmaxParams p = argmax_params(logits, vocab_start, ids, values, workspace);
  if (p.rows == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  launch_argmax_logits(p, api::current_stream(kArgmax, logits));
}
#endif

template <auto kOut>
std::tuple<Tensor, Tensor> argmax_logits(Tensor logits, int64_t vocab_start) {
  api::check_shape(kArgmax, "logits", logits, {-1, -1});
  const Tensor ids = api::new_empty(logits, {logits.size(0)}, ScalarType::Long);
  const Tensor values = api::new_empty(logits, {logits.size(0)}, ScalarType::Float);
  kOut(logits, vocab_start, ids, values, new_workspace(logits, Workspace::size(logits.size(0), 1)));
  return {ids, values};
}

MergeParams merge_params(const Tensor& shard_ids, const Tensor& shard_values, const Tensor& ids, const Tensor& values) {
  api::check_shape(kMerge, "ids", shard_ids, {-1, -1});
  api::check_shape(kMerge, "values", shard_values, {shard_ids.size(0), shard_ids.size(1)});
  api::check_dtype(kMerge, "ids", shard_ids, {ScalarType::Long});
  api::check_dtype(kMerge, "values", shard_values, {ScalarType::Float});
  api::check_same_device(kMerge, "values", shard_values, shard_ids);
  api::check_contiguous(kMerge, "ids", shard_ids);
  api::check_contiguous(kMerge, "values", shard_values);
  DFLASH_CHECK(kMerge, shard_ids.size(0) >= 1, "ids", "have at least 1 shard", shard_ids.size(0));
  check_best(kMerge, shard_ids, shard_ids.size(1), ids, values);
  return MergeParams{shard_ids.size(0),         shard_ids.size(1),  data<int64_t>(shard_ids),
                     data<float>(shard_values), data<int64_t>(ids), data<float>(values)};
}

void merge_out_cpu(Tensor shard_ids, Tensor shard_values, Tensor ids, Tensor values) {
  merge_vocab_shards_cpu(merge_params(shard_ids, shard_values, ids, values));
}

#if DFLASH_WITH_CUDA
void merge_out_cuda(Tensor shard_ids, Tensor shard_values, Tensor ids, Tensor values) {
  const MergeParams p = merge_params(shard_ids, shard_values, ids, values);
  if (p.rows == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(shard_ids.get_device_index());
  launch_merge_vocab_shards(p, api::current_stream(kMerge, shard_ids));
}
#endif

template <auto kOut>
std::tuple<Tensor, Tensor> merge_vocab_shards(Tensor shard_ids, Tensor shard_values) {
  api::check_shape(kMerge, "ids", shard_ids, {-1, -1});
  const Tensor ids = api::new_empty(shard_ids, {shard_ids.size(1)}, ScalarType::Long);
  const Tensor values = api::new_empty(shard_ids, {shard_ids.size(1)}, ScalarType::Float);
  kOut(shard_ids, shard_values, ids, values);
  return {ids, values};
}

constexpr const char* kMergeRanks = "merge_vocab_ranks";

MergeRanksParams merge_ranks_params(const Tensor& ids, const Tensor& values, const api::PeerArguments& peers,
                                    const Tensor& out_ids, const Tensor& out_values) {
  api::check_shape(kMergeRanks, "ids", ids, {-1});
  api::check_shape(kMergeRanks, "values", values, {ids.size(0)});
  api::check_dtype(kMergeRanks, "ids", ids, {ScalarType::Long});
  api::check_dtype(kMergeRanks, "values", values, {ScalarType::Float});
  api::check_same_device(kMergeRanks, "values", values, ids);
  api::check_contiguous(kMergeRanks, "ids", ids);
  api::check_contiguous(kMergeRanks, "values", values);
  DFLASH_CHECK(kMergeRanks, ids.size(0) <= kMostMergedRows, "ids",
               "have at most " + std::to_string(kMostMergedRows) + " elements", ids.size(0));
  check_best(kMergeRanks, ids, ids.size(0), out_ids, out_values);
  api::check_world(kMergeRanks, peers);
  MergeRanksParams p;
  p.peers = api::check_peers(kMergeRanks, peers, merge_exchange_words(static_cast<int>(peers.world())), ids);
  p.rows = static_cast<int>(ids.size(0));
  p.ids = data<int64_t>(ids);
  p.values = data<float>(values);
  p.out_ids = data<int64_t>(out_ids);
  p.out_values = data<float>(out_values);
  return p;
}

// One rank's best are the best. Several would have to run at the same time.
void merge_ranks_out_cpu(Tensor ids, Tensor values, Tensor exchange, std::vector<int64_t> peers, int64_t rank,
                         double patience, Tensor out_ids, Tensor out_values) {
  const MergeRanksParams p = merge_ranks_params(ids, values, {exchange, peers, rank, patience}, out_ids, out_values);
  DFLASH_CHECK(kMergeRanks, p.peers.world == 1, "peers", "be one address on the CPU", p.peers.world);
  std::copy_n(p.ids, p.rows, p.out_ids);
  std::copy_n(p.values, p.rows, p.out_values);
}

#if DFLASH_WITH_CUDA
void merge_ranks_out_cuda(Tensor ids, Tensor values, Tensor exchange, std::vector<int64_t> peers, int64_t rank,
                          double patience, Tensor out_ids, Tensor out_values) {
  const MergeRanksParams p = merge_ranks_params(ids, values, {exchange, peers, rank, patience}, out_ids, out_values);
  if (p.rows == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
  launch_merge_vocab_ranks(p, api::current_stream(kMergeRanks, ids));
}
#endif

template <auto kOut>
std::tuple<Tensor, Tensor> merge_vocab_ranks(Tensor ids, Tensor values, Tensor exchange, std::vector<int64_t> peers,
                                             int64_t rank, double patience) {
  api::check_shape(kMergeRanks, "ids", ids, {-1});
  const Tensor out_ids = api::new_empty(ids, {ids.size(0)}, ScalarType::Long);
  const Tensor out_values = api::new_empty(ids, {ids.size(0)}, ScalarType::Float);
  kOut(ids, values, exchange, peers, rank, patience, out_ids, out_values);
  return {out_ids, out_values};
}

int64_t merge_exchange_size(int64_t world) {
  DFLASH_CHECK("merge_exchange_words", world >= 1 && world <= kMostRanks, "world", "be in 1..8", world);
  return merge_exchange_words(static_cast<int>(world));
}

}  // namespace
}  // namespace dflash::verify

#define DFLASH_MERGE_RANKS_INPUTS \
  "Tensor ids, Tensor values, Tensor(c!) exchange, int[] peers, int rank, float patience"
#define DFLASH_VERIFY_RETURNS \
  "(Tensor accept_lens, Tensor commit_lens, Tensor bonus_ids, Tensor out_tokens, Tensor new_seq_lens)"
#define DFLASH_VERIFY_OUTS                                                                        \
  "Tensor(a!) accept_lens, Tensor(b!) commit_lens, Tensor(c!) bonus_ids, Tensor(d!) out_tokens, " \
  "Tensor(e!) new_seq_lens, Tensor(f!) workspace"
#define DFLASH_SAMPLED_INPUTS                                                                \
  "Tensor candidates, Tensor logits, Tensor prefix_lens, Tensor temperature, Tensor top_k, " \
  "Tensor top_p, Tensor min_p, Tensor seeds, Tensor offsets, Tensor? draft_ids=None, "       \
  "Tensor? draft_probs=None, Tensor? token_bitmask=None, Tensor? logit_bias=None, str rule=\"token\""

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def("verify_block(Tensor candidates, Tensor target, Tensor prefix_lens, int lazy=-1) -> " DFLASH_VERIFY_RETURNS);
  m.def("verify_block.out(Tensor candidates, Tensor target, Tensor prefix_lens, int lazy=-1, *, " DFLASH_VERIFY_OUTS
        ") -> ()");
  m.def("verify_block_sampled(" DFLASH_SAMPLED_INPUTS ") -> " DFLASH_VERIFY_RETURNS);
  m.def("verify_block_sampled.out(" DFLASH_SAMPLED_INPUTS ", *, " DFLASH_VERIFY_OUTS ") -> ()");
  m.def("argmax_logits(Tensor logits, int vocab_start=0) -> (Tensor ids, Tensor values)");
  m.def(
      "argmax_logits.out(Tensor logits, int vocab_start=0, *, Tensor(a!) out_ids, Tensor(b!) out_values, "
      "Tensor(c!) workspace) -> ()");
  m.def("merge_vocab_shards(Tensor ids, Tensor values) -> (Tensor out_ids, Tensor out_values)");
  m.def("merge_vocab_shards.out(Tensor ids, Tensor values, *, Tensor(a!) out_ids, Tensor(b!) out_values) -> ()");
  m.def("merge_vocab_ranks(" DFLASH_MERGE_RANKS_INPUTS ") -> (Tensor out_ids, Tensor out_values)");
  m.def("merge_vocab_ranks.out(" DFLASH_MERGE_RANKS_INPUTS ", *, Tensor(a!) out_ids, Tensor(b!) out_values) -> ()");
  m.def("merge_exchange_words(int world) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CompositeExplicitAutograd, m) {
  m.impl("merge_exchange_words", TORCH_BOX(&dflash::verify::merge_exchange_size));
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) {
  using namespace dflash::verify;
  m.impl("verify_block", TORCH_BOX(&verify_block<&verify_block_out_cpu>));
  m.impl("verify_block.out", TORCH_BOX(&verify_block_out_cpu));
  m.impl("verify_block_sampled", TORCH_BOX(&verify_block_sampled<&sampled_cpu>));
  m.impl("verify_block_sampled.out", TORCH_BOX(&verify_block_sampled_out<&sampled_cpu>));
  m.impl("argmax_logits", TORCH_BOX(&argmax_logits<&argmax_logits_out_cpu>));
  m.impl("argmax_logits.out", TORCH_BOX(&argmax_logits_out_cpu));
  m.impl("merge_vocab_shards", TORCH_BOX(&merge_vocab_shards<&merge_out_cpu>));
  m.impl("merge_vocab_shards.out", TORCH_BOX(&merge_out_cpu));
  m.impl("merge_vocab_ranks", TORCH_BOX(&merge_vocab_ranks<&merge_ranks_out_cpu>));
  m.impl("merge_vocab_ranks.out", TORCH_BOX(&merge_ranks_out_cpu));
}

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  using namespace dflash::verify;
  m.impl("verify_block", TORCH_BOX(&verify_block<&verify_block_out_cuda>));
  m.impl("verify_block.out", TORCH_BOX(&verify_block_out_cuda));
  m.impl("verify_block_sampled", TORCH_BOX(&verify_block_sampled<&sampled_cuda>));
  m.impl("verify_block_sampled.out", TORCH_BOX(&verify_block_sampled_out<&sampled_cuda>));
  m.impl("argmax_logits", TORCH_BOX(&argmax_logits<&argmax_logits_out_cuda>));
  m.impl("argmax_logits.out", TORCH_BOX(&argmax_logits_out_cuda));
  m.impl("merge_vocab_shards", TORCH_BOX(&merge_vocab_shards<&merge_out_cuda>));
  m.impl("merge_vocab_shards.out", TORCH_BOX(&merge_out_cuda));
  m.impl("merge_vocab_ranks", TORCH_BOX(&merge_vocab_ranks<&merge_ranks_out_cuda>));
  m.impl("merge_vocab_ranks.out", TORCH_BOX(&merge_ranks_out_cuda));
}
#endif

// draft_forward: schemas, checks, dispatch. The CPU implementation is registered from Python
// (dflash_kernels/ops/draft.py) and has its arguments checked here, by _draft_forward_check.
#include <algorithm>
#include <cmath>
#include <utility>

#include "api/check.h"
#include "api/cuda_stream.h"
#include "smxx/draft/index_check.h"
#include "smxx/draft/params.h"
#if DFLASH_WITH_CUDA
#include "smxx/draft/launch.h"
#endif

namespace dflash::draft {
namespace {

using api::ScalarType;
using api::Tensor;

constexpr const char* kOp = "draft_forward";

struct Inputs {
  Tensor block_ids, positions, prefix_lens, req_pool_indices, req_to_token;
  std::vector<Tensor> k_caches, v_caches;
  Tensor embed_weight, input_norm, qkv_weight;
  std::optional<Tensor> qkv_bias, q_norm, k_norm;
  Tensor o_weight;
  std::optional<Tensor> o_bias;
  Tensor post_norm, gate_up_weight, down_weight, final_norm, cos_sin;
  std::vector<int64_t> windows, causal;
  double eps;
  std::optional<double> softmax_scale;
};

const uint16_t* bf16_data(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.data_ptr()); }

const uint16_t* bf16_data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? bf16_data(*tensor) : nullptr;
}

// A contiguous tensor of activations or weights; CUDA kernels read it 16 bytes at a time.
void check_matrix(const std::string& name, const Tensor& tensor, const Inputs& in,
                  std::initializer_list<int64_t> shape) {
  const char* argument = name.c_str();
  api::check_shape(kOp, argument, tensor, shape);
  api::check_dtype(kOp, argument, tensor, {in.embed_weight.scalar_type()});
  api::check_same_device(kOp, argument, tensor, in.block_ids);
  api::check_contiguous(kOp, argument, tensor);
  DFLASH_CHECK(kOp, tensor.is_cpu() || reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, argument,
               "start at a multiple of 16 bytes", reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16);
}

void check_cache(const std::string& name, const Tensor& cache, const Inputs& in, int64_t kv_heads, int64_t head_dim) {
  const char* argument = name.c_str();
  api::check_shape(kOp, argument, cache, {-1, kv_heads, head_dim});
  api::check_dtype(kOp, argument, cache, {in.embed_weight.scalar_type()});
  api::check_same_device(kOp, argument, cache, in.block_ids);
  const bool dense = cache.stride(2) == 1 && (kv_heads == 1 || cache.stride(1) == head_dim) && cache.stride(0) % 8 == 0;
  DFLASH_CHECK(kOp, cache.numel() == 0 || dense, argument,
               "have contiguous slots whose stride is a multiple of 8 elements",
               "strides [" + std::to_string(cache.stride(0)) + ", " + std::to_string(cache.stride(1)) + ", " +
                   std::to_string(cache.stride(2)) + "]");
  DFLASH_CHECK(kOp, cache.is_cpu() || reinterpret_cast<uintptr_t>(cache.data_ptr()) % 16 == 0, argument,
               "start at a multiple of 16 bytes", reinterpret_cast<uintptr_t>(cache.data_ptr()) % 16);
}

void check_index_tensors(const Inputs& in) {
  api::check_shape(kOp, "block_ids", in.block_ids, {-1, -1});
  const int64_t batch = in.block_ids.size(0), block_size = in.block_ids.size(1);
  DFLASH_CHECK(kOp, block_size >= 1 && block_size <= attention::kMaxBlockSize, "block_ids",
               "have 1.." + std::to_string(attention::kMaxBlockSize) + " columns", block_size);
  api::check_shape(kOp, "positions", in.positions, {batch, block_size});
  api::check_shape(kOp, "prefix_lens", in.prefix_lens, {batch});
  api::check_shape(kOp, "req_pool_indices", in.req_pool_indices, {batch});
  api::check_shape(kOp, "req_to_token", in.req_to_token, {-1, -1});
  const std::pair<const char*, const Tensor*> tensors[] = {{"block_ids", &in.block_ids},
                                                           {"positions", &in.positions},
                                                           {"prefix_lens", &in.prefix_lens},
                                                           {"req_pool_indices", &in.req_pool_indices},
                                                           {"req_to_token", &in.req_to_token}};
  for (const auto& [name, tensor] : tensors) {
    api::check_index_dtype(kOp, name, *tensor);
    api::check_same_device(kOp, name, *tensor, in.block_ids);
  }
}

// Sizes from block_ids, embed_weight, qkv_weight, the first cache and down_weight, whose ranks are checked here.
DraftSizes check_sizes(const Inputs& in) {
  api::check_shape(kOp, "embed_weight", in.embed_weight, {-1, -1});
  api::check_shape(kOp, "input_norm", in.input_norm, {-1, in.embed_weight.size(1)});
  const auto layers = static_cast<size_t>(in.input_norm.size(0));
  DFLASH_CHECK(kOp, layers >= 1, "input_norm", "have at least 1 layer", layers);
  const std::pair<const char*, size_t> counts[] = {{"k_caches", in.k_caches.size()},
                                                   {"v_caches", in.v_caches.size()},
                                                   {"windows", in.windows.size()},
                                                   {"causal", in.causal.size()}};
  for (const auto& [name, count] : counts) {
    DFLASH_CHECK(kOp, count == layers, name, "have one entry a layer (" + std::to_string(layers) + ")", count);
  }
  api::check_shape(kOp, "k_caches[0]", in.k_caches[0], {-1, -1, -1});
  DraftSizes s;
  s.batch = in.block_ids.size(0);
  s.block_size = in.block_ids.size(1);
  s.hidden = in.embed_weight.size(1);
  s.kv_heads = in.k_caches[0].size(1);
  s.head_dim = in.k_caches[0].size(2);
  DFLASH_CHECK(kOp, s.kv_heads >= 1, "k_caches[0].size(1)", "be at least 1", s.kv_heads);
  DFLASH_CHECK(kOp, attention::is_head_dim_supported(s.head_dim), "k_caches[0].size(2)",
               "be a head size of 32, 64, 96, 128 or 256", s.head_dim);
  DFLASH_CHECK(kOp, s.hidden >= 8 && s.hidden % 8 == 0, "embed_weight.size(1)", "be a multiple of 8", s.hidden);
  api::check_shape(kOp, "qkv_weight", in.qkv_weight, {in.input_norm.size(0), -1, s.hidden});
  const int64_t heads = in.qkv_weight.size(1) / s.head_dim;
  s.q_heads = heads - 2 * s.kv_heads;
  DFLASH_CHECK(kOp, in.qkv_weight.size(1) % s.head_dim == 0 && s.q_heads >= s.kv_heads && s.q_heads % s.kv_heads == 0,
               "qkv_weight.size(1)",
               "be (Hq + 2 * Hkv) * D with Hq a multiple of Hkv = " + std::to_string(s.kv_heads) +
                   " and D = " + std::to_string(s.head_dim),
               in.qkv_weight.size(1));
  api::check_shape(kOp, "down_weight", in.down_weight, {in.input_norm.size(0), s.hidden, -1});
  s.intermediate = in.down_weight.size(2);
  DFLASH_CHECK(kOp, s.intermediate >= 8 && s.intermediate % 8 == 0, "down_weight.size(2)", "be a multiple of 8",
               s.intermediate);
  return s;
}

// All checks of shapes, dtypes, devices and strides; values of index tensors are not looked at.
DraftParams draft_params(const Inputs& in) {
  check_index_tensors(in);
  const DraftSizes s = check_sizes(in);
  const int64_t layers = in.input_norm.size(0), qkv_width = s.qkv_width();
  if (in.block_ids.is_cpu()) {
    api::check_dtype(kOp, "embed_weight", in.embed_weight, {ScalarType::BFloat16, ScalarType::Float});
  } else {
    api::check_dtype(kOp, "embed_weight", in.embed_weight, {ScalarType::BFloat16});
  }
  check_matrix("embed_weight", in.embed_weight, in, {-1, s.hidden});
  check_matrix("input_norm", in.input_norm, in, {layers, s.hidden});
  check_matrix("qkv_weight", in.qkv_weight, in, {layers, qkv_width, s.hidden});
  if (in.qkv_bias) check_matrix("qkv_bias", *in.qkv_bias, in, {layers, qkv_width});
  if (in.q_norm) check_matrix("q_norm", *in.q_norm, in, {layers, s.head_dim});
  if (in.k_norm) check_matrix("k_norm", *in.k_norm, in, {layers, s.head_dim});
  check_matrix("o_weight", in.o_weight, in, {layers, s.hidden, s.q_heads * s.head_dim});
  if (in.o_bias) check_matrix("o_bias", *in.o_bias, in, {layers, s.hidden});
  check_matrix("post_norm", in.post_norm, in, {layers, s.hidden});
  check_matrix("gate_up_weight", in.gate_up_weight, in, {layers, 2 * s.intermediate, s.hidden});
  check_matrix("down_weight", in.down_weight, in, {layers, s.hidden, s.intermediate});
  check_matrix("final_norm", in.final_norm, in, {s.hidden});
  api::check_shape(kOp, "cos_sin", in.cos_sin, {-1, -1});
  api::check_dtype(kOp, "cos_sin", in.cos_sin, {ScalarType::Float});
  api::check_same_device(kOp, "cos_sin", in.cos_sin, in.block_ids);
  api::check_contiguous(kOp, "cos_sin", in.cos_sin);
  const int64_t rotary_dim = in.cos_sin.size(1);
  DFLASH_CHECK(kOp, in.cos_sin.size(0) >= 1, "cos_sin", "have at least 1 row", in.cos_sin.size(0));
  DFLASH_CHECK(kOp, rotary_dim % 2 == 0 && rotary_dim <= s.head_dim, "cos_sin.size(1)",
               "be even and at most the head size " + std::to_string(s.head_dim), rotary_dim);
  DFLASH_CHECK(kOp, in.eps >= 0.0, "eps", "be at least 0", in.eps);
  const double scale = in.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(s.head_dim)));
  DFLASH_CHECK(kOp, std::isfinite(scale), "softmax_scale", "be finite", scale);

  DraftParams p;
  p.sizes = s;
  for (int64_t l = 0; l < layers; ++l) {
    const Tensor &k = in.k_caches[l], &v = in.v_caches[l];
    const std::string index = "[" + std::to_string(l) + "]";
    check_cache("k_caches" + index, k, in, s.kv_heads, s.head_dim);
    check_cache("v_caches" + index, v, in, s.kv_heads, s.head_dim);
    DFLASH_CHECK(kOp, in.windows[l] >= 0, "windows" + index, "be at least 0", in.windows[l]);
    DFLASH_CHECK(kOp, in.causal[l] == 0 || in.causal[l] == 1, "causal" + index, "be 0 or 1", in.causal[l]);
    LayerCache cache;
    cache.k = bf16_data(k);
    cache.v = bf16_data(v);
    cache.k_slot_stride = k.stride(0);
    cache.v_slot_stride = v.stride(0);
    cache.num_slots = std::min(k.size(0), v.size(0));
    cache.window = in.windows[l];
    cache.causal = in.causal[l] != 0;
    p.layers.push_back(cache);
  }
  p.vocab = in.embed_weight.size(0);
  p.rotary_dim = rotary_dim;
  p.max_positions = in.cos_sin.size(0);
  p.rows = in.req_to_token.size(0);
  p.width = in.req_to_token.size(1);
  p.block_ids = api::int_view(in.block_ids);
  p.positions = api::int_view(in.positions);
  p.prefix_lens = api::int_view(in.prefix_lens);
  p.req_pool_indices = api::int_view(in.req_pool_indices);
  p.req_to_token = api::int_view(in.req_to_token);
  p.embed_weight = bf16_data(in.embed_weight);
  p.input_norm = bf16_data(in.input_norm);
  p.qkv_weight = bf16_data(in.qkv_weight);
  p.qkv_bias = bf16_data(in.qkv_bias);
  p.q_norm = bf16_data(in.q_norm);
  p.k_norm = bf16_data(in.k_norm);
  p.o_weight = bf16_data(in.o_weight);
  p.o_bias = bf16_data(in.o_bias);
  p.post_norm = bf16_data(in.post_norm);
  p.gate_up_weight = bf16_data(in.gate_up_weight);
  p.down_weight = bf16_data(in.down_weight);
  p.final_norm = bf16_data(in.final_norm);
  p.cos_sin = static_cast<const float*>(in.cos_sin.data_ptr());
  p.eps = static_cast<float>(in.eps);
  p.softmax_scale = static_cast<float>(scale);
  return p;
}

void set_outputs(DraftParams& p, const Inputs& in, const Tensor& out, const Tensor& workspace) {
  check_matrix("out", out, in, {p.sizes.tokens(), p.sizes.hidden});
  api::check_shape(kOp, "workspace", workspace, {-1});
  api::check_dtype(kOp, "workspace", workspace, {ScalarType::Byte});
  api::check_same_device(kOp, "workspace", workspace, in.block_ids);
  api::check_contiguous(kOp, "workspace", workspace);
  const int64_t needed = plan_workspace(p.sizes).bytes;
  DFLASH_CHECK(kOp, workspace.size(0) >= needed, "workspace", "have at least " + std::to_string(needed) + " bytes",
               workspace.size(0));
  DFLASH_CHECK(kOp, workspace.is_cpu() || reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 16 == 0, "workspace",
               "start at a multiple of 16 bytes", reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 16);
  p.out = static_cast<uint16_t*>(out.data_ptr());
  p.workspace = static_cast<unsigned char*>(workspace.data_ptr());
}

IndexParams index_params(const DraftParams& p) {
  IndexParams index;
  index.batch = p.sizes.batch;
  index.block_size = p.sizes.block_size;
  index.block_ids = p.block_ids;
  index.positions = p.positions;
  index.prefix_lens = p.prefix_lens;
  index.req_pool_indices = p.req_pool_indices;
  index.req_to_token = p.req_to_token;
  index.vocab = p.vocab;
  index.max_positions = p.max_positions;
  index.rows = p.rows;
  index.width = p.width;
  index.num_slots = p.layers[0].num_slots;
  index.window = p.layers[0].window;
  for (const LayerCache& layer : p.layers) {
    index.num_slots = std::min(index.num_slots, layer.num_slots);
    index.window = index.window == 0 || layer.window == 0 ? 0 : std::max(index.window, layer.window);
  }
  return index;
}

void report_fault(const IndexParams& p, const IndexFault& found) {
  auto check = [&](Fault fault, const char* argument, int64_t end) {
    DFLASH_CHECK(kOp, found.fault != fault, argument, "be in [0, " + std::to_string(end) + ")", found.value);
  };
  check(Fault::kBlockId, "block_ids", p.vocab);
  check(Fault::kPosition, "positions", p.max_positions);
  check(Fault::kPrefixLen, "prefix_lens", p.width + 1);
  check(Fault::kPoolIndex, "req_pool_indices", p.rows);
  check(Fault::kSlot, "req_to_token", p.num_slots);
}

int64_t draft_forward_workspace(int64_t batch, int64_t block_size, int64_t hidden_size, int64_t intermediate_size,
                                int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"block_size", block_size},   {"hidden_size", hidden_size},   {"intermediate_size", intermediate_size},
      {"num_q_heads", num_q_heads}, {"num_kv_heads", num_kv_heads}, {"head_dim", head_dim}};
  DFLASH_CHECK("draft_forward_workspace", batch >= 0, "batch", "be at least 0", batch);
  for (const auto& [name, size] : sizes) {
    DFLASH_CHECK("draft_forward_workspace", size >= 1, name, "be at least 1", size);
  }
  DFLASH_CHECK("draft_forward_workspace", num_q_heads % num_kv_heads == 0, "num_q_heads",
               "be a multiple of num_kv_heads (" + std::to_string(num_kv_heads) + ")", num_q_heads);
  DraftSizes s;
  s.batch = batch;
  s.block_size = block_size;
  s.hidden = hidden_size;
  s.intermediate = intermediate_size;
  s.q_heads = num_q_heads;
  s.kv_heads = num_kv_heads;
  s.head_dim = head_dim;
  return plan_workspace(s).bytes;
}

// The list of arguments that three entry points share.
#define DFLASH_DRAFT_PARAMETERS                                                                                      \
  Tensor block_ids, Tensor positions, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token,              \
      std::vector<Tensor> k_caches, std::vector<Tensor> v_caches, Tensor embed_weight, Tensor input_norm,            \
      Tensor qkv_weight, std::optional<Tensor> qkv_bias, std::optional<Tensor> q_norm, std::optional<Tensor> k_norm, \
      Tensor o_weight, std::optional<Tensor> o_bias, Tensor post_norm, Tensor gate_up_weight, Tensor down_weight,    \
      Tensor final_norm, Tensor cos_sin, std::vector<int64_t> windows, std::vector<int64_t> causal, double eps,      \
      std::optional<double> softmax_scale
#define DFLASH_DRAFT_INPUTS                                                                                          \
  Inputs {                                                                                                           \
    block_ids, positions, prefix_lens, req_pool_indices, req_to_token, k_caches, v_caches, embed_weight, input_norm, \
        qkv_weight, qkv_bias, q_norm, k_norm, o_weight, o_bias, post_norm, gate_up_weight, down_weight, final_norm,  \
        cos_sin, windows, causal, eps, softmax_scale                                                                 \
  }

void draft_forward_check_cpu(DFLASH_DRAFT_PARAMETERS, std::optional<Tensor> out, std::optional<Tensor> workspace) {
  const Inputs in = DFLASH_DRAFT_INPUTS;
  DraftParams p = draft_params(in);
  if (out.has_value() && workspace.has_value()) set_outputs(p, in, *out, *workspace);
  const IndexParams index = index_params(p);
  for (int64_t b = 0; b < index.batch; ++b) report_fault(index, find_fault(index, b));
}

#if DFLASH_WITH_CUDA
void run_cuda(DraftParams& p, const Inputs& in, const Tensor& out, const Tensor& workspace) {
  set_outputs(p, in, out, workspace);
  if (p.sizes.batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(in.block_ids.get_device_index());
  const cudaStream_t stream = api::current_stream(kOp, in.block_ids);
  if (api::debug_enabled() && !is_capturing(stream)) {
    const IndexParams index = index_params(p);
    report_fault(index, check_indices(index, p.workspace, stream));
  }
  launch_draft_forward(p, stream);
}

void draft_forward_out_cuda(DFLASH_DRAFT_PARAMETERS, Tensor out, Tensor workspace) {
  const Inputs in = DFLASH_DRAFT_INPUTS;
  DraftParams p = draft_params(in);
  run_cuda(p, in, out, workspace);
}

Tensor draft_forward_cuda(DFLASH_DRAFT_PARAMETERS) {
  const Inputs in = DFLASH_DRAFT_INPUTS;
  DraftParams p = draft_params(in);
  const Tensor out = api::new_empty(embed_weight, {p.sizes.tokens(), p.sizes.hidden}, embed_weight.scalar_type());
  const Tensor workspace = api::new_empty(embed_weight, {plan_workspace(p.sizes).bytes}, ScalarType::Byte);
  run_cuda(p, in, out, workspace);
  return out;
}
#endif

#undef DFLASH_DRAFT_PARAMETERS
#undef DFLASH_DRAFT_INPUTS

}  // namespace
}  // namespace dflash::draft

#define DFLASH_DRAFT_SCHEMA                                                                                     \
  "Tensor block_ids, Tensor positions, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token, "      \
  "Tensor[] k_caches, Tensor[] v_caches, Tensor embed_weight, Tensor input_norm, Tensor qkv_weight, "           \
  "Tensor? qkv_bias, Tensor? q_norm, Tensor? k_norm, Tensor o_weight, Tensor? o_bias, Tensor post_norm, "       \
  "Tensor gate_up_weight, Tensor down_weight, Tensor final_norm, Tensor cos_sin, int[] windows, int[] causal, " \
  "float eps, float? softmax_scale=None"

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def("draft_forward(" DFLASH_DRAFT_SCHEMA ") -> Tensor");
  m.def("draft_forward.out(" DFLASH_DRAFT_SCHEMA ", *, Tensor(a!) out, Tensor(b!) workspace) -> ()");
  m.def("_draft_forward_check(" DFLASH_DRAFT_SCHEMA ", *, Tensor? out=None, Tensor? workspace=None) -> ()");
  m.def(
      "draft_forward_workspace(int batch, int block_size, int hidden_size, int intermediate_size, int num_q_heads, "
      "int num_kv_heads, int head_dim) -> int");
}
#undef DFLASH_DRAFT_SCHEMA

STABLE_TORCH_LIBRARY_IMPL(dflash, CompositeExplicitAutograd, m) {
  m.impl("draft_forward_workspace", TORCH_BOX(&dflash::draft::draft_forward_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) {
  m.impl("_draft_forward_check", TORCH_BOX(&dflash::draft::draft_forward_check_cpu));
}

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("draft_forward", TORCH_BOX(&dflash::draft::draft_forward_cuda));
  m.impl("draft_forward.out", TORCH_BOX(&dflash::draft::draft_forward_out_cuda));
}
#endif

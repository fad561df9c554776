// draft_attention and draft_mlp, the two halves of one drafter layer: schemas, checks, dispatch. Between them a tensor
// parallel drafter adds up its ranks' parts. The CPU implementations are registered from Python
// (dflash_kernels/ops/draft_layer.py) and have their arguments checked here, by _draft_attention_check and
// _draft_mlp_check.
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

const uint16_t* bf16_data(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.data_ptr()); }

const uint16_t* bf16_data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? bf16_data(*tensor) : nullptr;
}

bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0; }

void check_aligned(const char* op, const char* argument, const Tensor& tensor) {
  DFLASH_CHECK(op, tensor.is_cpu() || is_aligned(tensor), argument, "start at a multiple of 16 bytes",
               reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16);
}

// Of the shape given, of x's dtype and device, contiguous, aligned.
void check_matrix(const char* op, const char* argument, const Tensor& tensor, const Tensor& x,
                  std::initializer_list<int64_t> shape) {
  api::check_shape(op, argument, tensor, shape);
  api::check_dtype(op, argument, tensor, {x.scalar_type()});
  api::check_same_device(op, argument, tensor, x);
  api::check_contiguous(op, argument, tensor);
  check_aligned(op, argument, tensor);
}

void check_x(const char* op, const Tensor& x) {
  api::check_shape(op, "x", x, {-1, -1});
  if (x.is_cpu()) {
    api::check_dtype(op, "x", x, {ScalarType::BFloat16, ScalarType::Float});
  } else {
    api::check_dtype(op, "x", x, {ScalarType::BFloat16});
  }
  DFLASH_CHECK(op, x.size(1) >= 8 && x.size(1) % 8 == 0, "x.size(1)", "be a multiple of 8", x.size(1));
  check_matrix(op, "x", x, x, {-1, -1});
}

void check_eps(const char* op, double eps) { DFLASH_CHECK(op, eps >= 0.0, "eps", "be at least 0", eps); }

// `out` may be x itself; nothing may overlap in part.
void check_outputs(const char* op, const Tensor& x, const Tensor& out, const Tensor& workspace, int64_t needed) {
  check_matrix(op, "out", out, x, {x.size(0), x.size(1)});
  api::check_shape(op, "workspace", workspace, {-1});
  api::check_dtype(op, "workspace", workspace, {ScalarType::Byte});
  api::check_same_device(op, "workspace", workspace, x);
  api::check_contiguous(op, "workspace", workspace);
  DFLASH_CHECK(op, workspace.size(0) >= needed, "workspace", "have at least " + std::to_string(needed) + " bytes",
               workspace.size(0));
  check_aligned(op, "workspace", workspace);
}

void check_cache(const char* op, const char* argument, const Tensor& cache, const Tensor& x, int64_t kv_heads,
                 int64_t head_dim) {
  api::check_shape(op, argument, cache, {-1, kv_heads, head_dim});
  api::check_dtype(op, argument, cache, {x.scalar_type()});
  api::check_same_device(op, argument, cache, x);
  const bool dense = cache.stride(2) == 1 && (kv_heads == 1 || cache.stride(1) == head_dim) && cache.stride(0) % 8 == 0;
  DFLASH_CHECK(op, cache.numel() == 0 || dense, argument,
               "have contiguous slots whose stride is a multiple of 8 elements",
               "strides [" + std::to_string(cache.stride(0)) + ", " + std::to_string(cache.stride(1)) + ", " +
                   std::to_string(cache.stride(2)) + "]");
  check_aligned(op, argument, cache);
}

#define DFLASH_ATTENTION_PARAMETERS                                                                              \
  Tensor x, Tensor positions, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token, Tensor k_cache,  \
      Tensor v_cache, Tensor input_norm, Tensor qkv_weight, std::optional<Tensor> qkv_bias,                      \
      std::optional<Tensor> q_norm, std::optional<Tensor> k_norm, Tensor o_weight, std::optional<Tensor> o_bias, \
      Tensor cos_sin, int64_t window, bool causal, double eps, std::optional<double> softmax_scale, bool add_x
#define DFLASH_ATTENTION_ARGUMENTS                                                                               \
  x, positions, prefix_lens, req_pool_indices, req_to_token, k_cache, v_cache, input_norm, qkv_weight, qkv_bias, \
      q_norm, k_norm, o_weight, o_bias, cos_sin, window, causal, eps, softmax_scale, add_x

// All checks of shapes, dtypes, devices and strides; values of index tensors are not looked at.
DraftParams attention_params(DFLASH_ATTENTION_PARAMETERS) {
  constexpr const char* kOp = "draft_attention";
  (void)add_x;
  check_x(kOp, x);
  api::check_shape(kOp, "positions", positions, {-1, -1});
  const int64_t batch = positions.size(0), block_size = positions.size(1), hidden = x.size(1);
  DFLASH_CHECK(kOp, block_size >= 1 && block_size <= attention::kMaxBlockSize, "positions",
               "have 1.." + std::to_string(attention::kMaxBlockSize) + " columns", block_size);
  api::check_shape(kOp, "x", x, {batch * block_size, hidden});
  api::check_shape(kOp, "prefix_lens", prefix_lens, {batch});
  api::check_shape(kOp, "req_pool_indices", req_pool_indices, {batch});
  api::check_shape(kOp, "req_to_token", req_to_token, {-1, -1});
  const std::pair<const char*, const Tensor*> indices[] = {{"positions", &positions},
                                                           {"prefix_lens", &prefix_lens},
                                                           {"req_pool_indices", &req_pool_indices},
                                                           {"req_to_token", &req_to_token}};
  for (const auto& [name, tensor] : indices) {
    api::check_index_dtype(kOp, name, *tensor);
    api::check_same_device(kOp, name, *tensor, x);
  }
  api::check_shape(kOp, "k_cache", k_cache, {-1, -1, -1});
  DraftSizes s;
  s.batch = batch;
  s.block_size = block_size;
  s.hidden = hidden;
  s.kv_heads = k_cache.size(1);
  s.head_dim = k_cache.size(2);
  DFLASH_CHECK(kOp, s.kv_heads >= 1, "k_cache.size(1)", "be at least 1", s.kv_heads);
  DFLASH_CHECK(kOp, attention::is_head_dim_supported(s.head_dim), "k_cache.size(2)",
               "be a head size of 32, 64, 96, 128 or 256", s.head_dim);
  check_cache(kOp, "k_cache", k_cache, x, s.kv_heads, s.head_dim);
  check_cache(kOp, "v_cache", v_cache, x, s.kv_heads, s.head_dim);
  check_matrix(kOp, "qkv_weight", qkv_weight, x, {-1, hidden});
  s.q_heads = qkv_weight.size(0) / s.head_dim - 2 * s.kv_heads;
  DFLASH_CHECK(kOp, qkv_weight.size(0) % s.head_dim == 0 && s.q_heads >= s.kv_heads && s.q_heads % s.kv_heads == 0,
               "qkv_weight.size(0)",
               "be (Hq + 2 * Hkv) * D with Hq a multiple of Hkv = " + std::to_string(s.kv_heads) +
                   " and D = " + std::to_string(s.head_dim),
               qkv_weight.size(0));
  check_matrix(kOp, "input_norm", input_norm, x, {hidden});
  if (qkv_bias) check_matrix(kOp, "qkv_bias", *qkv_bias, x, {s.qkv_width()});
  if (q_norm) check_matrix(kOp, "q_norm", *q_norm, x, {s.head_dim});
  if (k_norm) check_matrix(kOp, "k_norm", *k_norm, x, {s.head_dim});
  check_matrix(kOp, "o_weight", o_weight, x, {hidden, s.q_heads * s.head_dim});
  if (o_bias) check_matrix(kOp, "o_bias", *o_bias, x, {hidden});
  api::check_shape(kOp, "cos_sin", cos_sin, {-1, -1});
  api::check_dtype(kOp, "cos_sin", cos_sin, {ScalarType::Float});
  api::check_same_device(kOp, "cos_sin", cos_sin, x);
  api::check_contiguous(kOp, "cos_sin", cos_sin);
  const int64_t rotary_dim = cos_sin.size(1);
  DFLASH_CHECK(kOp, cos_sin.size(0) >= 1, "cos_sin", "have at least 1 row", cos_sin.size(0));
  DFLASH_CHECK(kOp, rotary_dim % 2 == 0 && rotary_dim <= s.head_dim, "cos_sin.size(1)",
               "be even and at most the head size " + std::to_string(s.head_dim), rotary_dim);
  DFLASH_CHECK(kOp, window >= 0, "window", "be at least 0", window);
  check_eps(kOp, eps);
  const double scale = softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(s.head_dim)));
  DFLASH_CHECK(kOp, std::isfinite(scale), "softmax_scale", "be finite", scale);

  DraftParams p;
  p.sizes = s;
  LayerCache cache;
  cache.k = bf16_data(k_cache);
  cache.v = bf16_data(v_cache);
  cache.k_slot_stride = k_cache.stride(0);
  cache.v_slot_stride = v_cache.stride(0);
  cache.num_slots = std::min(k_cache.size(0), v_cache.size(0));
  cache.window = window;
  cache.causal = causal;
  p.layers.push_back(cache);
  p.rotary_dim = rotary_dim;
  p.max_positions = cos_sin.size(0);
  p.rows = req_to_token.size(0);
  p.width = req_to_token.size(1);
  p.positions = api::int_view(positions);
  p.prefix_lens = api::int_view(prefix_lens);
  p.req_pool_indices = api::int_view(req_pool_indices);
  p.req_to_token = api::int_view(req_to_token);
  p.input_norm = bf16_data(input_norm);
  p.qkv_weight = bf16_data(qkv_weight);
  p.qkv_bias = bf16_data(qkv_bias);
  p.q_norm = bf16_data(q_norm);
  p.k_norm = bf16_data(k_norm);
  p.o_weight = bf16_data(o_weight);
  p.o_bias = bf16_data(o_bias);
  p.cos_sin = static_cast<const float*>(cos_sin.data_ptr());
  p.eps = static_cast<float>(eps);
  p.softmax_scale = static_cast<float>(scale);
  return p;
}

// Range checks as of draft_forward, with positions in place of the ids.
IndexParams index_params(const DraftParams& p) {
  IndexParams index;
  index.batch = p.sizes.batch;
  index.block_size = p.sizes.block_size;
  index.block_ids = index.positions = p.positions;
  index.prefix_lens = p.prefix_lens;
  index.req_pool_indices = p.req_pool_indices;
  index.req_to_token = p.req_to_token;
  index.vocab = index.max_positions = p.max_positions;
  index.rows = p.rows;
  index.width = p.width;
  index.num_slots = p.layers[0].num_slots;
  index.window = p.layers[0].window;
  return index;
}

void report_fault(const IndexParams& p, const IndexFault& found) {
  auto check = [&](Fault fault, const char* argument, int64_t end) {
    DFLASH_CHECK("draft_attention", found.fault != fault, argument, "be in [0, " + std::to_string(end) + ")",
                 found.value);
  };
  check(Fault::kBlockId, "positions", p.max_positions);
  check(Fault::kPrefixLen, "prefix_lens", p.width + 1);
  check(Fault::kPoolIndex, "req_pool_indices", p.rows);
  check(Fault::kSlot, "req_to_token", p.num_slots);
}

void draft_attention_check(DFLASH_ATTENTION_PARAMETERS, std::optional<Tensor> out, std::optional<Tensor> workspace) {
  const DraftParams p = attention_params(DFLASH_ATTENTION_ARGUMENTS);
  if (out && workspace) check_outputs("draft_attention", x, *out, *workspace, plan_workspace(p.sizes).bytes);
  const IndexParams index = index_params(p);
  for (int64_t b = 0; b < index.batch; ++b) report_fault(index, find_fault(index, b));
}

#define DFLASH_MLP_PARAMETERS \
  Tensor x, Tensor post_norm, Tensor gate_up_weight, Tensor down_weight, double eps, bool add_x
#define DFLASH_MLP_ARGUMENTS x, post_norm, gate_up_weight, down_weight, eps, add_x

DraftParams mlp_params(DFLASH_MLP_PARAMETERS) {
  constexpr const char* kOp = "draft_mlp";
  (void)add_x;
  check_x(kOp, x);
  DraftParams p;
  p.sizes.batch = x.size(0);
  p.sizes.block_size = 1;
  p.sizes.hidden = x.size(1);
  api::check_shape(kOp, "down_weight", down_weight, {p.sizes.hidden, -1});
  p.sizes.intermediate = down_weight.size(1);
  DFLASH_CHECK(kOp, p.sizes.intermediate >= 8 && p.sizes.intermediate % 8 == 0, "down_weight.size(1)",
               "be a multiple of 8", p.sizes.intermediate);
  check_matrix(kOp, "post_norm", post_norm, x, {p.sizes.hidden});
  check_matrix(kOp, "gate_up_weight", gate_up_weight, x, {2 * p.sizes.intermediate, p.sizes.hidden});
  check_matrix(kOp, "down_weight", down_weight, x, {p.sizes.hidden, p.sizes.intermediate});
  check_eps(kOp, eps);
  p.post_norm = bf16_data(post_norm);
  p.gate_up_weight = bf16_data(gate_up_weight);
  p.down_weight = bf16_data(down_weight);
  p.eps = static_cast<float>(eps);
  return p;
}

// normed, then activated: never more than the workspace of draft_forward for these sizes.
int64_t mlp_activated_at(const DraftSizes& s) { return (s.tokens() * s.hidden * 2 + 255) / 256 * 256; }
int64_t mlp_workspace_bytes(const DraftSizes& s) { return mlp_activated_at(s) + s.tokens() * s.intermediate * 2; }

void draft_mlp_check(DFLASH_MLP_PARAMETERS, std::optional<Tensor> out, std::optional<Tensor> workspace) {
  const DraftParams p = mlp_params(DFLASH_MLP_ARGUMENTS);
  if (out && workspace) check_outputs("draft_mlp", x, *out, *workspace, mlp_workspace_bytes(p.sizes));
}

#if DFLASH_WITH_CUDA
void draft_attention_out_cuda(DFLASH_ATTENTION_PARAMETERS, Tensor out, Tensor workspace) {
  DraftParams p = attention_params(DFLASH_ATTENTION_ARGUMENTS);
  check_outputs("draft_attention", x, out, workspace, plan_workspace(p.sizes).bytes);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = api::current_stream("draft_attention", x);
  p.workspace = static_cast<unsigned char*>(workspace.data_ptr());
  if (p.sizes.batch > 0 && api::checks_values("draft_attention", stream)) {
    const IndexParams index = index_params(p);
    report_fault(index, check_indices(index, p.workspace, stream));
  }
  launch_draft_attention(p, 0, bf16_data(x), static_cast<uint16_t*>(out.data_ptr()), add_x, stream);
}

Tensor draft_attention_cuda(DFLASH_ATTENTION_PARAMETERS) {
  const DraftParams p = attention_params(DFLASH_ATTENTION_ARGUMENTS);
  const Tensor out = api::new_empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  const Tensor workspace = api::new_empty(x, {plan_workspace(p.sizes).bytes}, ScalarType::Byte);
  draft_attention_out_cuda(DFLASH_ATTENTION_ARGUMENTS, out, workspace);
  return out;
}

void draft_mlp_out_cuda(DFLASH_MLP_PARAMETERS, Tensor out, Tensor workspace) {
  const DraftParams p = mlp_params(DFLASH_MLP_ARGUMENTS);
  check_outputs("draft_mlp", x, out, workspace, mlp_workspace_bytes(p.sizes));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  auto* scratch = static_cast<unsigned char*>(workspace.data_ptr());
  launch_draft_mlp(
      p, 0, bf16_data(x), static_cast<uint16_t*>(out.data_ptr()), add_x, reinterpret_cast<uint16_t*>(scratch),
      reinterpret_cast<uint16_t*>(scratch + mlp_activated_at(p.sizes)), api::current_stream("draft_mlp", x));
}

Tensor draft_mlp_cuda(DFLASH_MLP_PARAMETERS) {
  const DraftParams p = mlp_params(DFLASH_MLP_ARGUMENTS);
  const Tensor out = api::new_empty(x, {x.size(0), x.size(1)}, x.scalar_type());
  const Tensor workspace = api::new_empty(x, {mlp_workspace_bytes(p.sizes) + 256}, ScalarType::Byte);
  draft_mlp_out_cuda(DFLASH_MLP_ARGUMENTS, out, workspace);
  return out;
}
#endif

#undef DFLASH_ATTENTION_PARAMETERS
#undef DFLASH_ATTENTION_ARGUMENTS
#undef DFLASH_MLP_PARAMETERS
#undef DFLASH_MLP_ARGUMENTS

}  // namespace
}  // namespace dflash::draft

#define DFLASH_ATTENTION_SCHEMA                                                                                      \
  "Tensor x, Tensor positions, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token, Tensor k_cache, "   \
  "Tensor v_cache, Tensor input_norm, Tensor qkv_weight, Tensor? qkv_bias, Tensor? q_norm, Tensor? k_norm, "         \
  "Tensor o_weight, Tensor? o_bias, Tensor cos_sin, int window, bool causal, float eps, float? softmax_scale, bool " \
  "add_x"
#define DFLASH_MLP_SCHEMA "Tensor x, Tensor post_norm, Tensor gate_up_weight, Tensor down_weight, float eps, bool add_x"

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def("draft_attention(" DFLASH_ATTENTION_SCHEMA ") -> Tensor");
  m.def("draft_attention.out(" DFLASH_ATTENTION_SCHEMA ", *, Tensor(a!) out, Tensor(b!) workspace) -> ()");
  m.def("_draft_attention_check(" DFLASH_ATTENTION_SCHEMA ", *, Tensor? out=None, Tensor? workspace=None) -> ()");
  m.def("draft_mlp(" DFLASH_MLP_SCHEMA ") -> Tensor");
  m.def("draft_mlp.out(" DFLASH_MLP_SCHEMA ", *, Tensor(a!) out, Tensor(b!) workspace) -> ()");
  m.def("_draft_mlp_check(" DFLASH_MLP_SCHEMA ", *, Tensor? out=None, Tensor? workspace=None) -> ()");
}
#undef DFLASH_ATTENTION_SCHEMA
#undef DFLASH_MLP_SCHEMA

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) {
  m.impl("_draft_attention_check", TORCH_BOX(&dflash::draft::draft_attention_check));
  m.impl("_draft_mlp_check", TORCH_BOX(&dflash::draft::draft_mlp_check));
}

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("draft_attention", TORCH_BOX(&dflash::draft::draft_attention_cuda));
  m.impl("draft_attention.out", TORCH_BOX(&dflash::draft::draft_attention_out_cuda));
  m.impl("draft_mlp", TORCH_BOX(&dflash::draft::draft_mlp_cuda));
  m.impl("draft_mlp.out", TORCH_BOX(&dflash::draft::draft_mlp_out_cuda));
}
#endif

// draft_forward: the order of the kernels of one pass; each is described in its own file.
//
// A layer is nine kernels: norm, qkv, rotate, attention (two with splits), o + residual, norm, gate_up with gating,
// down + residual. All but the first start early (common/dependent_launch.cuh): the GEMMs fetch weights and the
// attention fetches its first context keys while the preceding kernel drains.
//
// In fp8 the four products multiply e4m3 with e4m3. The norms write codes in place of bf16; what the attention and the
// gated product write goes through a kernel that quantises it, because a row's scale is known only when all of the row
// is. One buffer of codes serves all four: a kernel that fills it starts when the product that read it has completed.
// In nvfp4 it is the same with e2m1, but for the norms, which write bf16.
#include <climits>

#include "smxx/attention/launch.h"
#include "smxx/draft/launch.h"
#include "smxx/gemm/launch.h"
#include "smxx/norm/launch.h"
#include "smxx/quantize/launch.h"

namespace dflash::draft {
namespace {

struct Linear {
  const uint16_t* weight;
  const float* scale;     // nullptr: bf16
  const uint8_t* blocks;  // nullptr: not nvfp4
  const uint16_t* bias;
  int64_t n, k;
};

// Rows that a product multiplies: bf16, e4m3 with a scale a row, or nvfp4.
struct Rows {
  const uint16_t* data;
  const float* scale;     // nullptr: bf16
  const uint8_t* blocks;  // nullptr: not nvfp4
};

void launch_linear(const Linear& linear, const Rows& a, int64_t rows, uint16_t* c, const uint16_t* residual, bool gated,
                   cudaStream_t stream) {
  gemm::GemmParams p;
  p.a[0] = a.data;
  p.a_scale = a.scale;
  p.k = linear.blocks == nullptr ? linear.k : linear.k / 2;
  p.a_stride[0] = p.k;
  p.a_blocks = a.blocks;
  p.w_blocks = linear.blocks;
  p.w = linear.weight;
  p.w_scale = linear.scale;
  p.bias = linear.bias;
  p.residual = residual;
  p.residual_stride = linear.n;
  p.c = c;
  p.c_stride = gated ? linear.n / 2 : linear.n;
  p.m = rows;
  p.n = linear.n;
  p.gated = gated;
  p.early_start = true;
  p.next_fetches = gated && linear.scale == nullptr;  // down
  if (linear.blocks != nullptr) {
    gemm::launch_gemm_nvfp4(p, stream);
  } else {
    linear.scale == nullptr ? gemm::launch_gemm_bf16(p, stream) : gemm::launch_gemm_fp8(p, stream);
  }
}

norm::RmsNormParams norm_params(const uint16_t* x, const uint16_t* weight, uint16_t* out, const DraftParams& params) {
  norm::RmsNormParams p;
  p.x = x;
  p.weight = weight;
  p.out = out;
  p.m = params.sizes.tokens();
  p.n = p.x_stride = p.out_stride = params.sizes.hidden;
  p.eps = params.eps;
  p.early_start = true;
  return p;
}

// Where the codes of a product's input and their scales go.
struct CodeBuffer {
  uint8_t* codes;
  float* scale;
  uint8_t* blocks = nullptr;  // nvfp4

  explicit CodeBuffer(const DraftParams& p) {
    const WorkspacePlan plan = plan_workspace(p.sizes);
    codes = p.workspace + plan.codes;
    scale = reinterpret_cast<float*>(p.workspace + plan.row_scales);
    if (p.sizes.products == Products::kNvfp4) blocks = p.workspace + plan.blocks;
  }
  Rows rows() const { return {reinterpret_cast<const uint16_t*>(codes), scale, blocks}; }
};

// x [B * T, columns] as the product's input: quantised, or in bf16 x itself.
Rows input_rows(const uint16_t* x, int64_t columns, const DraftParams& params, cudaStream_t stream) {
  if (params.sizes.products == Products::kBf16) return {x, nullptr, nullptr};
  const CodeBuffer to(params);
  quantize::QuantizeParams p;
  p.x = x;
  p.codes = to.codes;
  p.scale = to.scale;
  p.blocks = to.blocks;
  p.m = params.sizes.tokens();
  p.n = columns;
  p.early_start = true;
  to.blocks == nullptr ? quantize::launch_quantize_rows(p, stream) : quantize::launch_quantize_rows_nvfp4(p, stream);
  return to.rows();
}

// The same of the normed x, which goes to `normed` only where the norm does not quantise it itself.
Rows normed_rows(const uint16_t* x, const uint16_t* weight, uint16_t* normed, const DraftParams& params,
                 cudaStream_t stream) {
  norm::RmsNormParams p = norm_params(x, weight, normed, params);
  if (params.sizes.products != Products::kFp8 || p.n > norm::kMaxHeldColumns) {
    norm::launch_rmsnorm(p, stream);
    return input_rows(normed, p.n, params, stream);
  }
  const CodeBuffer to(params);
  p.codes = to.codes;
  p.row_scales = to.scale;
  norm::launch_rmsnorm(p, stream);
  return to.rows();
}

// Element `layer` of a stack of weights; nullptr stays nullptr.
template <typename T>
const T* at_layer(const T* stack, int64_t layer, int64_t elements) {
  return stack == nullptr ? nullptr : stack + layer * elements;
}

// One of the four weights of all layers, without its shape.
struct Weights {
  const uint16_t* data;
  const float* scale;
  const uint8_t* blocks;
  const uint16_t* bias;
};

Linear linear_at(int64_t layer, const Weights& of, int64_t n, int64_t k, bool gated = false) {
  const int64_t elements = of.scale == nullptr ? n * k : of.blocks == nullptr ? n * k / 2 : n * k / 4;
  const int64_t block_rows = gated ? (n / 2 + 63) / 64 : (n + 127) / 128;
  return {at_layer(of.data, layer, elements),
          at_layer(of.scale, layer, n),
          at_layer(of.blocks, layer, block_rows * ((k + 63) / 64) * 512),
          at_layer(of.bias, layer, n),
          n,
          k};
}

}  // namespace

void launch_draft_attention(const DraftParams& p, int64_t l, const uint16_t* x, uint16_t* out, bool add_x,
                            cudaStream_t stream) {
  const DraftSizes& s = p.sizes;
  const int64_t tokens = s.tokens();
  if (tokens == 0) return;
  const LayerCache& cache = p.layers[l];
  const WorkspacePlan plan = plan_workspace(s);
  auto* normed = reinterpret_cast<uint16_t*>(p.workspace + plan.normed);
  auto* qkv = reinterpret_cast<uint16_t*>(p.workspace + plan.qkv);
  auto* attended = reinterpret_cast<uint16_t*>(p.workspace + plan.attended);
  const int64_t q_width = s.q_heads * s.head_dim, qkv_width = s.qkv_width();

  const Rows h = normed_rows(x, at_layer(p.input_norm, l, s.hidden), normed, p, stream);
  launch_linear(linear_at(l, {p.qkv_weight, p.qkv_scale, p.qkv_blocks, p.qkv_bias}, qkv_width, s.hidden), h, tokens,
                qkv, nullptr, false, stream);

  RotateParams rotate;
  rotate.qkv = qkv;
  rotate.tokens = tokens;
  rotate.block_size = static_cast<int>(s.block_size);
  rotate.q_heads = static_cast<int>(s.q_heads);
  rotate.kv_heads = static_cast<int>(s.kv_heads);
  rotate.head_dim = static_cast<int>(s.head_dim);
  rotate.q_norm = at_layer(p.q_norm, l, s.head_dim);
  rotate.k_norm = at_layer(p.k_norm, l, s.head_dim);
  rotate.positions = p.positions;
  rotate.cos_sin = p.cos_sin;
  rotate.rotary_dim = static_cast<int>(p.rotary_dim);
  rotate.max_positions = p.max_positions;
  rotate.eps = p.eps;
  launch_rotate(rotate, stream);

  attention::BlockAttentionParams attend;
  attend.qkv = qkv;
  attend.k_cache = cache.k;
  attend.v_cache = cache.v;
  attend.k_slot_stride = cache.k_slot_stride;
  attend.v_slot_stride = cache.v_slot_stride;
  attend.num_slots = cache.num_slots;
  attend.positions = p.positions;
  attend.prefix_lens = p.prefix_lens;
  attend.req_pool_indices = p.req_pool_indices;
  attend.req_to_token = p.req_to_token;
  attend.rows = p.rows;
  attend.width = p.width;
  attend.batch = s.batch;
  attend.block_size = static_cast<int>(s.block_size);
  attend.q_heads = static_cast<int>(s.q_heads);
  attend.kv_heads = static_cast<int>(s.kv_heads);
  attend.head_dim = static_cast<int>(s.head_dim);
  attend.window = static_cast<int>(cache.window < INT_MAX ? cache.window : INT_MAX);
  attend.causal = cache.causal;
  attend.scale = p.softmax_scale;
  attend.num_splits = static_cast<int>(plan.splits);
  attend.partial_out = reinterpret_cast<float*>(p.workspace + plan.partial_out);
  attend.partial_stats = reinterpret_cast<float*>(p.workspace + plan.partial_stats);
  attend.out = attended;
  attention::launch_block_attention(attend, stream);

  launch_linear(linear_at(l, {p.o_weight, p.o_scale, p.o_blocks, p.o_bias}, s.hidden, q_width),
                input_rows(attended, q_width, p, stream), tokens, out, add_x ? x : nullptr, false, stream);
}

void launch_draft_mlp(const DraftParams& p, int64_t l, const uint16_t* x, uint16_t* out, bool add_x, uint16_t* normed,
                      uint16_t* activated, cudaStream_t stream) {
  const DraftSizes& s = p.sizes;
  const int64_t tokens = s.tokens();
  if (tokens == 0) return;
  const Rows h = normed_rows(x, at_layer(p.post_norm, l, s.hidden), normed, p, stream);
  launch_linear(
      linear_at(l, {p.gate_up_weight, p.gate_up_scale, p.gate_up_blocks, nullptr}, 2 * s.intermediate, s.hidden, true),
      h, tokens, activated, nullptr, true, stream);
  launch_linear(linear_at(l, {p.down_weight, p.down_scale, p.down_blocks, nullptr}, s.hidden, s.intermediate),
                input_rows(activated, s.intermediate, p, stream), tokens, out, add_x ? x : nullptr, false, stream);
}

void launch_draft_forward(const DraftParams& p, cudaStream_t stream) {
  const DraftSizes& s = p.sizes;
  const int64_t tokens = s.tokens();
  if (tokens == 0) return;
  const WorkspacePlan plan = plan_workspace(s);
  auto* x = reinterpret_cast<uint16_t*>(p.workspace + plan.x);
  auto* normed = reinterpret_cast<uint16_t*>(p.workspace + plan.normed);
  auto* activated = reinterpret_cast<uint16_t*>(p.workspace + plan.activated);

  EmbedParams embed;
  embed.ids = p.block_ids;
  embed.tokens = tokens;
  embed.block_size = static_cast<int>(s.block_size);
  embed.embed_weight = p.embed_weight;
  embed.vocab = p.vocab;
  embed.hidden = s.hidden;
  embed.x = x;
  launch_embed(embed, stream);

  for (int64_t l = 0; l < static_cast<int64_t>(p.layers.size()); ++l) {
    launch_draft_attention(p, l, x, x, true, stream);
    launch_draft_mlp(p, l, x, x, true, normed, activated, stream);
  }
  norm::launch_rmsnorm(norm_params(x, p.final_norm, p.out, p), stream);
}

}  // namespace dflash::draft

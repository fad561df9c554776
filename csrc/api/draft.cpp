// draft_forward and its variants: schemas, checks, dispatch. The CPU implementations are registered from Python
// (dflash_kernels/ops/draft.py) and have their arguments checked here, by _draft_forward_check.
#include <algorithm>
#include <cmath>
#include <utility>

#include "api/check.h"
#include "api/cuda_stream.h"
#include "api/packed.h"
#include "api/peers.h"
#include "smxx/draft/index_check.h"
#include "smxx/draft/params.h"
#include "smxx/draft/stream.h"
#include "smxx/quantize/params.h"
#if DFLASH_WITH_CUDA
#include "common/cuda_check.h"
#include "smxx/draft/launch.h"
#include "smxx/gemm/launch.h"
#endif

namespace dflash::draft {
namespace {

using api::ScalarType;
using api::Tensor;

// Weights in the order in which one kernel streams them, instead of the four matrices (dflash_kernels/draft_stream.py).
struct Packed {
  Tensor weights;
  std::string format;
  Tensor units, counters;
  int64_t q_heads, intermediate, slots;
};

// Of a tensor-parallel drafter; embed_weight holds rows vocab_start .. of the vocabulary.
struct Ranks {
  api::PeerArguments peers;
  bool one_device;
  int64_t vocab_start, vocab;
};

// Of weights in fp8 and nvfp4, a scale for each row; nvfp4: also those of groups, in blocks.
struct Scales {
  Tensor qkv, o, gate_up, down;
  std::vector<Tensor> blocks = {};  // in the same order
};

struct Inputs {
  const char* op;
  Tensor block_ids, positions, prefix_lens, req_pool_indices, req_to_token;
  std::vector<Tensor> k_caches, v_caches;
  Tensor embed_weight, input_norm;
  std::optional<Tensor> qkv_weight, qkv_bias, q_norm, k_norm, o_weight, o_bias;
  Tensor post_norm;
  std::optional<Tensor> gate_up_weight, down_weight;
  Tensor final_norm, cos_sin;
  std::vector<int64_t> windows, causal;
  double eps;
  std::optional<double> softmax_scale;
  std::optional<Packed> packed;  // or the four weights
  std::optional<Ranks> ranks = {};
  std::optional<Scales> scales = {};  // the four weights are codes
  Products products = Products::kBf16;
};

const uint16_t* bf16_data(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.data_ptr()); }

const uint16_t* bf16_data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? bf16_data(*tensor) : nullptr;
}

const float* float_data(const Tensor& tensor) { return static_cast<const float*>(tensor.data_ptr()); }

// A contiguous tensor of activations or weights; CUDA kernels read it 16 bytes at a time.
void check_matrix(const std::string& name, const Tensor& tensor, const Inputs& in, std::initializer_list<int64_t> shape,
                  std::optional<ScalarType> dtype = std::nullopt) {
  const char* argument = name.c_str();
  api::check_shape(in.op, argument, tensor, shape);
  api::check_dtype(in.op, argument, tensor, {dtype.value_or(in.embed_weight.scalar_type())});
  api::check_same_device(in.op, argument, tensor, in.block_ids);
  api::check_contiguous(in.op, argument, tensor);
  DFLASH_CHECK(in.op, tensor.is_cpu() || reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, argument,
               "start at a multiple of 16 bytes", reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16);
}

void check_cache(const std::string& name, const Tensor& cache, const Inputs& in, int64_t kv_heads, int64_t head_dim) {
  const char* argument = name.c_str();
  api::check_shape(in.op, argument, cache, {-1, kv_heads, head_dim});
  api::check_dtype(in.op, argument, cache, {in.embed_weight.scalar_type()});
  api::check_same_device(in.op, argument, cache, in.block_ids);
  const bool dense = cache.stride(2) == 1 && (kv_heads == 1 || cache.stride(1) == head_dim) && cache.stride(0) % 8 == 0;
  DFLASH_CHECK(in.op, cache.numel() == 0 || dense, argument,
               "have contiguous slots whose stride is a multiple of 8 elements",
               "strides [" + std::to_string(cache.stride(0)) + ", " + std::to_string(cache.stride(1)) + ", " +
                   std::to_string(cache.stride(2)) + "]");
  DFLASH_CHECK(in.op, cache.size(0) < 2 || cache.stride(0) < int64_t{1} << 31, argument,
               "have slots less than 2^31 elements apart", cache.stride(0));
  DFLASH_CHECK(in.op, cache.is_cpu() || reinterpret_cast<uintptr_t>(cache.data_ptr()) % 16 == 0, argument,
               "start at a multiple of 16 bytes", reinterpret_cast<uintptr_t>(cache.data_ptr()) % 16);
}

void check_index_tensors(const Inputs& in) {
  api::check_shape(in.op, "block_ids", in.block_ids, {-1, -1});
  const int64_t batch = in.block_ids.size(0), block_size = in.block_ids.size(1);
  DFLASH_CHECK(in.op, block_size >= 1 && block_size <= attention::kMaxBlockSize, "block_ids",
               "have 1.." + std::to_string(attention::kMaxBlockSize) + " columns", block_size);
  api::check_shape(in.op, "positions", in.positions, {batch, block_size});
  api::check_shape(in.op, "prefix_lens", in.prefix_lens, {batch});
  api::check_shape(in.op, "req_pool_indices", in.req_pool_indices, {batch});
  api::check_shape(in.op, "req_to_token", in.req_to_token, {-1, -1});
  const std::pair<const char*, const Tensor*> tensors[] = {{"block_ids", &in.block_ids},
                                                           {"positions", &in.positions},
                                                           {"prefix_lens", &in.prefix_lens},
                                                           {"req_pool_indices", &in.req_pool_indices},
                                                           {"req_to_token", &in.req_to_token}};
  for (const auto& [name, tensor] : tensors) {
    api::check_index_dtype(in.op, name, *tensor);
    api::check_same_device(in.op, name, *tensor, in.block_ids);
  }
}

// Sizes from block_ids, embed_weight, qkv_weight, the first cache and down_weight, whose ranks are checked here.
DraftSizes check_sizes(const Inputs& in) {
  api::check_shape(in.op, "embed_weight", in.embed_weight, {-1, -1});
  api::check_shape(in.op, "input_norm", in.input_norm, {-1, in.embed_weight.size(1)});
  const auto layers = static_cast<size_t>(in.input_norm.size(0));
  DFLASH_CHECK(in.op, layers >= 1, "input_norm", "have at least 1 layer", layers);
  const std::pair<const char*, size_t> counts[] = {{"k_caches", in.k_caches.size()},
                                                   {"v_caches", in.v_caches.size()},
                                                   {"windows", in.windows.size()},
                                                   {"causal", in.causal.size()}};
  for (const auto& [name, count] : counts) {
    DFLASH_CHECK(in.op, count == layers, name, "have one entry a layer (" + std::to_string(layers) + ")", count);
  }
  api::check_shape(in.op, "k_caches[0]", in.k_caches[0], {-1, -1, -1});
  DraftSizes s;
  s.batch = in.block_ids.size(0);
  s.block_size = in.block_ids.size(1);
  s.hidden = in.embed_weight.size(1);
  s.kv_heads = in.k_caches[0].size(1);
  s.head_dim = in.k_caches[0].size(2);
  DFLASH_CHECK(in.op, s.kv_heads >= 1, "k_caches[0].size(1)", "be at least 1", s.kv_heads);
  DFLASH_CHECK(in.op, attention::is_head_dim_supported(s.head_dim), "k_caches[0].size(2)",
               "be a head size of 32, 64, 96, 128 or 256", s.head_dim);
  s.products = in.products;
  // Elements of a row that a product reads at once, and that lie in one of the weight's.
  const int64_t unit = s.products == Products::kBf16 ? 8 : s.products == Products::kFp8 ? 16 : 32;
  const int64_t pack = s.products == Products::kNvfp4 ? 2 : 1;
  const std::string multiple = "be a multiple of " + std::to_string(unit);
  DFLASH_CHECK(in.op, s.hidden >= unit && s.hidden % unit == 0, "embed_weight.size(1)", multiple, s.hidden);
  if (in.packed) {
    s.q_heads = in.packed->q_heads;
    s.intermediate = in.packed->intermediate;
    DFLASH_CHECK(in.op, s.q_heads >= s.kv_heads && s.q_heads % s.kv_heads == 0, "num_q_heads",
                 "be a multiple of Hkv = " + std::to_string(s.kv_heads), s.q_heads);
    DFLASH_CHECK(in.op, s.intermediate >= 8 && s.intermediate % 8 == 0, "intermediate_size", "be a multiple of 8",
                 s.intermediate);
    return s;
  }
  api::check_shape(in.op, "qkv_weight", *in.qkv_weight, {in.input_norm.size(0), -1, s.hidden / pack});
  const int64_t heads = in.qkv_weight->size(1) / s.head_dim;
  s.q_heads = heads - 2 * s.kv_heads;
  DFLASH_CHECK(in.op,
               in.qkv_weight->size(1) % s.head_dim == 0 && s.q_heads >= s.kv_heads && s.q_heads % s.kv_heads == 0,
               "qkv_weight.size(1)",
               "be (Hq + 2 * Hkv) * D with Hq a multiple of Hkv = " + std::to_string(s.kv_heads) +
                   " and D = " + std::to_string(s.head_dim),
               in.qkv_weight->size(1));
  api::check_shape(in.op, "down_weight", *in.down_weight, {in.input_norm.size(0), s.hidden, -1});
  s.intermediate = in.down_weight->size(2) * pack;
  DFLASH_CHECK(in.op, s.intermediate >= unit && s.intermediate % unit == 0, "down_weight.size(2)",
               "be a multiple of " + std::to_string(unit / pack), s.intermediate / pack);
  if (s.products == Products::kBf16) return s;
  const std::pair<const char*, int64_t> columns[] = {{"embed_weight.size(1)", s.hidden},
                                                     {"o_weight.size(2)", s.q_heads * s.head_dim},
                                                     {"down_weight.size(2)", s.intermediate}};
  for (const auto& [name, size] : columns) {
    DFLASH_CHECK(in.op, size <= quantize::kMaxColumns, name, "be at most " + std::to_string(quantize::kMaxColumns),
                 size);
  }
  return s;
}

// All checks of shapes, dtypes, devices and strides; values of index tensors are not looked at.
DraftParams draft_params(const Inputs& in) {
  check_index_tensors(in);
  const DraftSizes s = check_sizes(in);
  const int64_t layers = in.input_norm.size(0), qkv_width = s.qkv_width();
  if (in.block_ids.is_cpu()) {
    api::check_dtype(in.op, "embed_weight", in.embed_weight, {ScalarType::BFloat16, ScalarType::Float});
  } else {
    api::check_dtype(in.op, "embed_weight", in.embed_weight, {ScalarType::BFloat16});
  }
  check_matrix("embed_weight", in.embed_weight, in, {-1, s.hidden});
  check_matrix("input_norm", in.input_norm, in, {layers, s.hidden});
  const std::optional<ScalarType> coded = in.scales ? std::optional(ScalarType::Byte) : std::nullopt;
  const int64_t pack = s.products == Products::kNvfp4 ? 2 : 1;  // codes a byte
  const auto check_scale = [&](const char* name, Tensor Scales::* scale, int64_t rows) {
    if (in.scales) check_matrix(name, (*in.scales).*scale, in, {layers, rows, 1}, ScalarType::Float);
  };
  if (in.qkv_weight) check_matrix("qkv_weight", *in.qkv_weight, in, {layers, qkv_width, s.hidden / pack}, coded);
  check_scale("qkv_scale", &Scales::qkv, qkv_width);
  if (in.qkv_bias) check_matrix("qkv_bias", *in.qkv_bias, in, {layers, qkv_width});
  if (in.q_norm) check_matrix("q_norm", *in.q_norm, in, {layers, s.head_dim});
  if (in.k_norm) check_matrix("k_norm", *in.k_norm, in, {layers, s.head_dim});
  if (in.o_weight) check_matrix("o_weight", *in.o_weight, in, {layers, s.hidden, s.q_heads * s.head_dim / pack}, coded);
  check_scale("o_scale", &Scales::o, s.hidden);
  if (in.o_bias) check_matrix("o_bias", *in.o_bias, in, {layers, s.hidden});
  check_matrix("post_norm", in.post_norm, in, {layers, s.hidden});
  if (in.gate_up_weight) {
    check_matrix("gate_up_weight", *in.gate_up_weight, in, {layers, 2 * s.intermediate, s.hidden / pack}, coded);
  }
  check_scale("gate_up_scale", &Scales::gate_up, 2 * s.intermediate);
  if (in.down_weight)
    check_matrix("down_weight", *in.down_weight, in, {layers, s.hidden, s.intermediate / pack}, coded);
  check_scale("down_scale", &Scales::down, s.hidden);
  if (s.products == Products::kNvfp4) {
    const std::vector<Tensor>& blocks = in.scales->blocks;
    DFLASH_CHECK(in.op, blocks.size() == 4, "blocks", "have one entry a weight (4)", blocks.size());
    const auto check_blocks = [&](size_t i, int64_t rows, int64_t columns) {
      check_matrix("blocks[" + std::to_string(i) + "]", blocks[i], in, {layers, rows, (columns + 63) / 64, 512},
                   ScalarType::Byte);
    };
    check_blocks(0, (qkv_width + 127) / 128, s.hidden);
    check_blocks(1, (s.hidden + 127) / 128, s.q_heads * s.head_dim);
    check_blocks(2, (s.intermediate + 63) / 64, s.hidden);
    check_blocks(3, (s.hidden + 127) / 128, s.intermediate);
  }
  check_matrix("final_norm", in.final_norm, in, {s.hidden});
  api::check_shape(in.op, "cos_sin", in.cos_sin, {-1, -1});
  api::check_dtype(in.op, "cos_sin", in.cos_sin, {ScalarType::Float});
  api::check_same_device(in.op, "cos_sin", in.cos_sin, in.block_ids);
  api::check_contiguous(in.op, "cos_sin", in.cos_sin);
  const int64_t rotary_dim = in.cos_sin.size(1);
  DFLASH_CHECK(in.op, in.cos_sin.size(0) >= 1, "cos_sin", "have at least 1 row", in.cos_sin.size(0));
  DFLASH_CHECK(in.op, rotary_dim % 2 == 0 && rotary_dim <= s.head_dim, "cos_sin.size(1)",
               "be even and at most the head size " + std::to_string(s.head_dim), rotary_dim);
  DFLASH_CHECK(in.op, in.eps >= 0.0, "eps", "be at least 0", in.eps);
  const double scale = in.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(s.head_dim)));
  DFLASH_CHECK(in.op, std::isfinite(scale), "softmax_scale", "be finite", scale);

  DraftParams p;
  p.sizes = s;
  for (int64_t l = 0; l < layers; ++l) {
    const Tensor &k = in.k_caches[l], &v = in.v_caches[l];
    const std::string index = "[" + std::to_string(l) + "]";
    check_cache("k_caches" + index, k, in, s.kv_heads, s.head_dim);
    check_cache("v_caches" + index, v, in, s.kv_heads, s.head_dim);
    DFLASH_CHECK(in.op, in.windows[l] >= 0, "windows" + index, "be at least 0", in.windows[l]);
    DFLASH_CHECK(in.op, in.causal[l] == 0 || in.causal[l] == 1, "causal" + index, "be 0 or 1", in.causal[l]);
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
  if (in.scales) {
    p.qkv_scale = float_data(in.scales->qkv);
    p.o_scale = float_data(in.scales->o);
    p.gate_up_scale = float_data(in.scales->gate_up);
    p.down_scale = float_data(in.scales->down);
    if (s.products == Products::kNvfp4) {
      const uint8_t** const to[] = {&p.qkv_blocks, &p.o_blocks, &p.gate_up_blocks, &p.down_blocks};
      for (size_t i = 0; i < 4; ++i) *to[i] = static_cast<const uint8_t*>(in.scales->blocks[i].data_ptr());
    }
  }
  p.cos_sin = float_data(in.cos_sin);
  p.eps = static_cast<float>(in.eps);
  p.softmax_scale = static_cast<float>(scale);
  return p;
}

int64_t workspace_bytes(const Inputs& in, const DraftSizes& s) {
  if (!in.packed) return plan_workspace(s).bytes;
  return plan_stream_workspace(s).bytes;
}

void set_outputs(DraftParams& p, const Inputs& in, const Tensor& out, const Tensor& workspace) {
  check_matrix("out", out, in, {p.sizes.tokens(), p.sizes.hidden});
  api::check_shape(in.op, "workspace", workspace, {-1});
  api::check_dtype(in.op, "workspace", workspace, {ScalarType::Byte});
  api::check_same_device(in.op, "workspace", workspace, in.block_ids);
  api::check_contiguous(in.op, "workspace", workspace);
  const int64_t needed = workspace_bytes(in, p.sizes);
  DFLASH_CHECK(in.op, workspace.size(0) >= needed, "workspace", "have at least " + std::to_string(needed) + " bytes",
               workspace.size(0));
  DFLASH_CHECK(in.op, workspace.is_cpu() || reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 16 == 0, "workspace",
               "start at a multiple of 16 bytes", reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 16);
  p.out = static_cast<uint16_t*>(out.data_ptr());
  p.workspace = static_cast<unsigned char*>(workspace.data_ptr());
}

StreamRanks check_ranks(const Inputs& in, const Ranks& ranks, int64_t hidden) {
  const int64_t held = in.embed_weight.size(0);
  api::check_world(in.op, ranks.peers);
  DFLASH_CHECK(in.op, ranks.vocab_start >= 0 && ranks.vocab_start <= ranks.vocab - held, "vocab_start",
               "be in 0.." + std::to_string(ranks.vocab - held) + " (vocab_size less the rows of embed_weight)",
               ranks.vocab_start);
  const int64_t needed = exchange_words(ranks.peers.world(), hidden);
  StreamRanks result{api::check_peers(in.op, ranks.peers, needed, in.block_ids)};
  result.one_device = ranks.one_device;
  result.vocab = ranks.vocab;
  result.vocab_start = ranks.vocab_start;
  return result;
}

// What the streaming kernel needs beyond draft_params.
void check_packed(const Inputs& in, const DraftSizes& s) {
  const Packed& packed = *in.packed;
  const int64_t layers = in.input_norm.size(0);
  const stream::WeightFormat format = api::weight_format(in.op, packed.format);
  DFLASH_CHECK(in.op, layers <= kMaxStreamLayers, "input_norm", "have at most 64 layers", layers);
  DFLASH_CHECK(in.op, s.tokens() <= stream::kMaxTokens, "block_ids", "have at most 64 elements", s.tokens());
  DFLASH_CHECK(in.op, is_stream_head_dim(s.head_dim), "k_caches[0].size(2)", "be a head size of 64 or 128", s.head_dim);
  for (size_t l = 0; l < in.k_caches.size(); ++l) {
    const int64_t slots = std::min(in.k_caches[l].size(0), in.v_caches[l].size(0));
    DFLASH_CHECK(in.op, slots <= INT32_MAX, "k_caches[" + std::to_string(l) + "].size(0)", "fit 32 bits", slots);
  }
  const int64_t tiles = layers * (api::num_tiles(format, s.qkv_width(), s.hidden) +
                                  api::num_tiles(format, s.hidden, s.q_heads * s.head_dim) +
                                  api::num_tiles(format, (s.intermediate + 63) / 64 * 128, s.hidden) +
                                  api::num_tiles(format, s.hidden, s.intermediate));
  api::check_dtype(in.op, "embed_weight", in.embed_weight, {ScalarType::BFloat16});
  if (in.ranks) check_ranks(in, *in.ranks, s.hidden);
  api::check_packed(in.op, packed.weights, format, tiles, packed.units, packed.counters, packed.slots, in.block_ids);
  const int64_t attention = stream_attention_slots(s.q_heads, s.head_dim, packed.units.size(0));
  DFLASH_CHECK(in.op, packed.slots >= attention, "slots",
               "be at least " + std::to_string(attention) + ", those of the attention", packed.slots);
}

IndexParams index_params(const DraftParams& p, const Inputs& in) {
  IndexParams index;
  index.batch = p.sizes.batch;
  index.block_size = p.sizes.block_size;
  index.block_ids = p.block_ids;
  index.positions = p.positions;
  index.prefix_lens = p.prefix_lens;
  index.req_pool_indices = p.req_pool_indices;
  index.req_to_token = p.req_to_token;
  index.vocab = in.ranks ? in.ranks->vocab : p.vocab;
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

void report_fault(const char* op, const IndexParams& p, const IndexFault& found) {
  auto check = [&](Fault fault, const char* argument, int64_t end) {
    DFLASH_CHECK(op, found.fault != fault, argument, "be in [0, " + std::to_string(end) + ")", found.value);
  };
  check(Fault::kBlockId, "block_ids", p.vocab);
  check(Fault::kPosition, "positions", p.max_positions);
  check(Fault::kPrefixLen, "prefix_lens", p.width + 1);
  check(Fault::kPoolIndex, "req_pool_indices", p.rows);
  check(Fault::kSlot, "req_to_token", p.num_slots);
}

// Of all three workspace ops, sizes checked.
DraftSizes workspace_sizes(const char* op, int64_t batch, int64_t block_size, int64_t hidden_size,
                           int64_t intermediate_size, int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"block_size", block_size},   {"hidden_size", hidden_size},   {"intermediate_size", intermediate_size},
      {"num_q_heads", num_q_heads}, {"num_kv_heads", num_kv_heads}, {"head_dim", head_dim}};
  DFLASH_CHECK(op, batch >= 0, "batch", "be at least 0", batch);
  for (const auto& [name, size] : sizes) DFLASH_CHECK(op, size >= 1, name, "be at least 1", size);
  DFLASH_CHECK(op, num_q_heads % num_kv_heads == 0, "num_q_heads",
               "be a multiple of num_kv_heads (" + std::to_string(num_kv_heads) + ")", num_q_heads);
  DraftSizes s;
  s.batch = batch;
  s.block_size = block_size;
  s.hidden = hidden_size;
  s.intermediate = intermediate_size;
  s.q_heads = num_q_heads;
  s.kv_heads = num_kv_heads;
  s.head_dim = head_dim;
  return s;
}

int64_t draft_forward_workspace(int64_t batch, int64_t block_size, int64_t hidden_size, int64_t intermediate_size,
                                int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim) {
  return plan_workspace(workspace_sizes("draft_forward_workspace", batch, block_size, hidden_size, intermediate_size,
                                        num_q_heads, num_kv_heads, head_dim))
      .bytes;
}

int64_t draft_forward_fp8_workspace(int64_t batch, int64_t block_size, int64_t hidden_size, int64_t intermediate_size,
                                    int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim) {
  DraftSizes s = workspace_sizes("draft_forward_fp8_workspace", batch, block_size, hidden_size, intermediate_size,
                                 num_q_heads, num_kv_heads, head_dim);
  s.products = Products::kFp8;
  return plan_workspace(s).bytes;
}

int64_t draft_forward_nvfp4_workspace(int64_t batch, int64_t block_size, int64_t hidden_size, int64_t intermediate_size,
                                      int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim) {
  DraftSizes s = workspace_sizes("draft_forward_nvfp4_workspace", batch, block_size, hidden_size, intermediate_size,
                                 num_q_heads, num_kv_heads, head_dim);
  s.products = Products::kNvfp4;
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
    "draft_forward", block_ids, positions, prefix_lens, req_pool_indices, req_to_token, k_caches, v_caches,          \
        embed_weight, input_norm, qkv_weight, qkv_bias, q_norm, k_norm, o_weight, o_bias, post_norm, gate_up_weight, \
        down_weight, final_norm, cos_sin, windows, causal, eps, softmax_scale, std::nullopt                          \
  }

// The same with a scale behind each of the four weights.
#define DFLASH_FP8_PARAMETERS                                                                                        \
  Tensor block_ids, Tensor positions, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token,              \
      std::vector<Tensor> k_caches, std::vector<Tensor> v_caches, Tensor embed_weight, Tensor input_norm,            \
      Tensor qkv_weight, Tensor qkv_scale, std::optional<Tensor> qkv_bias, std::optional<Tensor> q_norm,             \
      std::optional<Tensor> k_norm, Tensor o_weight, Tensor o_scale, std::optional<Tensor> o_bias, Tensor post_norm, \
      Tensor gate_up_weight, Tensor gate_up_scale, Tensor down_weight, Tensor down_scale, Tensor final_norm,         \
      Tensor cos_sin, std::vector<int64_t> windows, std::vector<int64_t> causal, double eps,                         \
      std::optional<double> softmax_scale
#define DFLASH_FP8_INPUTS of_codes(DFLASH_DRAFT_INPUTS, Scales{qkv_scale, o_scale, gate_up_scale, down_scale})

#define DFLASH_NVFP4_INPUTS \
  of_codes(DFLASH_DRAFT_INPUTS, Scales{qkv_scale, o_scale, gate_up_scale, down_scale, blocks}, Products::kNvfp4)

Inputs of_codes(Inputs in, Scales scales, Products products = Products::kFp8) {
  in.op = products == Products::kFp8 ? "draft_forward_fp8" : "draft_forward_nvfp4";
  in.scales = std::move(scales);
  in.products = products;
  return in;
}

void check_dense_cpu(const Inputs& in, const std::optional<Tensor>& out, const std::optional<Tensor>& workspace) {
  DraftParams p = draft_params(in);
  if (out.has_value() && workspace.has_value()) set_outputs(p, in, *out, *workspace);
  const IndexParams index = index_params(p, in);
  for (int64_t b = 0; b < index.batch; ++b) report_fault(in.op, index, find_fault(index, b));
}

void draft_forward_check_cpu(DFLASH_DRAFT_PARAMETERS, std::optional<Tensor> out, std::optional<Tensor> workspace) {
  check_dense_cpu(DFLASH_DRAFT_INPUTS, out, workspace);
}

void draft_forward_fp8_check_cpu(DFLASH_FP8_PARAMETERS, std::optional<Tensor> out, std::optional<Tensor> workspace) {
  check_dense_cpu(DFLASH_FP8_INPUTS, out, workspace);
}

void draft_forward_nvfp4_check_cpu(DFLASH_FP8_PARAMETERS, std::vector<Tensor> blocks, std::optional<Tensor> out,
                                   std::optional<Tensor> workspace) {
  check_dense_cpu(DFLASH_NVFP4_INPUTS, out, workspace);
}

#define DFLASH_PACKED_PARAMETERS                                                                          \
  Tensor block_ids, Tensor positions, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token,   \
      std::vector<Tensor> k_caches, std::vector<Tensor> v_caches, Tensor embed_weight, Tensor input_norm, \
      std::optional<Tensor> qkv_bias, std::optional<Tensor> q_norm, std::optional<Tensor> k_norm,         \
      std::optional<Tensor> o_bias, Tensor post_norm, Tensor final_norm, Tensor cos_sin, Tensor weights,  \
      std::string weight_format, Tensor units, Tensor counters, int64_t slots, int64_t num_q_heads,       \
      int64_t intermediate_size, std::vector<int64_t> windows, std::vector<int64_t> causal, double eps,   \
      std::optional<double> softmax_scale
#define DFLASH_PACKED_INPUTS                                                                                       \
  Inputs {                                                                                                         \
    "draft_forward_packed", block_ids, positions, prefix_lens, req_pool_indices, req_to_token, k_caches, v_caches, \
        embed_weight, input_norm, std::nullopt, qkv_bias, q_norm, k_norm, std::nullopt, o_bias, post_norm,         \
        std::nullopt, std::nullopt, final_norm, cos_sin, windows, causal, eps, softmax_scale, Packed {             \
      weights, weight_format, units, counters, num_q_heads, intermediate_size, slots                               \
    }                                                                                                              \
  }

#define DFLASH_RANKS_PARAMETERS                                                                                        \
  Tensor exchange, std::vector<int64_t> peers, int64_t rank, bool one_device, int64_t vocab_start, int64_t vocab_size, \
      double patience
#define DFLASH_RANKS \
  Ranks { api::PeerArguments{exchange, peers, rank, patience}, one_device, vocab_start, vocab_size }

Inputs of_ranks(Inputs in, Ranks ranks) {
  in.op = "draft_forward_sharded";
  in.ranks = std::move(ranks);
  return in;
}

void check_packed_cpu(const Inputs& in, const std::optional<Tensor>& out, const std::optional<Tensor>& workspace) {
  DraftParams p = draft_params(in);
  check_packed(in, p.sizes);
  if (out.has_value() && workspace.has_value()) set_outputs(p, in, *out, *workspace);
  const IndexParams index = index_params(p, in);
  for (int64_t b = 0; b < index.batch; ++b) report_fault(in.op, index, find_fault(index, b));
}

void draft_forward_packed_check_cpu(DFLASH_PACKED_PARAMETERS, std::optional<Tensor> out,
                                    std::optional<Tensor> workspace) {
  check_packed_cpu(DFLASH_PACKED_INPUTS, out, workspace);
}

void draft_forward_sharded_check_cpu(DFLASH_PACKED_PARAMETERS, DFLASH_RANKS_PARAMETERS, std::optional<Tensor> out,
                                     std::optional<Tensor> workspace) {
  check_packed_cpu(of_ranks(DFLASH_PACKED_INPUTS, DFLASH_RANKS), out, workspace);
}

int64_t draft_exchange_words(int64_t world, int64_t hidden_size) {
  constexpr const char* kOp = "draft_exchange_words";
  DFLASH_CHECK(kOp, world >= 1 && world <= kMostRanks, "world", "be in 1..8", world);
  DFLASH_CHECK(kOp, hidden_size >= 8 && hidden_size % 8 == 0, "hidden_size", "be a multiple of 8", hidden_size);
  return exchange_words(world, hidden_size);
}

int64_t draft_forward_packed_workspace(int64_t batch, int64_t block_size, int64_t hidden_size,
                                       int64_t intermediate_size, int64_t num_q_heads, int64_t num_kv_heads,
                                       int64_t head_dim) {
  return plan_stream_workspace(workspace_sizes("draft_forward_packed_workspace", batch, block_size, hidden_size,
                                               intermediate_size, num_q_heads, num_kv_heads, head_dim))
      .bytes;
}

// Whether draft_forward_fp8 runs on this CUDA device.
bool draft_forward_fp8_supported(int64_t device) {
#if DFLASH_WITH_CUDA
  return gemm::is_fp8_supported(static_cast<int>(device));
#else
  (void)device;
  return false;
#endif
}

#if DFLASH_WITH_CUDA
// Ranks of one device wait for each other's blocks.
void check_all_resident(const Inputs& in, const StreamDraftParams& p) {
  int device = 0, multiprocessors = 0;
  cuda_check(cudaGetDevice(&device), in.op);
  cuda_check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), in.op);
  DFLASH_CHECK(
      in.op, p.stream.blocks * p.ranks.world <= multiprocessors, "units",
      "have at most " + std::to_string(multiprocessors / p.ranks.world) + " blocks where all ranks are on one device",
      p.stream.blocks);
}

StreamDraftParams stream_params(const DraftParams& p, const Packed& packed) {
  const DraftSizes& s = p.sizes;
  const int64_t blocks = packed.units.size(0);
  const StreamWorkspacePlan plan = plan_stream_workspace(s);
  StreamDraftParams q;
  q.stream.weights = static_cast<const uint8_t*>(packed.weights.data_ptr());
  q.stream.units = static_cast<const stream::Unit*>(packed.units.data_ptr());
  q.stream.blocks = static_cast<int>(blocks);
  q.stream.max_units = static_cast<int>(packed.units.size(1));
  q.stream.counters = static_cast<uint32_t*>(packed.counters.data_ptr());
  q.stream.partials = api::packed_partials(packed.counters, packed.slots);
  q.batch = static_cast<int>(s.batch);
  q.block_size = static_cast<int>(s.block_size);
  q.hidden = static_cast<int>(s.hidden);
  q.intermediate = static_cast<int>(s.intermediate);
  q.q_heads = static_cast<int>(s.q_heads);
  q.kv_heads = static_cast<int>(s.kv_heads);
  q.num_layers = static_cast<int>(p.layers.size());
  q.rotary_dim = static_cast<int>(p.rotary_dim);
  q.splits = static_cast<int>(stream_splits(s, blocks));
  q.row_tiles = static_cast<int>(stream_row_tiles(s));
  q.units = q.batch * q.kv_heads * q.splits * q.row_tiles;
  q.vocab = p.vocab;
  q.max_positions = p.max_positions;
  q.rows = p.rows;
  q.width = p.width;
  q.block_ids = p.block_ids;
  q.positions = p.positions;
  q.prefix_lens = p.prefix_lens;
  q.req_pool_indices = p.req_pool_indices;
  q.req_to_token = p.req_to_token;
  q.embed_weight = p.embed_weight;
  q.input_norm = p.input_norm;
  q.qkv_bias = p.qkv_bias;
  q.q_norm = p.q_norm;
  q.k_norm = p.k_norm;
  q.o_bias = p.o_bias;
  q.post_norm = p.post_norm;
  q.final_norm = p.final_norm;
  q.cos_sin = p.cos_sin;
  q.eps = p.eps;
  q.scale = p.softmax_scale;
  q.x = reinterpret_cast<uint16_t*>(p.workspace + plan.x);
  q.weighted = reinterpret_cast<uint16_t*>(p.workspace + plan.weighted);
  q.qkv = reinterpret_cast<uint16_t*>(p.workspace + plan.qkv);
  q.attended = reinterpret_cast<uint16_t*>(p.workspace + plan.attended);
  q.activated = reinterpret_cast<uint16_t*>(p.workspace + plan.activated);
  q.squares = reinterpret_cast<float*>(p.workspace + plan.squares);
  const int64_t attention_slots = stream_attention_slots(s.q_heads, s.head_dim, blocks);
  q.attention_parts = q.stream.partials + (packed.slots - attention_slots) * stream::kSlotFloats;
  q.out = p.out;
  for (size_t l = 0; l < p.layers.size(); ++l) {
    const LayerCache& from = p.layers[l];
    StreamLayer& to = q.layers[l];
    to.k = from.k;
    to.v = from.v;
    to.k_slot_stride = from.k_slot_stride;
    to.v_slot_stride = from.v_slot_stride;
    to.num_slots = from.num_slots;
    to.window = static_cast<int32_t>(std::min<int64_t>(from.window, INT32_MAX));
    to.causal = from.causal ? 1 : 0;
  }
  return q;
}

void run_cuda(DraftParams& p, const Inputs& in, const Tensor& out, const Tensor& workspace) {
  set_outputs(p, in, out, workspace);
  const int device = in.block_ids.get_device_index();
  DFLASH_CHECK(in.op, in.products != Products::kFp8 || gemm::is_fp8_supported(device), "block_ids",
               "be on a device of compute capability 9.0 or 10.x, whose tensor cores multiply fp8",
               api::device_text(in.block_ids));
  DFLASH_CHECK(in.op, in.products != Products::kNvfp4 || gemm::is_nvfp4_supported(device), "block_ids",
               "be on a device of compute capability 10.x, whose tensor cores multiply nvfp4",
               api::device_text(in.block_ids));
  if (p.sizes.batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = api::current_stream(in.op, in.block_ids);
  if (api::debug_enabled() && !is_capturing(stream)) {
    const IndexParams index = index_params(p, in);
    report_fault(in.op, index, check_indices(index, p.workspace, stream));
  }
  if (in.packed) {
    const stream::WeightFormat format = api::weight_format(in.op, in.packed->format);
    StreamDraftParams q = stream_params(p, *in.packed);
    if (in.ranks) {
      q.ranks = check_ranks(in, *in.ranks, p.sizes.hidden);
      if (q.ranks.one_device) check_all_resident(in, q);
    }
    launch_stream_draft_forward(q, p.sizes.head_dim, format, stream);
  } else {
    launch_draft_forward(p, stream);
  }
}

void dense_out_cuda(const Inputs& in, const Tensor& out, const Tensor& workspace) {
  DraftParams p = draft_params(in);
  run_cuda(p, in, out, workspace);
}

Tensor dense_cuda(const Inputs& in) {
  DraftParams p = draft_params(in);
  const Tensor out = api::new_empty(in.embed_weight, {p.sizes.tokens(), p.sizes.hidden}, in.embed_weight.scalar_type());
  const Tensor workspace = api::new_empty(in.embed_weight, {plan_workspace(p.sizes).bytes}, ScalarType::Byte);
  run_cuda(p, in, out, workspace);
  return out;
}

void draft_forward_out_cuda(DFLASH_DRAFT_PARAMETERS, Tensor out, Tensor workspace) {
  dense_out_cuda(DFLASH_DRAFT_INPUTS, out, workspace);
}

Tensor draft_forward_cuda(DFLASH_DRAFT_PARAMETERS) { return dense_cuda(DFLASH_DRAFT_INPUTS); }

void draft_forward_fp8_out_cuda(DFLASH_FP8_PARAMETERS, Tensor out, Tensor workspace) {
  dense_out_cuda(DFLASH_FP8_INPUTS, out, workspace);
}

Tensor draft_forward_fp8_cuda(DFLASH_FP8_PARAMETERS) { return dense_cuda(DFLASH_FP8_INPUTS); }

void draft_forward_nvfp4_out_cuda(DFLASH_FP8_PARAMETERS, std::vector<Tensor> blocks, Tensor out, Tensor workspace) {
  dense_out_cuda(DFLASH_NVFP4_INPUTS, out, workspace);
}

Tensor draft_forward_nvfp4_cuda(DFLASH_FP8_PARAMETERS, std::vector<Tensor> blocks) {
  return dense_cuda(DFLASH_NVFP4_INPUTS);
}

void packed_out_cuda(const Inputs& in, const Tensor& out, const Tensor& workspace) {
  DraftParams p = draft_params(in);
  check_packed(in, p.sizes);
  run_cuda(p, in, out, workspace);
}

Tensor packed_cuda(const Inputs& in) {
  DraftParams p = draft_params(in);
  check_packed(in, p.sizes);
  const Tensor out = api::new_empty(in.embed_weight, {p.sizes.tokens(), p.sizes.hidden}, in.embed_weight.scalar_type());
  const Tensor workspace = api::new_empty(in.embed_weight, {workspace_bytes(in, p.sizes)}, ScalarType::Byte);
  run_cuda(p, in, out, workspace);
  return out;
}

void draft_forward_packed_out_cuda(DFLASH_PACKED_PARAMETERS, Tensor out, Tensor workspace) {
  packed_out_cuda(DFLASH_PACKED_INPUTS, out, workspace);
}

Tensor draft_forward_packed_cuda(DFLASH_PACKED_PARAMETERS) { return packed_cuda(DFLASH_PACKED_INPUTS); }

void draft_forward_sharded_out_cuda(DFLASH_PACKED_PARAMETERS, DFLASH_RANKS_PARAMETERS, Tensor out, Tensor workspace) {
  packed_out_cuda(of_ranks(DFLASH_PACKED_INPUTS, DFLASH_RANKS), out, workspace);
}

Tensor draft_forward_sharded_cuda(DFLASH_PACKED_PARAMETERS, DFLASH_RANKS_PARAMETERS) {
  return packed_cuda(of_ranks(DFLASH_PACKED_INPUTS, DFLASH_RANKS));
}
#endif

#undef DFLASH_DRAFT_PARAMETERS
#undef DFLASH_DRAFT_INPUTS
#undef DFLASH_FP8_PARAMETERS
#undef DFLASH_FP8_INPUTS
#undef DFLASH_NVFP4_INPUTS
#undef DFLASH_PACKED_PARAMETERS
#undef DFLASH_PACKED_INPUTS
#undef DFLASH_RANKS_PARAMETERS
#undef DFLASH_RANKS

}  // namespace
}  // namespace dflash::draft

#define DFLASH_DRAFT_SCHEMA                                                                                     \
  "Tensor block_ids, Tensor positions, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token, "      \
  "Tensor[] k_caches, Tensor[] v_caches, Tensor embed_weight, Tensor input_norm, Tensor qkv_weight, "           \
  "Tensor? qkv_bias, Tensor? q_norm, Tensor? k_norm, Tensor o_weight, Tensor? o_bias, Tensor post_norm, "       \
  "Tensor gate_up_weight, Tensor down_weight, Tensor final_norm, Tensor cos_sin, int[] windows, int[] causal, " \
  "float eps, float? softmax_scale=None"

#define DFLASH_FP8_SCHEMA                                                                                  \
  "Tensor block_ids, Tensor positions, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token, " \
  "Tensor[] k_caches, Tensor[] v_caches, Tensor embed_weight, Tensor input_norm, Tensor qkv_weight, "      \
  "Tensor qkv_scale, Tensor? qkv_bias, Tensor? q_norm, Tensor? k_norm, Tensor o_weight, Tensor o_scale, "  \
  "Tensor? o_bias, Tensor post_norm, Tensor gate_up_weight, Tensor gate_up_scale, Tensor down_weight, "    \
  "Tensor down_scale, Tensor final_norm, Tensor cos_sin, int[] windows, int[] causal, float eps, "         \
  "float? softmax_scale=None"

#define DFLASH_PACKED_SCHEMA                                                                               \
  "Tensor block_ids, Tensor positions, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token, " \
  "Tensor[] k_caches, Tensor[] v_caches, Tensor embed_weight, Tensor input_norm, Tensor? qkv_bias, "       \
  "Tensor? q_norm, Tensor? k_norm, Tensor? o_bias, Tensor post_norm, Tensor final_norm, Tensor cos_sin, "  \
  "Tensor weights, str weight_format, Tensor units, Tensor(c!) counters, int slots, int num_q_heads, "     \
  "int intermediate_size, int[] windows, int[] causal, float eps, float? softmax_scale"

#define DFLASH_RANKS_SCHEMA \
  "Tensor(d!) exchange, int[] peers, int rank, bool one_device, int vocab_start, int vocab_size, float patience"

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def("draft_forward_packed(" DFLASH_PACKED_SCHEMA "=None) -> Tensor");
  m.def("draft_forward_packed.out(" DFLASH_PACKED_SCHEMA "=None, *, Tensor(a!) out, Tensor(b!) workspace) -> ()");
  m.def("_draft_forward_packed_check(" DFLASH_PACKED_SCHEMA
        "=None, *, Tensor? out=None, Tensor? workspace=None) -> ()");
  m.def("draft_forward_sharded(" DFLASH_PACKED_SCHEMA ", " DFLASH_RANKS_SCHEMA ") -> Tensor");
  m.def("draft_forward_sharded.out(" DFLASH_PACKED_SCHEMA ", " DFLASH_RANKS_SCHEMA
        ", *, Tensor(a!) out, Tensor(b!) workspace) -> ()");
  m.def("_draft_forward_sharded_check(" DFLASH_PACKED_SCHEMA ", " DFLASH_RANKS_SCHEMA
        ", *, Tensor? out=None, Tensor? workspace=None) -> ()");
  m.def("draft_exchange_words(int world, int hidden_size) -> int");
  m.def(
      "draft_forward_packed_workspace(int batch, int block_size, int hidden_size, int intermediate_size, "
      "int num_q_heads, int num_kv_heads, int head_dim) -> int");
  m.def("draft_forward(" DFLASH_DRAFT_SCHEMA ") -> Tensor");
  m.def("draft_forward.out(" DFLASH_DRAFT_SCHEMA ", *, Tensor(a!) out, Tensor(b!) workspace) -> ()");
  m.def("_draft_forward_check(" DFLASH_DRAFT_SCHEMA ", *, Tensor? out=None, Tensor? workspace=None) -> ()");
  m.def(
      "draft_forward_workspace(int batch, int block_size, int hidden_size, int intermediate_size, int num_q_heads, "
      "int num_kv_heads, int head_dim) -> int");
  m.def("draft_forward_fp8(" DFLASH_FP8_SCHEMA ") -> Tensor");
  m.def("draft_forward_fp8.out(" DFLASH_FP8_SCHEMA ", *, Tensor(a!) out, Tensor(b!) workspace) -> ()");
  m.def("_draft_forward_fp8_check(" DFLASH_FP8_SCHEMA ", *, Tensor? out=None, Tensor? workspace=None) -> ()");
  m.def(
      "draft_forward_fp8_workspace(int batch, int block_size, int hidden_size, int intermediate_size, "
      "int num_q_heads, int num_kv_heads, int head_dim) -> int");
  m.def("draft_forward_fp8_supported(int device) -> bool");
  m.def("draft_forward_nvfp4(" DFLASH_FP8_SCHEMA ", *, Tensor[] blocks) -> Tensor");
  m.def("draft_forward_nvfp4.out(" DFLASH_FP8_SCHEMA
        ", *, Tensor[] blocks, Tensor(a!) out, Tensor(b!) workspace) -> ()");
  m.def("_draft_forward_nvfp4_check(" DFLASH_FP8_SCHEMA
        ", *, Tensor[] blocks, Tensor? out=None, Tensor? workspace=None) -> ()");
  m.def(
      "draft_forward_nvfp4_workspace(int batch, int block_size, int hidden_size, int intermediate_size, "
      "int num_q_heads, int num_kv_heads, int head_dim) -> int");
}
#undef DFLASH_DRAFT_SCHEMA
#undef DFLASH_FP8_SCHEMA
#undef DFLASH_PACKED_SCHEMA
#undef DFLASH_RANKS_SCHEMA

STABLE_TORCH_LIBRARY_IMPL(dflash, CompositeExplicitAutograd, m) {
  m.impl("draft_forward_workspace", TORCH_BOX(&dflash::draft::draft_forward_workspace));
  m.impl("draft_forward_fp8_workspace", TORCH_BOX(&dflash::draft::draft_forward_fp8_workspace));
  m.impl("draft_forward_nvfp4_workspace", TORCH_BOX(&dflash::draft::draft_forward_nvfp4_workspace));
  m.impl("draft_forward_fp8_supported", TORCH_BOX(&dflash::draft::draft_forward_fp8_supported));
  m.impl("draft_forward_packed_workspace", TORCH_BOX(&dflash::draft::draft_forward_packed_workspace));
  m.impl("draft_exchange_words", TORCH_BOX(&dflash::draft::draft_exchange_words));
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) {
  m.impl("_draft_forward_check", TORCH_BOX(&dflash::draft::draft_forward_check_cpu));
  m.impl("_draft_forward_fp8_check", TORCH_BOX(&dflash::draft::draft_forward_fp8_check_cpu));
  m.impl("_draft_forward_nvfp4_check", TORCH_BOX(&dflash::draft::draft_forward_nvfp4_check_cpu));
  m.impl("_draft_forward_packed_check", TORCH_BOX(&dflash::draft::draft_forward_packed_check_cpu));
  m.impl("_draft_forward_sharded_check", TORCH_BOX(&dflash::draft::draft_forward_sharded_check_cpu));
}

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("draft_forward", TORCH_BOX(&dflash::draft::draft_forward_cuda));
  m.impl("draft_forward.out", TORCH_BOX(&dflash::draft::draft_forward_out_cuda));
  m.impl("draft_forward_fp8", TORCH_BOX(&dflash::draft::draft_forward_fp8_cuda));
  m.impl("draft_forward_fp8.out", TORCH_BOX(&dflash::draft::draft_forward_fp8_out_cuda));
  m.impl("draft_forward_nvfp4", TORCH_BOX(&dflash::draft::draft_forward_nvfp4_cuda));
  m.impl("draft_forward_nvfp4.out", TORCH_BOX(&dflash::draft::draft_forward_nvfp4_out_cuda));
  m.impl("draft_forward_packed", TORCH_BOX(&dflash::draft::draft_forward_packed_cuda));
  m.impl("draft_forward_packed.out", TORCH_BOX(&dflash::draft::draft_forward_packed_out_cuda));
  m.impl("draft_forward_sharded", TORCH_BOX(&dflash::draft::draft_forward_sharded_cuda));
  m.impl("draft_forward_sharded.out", TORCH_BOX(&dflash::draft::draft_forward_sharded_out_cuda));
}
#endif

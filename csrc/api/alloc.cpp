// prepare_block, reserve_kv_slots, release_kv_slots, reserve_and_prepare_block: schemas, checks, dispatch.
#include <tuple>
#include <utility>

#include "api/check.h"
#include "api/cuda_stream.h"
#include "cpu/alloc.h"
#if DFLASH_WITH_CUDA
#include "common/cuda_check.h"
#include "smxx/alloc/launch.h"
#endif

namespace dflash::alloc {
namespace {

using api::ScalarType;
using api::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kPrepare = "prepare_block";
constexpr const char* kReserve = "reserve_kv_slots";
constexpr const char* kRelease = "release_kv_slots";
constexpr const char* kReserveAndPrepare = "reserve_and_prepare_block";

// --- arguments -> params: all that can be checked without reading a tensor ------------------------------------------

BlockParams block_params(const char* op, const Tensor& anchor_ids, const Tensor& prefix_lens,
                         const Tensor& req_pool_indices, const Tensor& req_to_token, int64_t mask_token_id,
                         const Tensor& block_ids, const Tensor& positions, const Tensor& slots) {
  const int64_t batch = anchor_ids.dim() == 1 ? anchor_ids.size(0) : -1;
  api::check_shape(op, "anchor_ids", anchor_ids, {-1});
  api::check_shape(op, "prefix_lens", prefix_lens, {batch});
  api::check_shape(op, "req_pool_indices", req_pool_indices, {batch});
  api::check_shape(op, "req_to_token", req_to_token, {-1, -1});
  api::check_shape(op, "block_ids", block_ids, {batch, -1});
  const int64_t block_size = block_ids.size(1);
  DFLASH_CHECK(op, block_size >= 1, "block_size", "be at least 1", block_size);
  DFLASH_CHECK(op, batch * block_size < (1ll << 31), "block_ids", "have fewer than 2**31 elements", batch * block_size);
  api::check_shape(op, "positions", positions, {batch, block_size});
  api::check_shape(op, "slots", slots, {batch, block_size});
  const std::pair<const char*, const Tensor*> inputs[] = {{"anchor_ids", &anchor_ids},
                                                          {"prefix_lens", &prefix_lens},
                                                          {"req_pool_indices", &req_pool_indices},
                                                          {"req_to_token", &req_to_token}};
  for (const auto& [name, tensor] : inputs) {
    api::check_index_dtype(op, name, *tensor);
    api::check_same_device(op, name, *tensor, anchor_ids);
  }
  api::check_last_dim_contiguous(op, "req_to_token", req_to_token);
  const std::pair<const char*, const Tensor*> outputs[] = {
      {"block_ids", &block_ids}, {"positions", &positions}, {"slots", &slots}};
  for (const auto& [name, tensor] : outputs) {
    api::check_dtype(op, name, *tensor, {ScalarType::Long});
    api::check_same_device(op, name, *tensor, anchor_ids);
    api::check_contiguous(op, name, *tensor);
  }
  BlockParams p;
  p.batch = batch;
  p.block_size = static_cast<int>(block_size);
  p.per_block = Divisor(batch == 0 ? 1 : block_size);
  p.anchor_ids = api::int_view(anchor_ids);
  p.prefix_lens = api::int_view(prefix_lens);
  p.req_pool_indices = api::int_view(req_pool_indices);
  p.req_to_token = api::int_view(req_to_token);
  p.rows = req_to_token.size(0);
  p.width = req_to_token.size(1);
  p.mask_token_id = mask_token_id;
  p.block_ids = static_cast<int64_t*>(block_ids.data_ptr());
  p.positions = static_cast<int64_t*>(positions.data_ptr());
  p.slots = static_cast<int64_t*>(slots.data_ptr());
  return p;
}

PageParams page_params(const char* op, const char* lens_name, const Tensor& req_to_token, const Tensor& alloc_lens,
                       const Tensor& free_pages, const Tensor& ring, const Tensor& req_pool_indices, const Tensor& lens,
                       int64_t page_size) {
  api::check_shape(op, "req_to_token", req_to_token, {-1, -1});
  api::check_shape(op, "alloc_lens", alloc_lens, {req_to_token.size(0)});
  api::check_shape(op, "free_pages", free_pages, {-1});
  api::check_shape(op, "ring", ring, {4});
  api::check_shape(op, "req_pool_indices", req_pool_indices, {-1});
  api::check_shape(op, lens_name, lens, {req_pool_indices.size(0)});
  DFLASH_CHECK(op, req_pool_indices.size(0) <= kMaxBatch, "req_pool_indices",
               "have at most " + std::to_string(kMaxBatch) + " entries", req_pool_indices.size(0));
  DFLASH_CHECK(op, req_to_token.size(1) <= kMaxWidth, "req_to_token",
               "have at most " + std::to_string(kMaxWidth) + " columns", req_to_token.size(1));
  DFLASH_CHECK(op, req_to_token.size(0) <= kMaxRows, "req_to_token",
               "have at most " + std::to_string(kMaxRows) + " rows", req_to_token.size(0));
  DFLASH_CHECK(op, page_size >= 1 && page_size <= 64, "page_size", "be in 1..64", page_size);
  DFLASH_CHECK(op, free_pages.size(0) * page_size <= (1ll << 31), "free_pages", "hold at most 2**31 slots",
               free_pages.size(0) * page_size);
  api::check_dtype(op, "req_to_token", req_to_token, {ScalarType::Int});
  api::check_dtype(op, "alloc_lens", alloc_lens, {ScalarType::Int});
  api::check_dtype(op, "free_pages", free_pages, {ScalarType::Int});
  api::check_dtype(op, "ring", ring, {ScalarType::Long});
  api::check_index_dtype(op, "req_pool_indices", req_pool_indices);
  api::check_index_dtype(op, lens_name, lens);
  api::check_last_dim_contiguous(op, "req_to_token", req_to_token);
  api::check_contiguous(op, "alloc_lens", alloc_lens);
  api::check_contiguous(op, "free_pages", free_pages);
  api::check_contiguous(op, "ring", ring);
  const std::pair<const char*, const Tensor*> others[] = {{"alloc_lens", &alloc_lens},
                                                          {"free_pages", &free_pages},
                                                          {"ring", &ring},
                                                          {"req_pool_indices", &req_pool_indices},
                                                          {lens_name, &lens}};
  for (const auto& [name, tensor] : others) api::check_same_device(op, name, *tensor, req_to_token);
  PageParams p;
  p.batch = req_pool_indices.size(0);
  p.page_size = static_cast<int>(page_size);
  p.per_page = Divisor(page_size);
  p.num_pages = free_pages.size(0);
  p.rows = req_to_token.size(0);
  p.width = req_to_token.size(1);
  p.req_to_token = static_cast<int32_t*>(req_to_token.data_ptr());
  p.req_to_token_stride = req_to_token.stride(0);
  p.alloc_lens = static_cast<int32_t*>(alloc_lens.data_ptr());
  p.free_pages = static_cast<int32_t*>(free_pages.data_ptr());
  p.ring = static_cast<int64_t*>(ring.data_ptr());
  p.req_pool_indices = api::int_view(req_pool_indices);
  p.lens = api::int_view(lens);
  return p;
}

struct FusedParams {
  PageParams pages;
  BlockParams block;
};

FusedParams fused_params(const Tensor& req_to_token, const Tensor& alloc_lens, const Tensor& free_pages,
                         const Tensor& ring, const Tensor& anchor_ids, const Tensor& prefix_lens,
                         const Tensor& req_pool_indices, int64_t page_size, int64_t mask_token_id,
                         std::optional<int64_t> reserve_tokens, const OptionalTensor& active, const Tensor& block_ids,
                         const Tensor& positions, const Tensor& slots) {
  const char* op = kReserveAndPrepare;
  FusedParams p;
  p.block = block_params(op, anchor_ids, prefix_lens, req_pool_indices, req_to_token, mask_token_id, block_ids,
                         positions, slots);
  DFLASH_CHECK(op, p.block.block_size <= kMaxBlockSize, "block_size", "be at most " + std::to_string(kMaxBlockSize),
               p.block.block_size);
  p.pages = page_params(op, "prefix_lens", req_to_token, alloc_lens, free_pages, ring, req_pool_indices, prefix_lens,
                        page_size);
  p.pages.extra_tokens = reserve_tokens.value_or(p.block.block_size);
  DFLASH_CHECK(op, p.pages.extra_tokens >= 0 && p.pages.extra_tokens <= kMaxWidth, "reserve_tokens",
               "be in [0, " + std::to_string(kMaxWidth) + "]", p.pages.extra_tokens);
  if (active.has_value()) {
    api::check_shape(op, "active", *active, {p.pages.batch});
    api::check_index_dtype(op, "active", *active);
    api::check_same_device(op, "active", *active, anchor_ids);
    p.pages.active = api::int_view(*active);
  }
  return p;
}

// --- values: always on the CPU, under DFLASH_DEBUG=1 on CUDA --------------------------------------------------------

void check_block_values(const BlockParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t row = p.req_pool_indices.at(b);
    DFLASH_CHECK(kPrepare, row >= 0 && row < p.rows, "req_pool_indices", "be in [0, " + std::to_string(p.rows) + ")",
                 row);
    DFLASH_CHECK(kPrepare, p.prefix_lens.at(b) >= 0, "prefix_lens", "be at least 0", p.prefix_lens.at(b));
  }
}

// All that could go wrong in the call itself; nothing has changed yet. Host pointers only.
void check_page_values(const char* op, const char* lens_name, const PageParams& p, bool reserve) {
  std::vector<bool> seen(p.rows);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.active.data != nullptr && p.active.at(b) == 0) continue;
    const int64_t row = p.req_pool_indices.at(b);
    DFLASH_CHECK(op, row >= 0 && row < p.rows, "req_pool_indices", "be in [0, " + std::to_string(p.rows) + ")", row);
    DFLASH_CHECK(op, !seen[row], "req_pool_indices", "be distinct", std::to_string(row) + " twice");
    seen[row] = true;
    const int64_t length = p.lens.at(b);
    DFLASH_CHECK(op, length >= 0 && length <= p.width, lens_name, "be in [0, " + std::to_string(p.width) + "]", length);
    const int64_t held = p.alloc_lens[row];
    DFLASH_CHECK(op, held >= 0 && held % p.page_size == 0 && held < p.width + p.page_size, "alloc_lens",
                 "hold whole pages of " + std::to_string(p.page_size) + " within the table", held);
  }
  const int64_t head = p.ring[kHead];
  const int64_t count = p.ring[kCount];
  DFLASH_CHECK(op, head >= 0 && (head < p.num_pages || head == 0) && count >= 0 && count <= p.num_pages, "ring",
               "hold a head below and a count of at most " + std::to_string(p.num_pages),
               std::to_string(head) + " and " + std::to_string(count));
  const int64_t excess = reserve ? pages_to_reserve(p) - count : pages_to_release(p) - (p.num_pages - count);
  DFLASH_CHECK(op, excess <= 0, "free_pages",
               reserve ? "hold all the pages asked for" : "have room for the pages given back",
               std::to_string(excess) + (reserve ? " too few" : " too many"));
}

#if DFLASH_WITH_CUDA
// The first n entries of a device vector, read after what is on the stream so far.
std::vector<int64_t> to_host(const char* op, const IntView& view, int64_t n, cudaStream_t stream) {
  const size_t width = view.is_int64 ? 8 : 4;
  std::vector<int64_t> values(n);
  if (n == 0) return values;
  std::vector<char> bytes(n * width);
  const bool expanded = view.stride0 == 0;  // one entry, n times
  cuda_check(cudaMemcpy2DAsync(bytes.data(), width, view.data, expanded ? width : view.stride0 * width, width,
                               expanded ? 1 : n, cudaMemcpyDeviceToHost, stream),
             op);
  cuda_check(cudaStreamSynchronize(stream), op);
  const IntView host{bytes.data(), expanded ? 0 : 1, 0, view.is_int64};
  for (int64_t i = 0; i < n; ++i) values[i] = host.at(i);
  return values;
}

IntView host_view(const std::vector<int64_t>& values) { return {values.data(), 1, 0, true}; }

void debug_check_block(BlockParams p, cudaStream_t stream) {
  const auto rows = to_host(kPrepare, p.req_pool_indices, p.batch, stream);
  const auto lens = to_host(kPrepare, p.prefix_lens, p.batch, stream);
  p.req_pool_indices = host_view(rows);
  p.prefix_lens = host_view(lens);
  check_block_values(p);
}

void debug_check_pages(const char* op, const char* lens_name, PageParams p, bool reserve, cudaStream_t stream) {
  const auto rows = to_host(op, p.req_pool_indices, p.batch, stream);
  const auto lens = to_host(op, p.lens, p.batch, stream);
  const auto active = to_host(op, p.active, p.active.data == nullptr ? 0 : p.batch, stream);
  const auto held = to_host(op, {p.alloc_lens, 1, 0, false}, p.rows, stream);
  auto ring = to_host(op, {p.ring, 1, 0, true}, 4, stream);
  std::vector<int32_t> alloc_lens(held.begin(), held.end());
  p.req_pool_indices = host_view(rows);
  p.lens = host_view(lens);
  if (p.active.data != nullptr) p.active = host_view(active);
  p.alloc_lens = alloc_lens.data();
  p.ring = ring.data();
  check_page_values(op, lens_name, p, reserve);
}
#endif

// --- implementations -------------------------------------------------------------------------------------------------

void prepare_block_out_cpu(Tensor anchor_ids, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token,
                           int64_t mask_token_id, Tensor block_ids, Tensor positions, Tensor slots) {
  const BlockParams p = block_params(kPrepare, anchor_ids, prefix_lens, req_pool_indices, req_to_token, mask_token_id,
                                     block_ids, positions, slots);
  check_block_values(p);
  prepare_block_cpu(p);
}

void reserve_cpu(Tensor req_to_token, Tensor alloc_lens, Tensor free_pages, Tensor ring, Tensor req_pool_indices,
                 Tensor target_lens, int64_t page_size) {
  const PageParams p = page_params(kReserve, "target_lens", req_to_token, alloc_lens, free_pages, ring,
                                   req_pool_indices, target_lens, page_size);
  check_page_values(kReserve, "target_lens", p, true);
  reserve_kv_slots_cpu(p);
}

void release_cpu(Tensor req_to_token, Tensor alloc_lens, Tensor free_pages, Tensor ring, Tensor req_pool_indices,
                 Tensor keep_lens, int64_t page_size) {
  const PageParams p = page_params(kRelease, "keep_lens", req_to_token, alloc_lens, free_pages, ring, req_pool_indices,
                                   keep_lens, page_size);
  check_page_values(kRelease, "keep_lens", p, false);
  release_kv_slots_cpu(p);
}

void fused_out_cpu(Tensor req_to_token, Tensor alloc_lens, Tensor free_pages, Tensor ring, Tensor anchor_ids,
                   Tensor prefix_lens, Tensor req_pool_indices, int64_t page_size, int64_t mask_token_id,
                   std::optional<int64_t> reserve_tokens, OptionalTensor active, Tensor block_ids, Tensor positions,
                   Tensor slots) {
  const FusedParams p =
      fused_params(req_to_token, alloc_lens, free_pages, ring, anchor_ids, prefix_lens, req_pool_indices, page_size,
                   mask_token_id, reserve_tokens, active, block_ids, positions, slots);
  check_page_values(kReserveAndPrepare, "prefix_lens", p.pages, true);
  reserve_and_prepare_block_cpu(p.pages, p.block);
}

#if DFLASH_WITH_CUDA
void prepare_block_out_cuda(Tensor anchor_ids, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token,
                            int64_t mask_token_id, Tensor block_ids, Tensor positions, Tensor slots) {
  const BlockParams p = block_params(kPrepare, anchor_ids, prefix_lens, req_pool_indices, req_to_token, mask_token_id,
                                     block_ids, positions, slots);
  if (p.batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(anchor_ids.get_device_index());
  const cudaStream_t stream = api::current_stream(kPrepare, anchor_ids);
  if (api::checks_values(kPrepare, stream)) debug_check_block(p, stream);
  launch_prepare_block(p, stream);
}

void reserve_cuda(Tensor req_to_token, Tensor alloc_lens, Tensor free_pages, Tensor ring, Tensor req_pool_indices,
                  Tensor target_lens, int64_t page_size) {
  const PageParams p = page_params(kReserve, "target_lens", req_to_token, alloc_lens, free_pages, ring,
                                   req_pool_indices, target_lens, page_size);
  if (p.batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(req_to_token.get_device_index());
  const cudaStream_t stream = api::current_stream(kReserve, req_to_token);
  if (api::checks_values(kReserve, stream)) debug_check_pages(kReserve, "target_lens", p, true, stream);
  launch_reserve_kv_slots(p, stream);
}

void release_cuda(Tensor req_to_token, Tensor alloc_lens, Tensor free_pages, Tensor ring, Tensor req_pool_indices,
                  Tensor keep_lens, int64_t page_size) {
  const PageParams p = page_params(kRelease, "keep_lens", req_to_token, alloc_lens, free_pages, ring, req_pool_indices,
                                   keep_lens, page_size);
  if (p.batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(req_to_token.get_device_index());
  const cudaStream_t stream = api::current_stream(kRelease, req_to_token);
  if (api::checks_values(kRelease, stream)) debug_check_pages(kRelease, "keep_lens", p, false, stream);
  launch_release_kv_slots(p, stream);
}

void fused_out_cuda(Tensor req_to_token, Tensor alloc_lens, Tensor free_pages, Tensor ring, Tensor anchor_ids,
                    Tensor prefix_lens, Tensor req_pool_indices, int64_t page_size, int64_t mask_token_id,
                    std::optional<int64_t> reserve_tokens, OptionalTensor active, Tensor block_ids, Tensor positions,
                    Tensor slots) {
  const FusedParams p =
      fused_params(req_to_token, alloc_lens, free_pages, ring, anchor_ids, prefix_lens, req_pool_indices, page_size,
                   mask_token_id, reserve_tokens, active, block_ids, positions, slots);
  if (p.pages.batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(req_to_token.get_device_index());
  const cudaStream_t stream = api::current_stream(kReserveAndPrepare, req_to_token);
  if (api::checks_values(kReserveAndPrepare, stream))
    debug_check_pages(kReserveAndPrepare, "prefix_lens", p.pages, true, stream);
  launch_reserve_and_prepare_block(p.pages, p.block, stream);
}
#endif

struct NewBlock {
  Tensor block_ids, positions, slots;
};

NewBlock new_block(const char* op, const Tensor& anchor_ids, int64_t block_size) {
  api::check_shape(op, "anchor_ids", anchor_ids, {-1});
  DFLASH_CHECK(op, block_size >= 1, "block_size", "be at least 1", block_size);
  const std::vector<int64_t> shape{anchor_ids.size(0), block_size};
  return {api::new_empty(anchor_ids, shape, ScalarType::Long), api::new_empty(anchor_ids, shape, ScalarType::Long),
          api::new_empty(anchor_ids, shape, ScalarType::Long)};
}

template <auto kOut>
std::tuple<Tensor, Tensor, Tensor> prepare_block(Tensor anchor_ids, Tensor prefix_lens, Tensor req_pool_indices,
                                                 Tensor req_to_token, int64_t block_size, int64_t mask_token_id) {
  const NewBlock out = new_block(kPrepare, anchor_ids, block_size);
  kOut(anchor_ids, prefix_lens, req_pool_indices, req_to_token, mask_token_id, out.block_ids, out.positions, out.slots);
  return {out.block_ids, out.positions, out.slots};
}

template <auto kOut>
std::tuple<Tensor, Tensor, Tensor> reserve_and_prepare_block(Tensor req_to_token, Tensor alloc_lens, Tensor free_pages,
                                                             Tensor ring, Tensor anchor_ids, Tensor prefix_lens,
                                                             Tensor req_pool_indices, int64_t page_size,
                                                             int64_t mask_token_id, int64_t block_size,
                                                             std::optional<int64_t> reserve_tokens,
                                                             OptionalTensor active) {
  const NewBlock out = new_block(kReserveAndPrepare, anchor_ids, block_size);
  kOut(req_to_token, alloc_lens, free_pages, ring, anchor_ids, prefix_lens, req_pool_indices, page_size, mask_token_id,
       reserve_tokens, active, out.block_ids, out.positions, out.slots);
  return {out.block_ids, out.positions, out.slots};
}

}  // namespace
}  // namespace dflash::alloc

STABLE_TORCH_LIBRARY_FRAGMENT(dflash, m) {
  m.def(
      "prepare_block(Tensor anchor_ids, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token, "
      "int block_size, int mask_token_id) -> (Tensor block_ids, Tensor positions, Tensor slots)");
  m.def(
      "prepare_block.out(Tensor anchor_ids, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token, "
      "int mask_token_id, *, Tensor(a!) block_ids, Tensor(b!) positions, Tensor(c!) slots) -> ()");
  m.def(
      "reserve_kv_slots(Tensor(a!) req_to_token, Tensor(b!) alloc_lens, Tensor(c!) free_pages, Tensor(d!) ring, "
      "Tensor req_pool_indices, Tensor target_lens, int page_size) -> ()");
  m.def(
      "release_kv_slots(Tensor(a!) req_to_token, Tensor(b!) alloc_lens, Tensor(c!) free_pages, Tensor(d!) ring, "
      "Tensor req_pool_indices, Tensor keep_lens, int page_size) -> ()");
  m.def(
      "reserve_and_prepare_block(Tensor(a!) req_to_token, Tensor(b!) alloc_lens, Tensor(c!) free_pages, "
      "Tensor(d!) ring, Tensor anchor_ids, Tensor prefix_lens, Tensor req_pool_indices, int page_size, "
      "int mask_token_id, *, int block_size, int? reserve_tokens=None, Tensor? active=None) "
      "-> (Tensor block_ids, Tensor positions, Tensor slots)");
  m.def(
      "reserve_and_prepare_block.out(Tensor(a!) req_to_token, Tensor(b!) alloc_lens, Tensor(c!) free_pages, "
      "Tensor(d!) ring, Tensor anchor_ids, Tensor prefix_lens, Tensor req_pool_indices, int page_size, "
      "int mask_token_id, *, int? reserve_tokens=None, Tensor? active=None, Tensor(e!) block_ids, "
      "Tensor(f!) positions, Tensor(g!) slots) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) {
  m.impl("prepare_block", TORCH_BOX(&dflash::alloc::prepare_block<&dflash::alloc::prepare_block_out_cpu>));
  m.impl("prepare_block.out", TORCH_BOX(&dflash::alloc::prepare_block_out_cpu));
  m.impl("reserve_kv_slots", TORCH_BOX(&dflash::alloc::reserve_cpu));
  m.impl("release_kv_slots", TORCH_BOX(&dflash::alloc::release_cpu));
  m.impl("reserve_and_prepare_block",
         TORCH_BOX(&dflash::alloc::reserve_and_prepare_block<&dflash::alloc::fused_out_cpu>));
  m.impl("reserve_and_prepare_block.out", TORCH_BOX(&dflash::alloc::fused_out_cpu));
}

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("prepare_block", TORCH_BOX(&dflash::alloc::prepare_block<&dflash::alloc::prepare_block_out_cuda>));
  m.impl("prepare_block.out", TORCH_BOX(&dflash::alloc::prepare_block_out_cuda));
  m.impl("reserve_kv_slots", TORCH_BOX(&dflash::alloc::reserve_cuda));
  m.impl("release_kv_slots", TORCH_BOX(&dflash::alloc::release_cuda));
  m.impl("reserve_and_prepare_block",
         TORCH_BOX(&dflash::alloc::reserve_and_prepare_block<&dflash::alloc::fused_out_cuda>));
  m.impl("reserve_and_prepare_block.out", TORCH_BOX(&dflash::alloc::fused_out_cuda));
}
#endif

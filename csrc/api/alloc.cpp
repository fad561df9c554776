// prepare_block, reserve_kv_slots, release_kv_slots: schemas, checks, dispatch.
#include <tuple>
#include <unordered_set>

#include "api/check.h"
#include "api/cuda_stream.h"
#include "cpu/alloc.h"
#if DFLASH_WITH_CUDA
#include "smxx/alloc/launch.h"
#endif

namespace dflash::alloc {
namespace {

using api::ScalarType;
using api::Tensor;

PrepareParams prepare_params(const Tensor& anchor_ids, const Tensor& prefix_lens, const Tensor& req_pool_indices,
                             const Tensor& req_to_token, int64_t mask_token_id, const Tensor& block_ids,
                             const Tensor& positions, const Tensor& slots) {
  const char* op = "prepare_block";
  const int64_t batch = anchor_ids.dim() == 1 ? anchor_ids.size(0) : -1;
  api::check_shape(op, "anchor_ids", anchor_ids, {-1});
  api::check_shape(op, "prefix_lens", prefix_lens, {batch});
  api::check_shape(op, "req_pool_indices", req_pool_indices, {batch});
  api::check_shape(op, "req_to_token", req_to_token, {-1, -1});
  api::check_shape(op, "block_ids", block_ids, {batch, -1});
  const int64_t block_size = block_ids.size(1);
  DFLASH_CHECK(op, block_size >= 1, "block_size", "be at least 1", block_size);
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
  PrepareParams p;
  p.batch = batch;
  p.block_size = static_cast<int>(block_size);
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

void check_prepare_values(const PrepareParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t row = p.req_pool_indices.at(b);
    DFLASH_CHECK("prepare_block", row >= 0 && row < p.rows, "req_pool_indices",
                 "be in [0, " + std::to_string(p.rows) + ")", row);
    DFLASH_CHECK("prepare_block", p.prefix_lens.at(b) >= 0, "prefix_lens", "be at least 0", p.prefix_lens.at(b));
  }
}

void prepare_block_out_cpu(Tensor anchor_ids, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token,
                           int64_t mask_token_id, Tensor block_ids, Tensor positions, Tensor slots) {
  const PrepareParams p = prepare_params(anchor_ids, prefix_lens, req_pool_indices, req_to_token, mask_token_id,
                                         block_ids, positions, slots);
  check_prepare_values(p);
  prepare_block_cpu(p);
}

#if DFLASH_WITH_CUDA
void prepare_block_out_cuda(Tensor anchor_ids, Tensor prefix_lens, Tensor req_pool_indices, Tensor req_to_token,
                            int64_t mask_token_id, Tensor block_ids, Tensor positions, Tensor slots) {
  const PrepareParams p = prepare_params(anchor_ids, prefix_lens, req_pool_indices, req_to_token, mask_token_id,
                                         block_ids, positions, slots);
  if (p.batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(anchor_ids.get_device_index());
  launch_prepare_block(p, api::current_stream("prepare_block", anchor_ids));
}
#endif

template <auto kOut>
std::tuple<Tensor, Tensor, Tensor> prepare_block(Tensor anchor_ids, Tensor prefix_lens, Tensor req_pool_indices,
                                                 Tensor req_to_token, int64_t block_size, int64_t mask_token_id) {
  api::check_shape("prepare_block", "anchor_ids", anchor_ids, {-1});
  DFLASH_CHECK("prepare_block", block_size >= 1, "block_size", "be at least 1", block_size);
  const std::vector<int64_t> shape{anchor_ids.size(0), block_size};
  const Tensor block_ids = api::new_empty(anchor_ids, shape, ScalarType::Long);
  const Tensor positions = api::new_empty(anchor_ids, shape, ScalarType::Long);
  const Tensor slots = api::new_empty(anchor_ids, shape, ScalarType::Long);
  kOut(anchor_ids, prefix_lens, req_pool_indices, req_to_token, mask_token_id, block_ids, positions, slots);
  return {block_ids, positions, slots};
}

PageParams page_params(const char* op, const char* lens_name, const Tensor& req_to_token, const Tensor& alloc_lens,
                       const Tensor& free_pages, const Tensor& ring, const Tensor& req_pool_indices,
                       const Tensor& lens, int64_t page_size) {
  api::check_shape(op, "req_to_token", req_to_token, {-1, -1});
  api::check_shape(op, "alloc_lens", alloc_lens, {req_to_token.size(0)});
  api::check_shape(op, "free_pages", free_pages, {-1});
  api::check_shape(op, "ring", ring, {4});
  api::check_shape(op, "req_pool_indices", req_pool_indices, {-1});
  api::check_shape(op, lens_name, lens, {req_pool_indices.size(0)});
  DFLASH_CHECK(op, page_size >= 1 && page_size <= 64, "page_size", "be in 1..64", page_size);
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
  p.page_size = page_size;
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

void check_page_values(const char* op, const char* lens_name, const PageParams& p) {
  std::unordered_set<int64_t> seen;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t row = p.req_pool_indices.at(b);
    DFLASH_CHECK(op, row >= 0 && row < p.rows, "req_pool_indices", "be in [0, " + std::to_string(p.rows) + ")", row);
    DFLASH_CHECK(op, seen.insert(row).second, "req_pool_indices", "be distinct", std::to_string(row) + " twice");
    const int64_t length = p.lens.at(b);
    DFLASH_CHECK(op, length >= 0 && length <= p.width, lens_name, "be in [0, " + std::to_string(p.width) + "]",
                 length);
  }
}

void reserve_cpu(Tensor req_to_token, Tensor alloc_lens, Tensor free_pages, Tensor ring, Tensor req_pool_indices,
                 Tensor target_lens, int64_t page_size) {
  const char* op = "reserve_kv_slots";
  const PageParams p = page_params(op, "target_lens", req_to_token, alloc_lens, free_pages, ring, req_pool_indices,
                                   target_lens, page_size);
  check_page_values(op, "target_lens", p);
  int64_t missing = 0;
  const bool done = reserve_kv_slots_cpu(p, &missing);
  DFLASH_CHECK(op, done, "free_pages", "hold all the pages asked for", std::to_string(missing) + " too few");
}

void release_cpu(Tensor req_to_token, Tensor alloc_lens, Tensor free_pages, Tensor ring, Tensor req_pool_indices,
                 Tensor keep_lens, int64_t page_size) {
  const PageParams p = page_params("release_kv_slots", "keep_lens", req_to_token, alloc_lens, free_pages, ring,
                                   req_pool_indices, keep_lens, page_size);
  check_page_values("release_kv_slots", "keep_lens", p);
  release_kv_slots_cpu(p);
}

#if DFLASH_WITH_CUDA
void reserve_cuda(Tensor req_to_token, Tensor alloc_lens, Tensor free_pages, Tensor ring, Tensor req_pool_indices,
                  Tensor target_lens, int64_t page_size) {
  const PageParams p = page_params("reserve_kv_slots", "target_lens", req_to_token, alloc_lens, free_pages, ring,
                                   req_pool_indices, target_lens, page_size);
  if (p.batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(req_to_token.get_device_index());
  launch_reserve_kv_slots(p, api::current_stream("reserve_kv_slots", req_to_token));
}

void release_cuda(Tensor req_to_token, Tensor alloc_lens, Tensor free_pages, Tensor ring, Tensor req_pool_indices,
                  Tensor keep_lens, int64_t page_size) {
  const PageParams p = page_params("release_kv_slots", "keep_lens", req_to_token, alloc_lens, free_pages, ring,
                                   req_pool_indices, keep_lens, page_size);
  if (p.batch == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(req_to_token.get_device_index());
  launch_release_kv_slots(p, api::current_stream("release_kv_slots", req_to_token));
}
#endif

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
}

STABLE_TORCH_LIBRARY_IMPL(dflash, CPU, m) {
  m.impl("prepare_block", TORCH_BOX(&dflash::alloc::prepare_block<&dflash::alloc::prepare_block_out_cpu>));
  m.impl("prepare_block.out", TORCH_BOX(&dflash::alloc::prepare_block_out_cpu));
  m.impl("reserve_kv_slots", TORCH_BOX(&dflash::alloc::reserve_cpu));
  m.impl("release_kv_slots", TORCH_BOX(&dflash::alloc::release_cpu));
}

#if DFLASH_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash, CUDA, m) {
  m.impl("prepare_block", TORCH_BOX(&dflash::alloc::prepare_block<&dflash::alloc::prepare_block_out_cuda>));
  m.impl("prepare_block.out", TORCH_BOX(&dflash::alloc::prepare_block_out_cuda));
  m.impl("reserve_kv_slots", TORCH_BOX(&dflash::alloc::reserve_cuda));
  m.impl("release_kv_slots", TORCH_BOX(&dflash::alloc::release_cuda));
}
#endif

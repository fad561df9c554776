// TMA descriptors of row-major matrices of bf16 or bytes, and of their scales, made on the host for one launch.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace dflash::many_rows {

using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// nullptr where the driver has none.
inline EncodeTensorMap tensor_map_encoder() {
  static const EncodeTensorMap encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<EncodeTensorMap>(function) : EncodeTensorMap{nullptr};
  }();
  return encode;
}

// Boxes of [box_rows, box_columns] elements of a row-major matrix; outside of [rows, columns] they read zeros. Base and
// stride (in bytes) aligned to 16 bytes. False where the driver has none or refuses.
inline bool encode_tensor_map(CUtensorMap* map, const void* data, CUtensorMapDataType type, int64_t rows,
                              int64_t columns, int64_t stride_bytes, int box_rows, int box_columns,
                              CUtensorMapSwizzle swizzle) {
  const EncodeTensorMap encode = tensor_map_encoder();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  return encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Boxes of box_rows rows of 128 bytes, swizzled by 128 bytes, of elements of 2 bytes or 1; stride in elements, at least
// columns.
inline bool make_tensor_map(CUtensorMap* map, const void* data, int element_bytes, int64_t rows, int64_t columns,
                            int64_t stride, int box_rows) {
  const auto type = element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  return encode_tensor_map(map, data, type, rows, columns, stride * element_bytes, box_rows, 128 / element_bytes,
                           CU_TENSOR_MAP_SWIZZLE_128B);
}

// Scales of block-scaled operands [row_blocks, k_blocks, 512] bytes: boxes of four blocks along K, which lie behind
// each other. In words of 8 bytes, of which a box may have 256.
inline bool make_scale_map(CUtensorMap* map, const uint8_t* blocks, int64_t row_blocks, int64_t k_blocks) {
  return encode_tensor_map(map, blocks, CU_TENSOR_MAP_DATA_TYPE_UINT64, row_blocks, k_blocks * 64, k_blocks * 512, 1,
                           256, CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace dflash::many_rows

// The index half of inject_kv on the CPU; the GEMMs before it are torch's.
#include "cpu/inject.h"

#include <cmath>
#include <cstring>

#include "common/half_bits.h"
#include "common/order_key.h"

namespace dflash::inject {
namespace {

float to_float(float x) { return x; }
float to_float(uint16_t bits) { return bf16_bits_to_float(bits); }

void store(float x, float* out) { *out = x; }
void store(float x, uint16_t* out) {
  const uint32_t bits = float_bits(x);
  // Round to nearest, ties to even; NaN stays NaN.
  *out = x != x ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <typename T>
void write_kv(const WriteParams& p) {
  const int dim = p.head_dim, half = p.rotary_dim / 2;
  float x[kMaxHeadDim];
  for (int64_t row = 0; row < p.rows; ++row) {
    if (!p.live.at(row)) continue;
    const int64_t slot = p.slots.at(row);
    const float* cosines = p.cos_sin + p.positions.at(row) * p.cos_sin_stride;
    const float* sines = cosines + half;
    for (int layer = 0; layer < p.layers; ++layer) {
      for (int head = 0; head < p.kv_heads; ++head) {
        const T* k = static_cast<const T*>(p.kv) + ((row * p.layers + layer) * 2 * p.kv_heads + head) * dim;
        const T* v = k + p.kv_heads * dim;
        const CacheView &k_view = p.k[layer], &v_view = p.v[layer];
        T* k_out = static_cast<T*>(k_view.data) + slot * k_view.slot_stride + head * k_view.head_stride;
        T* v_out = static_cast<T*>(v_view.data) + slot * v_view.slot_stride + head * v_view.head_stride;
        std::memcpy(v_out, v, sizeof(T) * dim);
        float sum = 0.0f;
        for (int i = 0; i < dim; ++i) {
          x[i] = to_float(k[i]);
          sum += x[i] * x[i];
        }
        if (p.k_norm != nullptr) {
          const T* weight = static_cast<const T*>(p.k_norm) + layer * dim;
          const float scale = 1.0f / std::sqrt(sum / static_cast<float>(dim) + p.eps);
          for (int i = 0; i < dim; ++i) x[i] = x[i] * scale * to_float(weight[i]);
        }
        for (int i = 0; i < half; ++i) {
          store(x[i] * cosines[i] - x[i + half] * sines[i], k_out + i);
          store(x[i + half] * cosines[i] + x[i] * sines[i], k_out + i + half);
        }
        for (int i = 2 * half; i < dim; ++i) store(x[i], k_out + i);
      }
    }
  }
}

}  // namespace

void write_kv_cpu(const WriteParams& p, FloatType type) {
  type == FloatType::kFloat32 ? write_kv<float>(p) : write_kv<uint16_t>(p);
}

}  // namespace dflash::inject

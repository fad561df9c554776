// The index half of inject_kv on the CPU; the GEMMs before it are torch's.
#include "cpu/inject.h"

#include <cmath>

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
float round_to(float x) {
  T stored;
  store(x, &stored);
  return to_float(stored);
}

// One head of a cache of T or, with p.is_fp8, of e4m3.
template <typename T>
struct HeadOut {
  T* values;
  uint8_t* codes;
  float inverse;
  HeadOut(const WriteParams& p, const CacheView& view, const float* scale, int64_t slot, int head, int layer)
      : inverse(scale == nullptr ? 1.0f : 1.0f / scale[layer]) {
    const int64_t at = slot * view.slot_stride + head * view.head_stride;
    values = p.is_fp8 ? nullptr : static_cast<T*>(view.data) + at;
    codes = p.is_fp8 ? static_cast<uint8_t*>(view.data) + at : nullptr;
  }
  void set(int i, float x) const {
    if (codes != nullptr) {
      codes[i] = float_to_e4m3(x * inverse);
    } else {
      store(x, values + i);
    }
  }
};

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
        const HeadOut<T> k_out(p, k_view, p.k_scale, slot, head, layer), v_out(p, v_view, p.v_scale, slot, head, layer);
        for (int i = 0; i < dim; ++i) v_out.set(i, round_to<T>(to_float(v[i]) * p.value_scale));
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
          k_out.set(i, x[i] * cosines[i] - x[i + half] * sines[i]);
          k_out.set(i + half, x[i + half] * cosines[i] + x[i] * sines[i]);
        }
        for (int i = 2 * half; i < dim; ++i) k_out.set(i, x[i]);
      }
    }
  }
}

}  // namespace

void write_kv_cpu(const WriteParams& p, FloatType type) {
  type == FloatType::kFloat32 ? write_kv<float>(p) : write_kv<uint16_t>(p);
}

}  // namespace dflash::inject

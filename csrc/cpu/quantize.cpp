// Rows of bf16 or float32 to codes of e4m3 with a scale each.
#include "cpu/quantize.h"

#include "common/half_bits.h"
#include "common/row_scale.h"

namespace dflash::quantize {
namespace {

float value_of(float x) { return x; }
float value_of(uint16_t x) { return bf16_bits_to_float(x); }

template <typename T>
void quantize_rows(const QuantizeParams& p) {
  for (int64_t row = 0; row < p.m; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.n;
    float largest = 0.0f;
    for (int64_t c = 0; c < p.n; ++c) largest = std::fmax(largest, std::fabs(value_of(x[c])));
    const RowScale scale = row_scale(largest);
    p.scale[row] = scale.scale;
    for (int64_t c = 0; c < p.n; ++c) p.codes[row * p.n + c] = float_to_e4m3(value_of(x[c]) * scale.inverse);
  }
}

}  // namespace

void quantize_rows_cpu(const QuantizeParams& p) { p.is_bf16 ? quantize_rows<uint16_t>(p) : quantize_rows<float>(p); }

}  // namespace dflash::quantize

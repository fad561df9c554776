#pragma once

#include "smxx/inject/params.h"

namespace dflash::inject {

enum class FloatType { kFloat32, kBFloat16 };

// K-norm, RoPE and paged write of the live rows; p.kv, k_norm and the caches hold `type` (caches also e4m3). Values
// have been checked.
void write_kv_cpu(const WriteParams& p, FloatType type);

}  // namespace dflash::inject

#pragma once

#include "smxx/quantize/params.h"

namespace dflash::quantize {

void quantize_rows_cpu(const QuantizeParams& params);

}  // namespace dflash::quantize

#pragma once

#include "smxx/dflash2/params.h"

namespace dflash::dflash2 {

void select_path_cpu(const SelectParams& params);
void grouped_conv_cpu(const ConvParams& params);

}  // namespace dflash::dflash2

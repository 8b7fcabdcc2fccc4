#pragma once

#include "params/quantize.h"

namespace fastattn::cpu {

void QuantizeFp8(const QuantizeFp8Params& p);

}  // namespace fastattn::cpu

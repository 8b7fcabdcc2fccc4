#pragma once

#include "params/mla_output.h"

namespace fastattn::cpu {

void InverseRopeQuantizeFp8(const InverseRopeParams& p);

}  // namespace fastattn::cpu

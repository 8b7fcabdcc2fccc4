#pragma once

#include "params/mla_qkv.h"

namespace fastattn::cpu {

void MlaQkvNormRopeWrite(const MlaQkvParams& p);

}  // namespace fastattn::cpu

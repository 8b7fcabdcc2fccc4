#pragma once

#include "params/mla_attention.h"

namespace fastattn::cpu {

void MlaSparseAttention(const MlaSparseParams& p);

}  // namespace fastattn::cpu

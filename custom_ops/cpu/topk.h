#pragma once

#include "params/topk.h"

namespace fastattn::cpu {

void TopkIndices(const TopkParams& p);

}  // namespace fastattn::cpu

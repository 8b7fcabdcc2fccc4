#pragma once

#include "params/merge_many.h"

namespace fastattn::cpu {

void MergeManyAttnStates(const MergeManyParams& p);

}  // namespace fastattn::cpu

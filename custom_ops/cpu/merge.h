#pragma once

#include "params/merge.h"

namespace fastattn::cpu {

void MergeAttnStates(const MergeParams& p);

}  // namespace fastattn::cpu

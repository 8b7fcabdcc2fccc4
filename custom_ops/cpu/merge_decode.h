#pragma once

#include "params/merge_decode.h"

namespace fastattn::cpu {

void MergeDecode(const MergeDecodeParams& p);

}  // namespace fastattn::cpu

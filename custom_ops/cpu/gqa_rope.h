#pragma once

#include "params/gqa_rope.h"

namespace fastattn::cpu {

void GqaRopeWriteCache(const GqaRopeWriteCacheParams& p);

}  // namespace fastattn::cpu

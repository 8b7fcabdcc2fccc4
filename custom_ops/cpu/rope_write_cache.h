#pragma once

#include "params/rope.h"

namespace fastattn::cpu {

void RopeWriteCache(const RopeWriteCacheParams& p);

}  // namespace fastattn::cpu

#pragma once

#include "params/key_transform.h"
#include "params/rope.h"

namespace fastattn::cpu {

void RopeWriteCache(const RopeWriteCacheParams& p, const KeyTransform& transform);

}  // namespace fastattn::cpu

#pragma once

#include "params/cache.h"
#include "params/key_transform.h"

namespace fastattn::cpu {

void WriteCache(const WriteCacheParams& p, const KeyTransform& transform);

}  // namespace fastattn::cpu

#pragma once

#include "params/cache.h"

namespace fastattn::cpu {

void WriteCache(const WriteCacheParams& p);

}  // namespace fastattn::cpu

#pragma once

#include "params/cache.h"

namespace fastattn::cpu {

void AppendCache(const AppendCacheParams& p);

}  // namespace fastattn::cpu

#pragma once

#include "params/mla_cache.h"

namespace fastattn::cpu {

void MlaWriteCache(const MlaWriteParams& p);
void MlaGatherCache(const MlaGatherParams& p);

}  // namespace fastattn::cpu

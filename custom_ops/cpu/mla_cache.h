#pragma once

#include "params/mla_cache.h"

namespace fastattn::cpu {

void MlaWriteCache(const MlaWriteParams& p);
// One token of it, whose channels lie anywhere.
void MlaWriteToken(const MlaWriteParams& p, int64_t token, const uint16_t* latent,
                   const uint16_t* rope);
void MlaGatherCache(const MlaGatherParams& p);

}  // namespace fastattn::cpu

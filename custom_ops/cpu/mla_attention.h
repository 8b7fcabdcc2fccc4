#pragma once

#include "params/mla_attention.h"

namespace fastattn::cpu {

// Tokens of no sequence keep their output; their LSE is not written.
void MlaAttention(const MlaAttentionParams& p);

}  // namespace fastattn::cpu

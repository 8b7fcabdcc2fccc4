#pragma once

#include "params/attention.h"

namespace fastattn::cpu {

// Throws std::invalid_argument for a combination of types that is not compiled.
void Attention(const AttentionParams& p);

}  // namespace fastattn::cpu

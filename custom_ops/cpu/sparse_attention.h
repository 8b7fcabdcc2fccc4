#pragma once

#include "params/sparse_attention.h"

namespace fastattn::cpu {

// Writes output and LSE of every token of a sequence, and leaves other tokens alone.
// Throws std::invalid_argument for a combination of types that is not compiled.
void SparseAttention(const SparseAttentionParams& p);

}  // namespace fastattn::cpu

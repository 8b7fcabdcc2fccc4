// Which kernel of rope_write_cache_kv a step takes, from what the host knows.
#pragma once

#include "plan/limits.h"

namespace fastattn {

inline bool UseDecodeKernel(int num_tokens, int batch) {
  if (num_tokens > 65535) return false;  // the grid's second dimension
  return num_tokens <= kDecodeKernelMax || num_tokens <= kTokensPerSeqMax * batch;
}

// Tokens that a CTA of the decode kernel takes: several where most sequences have several new ones,
// whose bytes of V lie side by side. A power of 2.
inline constexpr int kMostTokensTogether = 8;

inline int TokensTogether(int num_tokens, int batch) {
  if (num_tokens < 2 * batch) return 1;
  return num_tokens <= 4 * batch ? 4 : kMostTokensTogether;
}

}  // namespace fastattn

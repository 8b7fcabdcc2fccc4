// Which kernel a step takes, from what the host knows.
#pragma once

namespace fastattn::cuda {

// Up to this many tokens the one-token kernel is faster whatever the rows look like: its CTAs wait
// for one round of loads, a tile's for eight.
inline constexpr int kTokenKernelMax = 512;
// With more, it is used for decode and speculative rows only, where a tile would be nearly empty.
inline constexpr int kTokensPerRowMax = 8;

inline bool UseTokenKernel(int num_tokens, int batch) {
  if (num_tokens > 65535) return false;  // the grid's second dimension
  return num_tokens <= kTokenKernelMax || num_tokens <= kTokensPerRowMax * batch;
}

}  // namespace fastattn::cuda

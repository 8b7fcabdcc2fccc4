// Which kernel a step takes, from what the host knows.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// Up to this many tokens the one-token kernel is faster whatever the rows look like: its CTAs wait
// for one round of loads.
inline constexpr int kTokenKernelMax = 512;
// Where both kernels have a lean form, a prompt of this many tokens is as fast in tiles.
inline constexpr int kDecodeKernelMax = 16;
// With more, it is used for decode and speculative rows only, where a tile would be nearly empty.
inline constexpr int kTokensPerRowMax = 8;

inline bool UseTokenKernel(int num_tokens, int batch) {
  if (num_tokens > 65535) return false;  // the grid's second dimension
  return num_tokens <= kTokenKernelMax || num_tokens <= kTokensPerRowMax * batch;
}

// A grid of at most this many CTAs leaves most of a GPU to the next kernel.
inline constexpr int kSmallGrid = 256;

// The same choice where both kernels have their lean form: by the tokens of a row alone.
inline bool UseDecodeKernel(int num_tokens, int batch) {
  if (num_tokens > 65535) return false;
  return num_tokens <= kDecodeKernelMax || num_tokens <= kTokensPerRowMax * batch;
}

// For the larger CTAs of the lean prefill kernel.
inline constexpr int kStreamCtasWanted = 512;

// CTAs that share the heads of one group of tokens, so that `token_groups` of them fill a GPU
// several times over.
inline int HeadShares(int token_groups, int heads, int ctas_wanted = 1024) {
  const int shares = (ctas_wanted + token_groups - 1) / token_groups;
  return shares < 1 ? 1 : (shares > heads ? heads : shares);
}

// Heads that a lane group of the one-token kernel takes, so that one wave of CTAs does it all.
inline int HeadsPerGroup(int num_tokens, int heads, int groups, int most) {
  constexpr int kCtasOfAWave = 1056;  // 132 multiprocessors x 8
  for (int share = 1; share < most; ++share) {
    if (static_cast<int64_t>((heads + groups * share - 1) / (groups * share)) * num_tokens <=
        kCtasOfAWave) {
      return share;
    }
  }
  return most;
}

}  // namespace fastattn::cuda

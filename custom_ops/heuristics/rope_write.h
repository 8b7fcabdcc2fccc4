// Which kernel of rope_write_cache_kv a step takes, from what the host knows.
#pragma once

namespace fastattn {

// A prompt of more tokens than this is as fast in tiles.
inline constexpr int kDecodeKernelMax = 16;
// With more, the decode kernel takes decode and speculative steps only, where a tile would be
// nearly empty.
inline constexpr int kTokensPerSeqMax = 8;

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

// A grid of at most this many CTAs leaves most of a GPU to the next kernel.
inline constexpr int kSmallGrid = 256;
// One of at most this many CTAs of a warp lets the next kernel be set up from its start on.
inline constexpr int kReleasingGrid = 1536;
// The same for CTAs of several tokens.
inline constexpr int kReleasingGridTogether = 6144;

}  // namespace fastattn

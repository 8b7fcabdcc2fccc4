// How a prompt is cut: streaming CTAs give a token to each warp, which walks over its heads, a few
// at a time; they are followed by CTAs that take one KV head of a tile of V.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "cuda/cache/shared/head_lanes.cuh"
#include "cuda/cache/shared/seq_tiles.cuh"

namespace fastattn::cuda {

inline constexpr int kStreamThreads = 256;
inline constexpr int kStreamCtasWanted = 512;  // that a GPU is filled several times over

template <typename Traits>
using StreamLane = LaneShape<Traits::kIn, Traits::kHeadDim, 8>;

struct StreamGrid {
  int stream_ctas;
  int shares;           // CTAs that share the heads of the same tokens
  int steps_per_share;  // groups of heads that one of them takes
  float seqs_per_token;
  float seqs_per_tile;
  int64_t ctas;  // all of them
};

// `steps`: groups of heads of a token.
inline StreamGrid MakeStreamGrid(const SeqMeta& seqs, int steps, int kv_heads,
                                 int ctas_wanted = kStreamCtasWanted) {
  const int token_groups = CeilDiv(seqs.num_tokens, kStreamThreads / 32);
  const int wanted = std::clamp(CeilDiv(ctas_wanted, token_groups), 1, steps);
  const int64_t slots = NumTileSlots(seqs.num_tokens, seqs.batch, kBlockSize, 2);
  StreamGrid grid;
  grid.steps_per_share = CeilDiv(steps, wanted);
  grid.shares = CeilDiv(steps, grid.steps_per_share);
  grid.stream_ctas = token_groups * grid.shares;
  grid.seqs_per_token = static_cast<float>(seqs.batch) / static_cast<float>(seqs.num_tokens);
  grid.seqs_per_tile = static_cast<float>(seqs.batch) / static_cast<float>(slots);
  grid.ctas = grid.stream_ctas + slots * kv_heads;
  return grid;
}

// What is computed from the result stays behind this place: a compiler that takes it out of a loop
// keeps it in registers that the loop has no room for.
template <typename T>
__device__ __forceinline__ T KeepInLoop(T x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace fastattn::cuda

// Which sequence a CTA works on, found on the device: the host knows no length of a step.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cuda/common/lane.cuh"

namespace fastattn::cuda {

// Token tiles of all sequences in one index space, without a prefix sum over the sequences.
//
// Sequence b owns the slots from S(b) = start(b) / kTile + b on, `start` being its first token in a
// ragged tensor. It needs ceil(n / kTile) of them, and S(b + 1) - S(b) is never less: with
// start(b + 1) >= start(b) + n, floor((s + n) / t) + 1 >= floor(s / t) + ceil(n / t). So every
// (sequence, tile) has a slot of its own, and there are at most total / kTile + batch + 1 slots.
//
// Where the tiles are cut at multiples of kTile of a sequence's positions, it may need one more:
// then S(b) = start(b) / kTile + 2 b, `extra` = 2.
inline int64_t NumTileSlots(int64_t total_tokens, int batch, int tile = kBlockSize, int extra = 1) {
  return total_tokens / tile + static_cast<int64_t>(extra) * batch + 1;
}

// First slot of a sequence.
__device__ __forceinline__ int64_t FirstSlot(int start, int batch_idx, int tile = kBlockSize,
                                             int extra = 1) {
  return max(start, 0) / tile + static_cast<int64_t>(extra) * batch_idx;
}

// Returns the sequence that owns `slot`: the largest b with S(b) <= slot, or -1. All 32 lanes of a
// warp take part and get the result. The 32-ary search makes 2 dependent loads for up to 1024
// sequences.
__device__ __forceinline__ int FindSeq(const int* starts, int batch, int64_t slot,
                                       int tile = kBlockSize, int extra = 1) {
  const int lane = threadIdx.x & 31;
  int low = 0, size = batch;  // the answer lies in [low - 1, low + size)
  while (size > 0) {
    const int stride = (size + 31) / 32;
    const int candidate = low + lane * stride;
    const bool owned =
        candidate < low + size && FirstSlot(starts[candidate], candidate, tile, extra) <= slot;
    const int count = 32 - __clz(__ballot_sync(kFullWarp, owned));
    if (count == 0) return low - 1;
    // Candidate count-1 qualifies, candidate count does not: the search goes on between them.
    const int end = low + size;
    low += (count - 1) * stride + 1;
    size = min(stride - 1, end - low);
  }
  return low - 1;
}

}  // namespace fastattn::cuda

// Sequences of a step in the lanes of a warp. One round of independent loads finds a token's
// sequence and its metadata, where a search and then its loads would be two or three in sequence.
#pragma once

#include <cstdint>

#include "common/block_table.h"
#include "common/seq_lengths.h"
#include "cuda/cache/shared/seq_tiles.cuh"
#include "cuda/common/lane.cuh"
#include "params/common.h"

namespace fastattn::cuda {

// Lane i has sequence low + i, or the last one where that is past the end.
struct SeqWindow {
  int low;
  SeqFacts facts;
};

__device__ __forceinline__ SeqFacts LoadSeq(const SeqMeta& seqs, int batch_idx) {
  return {seqs.cu_seqlens_q[batch_idx], seqs.cu_seqlens_q[batch_idx + 1],
          seqs.seq_lens_this_time[batch_idx], seqs.seq_lens_decoder[batch_idx]};
}

// `guess` is a sequence that is probably near the one that is looked for.
__device__ __forceinline__ SeqWindow LoadWindow(const SeqMeta& seqs, int guess) {
  SeqWindow window = {};
  if (seqs.batch == 0) return window;
  window.low = max(min(guess - 8, seqs.batch - 32), 0);
  window.facts =
      LoadSeq(seqs, min(window.low + static_cast<int>(threadIdx.x & 31), seqs.batch - 1));
  return window;
}

// Returns the sequence that owns `slot` as FindSeq defines it. All lanes take part and get it.
__device__ __forceinline__ int PickSeq(const SeqMeta& seqs, const SeqWindow& window, int64_t slot,
                                       int tile, int extra) {
  const int lane = threadIdx.x & 31;
  const int batch_idx = window.low + lane;
  const bool owned =
      batch_idx < seqs.batch && FirstSlot(window.facts.first, batch_idx, tile, extra) <= slot;
  const int count = 32 - __clz(__ballot_sync(kFullWarp, owned));
  const bool beyond = count == 32 && batch_idx + 1 < seqs.batch &&
                      FirstSlot(window.facts.end, batch_idx + 1, tile, extra) <= slot;
  const bool elsewhere = count == 0 ? window.low > 0 : __shfl_sync(kFullWarp, beyond, 31);
  if (elsewhere) return FindSeq(seqs.cu_seqlens_q, seqs.batch, slot, tile, extra);
  return window.low + count - 1;
}

// Returns the facts of a sequence, out of the window if it is in there. All lanes ask for the same
// one.
__device__ __forceinline__ SeqFacts FactsOf(const SeqMeta& seqs, const SeqWindow& window,
                                            int batch_idx) {
  const int lane = batch_idx - window.low;
  if (lane < 0 || lane >= 32) return LoadSeq(seqs, batch_idx);
  return {__shfl_sync(kFullWarp, window.facts.first, lane),
          __shfl_sync(kFullWarp, window.facts.end, lane),
          __shfl_sync(kFullWarp, window.facts.count, lane),
          __shfl_sync(kFullWarp, window.facts.start, lane)};
}

using WarpPlace = TokenPlace<uint32_t>;

// `given` is the token's batch id if the step has any. All lanes take part.
__device__ __forceinline__ WarpPlace FindPlace(const SeqMeta& seqs, const SeqWindow& window,
                                               int given, int token) {
  const bool ids = seqs.batch_id_per_token != nullptr;
  // Mostly one lane has the token's sequence: it alone knows the position.
  const int batch_idx = window.low + static_cast<int>(threadIdx.x & 31);
  const WarpPlace mine = PlaceInSeq<uint32_t>(window.facts, batch_idx, token);
  const bool owns = mine.batch_idx >= 0 && batch_idx < seqs.batch && (!ids || given == batch_idx);
  const unsigned owners = __ballot_sync(kFullWarp, owns);
  if (owners != 0) {
    const int owner = __ffs(owners) - 1;
    return {window.low + owner, __shfl_sync(kFullWarp, mine.position, owner)};
  }
  const int found = ids ? given : PickSeq(seqs, window, token, 1, 0);
  if (found < 0 || found >= seqs.batch) return {-1, 0};
  return PlaceInSeq<uint32_t>(FactsOf(seqs, window, found), found, token);
}

__device__ __forceinline__ int GivenSeq(const SeqMeta& seqs, int token) {
  return seqs.batch_id_per_token != nullptr ? seqs.batch_id_per_token[token] : 0;
}

// Physical block of a sequence's block, or a negative number if none is assigned.
__device__ __forceinline__ int BlockOf(const SeqMeta& seqs, int num_blocks, int batch_idx,
                                       uint32_t block_index) {
  if (block_index >= static_cast<uint32_t>(seqs.max_blocks)) return -1;
  return BlockOrNegative(*BlockEntry(seqs.block_tables, seqs.max_blocks, batch_idx, block_index),
                         num_blocks);
}

}  // namespace fastattn::cuda

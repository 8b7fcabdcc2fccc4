// Sequences of a step in the lanes of a warp. One round of independent loads finds a token's
// sequence and its metadata, where a search and then its loads would be two or three in sequence.
#pragma once

#include <cstdint>

#include "cuda/cache/shared/seq_tiles.cuh"
#include "cuda/cache/shared/token_lookup.cuh"
#include "cuda/common/lane.cuh"

namespace fastattn::cuda {

// Metadata of one sequence.
struct RowFacts {
  int first;  // its first token
  int end;    // first token of the next sequence
  int count;  // new tokens
  int start;  // cached tokens
};

// Lane i has sequence low + i, or the last one where that is past the end.
struct RowWindow {
  int low;
  RowFacts facts;
};

__device__ __forceinline__ RowFacts LoadRow(const SeqMeta& seqs, int row) {
  return {seqs.cu_seqlens_q[row], seqs.cu_seqlens_q[row + 1], seqs.seq_lens_this_time[row],
          seqs.seq_lens_decoder[row]};
}

// `guess` is a sequence that is probably near the one that is looked for.
__device__ __forceinline__ RowWindow LoadWindow(const SeqMeta& seqs, int guess) {
  RowWindow window = {};
  if (seqs.batch == 0) return window;
  window.low = max(min(guess - 8, seqs.batch - 32), 0);
  window.facts =
      LoadRow(seqs, min(window.low + static_cast<int>(threadIdx.x & 31), seqs.batch - 1));
  return window;
}

// Returns the sequence that owns `slot` as FindSeq defines it. All lanes take part and get it.
__device__ __forceinline__ int PickRow(const SeqMeta& seqs, const RowWindow& window, int64_t slot,
                                       int tile, int extra) {
  const int lane = threadIdx.x & 31;
  const int row = window.low + lane;
  const bool owned = row < seqs.batch && FirstSlot(window.facts.first, row, tile, extra) <= slot;
  const int count = 32 - __clz(__ballot_sync(kFullWarp, owned));
  const bool beyond = count == 32 && row + 1 < seqs.batch &&
                      FirstSlot(window.facts.end, row + 1, tile, extra) <= slot;
  const bool elsewhere = count == 0 ? window.low > 0 : __shfl_sync(kFullWarp, beyond, 31);
  if (elsewhere) return FindSeq(seqs.cu_seqlens_q, seqs.batch, slot, tile, extra);
  return window.low + count - 1;
}

// Returns the facts of a sequence, out of the window if it is in there. All lanes ask for the same
// one.
__device__ __forceinline__ RowFacts FactsOf(const SeqMeta& seqs, const RowWindow& window, int row) {
  const int lane = row - window.low;
  if (lane < 0 || lane >= 32) return LoadRow(seqs, row);
  return {__shfl_sync(kFullWarp, window.facts.first, lane),
          __shfl_sync(kFullWarp, window.facts.end, lane),
          __shfl_sync(kFullWarp, window.facts.count, lane),
          __shfl_sync(kFullWarp, window.facts.start, lane)};
}

// Sequence and position of one token for a whole warp; the sequence is -1 for padding.
struct WarpPlace {
  int row;
  uint32_t position;
};

__device__ __forceinline__ WarpPlace PlaceInRow(const RowFacts& facts, int row, int token) {
  const int i = token - facts.first;
  if (facts.first < 0 || i < 0 || i >= facts.count || token >= facts.end) return {-1, 0};
  return {row, static_cast<uint32_t>(max(facts.start, 0)) + static_cast<uint32_t>(i)};
}

// `given` is the token's batch id if the step has any. All lanes take part.
__device__ __forceinline__ WarpPlace FindPlace(const SeqMeta& seqs, const RowWindow& window,
                                               int given, int token) {
  if (seqs.batch == 0) return {-1, 0};
  const bool ids = seqs.batch_id_per_token != nullptr;
  // Mostly one lane has the token's sequence: it alone knows the position.
  const int row = window.low + static_cast<int>(threadIdx.x & 31);
  const WarpPlace mine = PlaceInRow(window.facts, row, token);
  const bool owns = mine.row >= 0 && row < seqs.batch && (!ids || given == row);
  const unsigned owners = __ballot_sync(kFullWarp, owns);
  if (owners != 0) {
    const int owner = __ffs(owners) - 1;
    return {window.low + owner, __shfl_sync(kFullWarp, mine.position, owner)};
  }
  const int found = ids ? given : PickRow(seqs, window, token, 1, 0);
  if (found < 0 || found >= seqs.batch) return {-1, 0};
  return PlaceInRow(FactsOf(seqs, window, found), found, token);
}

__device__ __forceinline__ int GivenRow(const SeqMeta& seqs, int token) {
  return seqs.batch_id_per_token != nullptr ? seqs.batch_id_per_token[token] : 0;
}

// Physical block of a sequence's block, or a negative number if none is assigned.
__device__ __forceinline__ int BlockOf(const SeqMeta& seqs, int num_blocks, int row,
                                       uint32_t block_index) {
  if (block_index >= static_cast<uint32_t>(seqs.max_blocks)) return -1;
  const int block = seqs.block_tables[static_cast<int64_t>(row) * seqs.max_blocks + block_index];
  return block < num_blocks ? block : -1;
}

}  // namespace fastattn::cuda

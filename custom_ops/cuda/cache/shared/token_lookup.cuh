// Which sequence a token belongs to, and its position there.
#pragma once

#include "cuda/cache/shared/seq_tiles.cuh"
#include "params/common.h"

namespace fastattn::cuda {

// Sequence and position of a token; the sequence is -1 for padding.
struct TokenPlace {
  int row;
  int64_t position;
};

// All lanes of a warp take part. `base` is the same in all of them, and their tokens lie at it or a
// little past it.
__device__ __forceinline__ TokenPlace FindToken(const SeqMeta& seqs, int64_t base, int64_t token) {
  int row;
  if (seqs.batch_id_per_token != nullptr) {
    row = token < seqs.num_tokens ? __ldg(seqs.batch_id_per_token + token) : -1;
  } else {
    row = FindSeq(seqs.cu_seqlens_q, seqs.batch, base, 1, 0);
    while (row + 1 < seqs.batch && __ldg(seqs.cu_seqlens_q + row + 1) <= token) ++row;
  }
  if (row < 0 || row >= seqs.batch) return {-1, 0};
  const int first = __ldg(seqs.cu_seqlens_q + row);
  const int end = __ldg(seqs.cu_seqlens_q + row + 1);
  const int count = __ldg(seqs.seq_lens_this_time + row);
  const int start = __ldg(seqs.seq_lens_decoder + row);
  const int64_t i = token - first;
  if (first < 0 || i < 0 || i >= count || token >= min(end, seqs.num_tokens)) return {-1, 0};
  return {row, max(start, 0) + i};
}

// Physical block of a sequence's block, or a negative number if none is assigned.
__device__ __forceinline__ int FindBlock(const SeqMeta& seqs, int num_blocks, int row,
                                         int64_t block_index) {
  if (block_index >= seqs.max_blocks) return -1;
  const int block =
      __ldg(seqs.block_tables + static_cast<int64_t>(row) * seqs.max_blocks + block_index);
  return block < num_blocks ? block : -1;
}

}  // namespace fastattn::cuda

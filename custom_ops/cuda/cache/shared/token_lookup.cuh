// Which sequence a token belongs to, and its position there.
#pragma once

#include "common/seq_lengths.h"
#include "cuda/cache/shared/seq_tiles.cuh"
#include "params/common.h"

namespace fastattn::cuda {

// All lanes of a warp take part. `base` is the same in all of them, and their tokens lie at it or a
// little past it.
__device__ __forceinline__ TokenPlace<int64_t> FindToken(const SeqMeta& seqs, int64_t base,
                                                         int64_t token) {
  int batch_idx;
  if (seqs.batch_id_per_token != nullptr) {
    batch_idx = token < seqs.num_tokens ? __ldg(seqs.batch_id_per_token + token) : -1;
  } else {
    batch_idx = FindSeq(seqs.cu_seqlens_q, seqs.batch, base, 1, 0);
    while (batch_idx + 1 < seqs.batch && __ldg(seqs.cu_seqlens_q + batch_idx + 1) <= token)
      ++batch_idx;
  }
  if (batch_idx < 0 || batch_idx >= seqs.batch) return {-1, 0};
  const int first = __ldg(seqs.cu_seqlens_q + batch_idx);
  const int end = __ldg(seqs.cu_seqlens_q + batch_idx + 1);
  const int count = __ldg(seqs.seq_lens_this_time + batch_idx);
  const int start = __ldg(seqs.seq_lens_decoder + batch_idx);
  // PlaceInSeq() within the tensor; a call of that was measured to be other code.
  const int64_t i = token - first;
  if (first < 0 || i < 0 || i >= count || token >= min(end, seqs.num_tokens)) return {-1, 0};
  return {batch_idx, max(start, 0) + i};
}

}  // namespace fastattn::cuda

// Which sequence each new token of a step belongs to.
#pragma once

#include <cstdint>
#include <vector>

#include "common/seq_lengths.h"
#include "params/common.h"

namespace fastattn::cpu {

// New tokens of a sequence, none of them outside [0, num_tokens).
inline TokenRange<int64_t> NewTokensOf(const SeqMeta& seqs, int batch_idx) {
  return WrittenTokens<int64_t>(seqs.cu_seqlens_q[batch_idx], seqs.cu_seqlens_q[batch_idx + 1],
                                seqs.seq_lens_this_time[batch_idx], seqs.num_tokens);
}

// Sequence of each token, -1 for padding and for a token whose batch id names another sequence.
inline std::vector<int> SeqOfTokens(const SeqMeta& seqs) {
  std::vector<int> result(seqs.num_tokens, -1);
  for (int b = 0; b < seqs.batch; ++b) {
    const TokenRange<int64_t> tokens = NewTokensOf(seqs, b);
    for (int64_t t = tokens.begin; t < tokens.begin + tokens.count; ++t) {
      if (seqs.batch_id_per_token == nullptr || seqs.batch_id_per_token[t] == b) result[t] = b;
    }
  }
  return result;
}

// Position of a new token in its sequence.
inline int64_t PositionOf(const SeqMeta& seqs, int batch_idx, int64_t token) {
  return NewTokenPosition(seqs.seq_lens_decoder[batch_idx], token - seqs.cu_seqlens_q[batch_idx]);
}

}  // namespace fastattn::cpu

// Which row (sequence) each new token of a step belongs to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "params/common.h"

namespace fastattn::cpu {

// New tokens of row `row`: its first token and how many; none of them lies outside
// [0, num_tokens).
struct NewTokens {
  int64_t first = 0;
  int64_t count = 0;
};

inline NewTokens NewTokensOf(const SeqMeta& seqs, int row) {
  const int64_t first = seqs.cu_seqlens_q[row];
  if (first < 0) return {};
  const int64_t room = std::min<int64_t>(seqs.cu_seqlens_q[row + 1], seqs.num_tokens) - first;
  return {first, std::max<int64_t>(0, std::min<int64_t>(seqs.seq_lens_this_time[row], room))};
}

// Row of each token, -1 for padding and for a token whose batch id does not name its row.
inline std::vector<int> SeqOfTokens(const SeqMeta& seqs) {
  std::vector<int> result(seqs.num_tokens, -1);
  for (int row = 0; row < seqs.batch; ++row) {
    const NewTokens tokens = NewTokensOf(seqs, row);
    for (int64_t t = tokens.first; t < tokens.first + tokens.count; ++t) {
      if (seqs.batch_id_per_token == nullptr || seqs.batch_id_per_token[t] == row) result[t] = row;
    }
  }
  return result;
}

// Position of token `token` of row `row` in its sequence. Negative lengths count as 0.
inline int64_t PositionOf(const SeqMeta& seqs, int row, int64_t token) {
  return std::max(seqs.seq_lens_decoder[row], 0) + (token - seqs.cu_seqlens_q[row]);
}

}  // namespace fastattn::cpu

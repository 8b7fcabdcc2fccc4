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

inline NewTokens NewTokensOf(const RowMeta& rows, int row) {
  const int64_t first = rows.cu_seqlens_q[row];
  if (first < 0) return {};
  const int64_t room = std::min<int64_t>(rows.cu_seqlens_q[row + 1], rows.num_tokens) - first;
  return {first, std::max<int64_t>(0, std::min<int64_t>(rows.seq_lens_this_time[row], room))};
}

// Row of each token, -1 for padding and for a token whose batch id does not name its row.
inline std::vector<int> RowOfTokens(const RowMeta& rows) {
  std::vector<int> result(rows.num_tokens, -1);
  for (int row = 0; row < rows.batch; ++row) {
    const NewTokens tokens = NewTokensOf(rows, row);
    for (int64_t t = tokens.first; t < tokens.first + tokens.count; ++t) {
      if (rows.batch_id_per_token == nullptr || rows.batch_id_per_token[t] == row) result[t] = row;
    }
  }
  return result;
}

// Position of token `token` of row `row` in its sequence. Negative lengths count as 0.
inline int64_t PositionOf(const RowMeta& rows, int row, int64_t token) {
  return std::max(rows.seq_lens_decoder[row], 0) + (token - rows.cu_seqlens_q[row]);
}

}  // namespace fastattn::cpu

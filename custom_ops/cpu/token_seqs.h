// Which sequence each new token of a step belongs to.
#pragma once

#include <cstdint>
#include <limits>
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

// A query token of attention.
struct QueryPlace {
  int batch_idx = -1;    // -1: of no sequence
  int64_t position = 0;  // in its sequence
};

// Where every query token belongs. Of two sequences that claim a token the first has it. Sequences
// have at most `max_keys` keys.
inline std::vector<QueryPlace> FindQueries(const SeqMeta& seqs,
                                           int64_t max_keys = std::numeric_limits<int64_t>::max()) {
  std::vector<QueryPlace> queries(seqs.num_tokens);
  for (int b = seqs.batch - 1; b >= 0; --b) {
    const int* cu = seqs.cu_seqlens_q + b;
    const auto tokens = RaggedTokens<int64_t>(cu[0], cu[1], seqs.num_tokens);
    const int64_t count = NewTokens(int64_t{seqs.seq_lens_this_time[b]}, tokens.count);
    const int64_t keys = PagedKeys(int64_t{seqs.seq_lens_decoder[b]}, count, max_keys);
    for (int64_t i = 0; i < count; ++i) queries[tokens.begin + i] = {b, keys - count + i};
  }
  return queries;
}

}  // namespace fastattn::cpu

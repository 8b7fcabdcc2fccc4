// sparse_paged_attention: the queries of paged_attention over chosen keys.
#pragma once

#include <cstdint>

#include "params/attention.h"

namespace fastattn {

// A list for each query, of all KV heads or of each. Entry i stands for the keys i * granularity to
// (i + 1) * granularity - 1 of the query's sequence (common/selected_keys.h). Nothing of it is
// trusted; the entries of one list are distinct, or a key counts twice.
struct KeyLists {
  const int* entries = nullptr;  // [num_tokens, groups, width]
  const int* lengths = nullptr;  // [num_tokens, groups] or null: width. Clamped to [0, width]
  int64_t token_stride = 0;      // elements of `entries`; the entries of a list are contiguous
  int64_t group_stride = 0;
  int groups = 1;  // 1 or the number of KV heads
  int width = 0;
  int granularity = 1;  // 1, 4, or a multiple of 16

  FASTATTN_HD int GroupOf(int kv_head) const { return groups == 1 ? 0 : kv_head; }
  FASTATTN_HD const int* At(int64_t token, int kv_head) const {
    return entries + token * token_stride + GroupOf(kv_head) * group_stride;
  }
};

// Block tables of lists of whole blocks: each query is a sequence of its own, whose keys are the
// blocks that its list names and, last, the block with the query itself. A table has -1 for what
// the list does not name, or what lies after the query.
struct ListTables {
  int* block_tables = nullptr;        // [num_tokens, KV, slots + 1]
  int* cu_seqlens_q = nullptr;        // [num_tokens + 1]
  int* seq_lens_decoder = nullptr;    // [num_tokens]
  int* seq_lens_this_time = nullptr;  // [num_tokens] 1; 0 of a token of no sequence
  int slots = 0;                      // blocks of a list
};

// Query i of a sequence with q queries and k keys has key position i + k - q and sees no later key.
// A query that sees no key gets 0 and an LSE of -inf.
struct SparseAttentionParams {
  // Queries, cache, sequences and outputs. It is paged and causal, and has no other mask, no
  // workspace and no counters.
  AttentionParams attention;
  KeyLists lists;
  int window = 0;       // keys up to the query, its own included, that are seen in any case
  int sink_tokens = 0;  // first keys of the sequence that are seen in any case
};

}  // namespace fastattn

// compact_block_tables: block tables of which some entries name no block, without those entries,
// and what a sequence's queries see of the keys that are left.
//
// A local position counts the keys of assigned blocks only. All such blocks but the sequence's last
// one are full, so that a position follows from the number of assigned blocks before its own.
#pragma once

#include <cstdint>

#include "common/block_table.h"
#include "common/bounds.h"
#include "common/seq_lengths.h"
#include "common/types.h"
#include "common/visible_keys.h"
#include "params/common.h"

namespace fastattn {

// A sequence whose blocks are compacted: those that a query of it may see.
struct CompactSeq {
  int q_begin;  // its first token
  int q_len;    // its new tokens
  int k_len;    // its keys, those of the new tokens included
  int k_limit;  // those that the table has entries for
  int first;    // blocks [first, end) of the table
  int end;
};

struct CompactTablesParams {
  SeqMeta seqs;                       // blocks of block_size tokens
  const int* mask_offsets = nullptr;  // [num_tokens, 2] positions, or null
  int* tables = nullptr;              // [batch, max_blocks]: assigned blocks, then -1
  int* seq_lens = nullptr;            // [batch]: local keys without the new tokens, at least 0
  int* local_masks = nullptr;         // [num_tokens, 2] local positions; null: not wanted
  int* before = nullptr;              // [batch, max_blocks + 1], with local_masks: assigned blocks
                                      // before each of [first, end]
  int num_blocks = 0;                 // entries outside [0, num_blocks) name no block
  int block_size = 0;
  bool causal = false;
  int window_left = -1;
  int window_right = -1;

  FASTATTN_HD CompactSeq SeqOf(int b) const {
    const TokenRange<int> tokens =
        RaggedTokens(seqs.cu_seqlens_q[b], seqs.cu_seqlens_q[b + 1], seqs.num_tokens);
    CompactSeq seq;
    seq.q_begin = tokens.begin;
    seq.q_len = Least(NewTokens(seqs.seq_lens_this_time[b], tokens.count), kMaxKeys);
    seq.k_len = PagedKeys(seqs.seq_lens_decoder[b], seq.q_len, kMaxKeys);
    const int64_t held = static_cast<int64_t>(seqs.max_blocks) * block_size;
    seq.k_limit = static_cast<int>(Least<int64_t>(seq.k_len, held));
    // What no query of a window sees is left out, too.
    const int seen = VisibleKeys(*this, seq.k_len - seq.q_len, seq.k_limit).begin;
    seq.end = seq.k_limit / block_size + (seq.k_limit % block_size != 0);
    seq.first = Least(seen / block_size, seq.end);
    return seq;
  }

  // Local keys of a sequence with `count` assigned blocks.
  FASTATTN_HD int LocalKeys(const CompactSeq& seq, const int* table, int count) const {
    int64_t keys = static_cast<int64_t>(count) * block_size;
    if (count > 0 && IsAssignedBlock(table[seq.end - 1], num_blocks)) {
      keys -= static_cast<int64_t>(seq.end) * block_size - seq.k_limit;
    }
    return static_cast<int>(keys);
  }

  // Local keys before position x of [0, k_limit]; `counts` is the sequence's part of `before`.
  FASTATTN_HD int LocalPosition(const CompactSeq& seq, const int* counts, int x) const {
    const int block = x / block_size, rest = x - block * block_size;
    if (block < seq.first) return 0;
    const int count = counts[block];
    const bool inside = rest > 0 && counts[block + 1] > count;
    return static_cast<int>(static_cast<int64_t>(count) * block_size) + (inside ? rest : 0);
  }

  // Local keys that the sequence's query `index` sees.
  FASTATTN_HD KeyRange<int> LocalMask(const CompactSeq& seq, const int* counts, int index) const {
    const int position = index + seq.k_len - seq.q_len;
    KeyRange<int> keys = VisibleKeys(*this, position, seq.k_limit);
    if (mask_offsets != nullptr) {
      const int* mask = mask_offsets + 2 * static_cast<int64_t>(seq.q_begin + index);
      keys = Intersect(keys, {mask[0], mask[1]});
    }
    keys.begin = Clamp(keys.begin, 0, seq.k_limit);
    keys.end = Clamp(keys.end, keys.begin, seq.k_limit);
    return {LocalPosition(seq, counts, keys.begin), LocalPosition(seq, counts, keys.end)};
  }
};

}  // namespace fastattn

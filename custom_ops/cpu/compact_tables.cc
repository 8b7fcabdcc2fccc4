#include "cpu/compact_tables.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace fastattn::cpu {

namespace {

void CompactSequence(const CompactTablesParams& p, int b) {
  const int64_t max_blocks = p.seqs.max_blocks;
  const CompactSeq seq = p.SeqOf(b);
  const int* table = p.seqs.block_tables + b * max_blocks;
  int* to = p.tables + b * max_blocks;
  int* before = p.before == nullptr ? nullptr : p.before + b * (max_blocks + 1);
  int count = 0;
  for (int block = seq.first; block < seq.end; ++block) {
    if (before != nullptr) before[block] = count;
    if (IsAssignedBlock(table[block], p.num_blocks)) to[count++] = table[block];
  }
  if (before != nullptr) before[seq.end] = count;
  std::fill(to + count, to + max_blocks, -1);
  p.seq_lens[b] = std::max(p.LocalKeys(seq, table, count) - seq.q_len, 0);
  if (p.local_masks == nullptr) return;
  for (int i = 0; i < seq.q_len; ++i) {
    const KeyRange<int> keys = p.LocalMask(seq, before, i);
    int* mask = p.local_masks + 2 * (static_cast<int64_t>(seq.q_begin) + i);
    mask[0] = keys.begin;
    mask[1] = keys.end;
  }
}

}  // namespace

void CompactBlockTables(const CompactTablesParams& p) {
  if (p.local_masks != nullptr) {
    std::fill_n(p.local_masks, 2 * static_cast<int64_t>(p.seqs.num_tokens), 0);
  }
  ParallelFor(p.seqs.batch, 4 * int64_t{p.seqs.max_blocks}, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) CompactSequence(p, static_cast<int>(b));
  });
}

}  // namespace fastattn::cpu

// update_block_summaries and select_key_blocks: summaries of K, and lists of the key blocks that
// queries choose by them.
//
// A key block is `granularity` tokens of a sequence, counted from its start. A summary belongs to a
// physical block of 64 tokens, so that sequences with a common prefix share it. A key block of 128
// tokens has a summary in each of its two physical blocks: no third block's tokens can be in them.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "params/attention.h"
#include "params/common.h"
#include "params/key_transform.h"

namespace fastattn {

// Of each channel of a key block's keys.
enum class SummaryKind : uint8_t {
  kMean,    // the mean
  kMinMax,  // the least and the largest
  kPooled,  // the sum of the products with a weight of the token's place in the key block
};

FASTATTN_HD constexpr int SummaryRows(SummaryKind kind) {
  return kind == SummaryKind::kMinMax ? 2 : 1;
}

struct BlockSummaries {
  void* data = nullptr;           // [num_blocks, KV, 64 / Tokens(), rows, D], contiguous
  DType dtype = DType::kFloat32;  // fp32 or bf16
  SummaryKind kind = SummaryKind::kMean;
  int granularity = 64;  // 16, 32, 64 or 128
  int num_blocks = 0;
  int num_kv_heads = 0;
  int head_dim = 0;

  // Tokens of a summary.
  FASTATTN_HD int Tokens() const { return granularity < kBlockSize ? granularity : kBlockSize; }
  // Summaries of a key block.
  FASTATTN_HD int Parts() const { return granularity / Tokens(); }
  // First element of a physical block's summary `index`, which starts at its token index *
  // Tokens().
  FASTATTN_HD int64_t At(int block, int kv_head, int index) const {
    const int64_t plane = static_cast<int64_t>(block) * num_kv_heads + kv_head;
    return (plane * (kBlockSize / Tokens()) + index) * SummaryRows(kind) * head_dim;
  }
};

// Summaries that hold new tokens are made anew from all keys that they have now, in the order of
// the tokens. So their bits depend neither on the steps in which the keys came, nor on tokens that
// were written and then replaced.
struct UpdateSummariesParams {
  PagedCache cache;  // its keys; values are not read
  KeyTransform transform;
  SeqMeta seqs;  // without tokens: num_tokens is the largest int
  BlockSummaries summaries;
  const float* pool_weights = nullptr;  // [KV, granularity, D] of kPooled
};

// How the scores of a KV head's query heads become one.
enum class ScoreReduction : uint8_t { kMax, kSum };

struct SelectBlocksParams {
  AttentionParams attention;  // queries and sequences
  BlockSummaries summaries;
  ScoreReduction reduction = ScoreReduction::kMax;
  int k = 0;                // entries of a list, blocks that are always taken included
  int first_blocks = 0;     // taken in any case
  int last_blocks = 1;      // the same, the query's own block included; at least 1
  int* selected = nullptr;  // [num_tokens, KV, k] ascending, then -1

  // Entries that scores decide.
  FASTATTN_HD int Scored() const { return k - first_blocks - last_blocks; }
};

// Key blocks [0, end) up to a query. [0, first) and [end - last, end) are taken, and those between
// have scores.
struct SeenBlocks {
  int64_t end;
  int64_t first;
  int64_t last;

  FASTATTN_HD int64_t Between() const { return end - first - last; }
};

// Of a query with `end` key blocks up to its own.
FASTATTN_HD SeenBlocks SeenBlocksOf(const SelectBlocksParams& p, int64_t end) {
  SeenBlocks seen;
  seen.end = end;
  seen.first = seen.end < p.first_blocks ? seen.end : p.first_blocks;
  const int64_t rest = seen.end - seen.first;
  seen.last = rest < p.last_blocks ? rest : p.last_blocks;
  return seen;
}

// What a GPU's kernels hand each other, of query tokens [begin, begin + count). A row is a token
// and a KV head.
struct SelectBlocksWork {
  float* scores = nullptr;  // [rows, columns], of the key block with the column's number
  int* ends = nullptr;      // [rows] key blocks up to the query; 0 for a token of no sequence
  int* starts = nullptr;    // [rows] first key block that has a score
  int* lengths = nullptr;   // [rows] those with scores
  int* chosen = nullptr;    // [rows, Scored()] of these, less `starts`
  int64_t columns = 0;
  int begin = 0;
  int count = 0;
};

}  // namespace fastattn

// mqa_logits and paged_mqa_logits: the indexer's scores of a query token against keys.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "params/indexer.h"

namespace fastattn {

inline constexpr int kLogitsMaxHeads = 256;
// Bytes of a key's, or of a query head's, scales: one fp32, or a UE8M0 exponent per 32 channels,
// the first in the lowest byte (a head of 64 channels has two, the other two bytes mean nothing).
inline constexpr int kLogitsScaleBytes = 4;

// Keys of a row: columns [begin, end) of its range are visible; all others of the output are -inf.
struct LogitsRange {
  int64_t begin = 0;
  int64_t end = 0;
};

// Row m of the output is row m of q: sum over heads h of relu(q[m, h] . k) * weights[m, h], times
// the key's scale ("fp8"), or with the blocks' scales of both sides ("mxfp4").
struct LogitsParams {
  const uint8_t* q = nullptr;               // [rows, heads, CodeBytes()]
  const uint8_t* q_scales = nullptr;        // [rows, heads, 4] bytes; mxfp4 only
  const float* weights = nullptr;           // [rows, heads]
  IndexerQuant quant = IndexerQuant::kFp8;  // or kMxfp4
  int head_dim = 0;                         // 64 or 128
  int num_heads = 0;
  int64_t rows = 0;
  float* out = nullptr;    // [rows, columns]
  int64_t columns = 0;     // at most 2^31 - 1, as num_keys
  int64_t row_stride = 0;  // elements

  bool paged = false;
  // Ragged: row m sees keys [starts[m], ends[m]). Column n is key n, or starts[m] + n if relative.
  const uint8_t* keys = nullptr;        // [num_keys, CodeBytes()]
  const uint8_t* key_scales = nullptr;  // [num_keys, 4] bytes
  const int32_t* starts = nullptr;      // [rows]
  const int32_t* ends = nullptr;        // [rows]
  int64_t num_keys = 0;
  bool relative = false;
  // Paged: rows b * next_n .. + next_n - 1 are those of sequence b. A page holds the codes of its
  // tokens, then their scales. A key of a page that is not assigned is not visible.
  const uint8_t* cache = nullptr;
  const int32_t* context_lens = nullptr;  // [batch, next_n], or [batch]: see LengthOf
  const int32_t* block_tables = nullptr;  // [batch, max_blocks]
  bool lens_per_row = false;
  int64_t batch = 0;
  int64_t next_n = 1;
  int64_t table_stride = 0;  // elements
  int64_t max_blocks = 0;
  int64_t num_pages = 0;
  int64_t page_size = 0;    // tokens
  int64_t page_stride = 0;  // bytes

  FASTATTN_HD int CodeBytes() const {
    return quant == IndexerQuant::kFp8 ? head_dim : head_dim / 2;
  }

  // Visible keys of a row, clamped to those that there are.
  FASTATTN_HD LogitsRange RangeOf(int64_t row) const {
    if (paged) return RangeOfStep(row / next_n, row % next_n);
    const int64_t begin = Clamp(starts[row]);
    const int64_t end = Clamp(ends[row]);
    return {begin, end < begin ? begin : end};
  }

  // The same of a sequence's new token `step`; paged only.
  FASTATTN_HD LogitsRange RangeOfStep(int64_t sequence, int64_t step) const {
    int64_t size = lens_per_row ? int64_t{context_lens[sequence * next_n + step]}
                                : int64_t{context_lens[sequence]} - next_n + step + 1;
    const int64_t most = columns < max_blocks * page_size ? columns : max_blocks * page_size;
    size = size < 0 ? 0 : size > most ? most : size;
    return {0, size};
  }

  // Key of column 0.
  FASTATTN_HD int64_t FirstKey(int64_t row) const { return relative ? Clamp(starts[row]) : 0; }

  // Page of a key's block of a sequence, or -1.
  FASTATTN_HD int64_t PageOf(int64_t sequence, int64_t block) const {
    if (block >= max_blocks) return -1;
    const int32_t page = block_tables[sequence * table_stride + block];
    return page < 0 || page >= num_pages ? -1 : page;
  }

 private:
  FASTATTN_HD int64_t Clamp(int64_t key) const {
    return key < 0 ? 0 : key > num_keys ? num_keys : key;
  }
};

}  // namespace fastattn

// indexer_topk and paged_indexer_topk: the k keys of the largest logits of each row, tile by tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params/mqa_logits.h"
#include "params/topk.h"

namespace fastattn {

// Columns of a row from the first key of its range on; those past the last column do not count.
FASTATTN_HD int64_t TopkLengthOf(const LogitsParams& p, int64_t row) {
  if (!p.paged) {
    const LogitsRange range = p.RangeOf(row);
    return range.end - range.begin;
  }
  // Keys of a page that is not assigned are chosen behind all others, past the table's end as well.
  const int64_t step = row % p.next_n;
  const int64_t size = p.lens_per_row ? int64_t{p.context_lens[row]}
                                      : p.context_lens[row / p.next_n] - p.next_n + step + 1;
  return size < 0 ? 0 : size;
}

// Rows [first, first + count) of a call: their logits go to a workspace, then their indices to the
// result. A tile of a paged call has whole sequences, or rows of one.
struct IndexerTopkTile {
  LogitsParams logits;
  TopkParams topk;
};

struct IndexerTopkParams {
  LogitsParams logits;               // `out` is the workspace, [tile_rows, columns]
  const int32_t* lengths = nullptr;  // [rows], TopkLengthOf each
  int32_t* indices = nullptr;        // [rows, k]
  int64_t k = 0;
  int64_t tile_rows = 0;  // at most

  // Rows of the tile that begins at `first`.
  int64_t RowsOf(int64_t first) const {
    const int64_t left = logits.rows - first, next_n = logits.paged ? logits.next_n : 1;
    if (next_n <= tile_rows) return std::min(left, tile_rows / next_n * next_n);
    return std::min(tile_rows, next_n - first % next_n);
  }

  IndexerTopkTile TileOf(int64_t first, int64_t count) const {
    IndexerTopkTile tile;
    LogitsParams& p = tile.logits = logits;
    p.rows = count;
    p.q += first * p.num_heads * p.CodeBytes();
    p.weights += first * p.num_heads;
    if (p.q_scales != nullptr) p.q_scales += first * p.num_heads * kLogitsScaleBytes;
    if (p.paged) {
      if (p.next_n > count) p.next_n = count;
      p.batch = count / p.next_n;
      p.lens_per_row = true;
      p.context_lens = lengths + first;
      p.block_tables += first / logits.next_n * p.table_stride;
    } else {
      p.starts += first;
      p.ends += first;
    }
    TopkParams& t = tile.topk;
    t.logits = p.out;
    t.lengths = lengths + first;
    t.starts = p.paged || p.relative ? nullptr : p.starts;
    t.indices = indices + first * k;
    t.rows = count;
    t.columns = p.columns;
    t.row_stride = p.row_stride;
    t.k = k;
    return tile;
  }
};

}  // namespace fastattn

// Maps of the indexer's results: rows of int32 indices, -1 where there is none.
//
// Each struct is one map. Begin(row) reads what a row needs; At(row, column) gives a value or -1,
// the same on every device. Nothing read from the device is trusted: a value that does not exist or
// does not fit int32 is -1.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "params/index_array.h"

namespace fastattn {

inline constexpr int32_t kNoIndex = -1;
inline constexpr int64_t kLargestIndex = 0x7FFFFFFF;

FASTATTN_HD int32_t IndexOrNone(int64_t index) {
  return index < 0 || index > kLargestIndex ? kNoIndex : static_cast<int32_t>(index);
}

// Where a map's rows go. Behind their columns rows are filled with -1 up to `width`.
struct MapOutput {
  int32_t* indices = nullptr;  // [rows, width]
  int32_t* lengths = nullptr;  // [rows]: one past the row's last index; null = not wanted
  int64_t rows = 0;
  int64_t columns = 0;  // values of a row
  int64_t width = 0;    // of a row of `indices`; at least `columns`
};

// Tokens of sequences to slots of a paged cache.
struct SlotTable {
  const int32_t* tables = nullptr;  // [batch, max_blocks]
  int32_t batch = 0;
  int32_t max_blocks = 0;
  int32_t block_size = 1;
  int64_t block_stride = 1;  // slots from one block to the next
  int64_t num_blocks = 0;    // table entries outside [0, num_blocks) are unassigned

  FASTATTN_HD const int32_t* Row(int64_t seq) const {
    return seq < 0 || seq >= batch ? nullptr : tables + seq * max_blocks;
  }

  FASTATTN_HD int32_t Slot(const int32_t* table, int32_t token) const {
    const int32_t index = token / block_size;
    if (index >= max_blocks) return kNoIndex;
    const int64_t block = table[index];
    if (block < 0 || block >= num_blocks) return kNoIndex;
    return IndexOrNone(block * block_stride + (token - index * block_size));
  }
};

// Sequence, or another index, of a row; the row itself where nothing else is given.
struct RowSequences {
  IndexArray ids;  // [rows] or null

  FASTATTN_HD int64_t At(int64_t row) const { return ids.data == nullptr ? row : ids.At(row); }
};

// Tokens chosen in a sequence to slots of its blocks.
struct TopkToSlotsParams {
  const int32_t* indices = nullptr;  // [num_rows, columns], columns side by side
  int64_t num_rows = 0;
  int64_t row_stride = 0;  // elements
  RowSequences sources;    // row of `indices` of each row; outside [0, num_rows) = padding
  RowSequences seqs;
  SlotTable slots;
  // Of `world_size` ranks each owns `interleave` tokens in turn; others' tokens give -1.
  int32_t rank = 0, world_size = 1, interleave = 1;

  struct Row {
    const int32_t* indices;
    const int32_t* table;
  };

  FASTATTN_HD Row Begin(int64_t row) const {
    const int64_t source = sources.At(row);
    if (source < 0 || source >= num_rows) return {nullptr, nullptr};
    return {indices + source * row_stride, slots.Row(seqs.At(row))};
  }

  FASTATTN_HD int32_t At(const Row& row, int64_t column) const {
    if (row.table == nullptr) return kNoIndex;
    int32_t token = row.indices[column];
    if (token < 0) return kNoIndex;
    if (world_size > 1) {
      const int32_t group = token / interleave;
      if (group % world_size != rank) return kNoIndex;
      token = group / world_size * interleave + (token - group * interleave);
    }
    return slots.Slot(row.table, token);
  }
};

// The last `window` tokens up to a position, ascending.
struct WindowParams {
  IndexArray positions;             // [rows]; outside int32's positive range = padding
  RowSequences seqs;                // a negative sequence = padding
  SlotTable slots;                  // without tables, values are positions past starts
  const int32_t* starts = nullptr;  // [num_starts] by sequence, or null: 0
  int64_t num_starts = 0;
  int64_t window = 0;

  struct Row {
    const int32_t* table;
    int64_t first;  // position of column 0
    int64_t count;
    int64_t start;
  };

  FASTATTN_HD Row Begin(int64_t row) const {
    const int64_t position = positions.At(row), seq = seqs.At(row);
    Row begun = {nullptr, 0, 0, 0};
    if (position < 0 || position > kLargestIndex || seq < 0) return begun;
    if (slots.tables != nullptr) {
      begun.table = slots.Row(seq);
      if (begun.table == nullptr) return begun;
    }
    if (starts != nullptr) {
      if (seq >= num_starts) return begun;
      begun.start = starts[seq];
    }
    begun.count = position + 1 < window ? position + 1 : window;
    begun.first = position + 1 - begun.count;
    return begun;
  }

  FASTATTN_HD int32_t At(const Row& row, int64_t column) const {
    if (column >= row.count) return kNoIndex;
    const int64_t token = row.first + column;
    if (row.table != nullptr) return slots.Slot(row.table, static_cast<int32_t>(token));
    return IndexOrNone(token - row.start);
  }
};

// All entries of a context that is short: 0, 1, ... of a position's (position + 1) / ratio.
struct ShortContextParams {
  IndexArray positions;  // [rows]; outside int32's positive range = padding
  RowSequences seqs;     // a negative sequence = padding
  int64_t ratio = 1;
  int64_t columns = 0;

  struct Row {
    int64_t count;
  };

  FASTATTN_HD Row Begin(int64_t row) const {
    const int64_t position = positions.At(row);
    if (position < 0 || position > kLargestIndex || seqs.At(row) < 0) return {0};
    const int64_t count = (position + 1) / ratio;
    return {count < columns ? count : columns};
  }

  FASTATTN_HD int32_t At(const Row& row, int64_t column) const {
    return column < row.count ? static_cast<int32_t>(column) : kNoIndex;
  }
};

// Two lists of a row, one behind the other, in a workspace with a part for each sequence.
struct CombineParams {
  struct List {
    const int32_t* indices = nullptr;  // [rows, columns], columns side by side
    const int32_t* lengths = nullptr;  // [rows], or null: all columns
    int64_t row_stride = 0;            // elements
    int64_t columns = 0;
    int64_t offset = 0;  // of the list's part in that of a sequence
  };

  List topk, window;
  RowSequences seqs;
  int64_t seq_stride = 0;  // rows of the workspace for a sequence

  struct Row {
    const int32_t* topk;
    const int32_t* window;
    int64_t topk_count, window_count;
    int64_t base;
  };

  static FASTATTN_HD int64_t Count(const List& list, int64_t row) {
    if (list.lengths == nullptr) return list.columns;
    const int64_t length = list.lengths[row];
    return length < list.columns ? length : list.columns;
  }

  FASTATTN_HD Row Begin(int64_t row) const {
    const int64_t seq = seqs.ids.data == nullptr ? 0 : seqs.At(row);
    if (seq < 0 || seq > kLargestIndex) return {nullptr, nullptr, 0, 0, 0};
    return {topk.indices + row * topk.row_stride, window.indices + row * window.row_stride,
            Count(topk, row), Count(window, row), seq * seq_stride};
  }

  FASTATTN_HD int32_t At(const Row& row, int64_t column) const {
    const bool chosen = column < topk.columns;
    const int64_t at = chosen ? column : column - topk.columns;
    if (at >= (chosen ? row.topk_count : row.window_count)) return kNoIndex;
    const int32_t index = chosen ? row.topk[at] : row.window[at];
    return index < 0 ? kNoIndex
                     : IndexOrNone(row.base + (chosen ? topk.offset : window.offset) + index);
  }
};

// FastDeploy's use of a top-k: with `seq_lens` a row belongs to a slot of the batch, and its
// indices go to the row of the slot's first token, as slots of the cache if there are tables.
struct PlaceTopkParams {
  // [heads, rows / heads, columns] relative to a row's start; row r has head r % heads.
  const int32_t* indices = nullptr;
  const int32_t* offsets = nullptr;    // [num_offsets] by row: added to indices
  const int32_t* seq_lens = nullptr;   // [num_slots], or null: rows stay where they are
  const int32_t* batch_ids = nullptr;  // [num_tokens] slot of each token, or null
  int64_t num_offsets = 0;
  int64_t num_slots = 0;
  int64_t num_tokens = 0;
  int64_t num_out_rows = 0;
  int64_t rows = 0;
  int64_t heads = 1;  // rows of a slot
  int64_t columns = 0;
  SlotTable slots;

  struct Row {
    const int32_t* indices;
    const int32_t* table;
    int64_t offset;
  };

  // The slot's first token where a token of `batch_ids` is the first to have the slot, and
  // offsets[slot] without them; -1: the row is not written.
  FASTATTN_HD int64_t OutRow(int64_t row, int64_t first_token) const {
    int64_t out_row = row;
    if (seq_lens != nullptr) {
      const int64_t slot = row / heads;
      if (slot >= num_slots || seq_lens[slot] <= 0) return -1;
      const int64_t token =
          batch_ids != nullptr ? first_token : (slot < num_offsets ? offsets[slot] : -1);
      out_row = token < 0 ? -1 : token * heads + row % heads;
    }
    return out_row < num_out_rows ? out_row : -1;
  }

  FASTATTN_HD Row Begin(int64_t row) const {
    const bool paged = seq_lens != nullptr && slots.tables != nullptr;
    const int64_t at = row % heads * (rows / heads) + row / heads;
    return {indices + at * columns, paged ? slots.Row(row / heads) : nullptr,
            paged || row >= num_offsets ? 0 : offsets[row]};
  }

  FASTATTN_HD int32_t At(const Row& row, int64_t column) const {
    const int32_t index = row.indices[column];
    if (index < 0) return kNoIndex;
    if (seq_lens != nullptr && slots.tables != nullptr) {
      return row.table == nullptr ? kNoIndex : slots.Slot(row.table, index);
    }
    return IndexOrNone(row.offset + index);
  }
};

}  // namespace fastattn

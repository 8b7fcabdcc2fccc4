// Maps of a step of latent attention: where its tokens lie, and how the ragged queries of its
// sequences become rows of as many queries each.
//
// Nothing read from the device is trusted: what does not exist is -1 or 0, and no index leaves its
// array, whatever starts, sequences and positions say.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "params/index_array.h"
#include "params/index_maps.h"

namespace fastattn {

struct TokenMapsParams {
  IndexArray batch_ids;             // [num_tokens or more] sequence of a token; others: padding
  IndexArray given;                 // [num_tokens or more] its position, or null: by its start
  const int32_t* starts = nullptr;  // [batch + 1] first token of each sequence
  const int32_t* cached = nullptr;  // [batch or more] tokens of each that are cached
  SlotTable slots;
  int32_t* seqs = nullptr;       // [num_tokens] batch_ids, -1 for padding
  int32_t* positions = nullptr;  // [num_tokens]
  int32_t* places = nullptr;     // [num_tokens] slot of each token
  int64_t num_tokens = 0;
  int64_t batch = 0;

  FASTATTN_HD void Write(int64_t token) const {
    const int64_t seq = batch_ids.At(token);
    const bool known = seq >= 0 && seq < batch;
    int32_t position = kNoIndex, place = kNoIndex;
    if (known) {
      const int64_t at =
          given.data != nullptr ? given.At(token) : int64_t{cached[seq]} + (token - starts[seq]);
      position = IndexOrNone(at);
      const int32_t* table = slots.Row(seq);
      if (position >= 0 && table != nullptr) place = slots.Slot(table, position);
    }
    seqs[token] = known ? static_cast<int32_t>(seq) : kNoIndex;
    positions[token] = position;
    places[token] = place;
  }
};

// With one query a row, row t is token t. With more, a sequence's queries fill rows of their own:
// its first row is starts[seq] / tile + seq, which lies behind the rows of all before it, since
// (s + n) / tile + 1 >= s / tile + ceil(n / tile). Nobody has to know the lengths for that.
struct QueryRowsParams {
  IndexArray batch_ids;                // [num_tokens or more], as above
  const int32_t* positions = nullptr;  // [num_tokens]
  const int32_t* starts = nullptr;     // [batch + 1]
  const int32_t* tables = nullptr;     // [num_tables, max_blocks]
  int32_t* lengths = nullptr;          // [rows, tile] keys that a query sees; 0: no query
  int32_t* row_tables = nullptr;       // [rows, max_blocks] blocks of a row's sequence
  int32_t* token_of_query = nullptr;   // [rows * tile]; -1: no query
  int32_t* query_of_token = nullptr;   // [num_tokens]; -1: padding
  int64_t num_tokens = 0;
  int64_t num_tables = 0;
  int64_t max_blocks = 0;
  int64_t batch = 0;
  int64_t rows = 0;
  int64_t tile = 1;  // queries of a row

  FASTATTN_HD int64_t FirstRow(int64_t seq) const {
    const int64_t start = starts[seq];
    return (start < 0 ? 0 : start / tile) + seq;
  }

  // The sequence of a row: the last whose first row is not behind it; -1 if there is none.
  FASTATTN_HD int64_t SeqOf(int64_t row) const {
    if (tile == 1) {
      const int64_t seq = batch_ids.At(row);
      return seq < batch ? seq : kNoIndex;
    }
    int64_t low = 0, high = batch;  // first rows ascend; FirstRow(low) <= row < FirstRow(high)
    if (batch == 0 || FirstRow(0) > row) return kNoIndex;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (FirstRow(middle) <= row ? low : high) = middle;
    }
    return low;
  }

  // The token of a row's query, -1 if it has none. `seq` is the row's.
  FASTATTN_HD int64_t TokenOf(int64_t seq, int64_t row, int64_t query) const {
    if (seq < 0) return kNoIndex;
    if (tile == 1) return row;
    const int64_t token = starts[seq] + (row - FirstRow(seq)) * tile + query;
    const bool own = token >= 0 && token < num_tokens && token < starts[seq + 1];
    return own && batch_ids.At(token) == seq ? token : kNoIndex;
  }

  FASTATTN_HD void WriteQuery(int64_t seq, int64_t row, int64_t query) const {
    const int64_t token = TokenOf(seq, row, query), at = row * tile + query;
    const int32_t position = token < 0 ? kNoIndex : positions[token];
    const bool sees = position >= 0 && position < kLargestIndex;
    lengths[at] = sees ? position + 1 : 0;
    token_of_query[at] = static_cast<int32_t>(token);
  }

  FASTATTN_HD void WriteToken(int64_t token) const {
    const int64_t seq = batch_ids.At(token);
    int64_t query = kNoIndex;
    if (seq >= 0 && seq < batch) {
      const int64_t offset = token - starts[seq];
      if (tile == 1) {
        query = token;
      } else if (offset >= 0 && token < starts[seq + 1]) {
        query = FirstRow(seq) * tile + offset;
      }
    }
    query_of_token[token] = query < rows * tile ? IndexOrNone(query) : kNoIndex;
  }

  FASTATTN_HD const int32_t* TableOf(int64_t seq) const {
    return seq < 0 || seq >= num_tables ? nullptr : tables + seq * max_blocks;
  }
};

}  // namespace fastattn

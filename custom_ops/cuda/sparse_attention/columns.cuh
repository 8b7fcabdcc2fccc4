// Which keys a warp attends at a time.
//
// The keys of a query are cut into units of 16: the first keys of its sequence, the keys of its
// list, the last keys. Where an entry of the list stands for 16 tokens or more, and among the first
// and the last keys, a unit is 16 neighbouring slots of one block (wide). Finer entries are
// gathered one by one. A tile is two units, and its 32 keys are the columns of the warp's lanes.
#pragma once

#include <cstdint>

#include "common/block_table.h"
#include "common/layout.h"
#include "common/selected_keys.h"
#include "params/sparse_attention.h"

namespace fastattn::cuda::sparse {

inline constexpr int kUnit = 16;

struct Column {
  int block = -1;  // of the cache; negative: none. In a wide unit all have the unit's
  int row = 0;     // slot of the block
  bool seen = false;
  bool wide = false;
};

// A query's list, and how many units its keys are.
struct UnitRange {
  SelectedKeys<int> keys;
  const int* list;  // its `length` entries
  int length;
  int sink_units;
  int list_units;
  int units;

  __device__ __forceinline__ UnitRange(const SparseAttentionParams& p, int token, int kv_head,
                                       int position)
      : keys(SelectKeys(position, p.window, p.sink_tokens)), list(p.lists.At(token, kv_head)) {
    const KeyLists& lists = p.lists;
    length = lists.width;
    if (lists.lengths != nullptr) {
      const int64_t at = static_cast<int64_t>(token) * lists.groups + lists.GroupOf(kv_head);
      length = ListLength(lists.lengths[at], lists.width);
    }
    sink_units = (keys.sink_end + kUnit - 1) / kUnit;
    list_units = lists.granularity >= kUnit ? length * (lists.granularity / kUnit)
                                            : (length * lists.granularity + kUnit - 1) / kUnit;
    const int window_units = keys.window_begin < keys.limit
                                 ? (keys.limit + kUnit - 1) / kUnit - keys.window_begin / kUnit
                                 : 0;
    units = sink_units + list_units + window_units;
  }

  // Column `slot` of a unit. The slots of a wide one are in the order in which V has its tokens.
  __device__ __forceinline__ Column Find(const SparseAttentionParams& p, int batch_idx, int unit,
                                         int slot) const {
    Column column;
    const int granularity = p.lists.granularity;
    int position = -1;
    KeyRange<int> range{0, 0};
    column.wide = true;
    if (unit >= units) return column;
    if (unit < sink_units) {
      position = unit * kUnit + TokenOfSlot(slot);
      range = {0, keys.sink_end};
    } else if ((unit -= sink_units) >= list_units) {
      position = (keys.window_begin / kUnit + unit - list_units) * kUnit + TokenOfSlot(slot);
      range = {keys.window_begin, keys.limit};
    } else if (granularity >= kUnit) {
      const int parts = granularity / kUnit, entry = list[unit / parts];
      range = keys.Listed(entry, granularity);
      if (range.begin >= range.end) return column;
      position = entry * granularity + unit % parts * kUnit + TokenOfSlot(slot);
    } else {
      column.wide = false;
      const int i = unit * (kUnit / granularity) + slot / granularity;
      if (i >= length) return column;
      range = keys.Listed(list[i], granularity);
      if (range.begin >= range.end) return column;
      position = list[i] * granularity + slot % granularity;
    }
    const SeqMeta& seqs = p.attention.seqs;
    column.block = BlockOf(seqs.block_tables, seqs.max_blocks, p.attention.cache.num_blocks,
                           batch_idx, position / kBlockSize);
    column.row = position % kBlockSize;
    column.seen = column.block >= 0 && position >= range.begin && position < range.end;
    return column;
  }
};

}  // namespace fastattn::cuda::sparse

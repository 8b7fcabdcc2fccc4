// Masks that are no interval of key positions: a tree of drafts among a sequence's new tokens, and
// a window for each KV head beside the first keys of the sequence.
//
// What a query sees of the interval that the other masks leave (visible_keys.h) then has holes: the
// keys between the first ones and its head's window, and the new keys that are none of its
// ancestors.
#pragma once

#include <cstdint>

#include "common/visible_keys.h"

namespace fastattn {

// [B or more, size, size]: element (i, j) of a sequence tells whether its new token i sees its new
// token j. A sequence with more than `size` new tokens has no tree.
struct TreeMask {
  const uint8_t* data = nullptr;  // not 0: visible; null: no sequence has a tree
  int size = 0;

  FASTATTN_HD const uint8_t* Row(int64_t batch_idx, int64_t query) const {
    return data + (batch_idx * size + query) * size;
  }
};

// What a KV head's queries see of earlier keys: `left` before their position (negative: all), and
// the first `first` of the sequence.
struct HeadWindow {
  int left = -1;
  int first = 0;
};

// Takes what the head's window hides from the keys that the query at `position` sees: begins them
// later, or returns the keys [begin, end) between, of which the query sees none. A window of the
// whole sequence, `most` keys, hides nothing.
template <typename Index>
FASTATTN_HD constexpr KeyRange<Index> TakeHeadWindow(const HeadWindow& window, Index position,
                                                     Index most, KeyRange<Index>* keys) {
  if (window.left < 0) return {0, 0};
  const Index begin = position - Least(static_cast<Index>(window.left), most);
  const Index first = Most(static_cast<Index>(window.first), Index{0});
  if (first <= keys->begin) {
    keys->begin = Least(Most(keys->begin, begin), Most(keys->begin, keys->end));
    return {0, 0};
  }
  return {first, Most(first, begin)};
}

}  // namespace fastattn

// Which keys a query sees. Causal mask, window and mask offsets are intervals of key positions, and
// a key is visible if all of them hold it and its cache block is assigned.
#pragma once

#include "common/types.h"

namespace fastattn {

// Windows, at most, in kernels that count positions in an int. The operators take a longer one as
// unlimited: no sequence has so many keys.
inline constexpr int kMaxWindow = 1 << 29;

// Key positions [begin, end); empty if end <= begin.
template <typename Index>
struct KeyRange {
  Index begin = 0;
  Index end = 0;
};

// Causal mask and window around a query's position. Masks are aligned to the end of the sequence:
// query i of q queries and k keys has position i + k - q.
template <typename Index>
struct BandMask {
  bool causal = false;
  Index window_left = -1;  // keys before the position that stay visible; -1 = all
  Index window_right = -1;
};

// Keys that the query at `position` sees, of `num_keys`.
template <typename Index>
FASTATTN_HD constexpr KeyRange<Index> VisibleKeys(const BandMask<Index>& mask, Index position,
                                                  Index num_keys) {
  KeyRange<Index> keys{0, num_keys};
  if (mask.causal && position + 1 < keys.end) keys.end = position + 1;
  if (mask.window_right >= 0 && position + mask.window_right + 1 < keys.end) {
    keys.end = position + mask.window_right + 1;
  }
  if (mask.window_left >= 0 && position - mask.window_left > keys.begin) {
    keys.begin = position - mask.window_left;
  }
  return keys;
}

template <typename Index>
FASTATTN_HD constexpr KeyRange<Index> Intersect(const KeyRange<Index>& a,
                                                const KeyRange<Index>& b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

}  // namespace fastattn

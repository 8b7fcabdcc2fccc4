// Which keys a query sees. Causal mask, window and mask offsets are intervals of key positions, and
// a key is visible if all of them hold it and its cache block is assigned.
//
// Mask is anything with `causal`, `window_left` and `window_right` (keys besides the diagonal that
// stay visible; -1 = all), such as AttentionParams. Masks are aligned to the end of the sequence:
// query i of q queries and k keys has position i + k - q. Form is described in common/bounds.h.
#pragma once

#include "common/bounds.h"
#include "common/types.h"

namespace fastattn {

// Key positions [begin, end); empty if end <= begin.
template <typename Index>
struct KeyRange {
  Index begin;
  Index end;
};

// The end of the keys that the query at `position` sees, of those before `end`; it may lie before
// their begin.
template <class Form = PlainForm, class Mask, typename Index>
FASTATTN_HD constexpr Index VisibleEnd(const Mask& mask, Index position, Index end) {
  if (mask.causal) end = Least(end, position + 1);
  if (mask.window_right >= 0) end = Least(end, Form::WindowEnd(position, mask.window_right));
  return end;
}

// The first key that it sees, of those from `begin` on.
template <class Form = PlainForm, class Mask, typename Index>
FASTATTN_HD constexpr Index VisibleBegin(const Mask& mask, Index position, Index begin) {
  if (mask.window_left >= 0) begin = Most(begin, Form::WindowBegin(position, mask.window_left));
  return begin;
}

// Keys that it sees, of `num_keys`; mask offsets apart.
template <class Form = PlainForm, class Mask, typename Index>
FASTATTN_HD constexpr KeyRange<Index> VisibleKeys(const Mask& mask, Index position,
                                                  Index num_keys) {
  KeyRange<Index> keys{0, num_keys};
  keys.end = VisibleEnd<Form>(mask, position, keys.end);
  keys.begin = VisibleBegin<Form>(mask, position, keys.begin);
  return keys;
}

template <typename Index>
FASTATTN_HD constexpr KeyRange<Index> Intersect(const KeyRange<Index>& a,
                                                const KeyRange<Index>& b) {
  return {Most(a.begin, b.begin), Least(a.end, b.end)};
}

}  // namespace fastattn

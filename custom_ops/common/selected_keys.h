// Which keys a query of sparse_paged_attention sees: the first ones of its sequence, the last ones
// up to itself, and between them the keys that its list names. Entries of the list are cut to these
// positions, so that no key counts twice.
//
// Entries are not trusted: a negative one names nothing, and one past the query is cut away.
#pragma once

#include "common/bounds.h"
#include "common/types.h"
#include "common/visible_keys.h"

namespace fastattn {

// Key positions of a query, `limit` of which are up to itself: [0, sink_end), [window_begin, limit)
// and, from its list, some of [sink_end, window_begin).
template <typename Index>
struct SelectedKeys {
  Index sink_end;
  Index window_begin;
  Index limit;

  // Keys of an entry of the list, which stands for `granularity` of them; empty if end <= begin.
  FASTATTN_HD constexpr KeyRange<Index> Listed(int entry, int granularity) const {
    // The product of a larger entry might not fit.
    if (entry < 0 || entry > window_begin / granularity) return {0, 0};
    const Index begin = static_cast<Index>(entry) * granularity;
    return {Most(begin, sink_end), Least<Index>(begin + granularity, window_begin)};
  }
};

// `position` is the query's; neither `window` nor `sink_tokens` is negative.
template <typename Index>
FASTATTN_HD constexpr SelectedKeys<Index> SelectKeys(Index position, int window, int sink_tokens) {
  const Index limit = position + 1;
  const Index sink_end = Least<Index>(sink_tokens, limit);
  return {sink_end, Most<Index>(sink_end, limit - Least<Index>(window, limit)), limit};
}

// Entries of a list of `width` that are read.
FASTATTN_HD constexpr int ListLength(int length, int width) {
  return Least(Most(length, 0), width);
}

}  // namespace fastattn

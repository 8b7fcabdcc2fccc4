// Lengths of a step's sequences, cut to the tensors. They are read on the device and never trusted:
// offsets out of order or out of a tensor give no tokens, and negative lengths count as 0.
//
// The functions take loaded values, so that host and device code load them as they like. Index is
// int64_t where nothing limits a sequence, or int in kernels that count positions in 32 bits.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

template <typename Index>
FASTATTN_HD constexpr Index Clamp(Index x, Index low, Index high) {
  return x < low ? low : x < high ? x : high;
}

// Tokens [begin, begin + count) of a ragged tensor.
template <typename Index>
struct TokenRange {
  Index begin = 0;
  Index count = 0;
};

// Tokens that attention reads for a sequence: [start, end) of cu_seqlens, cut to the tensor.
template <typename Index>
FASTATTN_HD constexpr TokenRange<Index> RaggedTokens(Index start, Index end, Index num_tokens) {
  const Index begin = Clamp<Index>(start, 0, num_tokens);
  return {begin, Clamp<Index>(end, begin, num_tokens) - begin};
}

// Keys of a sequence in a paged cache: those cached before this step and the new ones.
template <typename Index>
FASTATTN_HD constexpr Index PagedKeys(Index cached, Index new_tokens, Index max_keys) {
  return Clamp<Index>(cached, 0, max_keys - new_tokens) + new_tokens;
}

// Tokens that a write or a gather touches for a sequence: `length` of them at most, inside
// [start, end) and the tensor. A negative start is no offset, so such a sequence is left out.
template <typename Index>
FASTATTN_HD constexpr TokenRange<Index> WrittenTokens(Index start, Index end, Index length,
                                                      Index num_tokens) {
  if (start < 0) return {};
  const Index room = (end < num_tokens ? end : num_tokens) - start;
  const Index count = length < room ? length : room;
  return {start, count > 0 ? count : 0};
}

// Position in its sequence of the new token that lies `offset` tokens behind the sequence's first.
FASTATTN_HD constexpr int64_t NewTokenPosition(int cached, int64_t offset) {
  return (cached > 0 ? cached : 0) + offset;
}

}  // namespace fastattn

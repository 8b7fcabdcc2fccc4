// Lengths of a step's sequences, cut to the tensors. They are read on the device and never trusted:
// offsets out of order or out of a tensor give no tokens, and negative lengths count as 0.
//
// The functions take loaded values, so that host and device code load them as they like. Index is
// int64_t where nothing limits a sequence, or int in kernels that count positions in 32 bits; Form
// is described in common/bounds.h.
#pragma once

#include "common/bounds.h"
#include "common/types.h"

namespace fastattn {

// Tokens [begin, begin + count) of a ragged tensor.
template <typename Index>
struct TokenRange {
  Index begin = 0;
  Index count = 0;
};

// Tokens that attention reads for a sequence: [start, end) of cu_seqlens, cut to the tensor. The
// begin comes from `start`, and the end from that begin.
template <class Form = PlainForm, typename Index>
FASTATTN_HD constexpr Index RaggedBegin(Index start, Index num_tokens) {
  return Form::Clamp(start, Index{0}, num_tokens);
}
template <class Form = PlainForm, typename Index>
FASTATTN_HD constexpr Index RaggedEnd(Index begin, Index end, Index num_tokens) {
  return Form::Clamp(end, begin, num_tokens);
}
template <typename Index>
FASTATTN_HD constexpr TokenRange<Index> RaggedTokens(const Index& start, const Index& end,
                                                     Index num_tokens) {
  const Index begin = RaggedBegin(start, num_tokens);
  return {begin, RaggedEnd(begin, end, num_tokens) - begin};
}

// New tokens that attention takes of a sequence with `tokens` of them in the tensor.
template <class Form = PlainForm, typename Index>
FASTATTN_HD constexpr Index NewTokens(Index seq_len_this_time, Index tokens) {
  return Form::Clamp(seq_len_this_time, Index{0}, tokens);
}

// Keys of a sequence in a paged cache: those cached before this step and the new ones.
template <class Form = PlainForm, typename Index>
FASTATTN_HD constexpr Index PagedKeys(Index cached, Index new_tokens, Index max_keys) {
  return Form::Clamp(cached, Index{0}, max_keys - new_tokens) + new_tokens;
}

// Keys that a block table holds, counted up to kMaxKeys. In 64 bits the product needs no care.
template <typename Index>
FASTATTN_HD constexpr int KeysInTable(int max_blocks) {
  if constexpr (sizeof(Index) > sizeof(int)) {
    return static_cast<int>(Least<Index>(static_cast<Index>(max_blocks) * kBlockSize, kMaxKeys));
  } else {
    return Least(max_blocks, kMaxKeys / kBlockSize) * kBlockSize;
  }
}

// Tokens that a write or a gather touches for a sequence: `length` of them at most, inside
// [start, end) and the tensor. A negative start is no offset, so such a sequence is left out.
template <typename Index>
FASTATTN_HD constexpr Index WrittenCount(Index start, Index end, Index length, Index num_tokens) {
  const Index last = Most(Least(end, num_tokens), Index{0});
  return Most(Least(length, last - start), Index{0});
}
template <typename Index>
FASTATTN_HD constexpr TokenRange<Index> WrittenTokens(Index start, Index end, Index length,
                                                      Index num_tokens) {
  if (start < 0) return {};
  return {start, WrittenCount(start, end, length, num_tokens)};
}

// Position in its sequence of the new token that lies `offset` tokens behind the sequence's first.
template <typename Index>
FASTATTN_HD constexpr Index NewTokenPosition(int cached, Index offset) {
  return static_cast<Index>(Most(cached, 0)) + offset;
}

// Sequence and position of a token; the sequence is -1 for padding.
template <typename Position>
struct TokenPlace {
  int batch_idx;
  Position position;
};

// Metadata of one sequence, as it was loaded.
struct SeqFacts {
  int first;  // its first token
  int end;    // first token of the next sequence
  int count;  // new tokens
  int start;  // cached tokens
};

// The place of a token of the tensor, if it is one of WrittenTokens().
template <typename Position, typename Token>
FASTATTN_HD constexpr TokenPlace<Position> PlaceInSeq(const SeqFacts& facts, int batch_idx,
                                                      Token token) {
  const Token i = token - facts.first;
  if (facts.first < 0 || i < 0 || i >= facts.count || token >= facts.end) return {-1, 0};
  return {batch_idx, NewTokenPosition(facts.start, static_cast<Position>(i))};
}

}  // namespace fastattn

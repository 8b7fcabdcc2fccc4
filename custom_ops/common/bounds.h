// How far kernels count positions, and what lengths and positions are cut with.
#pragma once

#include "common/types.h"

namespace fastattn {

// Keys of a sequence, at most, in kernels that count positions in an int: from any position, a
// window of as many keys ends at a position that an int still holds.
inline constexpr int kMaxKeys = 1 << 30;

// Windows, at most, in the same kernels. The operators take a longer one as unlimited: no sequence
// has so many keys.
inline constexpr int kMaxWindow = kMaxKeys / 2;

// Cached keys, at most, where the new ones that follow them are bounded only by their tensor.
inline constexpr int kMaxCachedKeys = kMaxKeys / 2;

template <typename T>
FASTATTN_HD constexpr T Least(T a, T b) {
#if defined(__CUDA_ARCH__)
  return min(a, b);
#else
  return a < b ? a : b;
#endif
}

template <typename T>
FASTATTN_HD constexpr T Most(T a, T b) {
#if defined(__CUDA_ARCH__)
  return max(a, b);
#else
  return a > b ? a : b;
#endif
}

// The order of operations in rules of lengths and masks. The rules stand once, in seq_lengths.h and
// visible_keys.h, as templates over such a form: all forms give the same results, but not the same
// instructions, and a kernel keeps the form that it was measured with.
struct PlainForm {
  // x cut to [low, high], low <= high.
  template <typename Index>
  static FASTATTN_HD constexpr Index Clamp(Index x, Index low, Index high) {
    return Most(low, Least(x, high));
  }
  // The position behind the last key of a window of `right` keys after `position`.
  template <typename Index>
  static FASTATTN_HD constexpr Index WindowEnd(Index position, int right) {
    return position + right + 1;
  }
  // The first key of a window of `left` keys before `position`.
  template <typename Index>
  static FASTATTN_HD constexpr Index WindowBegin(Index position, int left) {
    return position - left;
  }
};

template <typename Index>
FASTATTN_HD constexpr Index Clamp(Index x, Index low, Index high) {
  return PlainForm::Clamp(x, low, high);
}

}  // namespace fastattn

// Forms in which the attention kernels have the rules of lengths and masks (common/bounds.h).
// Theirs bound windows too, as parameters that come from elsewhere than an operator may hold longer
// ones.
#pragma once

#include "common/bounds.h"
#include "common/types.h"

namespace fastattn::cuda {

// mma_sm80, the merge of its partial results and the clearing of padding. All keys of a sequence
// together are at most kMaxKeys.
struct Sm80Form {
  static FASTATTN_HD constexpr int Clamp(int x, int low, int high) {
    return Least(Most(x, low), high);
  }
  static FASTATTN_HD constexpr int WindowEnd(int position, const int& right) {
    return position + 1 + Least(right, kMaxKeys - 1);
  }
  static FASTATTN_HD constexpr int WindowBegin(int position, const int& left) {
    return position - Least(left, kMaxKeys);
  }
};

// wgmma_sm90. The cached keys of a sequence are at most kMaxCachedKeys.
struct Sm90Form : PlainForm {
  // Keys of a window from the diagonal on, and those before it.
  static FASTATTN_HD constexpr int Right(int right) { return Least(right, kMaxWindow) + 1; }
  static FASTATTN_HD constexpr int Left(int left) { return Least(left, kMaxWindow); }

  static FASTATTN_HD constexpr int WindowEnd(int position, int right) {
    return position + Right(right);
  }
  static FASTATTN_HD constexpr int WindowBegin(int position, int left) {
    return position - Left(left);
  }
};

}  // namespace fastattn::cuda

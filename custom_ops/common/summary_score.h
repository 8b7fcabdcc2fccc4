// Scores of key blocks in fp32, with every rounding spelled: 32 sums, the i-th of channels i,
// i + 32, ..., which are then folded in halves. So lists have the same bits on every processor.
#pragma once

#include "common/exact.h"
#include "common/types.h"

namespace fastattn {

// Sums of a score. Every head dimension is a multiple.
inline constexpr int kScoreLanes = 32;

// The lesser, the larger; NaN if one is NaN.
FASTATTN_HD float LeastOrNaN(float a, float b) { return a <= b || a != a ? a : b; }
FASTATTN_HD float MostOrNaN(float a, float b) { return a >= b || a != a ? a : b; }

// A channel's largest product with a key between `low` and `high`.
FASTATTN_HD float BoundOfProduct(float q, float low, float high) {
  return MostOrNaN(Mul(q, low), Mul(q, high));
}

// Where a key block of two summaries has both: their mean, least, largest or sum.
FASTATTN_HD float MeanOfTwo(float a, float b) { return Mul(0.5f, Add(a, b)); }

}  // namespace fastattn

// The total order of top-k: by value, then by index; and the range of columns that a row has.
//
// Floats as integers of that order: NaN (of either sign) lowest, then -inf, up to +inf. -0 is +0:
// they are equal, and an order of their bits would not be.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

inline constexpr uint32_t kLeastTopkKey = 0;  // NaN

FASTATTN_HD uint32_t TopkKey(uint32_t float_bits) {
  const uint32_t magnitude = float_bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return kLeastTopkKey;
  if (magnitude == 0) return 0x80000000u;
  return (float_bits >> 31) != 0 ? ~float_bits : float_bits | 0x80000000u;
}

struct TopkRange {
  int64_t begin;  // first column
  int64_t size;   // columns
};

// Device values are clamped to the row: nothing outside it is read.
FASTATTN_HD TopkRange TopkRangeOf(int64_t start, int64_t length, int64_t columns) {
  TopkRange range;
  range.begin = start < 0 ? 0 : start > columns ? columns : start;
  const int64_t most = columns - range.begin;
  range.size = length < 0 ? 0 : length > most ? most : length;
  return range;
}

}  // namespace fastattn

// 4-bit codes of a KV cache: integers in [-8, 7], stored as code + 8, two in a byte, the one of the
// even channel in the low nibble.
//
// A group's scale has a sign: the value of the largest magnitude is always code -8, so that all 16
// codes are used. A step is then an eighth of that magnitude, where codes of +-7 have a seventh:
// the error is 12 % smaller (docs/numerics.md).
#pragma once

#include <cstdint>

#include "common/numeric.h"
#include "common/types.h"

namespace fastattn {

inline constexpr float kInt4Steps = 8.0f;
inline constexpr int kInt4Bias = 8;

// Scale of a group whose largest magnitude has the bits `amax_bits`. `below`: the group holds that
// magnitude with a minus sign. The bits do not depend on the order of the elements.
FASTATTN_HD float Int4Scale(uint32_t amax_bits, bool below, float floor) {
  const float scale = DynamicScale(amax_bits, floor, kInt4Steps);
  const bool negative = !below && amax_bits - 1u < 0x7F800000u;  // neither 0 nor NaN
  return negative ? -scale : scale;
}

// The code as it is stored, in [0, 15]. A NaN has no code and becomes that of 0 (its scale carries
// the NaN).
FASTATTN_HD uint8_t FloatToInt4(float x) {
  if (IsNaN(x)) return kInt4Bias;
  x = x < -8.0f ? -8.0f : (x > 7.0f ? 7.0f : x);
  // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low mantissa bits.
  return static_cast<uint8_t>((FloatBits(x + 0x1.8p23f) + kInt4Bias) & 0xFu);
}

// One code in a byte; a cache holds two.
template <>
struct Element<DType::kInt4> {
  using Storage = uint8_t;
  static FASTATTN_HD float Load(uint8_t x) {
    return static_cast<float>(static_cast<int>(x) - kInt4Bias);
  }
  static FASTATTN_HD uint8_t Store(float x) { return FloatToInt4(x); }
};

}  // namespace fastattn

// Scales of groups of E2M1 codes, a byte each: what a type of scale is computed from, and its
// value. `GroupScale<type>` is all that writers and readers know of a type.
#pragma once

#include <cstdint>

#include "common/fp4.h"
#include "formats/dtype.h"

namespace fastattn {

template <DType kType>
struct GroupScale;

template <>
struct GroupScale<DType::kUE8M0> {
  static constexpr bool kPowersOfTwo = true;
  // The byte for a group whose largest magnitude has these bits (of MxAbsBits).
  static FASTATTN_HD uint8_t Byte(uint32_t amax_bits) { return MxScaleByte(amax_bits); }
  static FASTATTN_HD float Value(uint8_t byte) { return UE8M0ToFloat(byte); }
  // What values are multiplied with ahead of their rounding, for a byte of Byte().
  static FASTATTN_HD float Inverse(uint8_t byte) { return UE8M0Inverse(byte); }
};

}  // namespace fastattn

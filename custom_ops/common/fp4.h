// E2M1 (FP4) codes and UE8M0 block exponents, in integer arithmetic: the same bits on every target,
// with or without a conversion instruction.
//
// E2M1 is sign, two exponent bits, one mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6. It has no NaN and
// no infinity. UE8M0 is an exponent byte e + 127; 255 is NaN.
#pragma once

#include <cstdint>

#include "common/numeric.h"
#include "common/types.h"

namespace fastattn {

inline constexpr float kE2M1Max = 6.0f;
// Elements that share one UE8M0 exponent.
inline constexpr int kMxBlock = 32;
inline constexpr uint8_t kUE8M0NaN = 255;

// Nearest code, ties to the even code. Saturates (infinities too), keeps the sign of zero; a NaN of
// either sign becomes 7, as the instruction has it.
//
// Cases are selected by masks: a CPU would mispredict a branch for every other value, and masks
// vectorise.
FASTATTN_HD uint32_t FloatToE2M1(float x) {
  const uint32_t bits = FloatBits(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const int32_t u = static_cast<int32_t>(magnitude);
  const int32_t sign = static_cast<int32_t>((bits >> 28) & 0x8u);
  // Below 1 the step is 0.5: adding 2^22 leaves exactly those bits in the mantissa.
  const int32_t small =
      static_cast<int32_t>(FloatBits(BitsFloat(magnitude) + 0x1p22f)) - 0x4A800000;
  // From 1 on: round the mantissa to its top bit, ties to even, and rebase the exponent.
  const int32_t large =
      static_cast<int32_t>((magnitude + 0x1FFFFFu + ((magnitude >> 22) & 1u)) >> 22) - (126 << 1);
  const int32_t below_1 = (u - 0x3F800000) >> 31;  // all ones or zero
  const int32_t below_6 = (u - 0x40C00000) >> 31;
  const int32_t nan = (0x7F800000 - u) >> 31;
  const int32_t code = (small & below_1) | (large & ~below_1);
  const int32_t saturated = (code & below_6) | (7 & ~below_6) | sign;
  return static_cast<uint32_t>((saturated & ~nan) | (7 & nan));
}

FASTATTN_HD float E2M1ToFloat(uint32_t code) {
  const uint32_t sign = (code & 0x8u) << 28;
  const uint32_t magnitude = code & 0x7u;
  // An fp32 with the code's exponent and mantissa is 2^126 times too small, the subnormal 0.5 too.
  return BitsFloat(sign | FloatBits(BitsFloat(magnitude << 22) * 0x1p126f));
}

// Elements 2i (low nibble) and 2i + 1 share byte i.
FASTATTN_HD uint8_t PackE2M1(uint32_t even, uint32_t odd) {
  return static_cast<uint8_t>(even | (odd << 4));
}

// |x| as bits for the amax of a block; a NaN counts as 0, so that its neighbours keep their values.
FASTATTN_HD uint32_t MxAbsBits(float x) {
  const uint32_t u = AbsBits(x);
  return u > 0x7F800000u ? 0u : u;
}

// UE8M0 byte of ceil(log2(max(amax, floor) / 6)): the smallest e with amax <= 1.5 * 2^(e + 2). An
// infinite amax counts as FLT_MAX. The byte lies in [1, 253].
FASTATTN_HD uint8_t MxScaleByte(uint32_t amax_bits) {
  // 6 * 2^-126: with this floor the inverse of a block's scale is a normal fp32 number.
  constexpr uint32_t kFloorBits = 0x01C00000u;
  if (amax_bits >= 0x7F800000u) amax_bits = 0x7F7FFFFFu;
  if (amax_bits < kFloorBits) amax_bits = kFloorBits;
  // A mantissa above 1.5 carries into the exponent.
  return static_cast<uint8_t>(((amax_bits + 0x3FFFFFu) >> 23) - 2u);
}

// 2^(byte - 127); 255 is NaN.
FASTATTN_HD float UE8M0ToFloat(uint8_t byte) {
  if (byte == kUE8M0NaN) return BitsFloat(0x7FC00000u);
  return byte == 0 ? 0x1p-127f : BitsFloat(static_cast<uint32_t>(byte) << 23);
}

// One code in a byte; a cache holds two.
template <>
struct Element<DType::kE2M1> {
  using Storage = uint8_t;
  static FASTATTN_HD float Load(uint8_t x) { return E2M1ToFloat(x); }
  static FASTATTN_HD uint8_t Store(float x) { return static_cast<uint8_t>(FloatToE2M1(x)); }
};

// 2^-(byte - 127), exact, for a byte of MxScaleByte.
FASTATTN_HD float UE8M0Inverse(uint8_t byte) {
  return BitsFloat((254u - static_cast<uint32_t>(byte)) << 23);
}

}  // namespace fastattn

// fp32 arithmetic whose bits do not depend on the processor, the compiler or its maths library.
//
// The functions here spell each rounding: a contraction to a fused multiply-add or a library's exp
// would move a result by an ulp, and an ulp before a quantiser is a different code.
#pragma once

#include <cstdint>

#include "common/numeric.h"
#include "common/types.h"

namespace fastattn {

#if defined(__CUDA_ARCH__)
FASTATTN_HD float Mul(float a, float b) { return __fmul_rn(a, b); }
FASTATTN_HD float Add(float a, float b) { return __fadd_rn(a, b); }
FASTATTN_HD float Sub(float a, float b) { return __fsub_rn(a, b); }
FASTATTN_HD float Div(float a, float b) { return __fdiv_rn(a, b); }
FASTATTN_HD float Sqrt(float a) { return __fsqrt_rn(a); }
#else
FASTATTN_HD float Mul(float a, float b) { return a * b; }
FASTATTN_HD float Add(float a, float b) { return a + b; }
FASTATTN_HD float Sub(float a, float b) { return a - b; }
FASTATTN_HD float Div(float a, float b) { return a / b; }
FASTATTN_HD float Sqrt(float a) { return __builtin_sqrtf(a); }
#endif

// `on` ? a : b. On the device it is one select without a branch: a kernel that waits little for
// memory is faster when both values are computed.
FASTATTN_HD float Select(bool on, float a, float b) {
#if defined(__CUDA_ARCH__)
  float chosen;
  asm("{\n"
      ".reg .pred on;\n"
      "setp.ne.s32 on, %1, 0;\n"
      "selp.f32 %0, %2, %3, on;\n"
      "}\n"
      : "=f"(chosen)
      : "r"(static_cast<int>(on)), "f"(a), "f"(b));
  return chosen;
#else
  return on ? a : b;
#endif
}

// exp(x) for x <= 0 within 2 ulp; below -87 it is 0 (the result would be subnormal), NaN is NaN.
//
// x = n ln2 + r with |r| <= ln2 / 2, exp(r) as its Taylor polynomial of degree 7 (error 6e-9).
FASTATTN_HD float ExpNonPositive(float x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer, ties to even, in the low bits
  constexpr float kLn2High = 0.693359375f;  // 9 bits: n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  const float shifted = Add(Mul(x, 1.44269504f), kRound);
  const float n = Sub(shifted, kRound);
  const float r = Sub(Sub(x, Mul(n, kLn2High)), Mul(n, kLn2Low));
  float p = 1.0f / 5040.0f;
  p = Add(Mul(p, r), 1.0f / 720.0f);
  p = Add(Mul(p, r), 1.0f / 120.0f);
  p = Add(Mul(p, r), 1.0f / 24.0f);
  p = Add(Mul(p, r), 1.0f / 6.0f);
  p = Add(Mul(p, r), 0.5f);
  p = Add(Mul(p, r), 1.0f);
  p = Add(Mul(p, r), 1.0f);
  const float power = BitsFloat((FloatBits(shifted) << 23) + 0x3F800000u);  // 2^n
  return Select(x < -87.0f, 0.0f, Mul(p, power));
}

// Floors of the amax of an FP8 block, as bits.
inline constexpr uint32_t kCacheFloorBits = 0x38D1B717u;       // 1e-4: of what a cache holds
inline constexpr uint32_t kActivationFloorBits = 0x2EDBE6FFu;  // 1e-10: of a product's operand

// Smallest power of two >= max(amax, floor) / 448 for the amax bits of an FP8 block. An infinite
// amax counts as FLT_MAX; NaN stays NaN. No quotient: 448 = 1.75 * 2^8, so the exponent of amax
// less 8, and one more where the mantissa is above 1.75.
FASTATTN_HD float PowerOfTwoFp8Scale(uint32_t amax_bits, uint32_t floor_bits = kCacheFloorBits) {
  if (amax_bits > 0x7F800000u) return BitsFloat(0x7FC00000u);
  if (amax_bits == 0x7F800000u) amax_bits = 0x7F7FFFFFu;
  if (amax_bits < floor_bits) amax_bits = floor_bits;
  return BitsFloat(((amax_bits + 0x1FFFFFu) & 0x7F800000u) - (8u << 23));
}

// 1 / scale of a power of two or a NaN, exact.
FASTATTN_HD float PowerOfTwoInverse(float scale) {
  return IsNaN(scale) ? scale : BitsFloat(0x7F000000u - FloatBits(scale));
}

// A power-of-two scale's UE8M0 byte: its biased exponent, 255 for NaN.
FASTATTN_HD uint8_t PowerOfTwoToUe8m0(float scale) {
  return static_cast<uint8_t>((FloatBits(scale) >> 23) & 0xFFu);
}

}  // namespace fastattn

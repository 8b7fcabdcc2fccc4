// Scalar conversions with one defined result for every input, on host and device.
//
// All roundings are to nearest, ties to even. FP8 saturates (infinities too) and keeps NaN as the
// canonical code 0x7F. CUDA kernels may use the hardware's conversions where they give these bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/types.h"

namespace fastattn {

inline constexpr float kE4M3Max = 448.0f;
inline constexpr float kE5M2Max = 57344.0f;
inline constexpr float kInt8Max = 127.0f;
inline constexpr uint8_t kFp8NaN = 0x7F;
// Smallest amax of a cache token: an all-zero token gets this scale and codes 0, never NaN.
inline constexpr float kCacheAmaxFloor = 1e-6f;

FASTATTN_HD uint32_t FloatBits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

FASTATTN_HD float BitsFloat(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

FASTATTN_HD bool IsNaN(float x) { return (FloatBits(x) & 0x7FFFFFFFu) > 0x7F800000u; }

FASTATTN_HD float BFloat16ToFloat(uint16_t x) { return BitsFloat(static_cast<uint32_t>(x) << 16); }

FASTATTN_HD uint16_t FloatToBFloat16(float x) {
  const uint32_t u = FloatBits(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

FASTATTN_HD float Float16ToFloat(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16;
  const uint32_t magnitude = (x & 0x7FFFu) << 13;
  if ((x & 0x7C00u) == 0x7C00u) return BitsFloat(sign | 0x7F800000u | (magnitude & 0x7FFFFFu));
  // Normal and subnormal alike: shift the exponent by an exact multiplication with 2^112.
  return BitsFloat(sign | FloatBits(BitsFloat(magnitude) * 0x1p112f));
}

FASTATTN_HD uint16_t FloatToFloat16(float x) {
  const uint32_t bits = FloatBits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t u = bits & 0x7FFFFFFFu;
  if (u > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (u >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // >= 65520 rounds to inf
  if (u < 0x38800000u) {
    // Below 2^-14 the step is 2^-24: adding 0.5 leaves exactly those bits in the mantissa.
    return static_cast<uint16_t>(sign | (FloatBits(BitsFloat(u) + 0.5f) - 0x3F000000u));
  }
  u += 0xFFFu + ((u >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((u >> 13) - (112u << 10)));
}

// Cases are selected by masks, so that this inner loop of every FP8 writer vectorises.
FASTATTN_HD uint8_t FloatToE4M3(float x) {
  const uint32_t bits = FloatBits(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const int32_t u = static_cast<int32_t>(magnitude);
  const int32_t sign = static_cast<int32_t>((bits >> 24) & 0x80u);
  // Below 2^-6 the step is 2^-9: adding 2^14 leaves exactly those bits in the mantissa.
  const int32_t small =
      static_cast<int32_t>(FloatBits(BitsFloat(magnitude) + 0x1p14f)) - 0x46800000;
  // From there on: round the mantissa to three bits, ties to even, and rebase the exponent.
  const int32_t large =
      static_cast<int32_t>((magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20) - (120 << 3);
  const int32_t below_normal = (u - 0x3C800000) >> 31;  // all ones or zero
  const int32_t below_max = (u - 0x43E00000) >> 31;     // 448
  const int32_t nan = (0x7F800000 - u) >> 31;
  const int32_t code = (small & below_normal) | (large & ~below_normal);
  const int32_t saturated = (code & below_max) | (0x7E & ~below_max) | sign;
  return static_cast<uint8_t>((saturated & ~nan) | (kFp8NaN & nan));
}

FASTATTN_HD uint8_t FloatToE5M2(float x) {
  const uint32_t bits = FloatBits(x);
  const uint32_t sign = (bits >> 24) & 0x80u;
  uint32_t u = bits & 0x7FFFFFFFu;
  if (u > 0x7F800000u) return kFp8NaN;
  if (u >= 0x47600000u) return static_cast<uint8_t>(sign | 0x7Bu);  // >= 57344
  if (u < 0x38800000u) {
    // Below 2^-14 the step is 2^-16: adding 2^7 leaves exactly those bits in the mantissa.
    return static_cast<uint8_t>(sign | (FloatBits(BitsFloat(u) + 0x1p7f) - 0x43000000u));
  }
  u += 0xFFFFFu + ((u >> 21) & 1u);
  return static_cast<uint8_t>(sign | ((u >> 21) - (112u << 2)));
}

FASTATTN_HD float E4M3ToFloat(uint8_t code) {
  const uint32_t sign = (code & 0x80u) << 24;
  const uint32_t magnitude = code & 0x7Fu;
  if (magnitude == 0x7Fu) return BitsFloat(sign | 0x7FC00000u);
  return BitsFloat(sign | FloatBits(BitsFloat(magnitude << 20) * 0x1p120f));
}

FASTATTN_HD float E5M2ToFloat(uint8_t code) {
  return Float16ToFloat(static_cast<uint16_t>(code << 8));  // e5m2 is the upper half of an fp16
}

// Codes lie in [-127, 127]; a NaN has no code and becomes 0 (its scale carries the NaN).
FASTATTN_HD int8_t FloatToInt8(float x) {
  if (IsNaN(x)) return 0;
  x = x < -kInt8Max ? -kInt8Max : (x > kInt8Max ? kInt8Max : x);
  // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low mantissa bits.
  return static_cast<int8_t>(FloatBits(x + 0x1.8p23f) & 0xFFu);
}

// amax over |x| as the maximum of the absolute values' bits: a NaN orders above infinity, so it is
// never lost, and the result does not depend on the order of the elements.
FASTATTN_HD uint32_t AbsBits(float x) { return FloatBits(x) & 0x7FFFFFFFu; }

// Dequantisation scale of a group with the given amax bits: max(amax, floor) / qmax. An infinite
// amax counts as FLT_MAX so that the scale stays finite; NaN stays NaN.
FASTATTN_HD float DynamicScale(uint32_t amax_bits, float floor, float qmax) {
  if (amax_bits == 0x7F800000u) amax_bits = 0x7F7FFFFFu;
  const float amax = BitsFloat(amax_bits);
  return (amax < floor ? floor : amax) / qmax;
}

// Loads and stores of a floating point type as fp32.
template <DType kDType>
struct Element;

template <>
struct Element<DType::kFloat32> {
  using Storage = float;
  static FASTATTN_HD float Load(float x) { return x; }
  static FASTATTN_HD float Store(float x) { return x; }
};

template <>
struct Element<DType::kBFloat16> {
  using Storage = uint16_t;
  static FASTATTN_HD float Load(uint16_t x) { return BFloat16ToFloat(x); }
  static FASTATTN_HD uint16_t Store(float x) { return FloatToBFloat16(x); }
};

template <>
struct Element<DType::kFloat16> {
  using Storage = uint16_t;
  static FASTATTN_HD float Load(uint16_t x) { return Float16ToFloat(x); }
  static FASTATTN_HD uint16_t Store(float x) { return FloatToFloat16(x); }
};

template <>
struct Element<DType::kE4M3> {
  using Storage = uint8_t;
  static FASTATTN_HD float Load(uint8_t x) { return E4M3ToFloat(x); }
  static FASTATTN_HD uint8_t Store(float x) { return FloatToE4M3(x); }
};

template <>
struct Element<DType::kE5M2> {
  using Storage = uint8_t;
  static FASTATTN_HD float Load(uint8_t x) { return E5M2ToFloat(x); }
  static FASTATTN_HD uint8_t Store(float x) { return FloatToE5M2(x); }
};

template <>
struct Element<DType::kInt8> {
  using Storage = int8_t;
  static FASTATTN_HD float Load(int8_t x) { return static_cast<float>(x); }
  static FASTATTN_HD int8_t Store(float x) { return FloatToInt8(x); }
};

// A scale or scalar read from fp32 or bf16 memory whose type is known at run time only.
FASTATTN_HD float LoadScale(const void* scales, DType dtype, int64_t index) {
  return dtype == DType::kFloat32 ? static_cast<const float*>(scales)[index]
                                  : BFloat16ToFloat(static_cast<const uint16_t*>(scales)[index]);
}

}  // namespace fastattn

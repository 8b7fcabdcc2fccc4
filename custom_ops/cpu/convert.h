// Conversions of whole rows of elements between fp32 and the stored types.
//
// The bits are those of common/numeric.h, whose scalar functions branch around floating point
// operations: the compiler may not speculate these, so loops over them do not vectorise. Here every
// case is computed and one is selected with masks, and a loop of its own changes the element size
// of a row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/fp4.h"
#include "common/int4.h"
#include "common/numeric.h"

namespace fastattn::cpu {

namespace detail {

// Elements of a row that are converted at a time, so that their 32-bit form stays in L1.
inline constexpr int kChunk = 128;

inline int32_t Bits(float x) { return static_cast<int32_t>(FloatBits(x)); }
inline float Float(int32_t bits) { return BitsFloat(static_cast<uint32_t>(bits)); }
inline int32_t Select(bool condition, int32_t yes, int32_t no) {
  const int32_t mask = -static_cast<int32_t>(condition);
  return (yes & mask) | (no & ~mask);
}
inline int32_t Min(int32_t a, int32_t b) { return Select(a < b, a, b); }

// One stored type: From(float) gives the code in the low bits, To(code) the value. The steps are
// explained in common/numeric.h.
template <DType kDType>
struct Lane;

// Small floats with kMantissa bits of mantissa. kStep is the float whose last mantissa bit is the
// subnormal step, kMinNormal and kLimit are the bits of the smallest normal and of the first value
// that becomes kLargest, kBias is the difference of the exponent biases.
template <int kMantissa, int32_t kMinNormal, int32_t kStep, int32_t kLimit, int32_t kLargest,
          int32_t kBias, int32_t kNaN, int kSignShift>
struct SmallFloat {
  static int32_t From(float x) {
    constexpr int kDrop = 23 - kMantissa;
    const int32_t bits = Bits(x);
    const int32_t u = bits & 0x7FFFFFFF;
    const int32_t low = Bits(Float(Min(u, kMinNormal)) + Float(kStep)) - kStep;
    const int32_t v = Min(u, kLimit);
    const int32_t high =
        ((v + ((1 << (kDrop - 1)) - 1) + ((v >> kDrop) & 1)) >> kDrop) - (kBias << kMantissa);
    const int32_t sign = (bits >> kSignShift) & (0x80 << (24 - kSignShift));
    const int32_t finite = Select(u >= kLimit, kLargest, Select(u < kMinNormal, low, high)) | sign;
    return Select(u > 0x7F800000, kNaN, finite);
  }
};

template <>
struct Lane<DType::kE4M3> : SmallFloat<3, 0x3C800000, 0x46800000, 0x43E00000, 0x7E, 120, 0x7F, 24> {
  static float To(int32_t code) {
    const int32_t magnitude = code & 0x7F;
    const int32_t finite = Bits(Float(magnitude << 20) * 0x1p120f);
    return Float(((code & 0x80) << 24) | Select(magnitude == 0x7F, 0x7FC00000, finite));
  }
};

template <>
struct Lane<DType::kFloat16>
    : SmallFloat<10, 0x38800000, 0x3F000000, 0x477FF000, 0x7C00, 112, 0x7E00, 16> {
  // The scalar function keeps the sign of a NaN.
  static int32_t From(float x) { return SmallFloat::From(x) | ((Bits(x) >> 16) & 0x8000); }
  static float To(int32_t code) {
    const int32_t magnitude = (code & 0x7FFF) << 13;
    const int32_t finite = Bits(Float(magnitude) * 0x1p112f);
    return Float(((code & 0x8000) << 16) |
                 Select((code & 0x7C00) == 0x7C00, magnitude | 0x7F800000, finite));
  }
};

template <>
struct Lane<DType::kE5M2> : SmallFloat<2, 0x38800000, 0x43000000, 0x47600000, 0x7B, 112, 0x7F, 24> {
  static float To(int32_t code) { return Lane<DType::kFloat16>::To(code << 8); }
};

template <>
struct Lane<DType::kBFloat16> {
  static int32_t From(float x) {
    const uint32_t bits = FloatBits(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = static_cast<int32_t>(bits & 0x7FFFFFFFu) > 0x7F800000;
    return Select(nan, static_cast<int32_t>((bits >> 16) | 0x40u), static_cast<int32_t>(rounded));
  }
  static float To(int32_t code) { return Float(code << 16); }
};

template <>
struct Lane<DType::kInt8> {
  static int32_t From(float x) {
    const int32_t bits = Bits(x);
    const int32_t u = bits & 0x7FFFFFFF;
    const int32_t sign = bits >> 31;
    // Adding 2^23 rounds to an integer, ties to even, and leaves it in the low mantissa bits.
    const int32_t magnitude = Bits(Float(Min(u, 0x42FE0000)) + 0x1p23f) & 0x7F;
    return Select(u > 0x7F800000, 0, (magnitude ^ sign) - sign);
  }
  static float To(int32_t code) { return static_cast<float>(code); }
};

template <>
struct Lane<DType::kInt4> {
  static int32_t From(float x) {
    const int32_t bits = Bits(x);
    const int32_t u = bits & 0x7FFFFFFF;
    const int32_t sign = bits >> 31;
    // As above; 7.5 or more is no code above 0.
    const int32_t limit = Select(sign != 0, 0x41000000, 0x40E00000);  // 8, 7
    const int32_t magnitude = Bits(Float(Min(u, limit)) + 0x1p23f) & 0xF;
    return Select(u > 0x7F800000, 0, (magnitude ^ sign) - sign) + kInt4Bias;
  }
  static float To(int32_t code) { return static_cast<float>(code - kInt4Bias); }
};

template <>
struct Lane<DType::kE2M1> {
  static int32_t From(float x) { return static_cast<int32_t>(FloatToE2M1(x)); }
  static float To(int32_t code) { return E2M1ToFloat(static_cast<uint32_t>(code)); }
};

}  // namespace detail

// Largest |x| as bits, NaN above all (see AbsBits).
inline uint32_t AmaxBits(const float* x, int n) {
  int32_t amax = 0;  // signed: the comparison is a vector instruction on every x86-64
  for (int i = 0; i < n; ++i) amax = std::max(amax, static_cast<int32_t>(AbsBits(x[i])));
  return static_cast<uint32_t>(amax);
}

// The same of a group with a scale of its own, in which a NaN does not count.
template <int kGroup>
uint32_t GroupAmaxBits(const float* x) {
  int32_t amax = 0;
  for (int i = 0; i < kGroup; ++i) amax = std::max(amax, static_cast<int32_t>(MxAbsBits(x[i])));
  return static_cast<uint32_t>(amax);
}

// Whether some x[i] is -|amax|.
inline bool ReachesBelow(const float* x, int n, uint32_t amax_bits) {
  int32_t found = 0;
  const int32_t wanted = static_cast<int32_t>(amax_bits | 0x80000000u);
  for (int i = 0; i < n; ++i) found |= static_cast<int32_t>(detail::Bits(x[i]) == wanted);
  return found != 0;
}

// Two codes a byte, the first in the low nibble, and back.
inline void PackNibbles(const uint8_t* codes, int n, uint8_t* bytes) {
  for (int i = 0; i < n / 2; ++i) {
    bytes[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  }
}

inline void UnpackNibbles(const uint8_t* bytes, int n, uint8_t* codes) {
  for (int i = 0; i < n / 2; ++i) {
    codes[2 * i] = bytes[i] & 0xF;
    codes[2 * i + 1] = bytes[i] >> 4;
  }
}

// out[i] = x[i] as fp32.
template <DType kDType>
void LoadRow(const typename Element<kDType>::Storage* x, int n, float* out) {
  if constexpr (kDType == DType::kFloat32) {
    std::copy(x, x + n, out);
  } else {
    int32_t wide[detail::kChunk];
    for (int begin = 0; begin < n; begin += detail::kChunk) {
      const int size = std::min(detail::kChunk, n - begin);
      for (int i = 0; i < size; ++i) wide[i] = x[begin + i];
      for (int i = 0; i < size; ++i) out[begin + i] = detail::Lane<kDType>::To(wide[i]);
    }
  }
}

// out[i] = value(i), rounded.
template <DType kDType, typename Value>
void StoreValues(int n, typename Element<kDType>::Storage* out, Value&& value) {
  using Storage = typename Element<kDType>::Storage;
  if constexpr (kDType == DType::kFloat32) {
    for (int i = 0; i < n; ++i) out[i] = value(i);
  } else {
    int32_t wide[detail::kChunk];
    for (int begin = 0; begin < n; begin += detail::kChunk) {
      const int size = std::min(detail::kChunk, n - begin);
      for (int i = 0; i < size; ++i) wide[i] = detail::Lane<kDType>::From(value(begin + i));
      for (int i = 0; i < size; ++i) out[begin + i] = static_cast<Storage>(wide[i]);
    }
  }
}

// out[i] = x[i], rounded.
template <DType kDType>
void StoreRow(const float* x, int n, typename Element<kDType>::Storage* out) {
  StoreValues<kDType>(n, out, [x](int i) { return x[i]; });
}

// Codes of x * inverse.
template <DType kCode>
void EncodeRow(const float* x, int n, float inverse, typename Element<kCode>::Storage* out) {
  StoreValues<kCode>(n, out, [x, inverse](int i) { return x[i] * inverse; });
}

// The same with one reciprocal a channel.
template <DType kCode>
void EncodeRow(const float* x, int n, const float* inverse, typename Element<kCode>::Storage* out) {
  StoreValues<kCode>(n, out, [x, inverse](int i) { return x[i] * inverse[i]; });
}

}  // namespace fastattn::cpu

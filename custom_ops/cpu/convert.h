// Conversions of whole rows between fp32 and the stored element types.
//
// The bits are those of common/numeric.h. Loops over the scalar functions there do not vectorise
// (their branches hold floating point operations, which the compiler may not speculate).
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/numeric.h"

namespace fastattn::cpu {

// Largest |x| as bits, NaN above all (see AbsBits).
inline uint32_t AmaxBits(const float* x, int n) {
  int32_t amax = 0;  // signed: the comparison is a vector instruction on every x86-64
  for (int i = 0; i < n; ++i) amax = std::max(amax, static_cast<int32_t>(AbsBits(x[i])));
  return static_cast<uint32_t>(amax);
}

template <DType kDType>
void LoadRow(const typename Element<kDType>::Storage* x, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = Element<kDType>::Load(x[i]);
}

template <DType kDType>
void StoreRow(const float* x, int n, typename Element<kDType>::Storage* out) {
  for (int i = 0; i < n; ++i) out[i] = Element<kDType>::Store(x[i]);
}

// Codes of x * inverse.
template <DType kCode>
void EncodeRow(const float* x, int n, float inverse, typename Element<kCode>::Storage* out) {
  for (int i = 0; i < n; ++i) out[i] = Element<kCode>::Store(x[i] * inverse);
}

// The same with one reciprocal a channel.
template <DType kCode>
void EncodeRow(const float* x, int n, const float* inverse, typename Element<kCode>::Storage* out) {
  for (int i = 0; i < n; ++i) out[i] = Element<kCode>::Store(x[i] * inverse[i]);
}

}  // namespace fastattn::cpu

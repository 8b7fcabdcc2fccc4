#pragma once

#include <algorithm>
#include <cstdint>

#include "common/numeric.h"
#include "params/quantize.h"

namespace fastattn::cpu {

void QuantizeFp8(const QuantizeFp8Params& p);

template <DType kDType>
inline uint32_t AmaxBits(const typename Element<kDType>::Storage* x, int64_t n) {
  uint32_t amax = 0;
  for (int64_t i = 0; i < n; ++i) amax = std::max(amax, AbsBits(Element<kDType>::Load(x[i])));
  return amax;
}

// e4m3 codes of n values under one scale.
template <DType kDType>
inline void EncodeE4M3(const typename Element<kDType>::Storage* x, int64_t n, float scale,
                       uint8_t* codes) {
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < n; ++i) codes[i] = FloatToE4M3(Element<kDType>::Load(x[i]) * inverse);
}

// The same under the scale that the values themselves call for, which is returned.
template <DType kDType>
inline float EncodeE4M3Dynamic(const typename Element<kDType>::Storage* x, int64_t n,
                               uint8_t* codes) {
  const float scale = DynamicScale(AmaxBits<kDType>(x, n), kActivationAmaxFloor, kE4M3Max);
  EncodeE4M3<kDType>(x, n, scale, codes);
  return scale;
}

}  // namespace fastattn::cpu

// Code that the query and the key kernels share: the rotation of a pair, and the inverse of FP8's
// power-of-two scale.
#pragma once

#include <cstdint>

#include "common/exact.h"
#include "common/numeric.h"

namespace fastattn::cuda {

__device__ __forceinline__ void RotatePair(float cos, float sin, float& even, float& odd) {
  const float e = even, o = odd;
  even = Sub(Mul(e, cos), Mul(o, sin));
  odd = Add(Mul(o, cos), Mul(e, sin));
}

// 1 / scale of a power of two or a NaN.
__device__ __forceinline__ float PowerOfTwoInverse(float scale) {
  return IsNaN(scale) ? scale : BitsFloat(0x7F000000u - FloatBits(scale));
}

}  // namespace fastattn::cuda

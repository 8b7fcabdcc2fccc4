// Codes of bf16 channels in a lane, by an exact division.
#pragma once

#include <cstdint>

#include "common/exact.h"
#include "common/numeric.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/dynamic_scale.cuh"

namespace fastattn::cuda {

// Divides bf16 numbers by an fp32 scale, with the bits of a division.
//
// One correction of the quotient by its exact remainder rounds it right: checked for every pair of
// a bf16 and an fp32 mantissa. That needs a reciprocal and remainders that are normal numbers;
// other scales (0, NaN, tiny, negative) are really divided by.
class Quotient {
 public:
  __device__ __forceinline__ explicit Quotient(float scale)
      : scale_(scale),
        reciprocal_(ReciprocalOfNormal(scale)),
        fast_(scale >= 0x1p-60f && scale <= 0x1p120f) {}

  __device__ __forceinline__ bool IsFast() const { return fast_; }

  __device__ __forceinline__ float Fast(float x) const {
    const float q = Mul(x, reciprocal_);
    const float corrected = __fmaf_rn(__fmaf_rn(-scale_, q, x), reciprocal_, q);
    // The correction makes +0 of -0, and NaN of what saturates; NaN stays NaN.
    return fabsf(q) <= 512.0f ? copysignf(corrected, q) : q;
  }

  __device__ __forceinline__ float Exact(float x) const { return Div(x, scale_); }

 private:
  float scale_, reciprocal_;
  bool fast_;
};

// The same by a power of two or NaN: the product with its reciprocal is exact.
class PowerOfTwoQuotient {
 public:
  __device__ __forceinline__ explicit PowerOfTwoQuotient(float scale)
      : inverse_(PowerOfTwoInverse(scale)) {}

  __device__ __forceinline__ bool IsFast() const { return true; }
  __device__ __forceinline__ float Fast(float x) const { return Mul(x, inverse_); }
  __device__ __forceinline__ float Exact(float x) const { return Fast(x); }

 private:
  float inverse_;
};

// Codes of 8 bf16 values.
template <bool kFast, typename Quotient>
__device__ __forceinline__ uint2 EncodeAs(uint4 pairs, const Quotient& quotient) {
  const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float value = BitsFloat(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    x[i] = kFast ? quotient.Fast(value) : quotient.Exact(value);
  }
  return make_uint2(PackCodes<DType::kE4M3>(x[0], x[1], x[2], x[3]),
                    PackCodes<DType::kE4M3>(x[4], x[5], x[6], x[7]));
}

template <typename Quotient>
__device__ __forceinline__ uint2 Encode(uint4 pairs, const Quotient& quotient) {
  return quotient.IsFast() ? EncodeAs<true>(pairs, quotient) : EncodeAs<false>(pairs, quotient);
}

}  // namespace fastattn::cuda

// The factor of an RMSNorm over a head that neighbouring lanes hold, with the bits of the CPU's.
#pragma once

#include <cstdint>

#include "common/exact.h"
#include "common/numeric.h"
#include "cuda/common/dynamic_scale.cuh"
#include "cuda/common/lane.cuh"

namespace fastattn::cuda {

// sqrt(x) correctly rounded for x from 2^-101 to FLT_MAX: what __fsqrt_rn does for these.
__device__ __forceinline__ float SqrtOfNormal(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float root = x * y;
  return __fmaf_rn(__fmaf_rn(-root, root, x), y * 0.5f, root);
}

// 1 / sqrt(x), both correctly rounded, of an x that is not negative; without the subroutines of
// the division and the root, which cost registers all around them.
__device__ __forceinline__ float InverseRoot(float x) {
  const uint32_t bits = FloatBits(x);
  float inverse = ReciprocalOfNormal(SqrtOfNormal(x));
  asm volatile("" : "+f"(inverse));  // computed in front of the branch, which is hardly ever taken
  if (bits - 0x0D000000u > 0x727FFFFFu) {
    if (bits > 0x7F800000u) return x;  // NaN
    if (bits == 0x7F800000u) return 0.0f;
    if (bits == 0) return BitsFloat(0x7F800000u);
    inverse = ReciprocalOfNormal(SqrtOfNormal(x * 0x1p96f)) * 0x1p48f;
  }
  return inverse;
}

// 1 / sqrt(mean(x^2) + eps) of a head, in all of its lanes, which all take part.
template <typename Lane>
__device__ __forceinline__ float InverseRms(const float (&x)[Lane::kValues], float eps) {
  float totals[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sums[Lane::kHalf];
#pragma unroll
    for (int i = 0; i < Lane::kHalf; ++i) {
      const float value = x[half * Lane::kHalf + i];
      sums[i] = Mul(value, value);
    }
#pragma unroll
    for (int n = Lane::kHalf / 2; n > 0; n /= 2) {
#pragma unroll
      for (int i = 0; i < n; ++i) sums[i] = Add(sums[2 * i], sums[2 * i + 1]);
    }
    totals[half] = sums[0];
  }
  // Neighbouring lanes hold neighbouring channels of either half: two trees side by side, whose
  // leaves past the channels are 0.
#pragma unroll
  for (int lanes = 1; lanes < Lane::kLanes; lanes *= 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      totals[half] = Add(totals[half], __shfl_xor_sync(kFullWarp, totals[half], lanes));
    }
  }
  const float total = Add(totals[0], totals[1]);
  // The product with 1 / D is the quotient for a power of two.
  if constexpr ((Lane::kHeadDim & (Lane::kHeadDim - 1)) == 0) {
    constexpr float kInverse = 1.0f / Lane::kHeadDim;
    return InverseRoot(Add(Mul(total, kInverse), eps));
  } else {
    return InverseRoot(Add(Div(total, static_cast<float>(Lane::kHeadDim)), eps));
  }
}

}  // namespace fastattn::cuda

// What each side of one token and head counts for in a merge by log-sum-exp.
#pragma once

#include <cmath>

#include "common/exact.h"

namespace fastattn {

struct MergeWeights {
  float max;     // of both LSEs, -inf if both sides are empty
  float sum;     // of both exponentials, relative to `max`
  float prefix;  // 0 for an empty side
  float suffix;
  bool use_prefix;  // false: the side is empty and its output may hold anything
  bool use_suffix;
};

struct Ratios {
  float one;    // 1 / sum
  float other;  // other / sum
};

// Both quotients correctly rounded, for other in [0, 1] and sum = 1 + other, or NaN.
//
// The device's division handles every exponent, by a branch and a call. In this range an estimate
// of the reciprocal within 2 ulp, two Newton steps and one correction of the quotient are enough
// for every `other` but one, whose sum is just below 2 (Markstein's exception).
FASTATTN_HD Ratios RatiosOf(float other, float sum) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(sum));  // within 1 ulp
  y = __fmaf_rn(y, __fmaf_rn(-sum, y, 1.0f), y);
  y = __fmaf_rn(y, __fmaf_rn(-sum, y, 1.0f), y);
  if (sum == 0x1.fffffep0f) y = 0x1.000002p-1f;
  const float q = Mul(other, y);
  return {y, __fmaf_rn(__fmaf_rn(-sum, q, other), y, q)};
#else
  return {Div(1.0f, sum), Div(other, sum)};
#endif
}

// -inf and +inf mark a side without keys. A NaN on either side reaches both weights.
//
// One of the two exponentials is exp(0) = 1, whose polynomial gives exactly 1: the other one is all
// there is to compute, with the bits of computing both.
FASTATTN_HD MergeWeights WeightsOfSides(float prefix_lse, float suffix_lse) {
  const float infinity = BitsFloat(0x7F800000u);
  const float p = prefix_lse == infinity ? -infinity : prefix_lse;
  const float s = suffix_lse == infinity ? -infinity : suffix_lse;
  MergeWeights w;
  w.use_prefix = p != -infinity;
  w.use_suffix = s != -infinity;
  const bool prefix_larger = p > s;
  w.max = prefix_larger ? p : s;
  const float other = ExpNonPositive(prefix_larger ? Sub(s, p) : Sub(p, s));
  w.sum = Add(1.0f, other);
  const Ratios ratios = RatiosOf(other, w.sum);
  const bool any = w.use_prefix || w.use_suffix;
  w.prefix = any ? (prefix_larger ? ratios.one : ratios.other) : 0.0f;
  w.suffix = any ? (prefix_larger ? ratios.other : ratios.one) : 0.0f;
  return w;
}

// The sum lies in [1, 2], where both logarithms are within 2^-24.
FASTATTN_HD float MergedLse(const MergeWeights& w) {
  if (!w.use_prefix && !w.use_suffix) return w.max;
#if defined(__CUDA_ARCH__)
  return Add(logf(w.sum), w.max);
#else
  return Add(static_cast<float>(std::log(static_cast<double>(w.sum))), w.max);
#endif
}

// One merged value of the two sides' values.
FASTATTN_HD float MergeValues(float prefix, float suffix, const MergeWeights& w) {
  if (!w.use_suffix) return w.use_prefix ? Mul(prefix, w.prefix) : 0.0f;
  if (!w.use_prefix) return Mul(suffix, w.suffix);
  return Add(Mul(prefix, w.prefix), Mul(suffix, w.suffix));
}

}  // namespace fastattn

// The weights of the two sides of one token and head in a merge by log-sum-exp.
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

// The order of two sides by their weights, which are logarithms of any base.
struct SideOrder {
  float max;         // NaN if the suffix's is NaN
  float difference;  // the smaller minus the larger: <= 0, or NaN if a side is
  bool prefix_larger;
};

FASTATTN_HD SideOrder OrderSides(float prefix, float suffix) {
  SideOrder order;
  order.prefix_larger = prefix > suffix;
  order.max = order.prefix_larger ? prefix : suffix;
  order.difference = order.prefix_larger ? Sub(suffix, prefix) : Sub(prefix, suffix);
  return order;
}

struct Ratios {
  float one;    // 1 / sum
  float other;  // other / sum
};

// Returns both quotients correctly rounded, for other in [0, 1] and sum = 1 + other, or NaN.
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
// One of the two exponentials is exp(0) = 1, and the polynomial gives exactly 1 for it. Computing
// the other one alone gives the bits of computing both.
FASTATTN_HD MergeWeights WeightsOfSides(float prefix_lse, float suffix_lse) {
  const float infinity = BitsFloat(0x7F800000u);
  const float p = prefix_lse == infinity ? -infinity : prefix_lse;
  const float s = suffix_lse == infinity ? -infinity : suffix_lse;
  MergeWeights w;
  w.use_prefix = p != -infinity;
  w.use_suffix = s != -infinity;
  const SideOrder order = OrderSides(p, s);
  w.max = order.max;
  const float other = ExpNonPositive(order.difference);
  w.sum = Add(1.0f, other);
  const Ratios ratios = RatiosOf(other, w.sum);
  const bool any = w.use_prefix || w.use_suffix;
  w.prefix = any ? (order.prefix_larger ? ratios.one : ratios.other) : 0.0f;
  w.suffix = any ? (order.prefix_larger ? ratios.other : ratios.one) : 0.0f;
  return w;
}

// Returns log(x) within 2^-24 for x in [1, 2], and NaN for NaN, without a branch: log1p(f) for f in
// [-1/3, 1/3] is f + f^2 * polynomial (relative error 3e-8), where x = 1 + f or 2 (1 + f).
FASTATTN_HD float LogOfSum(float x) {
#if defined(__CUDA_ARCH__)
  const bool large = x > 0x1.555556p0f;
  const float f = __fmaf_rn(x, large ? 0.5f : 1.0f, -1.0f);  // exact
  float p = 0x1.1f41ecp-3f;
  p = __fmaf_rn(p, f, -0x1.3b285ep-3f);
  p = __fmaf_rn(p, f, 0x1.1ea274p-3f);
  p = __fmaf_rn(p, f, -0x1.5032e4p-3f);
  p = __fmaf_rn(p, f, 0x1.99d426p-3f);
  p = __fmaf_rn(p, f, -0x1.001480p-2f);
  p = __fmaf_rn(p, f, 0x1.5554fap-2f);
  p = __fmaf_rn(p, f, -0x1.ffffd6p-2f);
  p = __fmaf_rn(Mul(f, p), f, f);
  return __fmaf_rn(large ? 1.0f : 0.0f, 0x1.62e430p-1f, p);
#else
  return static_cast<float>(std::log(static_cast<double>(x)));
#endif
}

FASTATTN_HD float MergedLse(const MergeWeights& w) {
  const bool any = w.use_prefix || w.use_suffix;
  return Select(any, Add(LogOfSum(w.sum), w.max), w.max);
}

// Merges one value of each side.
FASTATTN_HD float MergeValues(float prefix, float suffix, const MergeWeights& w) {
  if (!w.use_suffix) return w.use_prefix ? Mul(prefix, w.prefix) : 0.0f;
  if (!w.use_prefix) return Mul(suffix, w.suffix);
  return Add(Mul(prefix, w.prefix), Mul(suffix, w.suffix));
}

}  // namespace fastattn

// Error feedback while a token's K is quantised: rounding errors go where queries do not look.
//
// Channels are rounded in blocks of 8, and the errors of a block change the channels after it:
//
//   code_k = round(x_k),   e_k = value(code_k) - x_k,   x_j := x_j + sum of e_k M[k, j]
//
// x and e are in units of the scale. Which M makes the expected error of a score smallest, and
// where that is from: fastattn/reference/feedback.py.
#pragma once

#include "common/exact.h"
#include "common/types.h"

namespace fastattn {

inline constexpr int kFeedbackBlock = 8;

// Of one KV head: M [D, D], of which the elements right of the blocks on the diagonal are read.
struct KeyFeedback {
  const float* matrix = nullptr;  // null: none
};

// What a channel passes on. Codes of infinities and NaN pass nothing on.
FASTATTN_HD float PassedError(float value, float x) {
  const float error = Sub(value, x);
  return (FloatBits(error) & 0x7F800000u) == 0x7F800000u ? 0.0f : error;
}

// Sum of errors[i] * factors[i * stride] over half of a block. One order of sums for every
// implementation.
FASTATTN_HD float PassedByHalf(const float* errors, const float* factors, int stride) {
  return Add(Add(Mul(errors[0], factors[0]), Mul(errors[1], factors[stride])),
             Add(Mul(errors[2], factors[2 * stride]), Mul(errors[3], factors[3 * stride])));
}

// x and the same over a block.
FASTATTN_HD float WithPassedErrors(float x, const float* errors, const float* factors, int stride) {
  return Add(x, Add(PassedByHalf(errors, factors, stride),
                    PassedByHalf(errors + 4, factors + 4 * stride, stride)));
}

}  // namespace fastattn

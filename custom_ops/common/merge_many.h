// The weights of any number of partial results of one token and head, and of a sink.
#pragma once

#include <cmath>

#include "common/exact.h"

namespace fastattn {

// An LSE of +inf marks a state without keys, too, as some kernels write it.
FASTATTN_HD float StateLse(float lse) {
  const float infinity = BitsFloat(0x7F800000u);
  return lse == infinity ? -infinity : lse;
}

// Largest LSE of the states and the sink, and the sum of all exponentials relative to it, in the
// order of the states, the sink last. A NaN is no maximum, but reaches the sum.
struct MergeTotal {
  float max;
  float sum;
  bool any;  // whether a state has keys
};

// `lse(n)` is that of state n, `sink` -inf where there is none.
template <typename F>
FASTATTN_HD MergeTotal TotalOfStates(int states, float sink, F&& lse) {
  const float infinity = BitsFloat(0x7F800000u);
  MergeTotal total{sink, 0.0f, false};
  for (int n = 0; n < states; ++n) {
    const float x = StateLse(lse(n));
    total.any = total.any || x != -infinity;
    total.max = x > total.max ? x : total.max;
  }
  for (int n = 0; n < states; ++n) {
    const float x = StateLse(lse(n));
    if (x != -infinity) total.sum = Add(total.sum, ExpNonPositive(Sub(x, total.max)));
  }
  if (sink != -infinity) total.sum = Add(total.sum, ExpNonPositive(Sub(sink, total.max)));
  return total;
}

// Factor of a state's output.
FASTATTN_HD float WeightOfState(float lse, const MergeTotal& total) {
  return Div(ExpNonPositive(Sub(lse, total.max)), total.sum);
}

FASTATTN_HD float LseOfTotal(const MergeTotal& total) {
  if (!total.any) return BitsFloat(0xFF800000u);
  return Add(static_cast<float>(std::log(static_cast<double>(total.sum))), total.max);
}

}  // namespace fastattn

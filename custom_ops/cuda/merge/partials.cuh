// Merges two partial results of one attention, each with its values as they were summed up: they
// are divided by the sum of all at the end, once.
#pragma once

#include "common/exact.h"
#include "cuda/common/exp2.cuh"
#include "cuda/merge/weights.h"

namespace fastattn::cuda {

// What a partial result counts for: sum * 2^max. One without keys has a sum of 0, and values of 0.
struct PartialWeight {
  float max;
  float sum;
};

// A maximum that stands for -inf: two of them have a difference.
inline constexpr float kLowestMaximum = -3.40282347e38f;

// WeightsOfSides of partial results, in units of 2^max of the result instead of its sum. None is
// left out: what has no key is 0, or NaN, which has to stay.
__device__ __forceinline__ MergeWeights WeightsOfPartials(PartialWeight prefix,
                                                          PartialWeight suffix) {
  const SideOrder order = OrderSides(prefix.max, suffix.max);
  const float other = Exp2(order.difference);
  MergeWeights w;
  w.max = order.max;
  w.prefix = order.prefix_larger ? 1.0f : other;
  w.suffix = order.prefix_larger ? other : 1.0f;
  w.sum = Add(Mul(prefix.sum, w.prefix), Mul(suffix.sum, w.suffix));
  w.use_prefix = w.use_suffix = true;
  return w;
}

}  // namespace fastattn::cuda

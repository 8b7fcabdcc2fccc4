// The merge of two partial results of one attention, each with its values as they were summed up:
// they are divided by the sum over all splits at the end, once.
#pragma once

#include "common/exact.h"
#include "cuda/common/exp2.cuh"
#include "cuda/merge/shared/merge_weights.h"

namespace fastattn::cuda {

// The weight of a partial result is sum * 2^max. One without keys has a sum of 0, and values of 0.
struct PartialWeight {
  float max;
  float sum;
};

// Stands for a maximum of -inf, so that two of them have a difference.
inline constexpr float kLowestMaximum = -3.40282347e38f;

// WeightsOfSides for partial results: the weights are in units of 2^max of the merged one instead
// of its sum. Neither side is left out: the values of a split without keys are 0, and a NaN among
// them has to stay.
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

// The sum of a work tile's parts, added up one after the other in their order. The attention
// kernel and the one that merges share every step, so that it does not matter which of them adds.
#pragma once

#include <cuda_runtime.h>

#include "common/exact.h"
#include "cuda/common/exp2.cuh"

namespace fastattn::cuda {

struct FoldWeights {
  float total;
  float split;
};

// Adds a split's maximum and sum to those of the splits before it. One that sees no key, whose sum
// is 0, changes nothing: so it does not matter whether there is one. A NaN is not 0.
__device__ __forceinline__ FoldWeights FoldState(float2* total, float2 split) {
  if (split.y == 0.0f) return {1.0f, 0.0f};
  if (total->y == 0.0f) {
    *total = split;
    return {0.0f, 1.0f};
  }
  const float maximum = fmaxf(total->x, split.x);
  const FoldWeights w = {WeightOf(total->x, maximum), WeightOf(split.x, maximum)};
  *total = make_float2(maximum, Add(Mul(total->y, w.total), Mul(split.y, w.split)));
  return w;
}

__device__ __forceinline__ float4 FoldValues(float4 total, float4 split, const FoldWeights& w) {
  return make_float4(Add(Mul(total.x, w.total), Mul(split.x, w.split)),
                     Add(Mul(total.y, w.total), Mul(split.y, w.split)),
                     Add(Mul(total.z, w.total), Mul(split.z, w.split)),
                     Add(Mul(total.w, w.total), Mul(split.w, w.split)));
}

// A sum that is done, with +0 for -0: a split without keys, whose values are +0, turns -0 into +0,
// and it must not matter whether there is one.
__device__ __forceinline__ float4 DoneValues(float4 total) {
  return make_float4(Add(total.x, 0.0f), Add(total.y, 0.0f), Add(total.z, 0.0f),
                     Add(total.w, 0.0f));
}

}  // namespace fastattn::cuda

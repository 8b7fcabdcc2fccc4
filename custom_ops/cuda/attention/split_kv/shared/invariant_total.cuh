// The sum of a work tile's splits, added up one after the other in their order. The attention
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

// Adds a split's maximum and sum to those of the splits before it.
__device__ __forceinline__ FoldWeights FoldState(float2* total, float2 split) {
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

}  // namespace fastattn::cuda

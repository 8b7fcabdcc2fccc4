#pragma once

#include <cuda_runtime.h>

namespace fastattn::cuda {

// 2^x within 2 ulp in one instruction; results below the normal numbers are 0.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What multiplies values in units of 2^maximum to bring them to units of a larger one. Two maxima
// of -inf are the same.
__device__ __forceinline__ float WeightOf(float maximum, float larger) {
  return maximum == larger ? 1.0f : Exp2(maximum - larger);
}

}  // namespace fastattn::cuda

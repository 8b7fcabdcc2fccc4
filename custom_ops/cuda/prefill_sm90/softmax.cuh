// Parts of a thread's softmax that both Hopper prefill kernels share.
#pragma once

#include "cuda/prefill_sm90/config.h"

namespace fastattn::cuda::prefill_sm90 {

inline constexpr float kLog2E = 1.44269504f;
inline constexpr float kMinusInf = -__builtin_huge_valf();

// 2^x. Volatile: exponentials stay in their order.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The maximum, NaN if either is.
__device__ __forceinline__ float MaxNaN(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Scores so far from 0 that score * factor - shift, rounded once, is not what it should be: the
// largest one's must be the logarithm of P's peak, not a rounding error of two large numbers.
// Below it the error is at most 2^-12, in log2 units.
inline constexpr float kFarScore = 4096.0f;

// Whether a step's largest score, in log2 units, is far from 0. -inf (nothing is visible) is not.
__device__ __forceinline__ bool IsFar(float score) {
  return fabsf(score) > kFarScore && score > -__builtin_huge_valf();
}

// Multiplies a thread's scores of two rows, whose factors become 1 for this step: differences of
// the products are exact near the largest. `wanted` is the shift below that one, by kLogPeak where
// this can be subtracted exactly.
template <int kScores>
__device__ __forceinline__ void MultiplyFarScores(float (&scores)[kScores], float (&factor)[2],
                                                  const float (&largest)[2], float (&wanted)[2]) {
#pragma unroll
  for (int i = 0; i < kScores; ++i) scores[i] *= factor[i / 2 % 2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float top = largest[h] * factor[h];
    wanted[h] = fabsf(top) < 67108864.0f ? top - kLogPeak : top;  // 2^26
    factor[h] = 1.0f;
  }
}

}  // namespace fastattn::cuda::prefill_sm90

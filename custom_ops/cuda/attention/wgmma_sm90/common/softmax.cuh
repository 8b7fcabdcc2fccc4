// What both Hopper kernels share of a thread's softmax.
#pragma once

#include "cuda/attention/wgmma_sm90/common/epilogue.cuh"
#include "cuda/attention/wgmma_sm90/common/work_tile.h"

namespace fastattn::cuda::wgmma_sm90 {

inline constexpr float kMinusInf = -__builtin_huge_valf();

// 2^x. The statement is volatile so that exponentials stay in their order.
__device__ __forceinline__ float OrderedExp2(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The maximum, or NaN if either is NaN.
__device__ __forceinline__ float MaxNaN(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Scores so far from 0 that score * factor - shift, rounded once, is not what it should be: the
// largest one's must be the logarithm of P's peak, not a rounding error of two large numbers.
// Below it the error is at most 2^-12, in log2 units.
inline constexpr float kFarScore = 4096.0f;

// Whether a KV tile's largest score, in log2 units, is far from 0. -inf is not: it says that no key
// is visible.
__device__ __forceinline__ bool IsFarScore(float score) {
  return fabsf(score) > kFarScore && score > -__builtin_huge_valf();
}

// The shift below a KV tile's largest score, by kLogPeak where this can be subtracted exactly.
__device__ __forceinline__ float ShiftBelow(float largest) {
  return fabsf(largest) < 67108864.0f ? largest - kLogPeak : largest;  // 2^26
}

// Multiplies a thread's scores of those of its two rows that are far, whose factors become 1 for
// this KV tile: differences of the products are exact near the largest. `wanted` is the shift below
// that one. The other row stays as it is to the bit: it sees nothing of what the far one sees.
template <int kScores>
__device__ __forceinline__ void MultiplyFarScores(float (&scores)[kScores], float (&factor)[2],
                                                  const bool (&far)[2], const float (&largest)[2],
                                                  float (&wanted)[2]) {
  const float times[2] = {far[0] ? factor[0] : 1.0f, far[1] ? factor[1] : 1.0f};
#pragma unroll
  for (int i = 0; i < kScores; ++i) scores[i] *= times[i / 2 % 2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!far[h]) continue;
    wanted[h] = ShiftBelow(largest[h] * factor[h]);
    factor[h] = 1.0f;
  }
}

// Multiplies a thread's scores of eight columns with the scales of their tokens.
template <int kScores>
__device__ __forceinline__ void ScaleColumns(const float* scales, int j, float (&scores)[kScores]) {
  const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * j + 2 * (threadIdx.x % 4));
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    scores[4 * j + 2 * h] *= scale.x;
    scores[4 * j + 2 * h + 1] *= scale.y;
  }
}

// Makes scores of masked keys -inf. `start` is the KV tile's first key; Shared (of any kernel) has
// `visible` and kRecomputeLane.
template <class S, int kScores>
__device__ __forceinline__ void MaskScores(const S& shared, int buffer, int start, int flags,
                                           float (&scores)[kScores]) {
  const int column = start + 2 * (threadIdx.x % 4);
#pragma unroll
  for (int half = 0; half < kScores / (kBlockSize / 2); ++half) {
    const bool unassigned = flags & (kUnassigned << half);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int2 visible = shared.visible[buffer][QueryIndex<S::kRecomputeLane>(h)];
      const unsigned span = unassigned ? 0 : visible.y - visible.x;
      const int first = column + half * kBlockSize - visible.x;
#pragma unroll
      for (int j = 0; j < kBlockSize / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& s = scores[half * (kBlockSize / 2) + 4 * j + 2 * h + e];
          s = static_cast<unsigned>(first + 8 * j + e) < span ? s : kMinusInf;
        }
      }
    }
  }
}

// Loads the factors of a thread's two rows. A NaN would make scores of masked keys NaN, so it
// counts as 1 until RestoreNanFactors() makes the row NaN.
template <class S>
__device__ __forceinline__ void LoadFactors(const S& shared, int buffer, float (&factor)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float x = shared.factor[buffer][QueryIndex<S::kRecomputeLane>(h)];
    factor[h] = x == x ? x : 1.0f;
  }
}

// Makes rows with a NaN factor NaN (if they see no key, the epilogue writes 0 all the same).
template <class S>
__device__ __forceinline__ void RestoreNanFactors(const S& shared, int buffer, float (&sum)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float x = shared.factor[buffer][QueryIndex<S::kRecomputeLane>(h)];
    if (x != x) sum[h] = NAN;
  }
}

}  // namespace fastattn::cuda::wgmma_sm90

// Scores whose factor is that of their key: what a key's scale, the softmax scale and log2(e) make
// together. An exponent is one FMA of a score with its key's factor then, as it is with a query's
// where scales are constant; what per-token scales cost a thread is their loads.
#pragma once

#include "cuda/attention/wgmma_sm90/common/epilogue.cuh"
#include "cuda/attention/wgmma_sm90/common/softmax.cuh"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/attention/wgmma_sm90/q16/row_sums.cuh"
#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"

namespace fastattn::cuda::wgmma_q16 {

// Factors of a thread's columns, which are two of every eight.
class ColumnFactors {
 public:
  ColumnFactors() = default;
  // `address`: of the first ones in shared memory.
  __device__ __forceinline__ explicit ColumnFactors(uint32_t address) : address_(address) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) Load(j);
  }

  // Gives use(i, x, y) scores i and i + 1 of `count`, which lie side by side, with their factors.
  template <int kCount, class Use>
  __device__ __forceinline__ void ForEach(const Use& use) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      const float (&two)[2] = columns_[j % kAhead];
      use(4 * j, two[0], two[1]);
      use(4 * j + 2, two[0], two[1]);
      if (j + kAhead < kCount / 4) Load(j + kAhead);
    }
  }

 private:
  static constexpr int kAhead = 2;  // loads ahead of their scores

  // Volatile, as registers are short: the compiler keeps none for a second round.
  __device__ __forceinline__ void Load(int j) {
    float (&x)[2] = columns_[j % kAhead];
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x[0]), "=f"(x[1])
                 : "r"(address_ + 8 * j));
  }

  float columns_[kAhead][2];
  uint32_t address_;
};

// Makes scores of masked keys infinite, with the sign that their factor turns into -inf: none is 0
// or NaN where keys are masked, but infinite where it should be NaN (PerTokenScaleLoader).
template <class C>
__device__ __forceinline__ void MaskColumns(const Shared<C>& shared, int buffer, int start,
                                            int flags, ColumnFactors factors,
                                            float (&scores)[C::kScores]) {
  unsigned span[2][2];
  int first[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int2 visible = shared.visible[buffer][QueryIndex<true>(h)];
    first[h] = start + 2 * (Lane<true>() % 4) - visible.x;
    for (int half = 0; half < C::kBlocks; ++half) {
      span[half][h] = flags & (kUnassigned << half) ? 0 : visible.y - visible.x;
    }
  }
  factors.template ForEach<C::kScores>([&](int i, float x, float y) {
    const int h = i / 2 % 2, half = i / (kBlockSize / 2);
    const unsigned at = first[h] + 8 * (i / 4);
    const float factor[2] = {x, y};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float& s = scores[i + e];
      if (fabsf(factor[e]) > 3.4e38f) s = NAN;
      if (at + e >= span[half][h]) s = factor[e] < 0 ? -kMinusInf : kMinusInf;
    }
  });
}

// Masks the scores of a KV tile, whose factors are columns().
template <class C, class Columns>
__device__ __forceinline__ void MaskKeys(const Shared<C>& shared, int buffer, int start, int flags,
                                         const Columns& columns, float (&scores)[C::kScores]) {
  if constexpr (C::kColumnFactors) {
    MaskColumns(shared, buffer, start, flags, columns(), scores);
  } else {
    MaskScores(shared, buffer, start, flags, scores);
  }
}

// Multiplies scores with their queries' own factors.
template <class C>
__device__ __forceinline__ void MultiplyRows(const Shared<C>& shared, int buffer,
                                             float (&scores)[C::kScores]) {
  float factor[2];
  LoadFactors(shared, buffer, factor);
#pragma unroll
  for (int i = 0; i < C::kScores; ++i) scores[i] *= factor[i / 2 % 2];
}

// Finds the largest products of scores and factors: of row h in largest[2 * h] and the next.
template <class C>
__device__ __forceinline__ void FindLargestOfColumns(ColumnFactors factors,
                                                     const float (&scores)[C::kScores],
                                                     float (&largest)[4]) {
  factors.template ForEach<C::kScores>([&](int i, float x, float y) {
    float &a = largest[i % 4], &b = largest[i % 4 + 1];
    a = i < 4 ? scores[i] * x : MaxNaN(a, scores[i] * x);
    b = i < 4 ? scores[i + 1] * y : MaxNaN(b, scores[i + 1] * y);
  });
}

// Finds a KV tile's probabilities, packed into `words`, and what is kept of their sums. kFar: there
// may be rows `far`, whose products with the factors are rounded before the shift is subtracted, as
// the largest one was.
template <class C, bool kFar>
__device__ __forceinline__ void FindColumnProbabilities(
    ColumnFactors factors, const float (&scores)[C::kScores], const float (&shift)[2],
    const bool (&far)[2], uint32_t (&words)[C::kScores / 2], KvTileSums<C>& sums) {
  const auto probability = [&](int i, float factor) {
    const int h = i / 2 % 2;
    if (kFar && far[h]) return OrderedExp2(__fsub_rn(__fmul_rn(scores[i], factor), shift[h]));
    return OrderedExp2(fmaf(scores[i], factor, -shift[h]));
  };
  factors.template ForEach<C::kScores>([&](int i, float x, float y) {
    const float a = probability(i, x), b = probability(i + 1, y);
    words[i / 2] = PackPair<C::kOperand>(a, b);
    sums.Add(i / 2, a, b, words);
  });
}

}  // namespace fastattn::cuda::wgmma_q16

// The factor of an RMSNorm, with the same bits however a head is divided among threads.
#pragma once

#include "common/exact.h"

namespace fastattn::cpu {

constexpr int LeavesOf(int half) {
  int leaves = 1;
  while (leaves < half) leaves *= 2;
  return leaves;
}

// 1 / sqrt(mean(x^2) + eps). The squares of either half are summed as a balanced binary tree of
// neighbours, filled up with zeros to a power of two: any split of a head over threads in
// power-of-two runs gives the same bits.
template <int kHeadDim>
float InverseRms(float eps, const float* x) {
  constexpr int kHalf = kHeadDim / 2;
  constexpr int kLeaves = LeavesOf(kHalf);  // of a half
  float sums[2 * kLeaves] = {};
  for (int i = 0; i < kHeadDim; ++i) {
    sums[i / kHalf * kLeaves + i % kHalf] = Mul(x[i], x[i]);
  }
  for (int n = kLeaves; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) sums[i] = Add(sums[2 * i], sums[2 * i + 1]);
  }
  const float mean = Div(sums[0], static_cast<float>(kHeadDim));
  return Div(1.0f, Sqrt(Add(mean, eps)));
}

}  // namespace fastattn::cpu

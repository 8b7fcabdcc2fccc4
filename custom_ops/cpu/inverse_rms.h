// The factor of an RMSNorm, with the same bits however a head is divided among threads.
#pragma once

#include "common/exact.h"

namespace fastattn::cpu {

// 1 / sqrt(mean(x^2) + eps). The squares are summed as a balanced binary tree of neighbours: any
// split of a head over threads in power-of-two runs gives the same bits.
template <int kHeadDim>
float InverseRms(float eps, const float* x) {
  static_assert((kHeadDim & (kHeadDim - 1)) == 0, "a tree that halves loses terms of other counts");
  float sums[kHeadDim];
  for (int i = 0; i < kHeadDim; ++i) sums[i] = Mul(x[i], x[i]);
  for (int n = kHeadDim / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) sums[i] = Add(sums[2 * i], sums[2 * i + 1]);
  }
  const float mean = Div(sums[0], static_cast<float>(kHeadDim));
  return Div(1.0f, Sqrt(Add(mean, eps)));
}

}  // namespace fastattn::cpu

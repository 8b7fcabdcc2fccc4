// The Hadamard rotation of a head's channels, by which outliers of K spread over all channels
// before K is quantised; Q is rotated alike, so that scores stay as they are.
//
// One order for every implementation: stages of butterflies (a, b) -> (a + b, a - b) over channels
// that are 1, 2, 4, .. apart, each sum and difference rounded to fp32 by itself, then one product
// with the factor. That is the matrix of Sylvester's order divided by the root of its size: it is
// symmetric, and its own inverse.
#pragma once

#include "common/exact.h"
#include "common/types.h"

namespace fastattn {

enum class KeyRotation : int { kNone, kHadamard };

inline const char* NameOf(KeyRotation rotation) {
  return rotation == KeyRotation::kHadamard ? "hadamard" : "none";
}

// Channels that a rotation mixes: the largest power of two that divides the head dimension. A head
// of 96 channels has three such blocks, of 32.
FASTATTN_HD constexpr int HadamardSize(int head_dim) { return head_dim & -head_dim; }

// 1 / sqrt(size) of a power of two, rounded to fp32.
FASTATTN_HD constexpr float HadamardFactor(int size) {
  float factor = 1.0f;
  for (; size >= 4; size /= 4) factor *= 0.5f;
  return size == 2 ? factor * 0.70710678118654752440f : factor;
}

// Rotates a head in memory.
inline void HadamardRotate(float* x, int head_dim) {
  const int size = HadamardSize(head_dim);
  for (int step = 1; step < size; step *= 2) {
    for (int first = 0; first < head_dim; first += 2 * step) {
      for (int i = first; i < first + step; ++i) {
        const float a = x[i], b = x[i + step];
        x[i] = Add(a, b);
        x[i + step] = Sub(a, b);
      }
    }
  }
  const float factor = HadamardFactor(size);
  for (int i = 0; i < head_dim; ++i) x[i] = Mul(x[i], factor);
}

}  // namespace fastattn

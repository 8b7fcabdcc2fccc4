// Rotation of the 64 channels of DeepSeek's heads that have a position, in fp32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/exact.h"
#include "common/numeric.h"

namespace fastattn::cpu {

inline constexpr int kRotatedDim = 64;

// Cosines and sines of a position.
struct Rotation {
  float cos[kRotatedDim / 2];
  float sin[kRotatedDim / 2];
};

// A row of a table [max_positions, 64], which holds 32 cosines and then 32 sines.
inline Rotation LoadRotation(const void* table, DType dtype, int64_t position,
                             int64_t max_positions) {
  position = std::min(std::max<int64_t>(position, 0), max_positions - 1);
  Rotation rotation;
  for (int i = 0; i < kRotatedDim / 2; ++i) {
    rotation.cos[i] = LoadScale(table, dtype, position * kRotatedDim + i);
    rotation.sin[i] = LoadScale(table, dtype, position * kRotatedDim + kRotatedDim / 2 + i);
  }
  return rotation;
}

// Rotates the interleaved (even, odd) pairs of x[0..64).
inline void Rotate(const Rotation& rotation, float* x) {
  for (int i = 0; i < kRotatedDim / 2; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    const float c = rotation.cos[i], s = rotation.sin[i];
    x[2 * i] = Sub(Mul(even, c), Mul(odd, s));
    x[2 * i + 1] = Add(Mul(odd, c), Mul(even, s));
  }
}

inline void RoundToBFloat16(float* x, int n) {
  for (int i = 0; i < n; ++i) x[i] = BFloat16ToFloat(FloatToBFloat16(x[i]));
}

}  // namespace fastattn::cpu

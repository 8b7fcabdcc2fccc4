// Rotation of channels that a thread holds, interleaved pairs.
#pragma once

#include <cstdint>

#include "common/exact.h"
#include "cuda/common/unaligned.cuh"
#include "params/rotation.h"

namespace fastattn::cuda {

__device__ __forceinline__ void RotatePair(float cos, float sin, float& even, float& odd) {
  const float e = even, o = odd;
  even = Sub(Mul(e, cos), Mul(o, sin));
  odd = Add(Mul(o, cos), Mul(e, sin));
}

// Cosines and sines of kPairs neighbouring pairs, a multiple of 4.
template <int kPairs>
struct Angles {
  static constexpr int kRow = 64;  // of the table

  float cos[kPairs], sin[kPairs];

  // Pairs `first`, `first` + 1, ... of a row; `aligned` says that vectors of 4 may be loaded.
  __device__ __forceinline__ void Load(const Rotations& r, int64_t row, int first, bool aligned) {
#pragma unroll
    for (int i = 0; i < kPairs; i += 4) {
      float four[4];
      LoadFour(r.cos_sin, r.dtype, row * kRow + first + i, aligned, four);
#pragma unroll
      for (int j = 0; j < 4; ++j) cos[i + j] = four[j];
      LoadFour(r.cos_sin, r.dtype, row * kRow + kRow / 2 + first + i, aligned, four);
#pragma unroll
      for (int j = 0; j < 4; ++j) sin[i + j] = four[j];
    }
  }

  // kBack: by the opposite angle, which changes the sign of the sine exactly.
  template <bool kBack>
  __device__ __forceinline__ void Rotate(float (&x)[2 * kPairs]) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      RotatePair(cos[i], kBack ? -sin[i] : sin[i], x[2 * i], x[2 * i + 1]);
    }
  }
};

}  // namespace fastattn::cuda

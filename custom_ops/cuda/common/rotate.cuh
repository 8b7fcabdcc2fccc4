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

  // Pairs `first`, `first` + 1, ... of a row, if `active`. kPlain: see IsPlain.
  template <bool kPlain>
  __device__ __forceinline__ void Load(const Rotations& r, int64_t row, int first, bool active) {
    const int64_t at = row * kRow + first;
#pragma unroll
    for (int i = 0; i < kPairs; i += 4) {
      LoadPart<kPlain>(r, at + i, active, cos + i);
      LoadPart<kPlain>(r, at + kRow / 2 + i, active, sin + i);
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

 private:
  template <bool kPlain>
  static __device__ __forceinline__ void LoadPart(const Rotations& r, int64_t at, bool active,
                                                  float* to) {
    float four[4] = {};
    if constexpr (kPlain) {
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (active) {
        v = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(r.cos_sin) + at));
      }
      four[0] = v.x, four[1] = v.y, four[2] = v.z, four[3] = v.w;
    } else if (active) {
      LoadFour(r.cos_sin, r.dtype, at, false, four);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = four[i];
  }
};

// Whether a table is loaded by vectors without a branch: several tokens' angles are on their way
// at once.
inline bool IsPlain(const Rotations& r) {
  return r.dtype == DType::kFloat32 && IsAligned(r.cos_sin, 16);
}

}  // namespace fastattn::cuda

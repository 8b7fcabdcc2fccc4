// The Hadamard rotation (common/hadamard.h) of a head that lies over the lanes of a warp, with the
// same bits. All lanes of the warp take part.
#pragma once

#include <cstdint>

#include "common/exact.h"
#include "common/hadamard.h"
#include "cuda/common/lane.cuh"

namespace fastattn::cuda {

// Butterflies of channels kStep apart that a thread holds itself.
template <int kStep, int kValues>
__device__ __forceinline__ void OwnButterflies(float (&x)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    const int low = i / kStep * (2 * kStep) + i % kStep;
    const float a = x[low], b = x[low + kStep];
    x[low] = Add(a, b);
    x[low + kStep] = Sub(a, b);
  }
}

// Those whose other channel the lane at an XOR of `distance` holds at the same index.
template <int kValues>
__device__ __forceinline__ void LaneButterflies(int lane, int distance, float (&x)[kValues]) {
  // The product is exact, so that one instruction rounds as a sum or a difference does.
  const float sign = (lane & distance) != 0 ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    x[i] = __fmaf_rn(x[i], sign, __shfl_xor_sync(kFullWarp, x[i], distance));
  }
}

template <int kHeadDim, int kValues>
__device__ __forceinline__ void HadamardScale(float (&x)[kValues]) {
  constexpr float kFactor = HadamardFactor(HadamardSize(kHeadDim));
#pragma unroll
  for (int i = 0; i < kValues; ++i) x[i] = Mul(x[i], kFactor);
}

// A lane holds channels [kValues * lane, + kValues) of the head, whose first lane's number in the
// warp is a multiple of HadamardSize / kValues.
template <int kHeadDim, int kValues>
__device__ __forceinline__ void HadamardOfChunks(int lane, float (&x)[kValues]) {
  constexpr int kSize = HadamardSize(kHeadDim);
  static_assert((kValues & (kValues - 1)) == 0 && kSize % kValues == 0, "a lane holds one block's");
  static_assert(kValues <= 16, "more stages of own channels");
  OwnButterflies<1>(x);
  if constexpr (kValues > 2) OwnButterflies<2>(x);
  if constexpr (kValues > 4) OwnButterflies<4>(x);
  if constexpr (kValues > 8) OwnButterflies<8>(x);
#pragma unroll
  for (int distance = 1; distance < kSize / kValues; distance *= 2) {
    LaneButterflies(lane, distance, x);
  }
  HadamardScale<kHeadDim>(x);
}

// Those of channels `step` apart where the other channel may lie in any lane of the head, in either
// half: a head of 96 channels has a block of 32 in the middle. `lane` counts from the head's first.
template <int kHeadDim, int kHalf>
__device__ __forceinline__ void StragglingButterflies(int lane, int step, float (&x)[2 * kHalf]) {
  float y[2 * kHalf];
#pragma unroll
  for (int i = 0; i < 2 * kHalf; ++i) {
    const int channel = lane * kHalf + i % kHalf + i / kHalf * (kHeadDim / 2);
    const int other = channel ^ step;
    const bool second = other >= kHeadDim / 2;
    const int from = (second ? other - kHeadDim / 2 : other) / kHalf - lane + threadIdx.x % 32;
    const float low = __shfl_sync(kFullWarp, x[i % kHalf], from);
    const float high = __shfl_sync(kFullWarp, x[i % kHalf + kHalf], from);
    const uint32_t sign = (channel & step) != 0 ? 0x80000000u : 0;
    y[i] = Add(second ? high : low, BitsFloat(FloatBits(x[i]) ^ sign));
  }
#pragma unroll
  for (int i = 0; i < 2 * kHalf; ++i) x[i] = y[i];
}

// A lane holds channels [kHalf * lane, + kHalf) of each half of the head, as in LaneShape
// (cuda/cache/shared/head_lanes.cuh).
template <int kHeadDim, int kHalf>
__device__ __forceinline__ void HadamardOfHalves(int lane, float (&x)[2 * kHalf]) {
  constexpr int kSize = HadamardSize(kHeadDim);
  static_assert((kHalf & (kHalf - 1)) == 0 && kHalf > 1 && kHalf <= 16, "stages of own channels");
  static_assert(kSize % (2 * kHalf) == 0 && kHeadDim / 2 % kHalf == 0, "whole pieces");
  OwnButterflies<1>(x);
  if constexpr (kHalf > 2) OwnButterflies<2>(x);
  if constexpr (kHalf > 4) OwnButterflies<4>(x);
  if constexpr (kHalf > 8) OwnButterflies<8>(x);
  if constexpr (kSize == kHeadDim) {
#pragma unroll
    for (int distance = 1; distance < kHeadDim / 2 / kHalf; distance *= 2) {
      LaneButterflies(lane, distance, x);
    }
    OwnButterflies<kHalf>(x);  // of the two halves
  } else {
#pragma unroll
    for (int step = kHalf; step < kSize; step *= 2) {
      StragglingButterflies<kHeadDim, kHalf>(lane, step, x);
    }
    if (lane * kHalf >= kHeadDim / 2) {  // without channels
#pragma unroll
      for (int i = 0; i < 2 * kHalf; ++i) x[i] = 0.0f;
    }
  }
  HadamardScale<kHeadDim>(x);
}

}  // namespace fastattn::cuda

// Error feedback (common/key_feedback.h) over a head that is spread over neighbouring lanes
// (head_lanes.cuh). The bits are those of the CPU kernel.
#pragma once

#include <cstdint>

#include "common/int4.h"
#include "common/key_feedback.h"
#include "cuda/cache/shared/head_lanes.cuh"
#include "cuda/common/convert.cuh"

namespace fastattn::cuda {

// No feedback, known when the kernel is compiled.
struct NoFeedback {
  static constexpr bool kAny = false;
};

struct HeadFeedback : KeyFeedback {
  static constexpr bool kAny = true;
};

// Values of the codes of kCount numbers in units of the scale.
template <DType kCode, int kCount>
__device__ __forceinline__ void RoundToCodes(const float (&x)[kCount], float (&out)[kCount]) {
  if constexpr (kCode == DType::kInt8 || kCode == DType::kInt4) {
    constexpr float kRound = 0x1.8p23f;
    constexpr float kLeast = kCode == DType::kInt8 ? -kInt8Max : -8.0f;
    constexpr float kMost = kCode == DType::kInt8 ? kInt8Max : 7.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float rounded = Sub(Add(fminf(fmaxf(x[i], kLeast), kMost), kRound), kRound);
      out[i] = IsNaN(x[i]) ? 0.0f : rounded;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      float four[4];
      CodesToFloat<kCode>(PackCodes<kCode>(x[i], x[i + 1], x[i + 2], x[i + 3]), four);
#pragma unroll
      for (int k = 0; k < 4; ++k) out[i + k] = four[k];
    }
  }
}

// Channels [first, first + kCount) of a lane, whose i-th is channel + i of the head, with the
// errors of a block of rows.
template <int kHeadDim, int kCount>
__device__ __forceinline__ void PassOn(const float (&errors)[kFeedbackBlock], const float* rows,
                                       int channel, float* x) {
#pragma unroll
  for (int at = 0; at < kCount; at += 4) {
    float sums[2][4];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float factors[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        LoadFloats<4>(rows + (4 * part + i) * kHeadDim + channel + at, factors[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[part][i] = PassedByHalf(errors + 4 * part, &factors[0][i], 4);
      }
      asm volatile("" ::: "memory");  // few factors at a time: registers
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) x[at + i] = Add(x[at + i], Add(sums[0][i], sums[1][i]));
  }
}

// x, in units of the scale, becomes what is rounded to codes. All lanes of the warp take part.
template <DType kCode, typename Lane>
__device__ __forceinline__ void ApplyFeedback(const KeyFeedback& feedback, int lane,
                                              float (&x)[Lane::kValues]) {
  constexpr int kHalf = Lane::kHalf, kHalfDim = Lane::kHeadDim / 2;
  constexpr int kEach = kHalf < kFeedbackBlock ? kHalf : kFeedbackBlock;
  constexpr int kSharing = kFeedbackBlock / kEach;  // lanes of a block
  static_assert(kEach == 4 || kEach == 8);
  static_assert(Lane::kActive % kSharing == 0, "whole blocks in half a head");
  const bool active = Lane::IsActive(lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll 1
    for (int owner = 0; owner < Lane::kActive; owner += kSharing) {
#pragma unroll
      for (int at = 0; at < kHalf; at += kEach) {
        float own[kEach], value[kEach], errors[kFeedbackBlock];
#pragma unroll
        for (int i = 0; i < kEach; ++i) own[i] = x[half * kHalf + at + i];
        RoundToCodes<kCode>(own, value);
#pragma unroll
        for (int i = 0; i < kEach; ++i) value[i] = PassedError(value[i], own[i]);
#pragma unroll
        for (int i = 0; i < kFeedbackBlock; ++i) {
          errors[i] = __shfl_sync(kFullWarp, value[i % kEach], owner + i / kEach, Lane::kLanes);
        }
        const int begin = half * kHalfDim + owner * kHalf + at;  // the block's first channel
        const float* rows = feedback.matrix + begin * Lane::kHeadDim;
#pragma unroll
        for (int to = 0; to < kHalf; to += kEach) {  // a lane's channels in the same half
          const bool after = lane >= owner + kSharing || (lane == owner && to > at);
          if (active && after) {
            PassOn<Lane::kHeadDim, kEach>(errors, rows, half * kHalfDim + lane * kHalf + to,
                                          x + half * kHalf + to);
          }
        }
        if (half == 0 && active) {
          PassOn<Lane::kHeadDim, kHalf>(errors, rows, kHalfDim + lane * kHalf, x + kHalf);
        }
      }
    }
  }
}

}  // namespace fastattn::cuda

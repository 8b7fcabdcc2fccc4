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

// Eight channels of a lane with the errors of a block, whose rows of factors for these channels
// begin at `rows`.
template <int kHeadDim>
__device__ __forceinline__ void PassOn(const float (&errors)[kFeedbackBlock], const float* rows,
                                       float* x) {
#pragma unroll
  for (int at = 0; at < kFeedbackBlock; at += 4) {
    float sums[2][4];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float factors[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        LoadFloats<4>(rows + (4 * part + i) * kHeadDim + at, factors[i]);
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

// What a block of 8 channels passes on, in all lanes of its head. The block begins with the lane
// `owner`; `x` are kEach channels of the block in each of its lanes.
template <DType kCode, typename Lane, int kEach>
__device__ __forceinline__ void ErrorsOfBlock(const float* x, int owner,
                                              float (&errors)[kFeedbackBlock]) {
  float own[kEach], value[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) own[i] = x[i];
  RoundToCodes<kCode>(own, value);
#pragma unroll
  for (int i = 0; i < kEach; ++i) value[i] = PassedError(value[i], own[i]);
#pragma unroll
  for (int i = 0; i < kFeedbackBlock; ++i) {
    errors[i] = __shfl_sync(kFullWarp, value[i % kEach], owner + i / kEach, Lane::kLanes);
  }
}

// Decode steps, with lanes of 4 channels in each half of a head: few warps, which would wait for
// every block's factors one after the other. A warp asks for those of the next block ahead.
template <DType kCode, typename Lane, int kPart>
class FeedbackHalf {
  static constexpr int kHalfDim = Lane::kHeadDim / 2;
  static constexpr int kSharing = 2;  // lanes of a block
  static_assert(Lane::kHalf == 4 && Lane::kActive % (2 * kSharing) == 0, "blocks come in pairs");

 public:
  __device__ __forceinline__ FeedbackHalf(const KeyFeedback& feedback, int lane)
      : matrix_(feedback.matrix), lane_(lane), active_(Lane::IsActive(lane)) {}

  __device__ __forceinline__ void Apply(float (&x)[Lane::kValues]) const {
    Factors even, odd;
    Load(0, even);
#pragma unroll 1
    for (int owner = 0; owner < Lane::kActive; owner += 2 * kSharing) {
      Load(owner + kSharing, odd);
      Step(owner, even, x);
      if (owner + 2 * kSharing < Lane::kActive) Load(owner + 2 * kSharing, even);
      Step(owner + kSharing, odd, x);
    }
  }

 private:
  // Rows of a block: of a lane's channels in the same half, and in the one after it.
  struct Factors {
    float same[kFeedbackBlock][4];
    float next[kFeedbackBlock][4];
  };

  __device__ __forceinline__ bool IsAfter(int owner) const {
    return active_ && lane_ >= owner + kSharing;
  }

  __device__ __forceinline__ void Load(int owner, Factors& factors) const {
    const float* rows = matrix_ + (kPart * kHalfDim + owner * 4) * Lane::kHeadDim + lane_ * 4;
    if (IsAfter(owner)) {
#pragma unroll
      for (int i = 0; i < kFeedbackBlock; ++i) {
        LoadFloats<4>(rows + i * Lane::kHeadDim + kPart * kHalfDim, factors.same[i]);
      }
    }
    if (kPart == 0 && active_) {
#pragma unroll
      for (int i = 0; i < kFeedbackBlock; ++i) {
        LoadFloats<4>(rows + i * Lane::kHeadDim + kHalfDim, factors.next[i]);
      }
    }
  }

  __device__ __forceinline__ void Step(int owner, const Factors& factors,
                                       float (&x)[Lane::kValues]) const {
    float errors[kFeedbackBlock];
    ErrorsOfBlock<kCode, Lane, 4>(x + 4 * kPart, owner, errors);
    if (IsAfter(owner)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[4 * kPart + i] = WithPassedErrors(x[4 * kPart + i], errors, &factors.same[0][i], 4);
      }
    }
    if (kPart == 0 && active_) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[4 + i] = WithPassedErrors(x[4 + i], errors, &factors.next[0][i], 4);
      }
    }
  }

  const float* matrix_;
  int lane_;
  bool active_;
};

// x, in units of the scale, becomes what is rounded to codes. All lanes of the warp take part.
template <DType kCode, typename Lane>
__device__ __forceinline__ void ApplyFeedback(const KeyFeedback& feedback, int lane,
                                              float (&x)[Lane::kValues]) {
  if constexpr (Lane::kHalf == 4) {
    FeedbackHalf<kCode, Lane, 0>(feedback, lane).Apply(x);
    FeedbackHalf<kCode, Lane, 1>(feedback, lane).Apply(x);
  } else {
    static_assert(Lane::kHalf == kFeedbackBlock, "a block is a lane's half");
    constexpr int kHalfDim = Lane::kHeadDim / 2;
    const bool active = Lane::IsActive(lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll 1
      for (int owner = 0; owner < Lane::kActive; ++owner) {
        float* const own = x + half * kFeedbackBlock;
        float errors[kFeedbackBlock];
        ErrorsOfBlock<kCode, Lane, kFeedbackBlock>(own, owner, errors);
        const int begin = half * kHalfDim + owner * kFeedbackBlock;  // the block's first channel
        const float* rows = feedback.matrix + begin * Lane::kHeadDim + lane * kFeedbackBlock;
        if (active && lane > owner) {
          PassOn<Lane::kHeadDim>(errors, rows + half * kHalfDim, own);
        }
        if (half == 0 && active) {
          PassOn<Lane::kHeadDim>(errors, rows + kHalfDim, x + kFeedbackBlock);
        }
      }
    }
  }
}

}  // namespace fastattn::cuda

// K between its rounding to the input's type and its quantisation: less a constant and rotated, in
// fp32. And Q, where the writer rotates it for the attention.
#pragma once

#include <cstdint>

#include "common/exact.h"
#include "cuda/cache/shared/head_lanes.cuh"
#include "cuda/cache/shared/store_token.cuh"
#include "cuda/common/hadamard.cuh"
#include "params/key_transform.h"

namespace fastattn::cuda {

// The same lanes with fp32 values, a word each.
template <typename Lane>
using FloatLane = LaneShape<DType::kFloat32, Lane::kHeadDim, Lane::kHalf>;

// What lanes without channels get of the others is 0 again.
template <typename Lane>
__device__ __forceinline__ void Rotate(int lane, float (&x)[Lane::kValues]) {
  HadamardOfHalves<Lane::kHeadDim, Lane::kHalf>(lane, x);
  if (!Lane::IsActive(lane)) {
#pragma unroll
    for (int i = 0; i < Lane::kValues; ++i) x[i] = 0.0f;
  }
}

template <typename Lane>
__device__ __forceinline__ void TransformKey(const KeyTransform& key, int head, int lane,
                                             float (&x)[Lane::kValues]) {
  if (key.center != nullptr && Lane::IsActive(lane)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float center[Lane::kHalf];
      LoadFloats<Lane::kHalf>(
          key.center + head * Lane::kHeadDim + half * (Lane::kHeadDim / 2) + lane * Lane::kHalf,
          center);
#pragma unroll
      for (int i = 0; i < Lane::kHalf; ++i) {
        float& value = x[half * Lane::kHalf + i];
        value = Sub(value, center[i]);
      }
    }
  }
  if (key.rotation == KeyRotation::kHadamard) {
    Rotate<Lane>(lane, x);
  }
}

// Whether a kernel can be compiled for error feedback.
template <typename Traits>
inline constexpr bool kTakesFeedback = Traits::kTransformsKey && !Traits::Side::kGrouped;

// StoreTokenMajor of K, which is transformed first if the kernel is compiled for that. `p` is the
// kernel's parameters. kFeedsBack: with error feedback, if there is one. All lanes of the warp take
// part.
template <typename Traits, typename Lane, bool kFeedsBack, typename Params, typename HeadScaleOf>
__device__ __forceinline__ void StoreKey(const uint32_t (&words)[Lane::kWords], const Params& p,
                                         const PagedCache& cache, HeadScaleOf head_scale, int head,
                                         int lane, int64_t row, int64_t scale_index, bool store) {
  // Prompts of grouped codes without a transform have this kernel, too, and need no fp32 values.
  if constexpr (Traits::kTransformsKey && Traits::Side::kGrouped && !Traits::kRope &&
                Lane::kIn != DType::kFloat32 && Lane::kHalf == 8) {
    if (!p.transform.Any()) {
      StoreTokenMajor<Traits, Lane>(words, cache, cache.key, cache.k_scales, cache.k_granularity,
                                    head_scale, head, lane, row, scale_index, store);
      return;
    }
  }
  if constexpr (Traits::kTransformsKey) {
    float x[Lane::kValues];
    UnpackWords<Lane>(words, x);
    TransformKey<Lane>(p.transform, head, lane, x);
    const auto feedback = [&] {
      if constexpr (kFeedsBack) {
        return HeadFeedback{p.transform.FeedbackOf(head, Lane::kHeadDim)};
      } else {
        return NoFeedback{};
      }
    }();
    uint32_t bits[Lane::kValues];
#pragma unroll
    for (int i = 0; i < Lane::kValues; ++i) bits[i] = FloatBits(x[i]);
    StoreTokenMajor<Traits, FloatLane<Lane>>(bits, cache, cache.key, cache.k_scales,
                                             cache.k_granularity, head_scale, head, lane, row,
                                             scale_index, store, feedback);
  } else {
    StoreTokenMajor<Traits, Lane>(words, cache, cache.key, cache.k_scales, cache.k_granularity,
                                  head_scale, head, lane, row, scale_index, store);
  }
}

// Rotates a head of Q and rounds it again. All lanes of the warp take part.
template <typename Traits, typename Lane, typename Params>
__device__ __forceinline__ void RotateQuery(const Params& p, int lane,
                                            uint32_t (&words)[Lane::kWords]) {
  if constexpr (Traits::kTransformsKey) {
    if (!p.transform.rotates_q) return;
    float x[Lane::kValues];
    UnpackWords<Lane>(words, x);
    Rotate<Lane>(lane, x);
    PackWords<Traits::kIn>(x, words);
  }
}

}  // namespace fastattn::cuda

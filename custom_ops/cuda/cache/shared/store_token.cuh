// A token's K or V where the channels of a token lie together.
#pragma once

#include <cstdint>

#include "cuda/cache/shared/group_scales.cuh"
#include "cuda/cache/shared/head_lanes.cuh"
#include "cuda/cache/shared/nibbles.cuh"
#include "cuda/cache/shared/quantize_lane.cuh"

namespace fastattn::cuda {

// K (or V of type none) of a token, whose row in the cache begins at `row`. All lanes of the warp
// take part.
template <typename Traits, typename Lane, typename HeadScaleOf, typename Feedback = NoFeedback>
__device__ __forceinline__ void StoreTokenMajor(const uint32_t (&words)[Lane::kWords],
                                                const PagedCache& cache, void* codes_out,
                                                void* scales, ScaleScheme granularity,
                                                HeadScaleOf head_scale, int head, int lane,
                                                int64_t row, int64_t scale_index, bool store,
                                                const Feedback& feedback = {}) {
  const int64_t element = row + lane * Lane::kHalf;
  const bool stores = store && Lane::IsActive(lane);
  if constexpr (Traits::kNibbles) {
    uint32_t nibbles[kNibbleWords<Lane>];
    QuantizeFourBits<Traits, Lane>(words, cache, scales, lane, scale_index, store, nibbles,
                                   feedback);
    if (stores) StoreNibbles<Lane>(nibbles, static_cast<uint8_t*>(codes_out) + row, lane);
  } else if constexpr (Traits::kQuantized) {
    uint32_t codes[Lane::kCodeWords];
    QuantizeLane<Traits, Lane, HalvesMap<Lane>>(words, cache, scales, granularity, head_scale, head,
                                                lane, scale_index, store, codes, feedback);
    if (stores) {
      StoreHalves<Lane::kCodeWords, Lane::kHeadDim / 2>(static_cast<uint8_t*>(codes_out) + element,
                                                        codes);
    }
  } else if (stores) {
    uint16_t* out = static_cast<uint16_t*>(codes_out) + element;
    if constexpr (Lane::kIn == DType::kFloat32) {
      float x[Lane::kValues];
      UnpackWords<Lane>(words, x);
      uint32_t rounded[Lane::kHalf];
      PackWords<Traits::kCode>(x, rounded);
      StoreHalves<Lane::kHalf, Lane::kHeadDim>(out, rounded);
    } else {
      StoreHalves<Lane::kWords, Lane::kHeadDim>(out, words);
    }
  }
}

}  // namespace fastattn::cuda

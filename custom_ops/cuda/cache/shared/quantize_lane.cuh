// 8-bit codes of a head that is spread over neighbouring lanes (head_lanes.cuh).
#pragma once

#include <cstdint>

#include "cuda/cache/shared/feedback_lanes.cuh"
#include "cuda/cache/shared/head_lanes.cuh"

namespace fastattn::cuda {

// Codes of a lane's K or V, `words` being the values as the input's type holds them. A dynamic
// scale goes to scales[scale_index] if `store`. All lanes of the warp take part.
template <typename Traits, typename Lane, typename Map = HalvesMap<Lane>,
          typename Feedback = NoFeedback, typename HeadScaleOf>
__device__ __forceinline__ void QuantizeLane(const uint32_t (&words)[Lane::kWords],
                                             const PagedCache& cache, void* scales,
                                             ScaleScheme granularity, HeadScaleOf head_scale,
                                             int head, int lane, int64_t scale_index, bool store,
                                             uint32_t (&codes)[Lane::kCodeWords],
                                             const Feedback& feedback = {}) {
  float x[Lane::kValues];
  if constexpr (Traits::Side::kDynamic) {
    const uint32_t amax = LaneAmaxBits<Lane>(words);
    float scale = FastDynamicScale(amax, kCacheAmaxFloor, kCodeMax<Traits::kCode>);
    if (cache.scale_dtype == DType::kBFloat16) {
      const uint16_t rounded = FloatToBFloat16(scale);
      if (store && lane == 0) static_cast<uint16_t*>(scales)[scale_index] = rounded;
      scale = BFloat16ToFloat(rounded);  // the reader's scale, so that the codes fit it
    } else if (store && lane == 0) {
      static_cast<float*>(scales)[scale_index] = scale;
    }
    UnpackWords<Lane>(words, x);
    Scale(x, ReciprocalOfNormal(scale));
    bool bounded = Traits::kCode != DType::kInt8 || amax < 0x7F800000u;
    if constexpr (Feedback::kAny) {
      if (feedback.matrix != nullptr) {
        ApplyFeedback<Traits::kCode, Lane>(feedback, lane, x);
        bounded = false;
      }
    }
    if (bounded) {
      EncodeLane<Lane, Traits::kCode, true>(x, codes);
    } else {
      EncodeLane<Lane, Traits::kCode, false>(x, codes);
    }
  } else {
    UnpackWords<Lane>(words, x);
    if (Traits::kCode == DType::kInt8 && granularity == ScaleScheme::kChannel) {
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) {
        if (i % 4 == 0) asm volatile("" ::: "memory");  // few scales at a time: registers
        if (Lane::kActive != Lane::kLanes && Map::Channel(lane, i) >= Lane::kHeadDim) continue;
        const int index = ChannelScaleIndex(head, Map::Channel(lane, i), Lane::kHeadDim);
        x[i] = Mul(x[i], Reciprocal(LoadScale(scales, cache.scale_dtype, index)));
      }
    } else {
      Scale(x, InverseOf(head_scale));
      if constexpr (Feedback::kAny) {
        if (feedback.matrix != nullptr) ApplyFeedback<Traits::kCode, Lane>(feedback, lane, x);
      }
    }
    EncodeLane<Lane, Traits::kCode, false>(x, codes);
  }
}

}  // namespace fastattn::cuda

// A head of one token as 4-bit codes, two neighbouring channels in a byte; the lanes are those of
// head_lanes.cuh. The bits are those of common/int4.h.
#pragma once

#include <cstdint>

#include "common/exact.h"
#include "common/int4.h"
#include "cuda/cache/shared/feedback_lanes.cuh"
#include "cuda/cache/shared/head_lanes.cuh"

namespace fastattn::cuda {

template <typename Lane>
inline constexpr int kNibbleWords = Lane::kValues / 8;  // of a lane's codes

// Eight codes, the first in the lowest nibble. kBounded: -8.5 < x < 8.5.
template <bool kBounded>
__device__ __forceinline__ uint32_t NibblesOf(const float* x) {
  uint32_t word = 0;
  if constexpr (kBounded) {
    // The sums' low bits are the codes; what else is in them adds up to a constant.
    constexpr float kRound = 0x1.8p23f + kInt4Bias;
#pragma unroll
    for (int i = 0; i < 8; ++i) word += FloatBits(Add(fminf(x[i], 7.0f), kRound)) << (4 * i);
    return word - 0x4B400000u * 0x11111111u;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(FloatToInt4(x[i])) << (4 * i);
    return word;
  }
}

// Whether any of a lane's values is -amax, amax being the largest magnitude of the head as fp32
// bits. Of no meaning where that is 0 or NaN.
template <typename Lane>
__device__ __forceinline__ bool HoldsNegative(const uint32_t (&words)[Lane::kWords],
                                              const float (&x)[Lane::kValues], uint32_t amax) {
  const uint32_t wanted = amax | 0x80000000u;
#if __CUDA_ARCH__ >= 900
  if constexpr (Lane::kIn != DType::kFloat32) {  // the least of pairs, half of the instructions
    uint32_t least[Lane::kWords];
#pragma unroll
    for (int i = 0; i < Lane::kWords; ++i) least[i] = words[i];
    Reduce<Lane::kWords / 2>(least, [](uint32_t a, uint32_t b) {
      uint32_t out;
      if constexpr (Lane::kIn == DType::kBFloat16) {
        asm("min.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
      } else {
        asm("min.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
      }
      return out;
    });
    const auto value = [](uint32_t bits) {
      return Element<Lane::kIn>::Load(static_cast<uint16_t>(bits));
    };
    return FloatBits(value(least[0])) == wanted || FloatBits(value(least[0] >> 16)) == wanted;
  }
#endif
  bool found = false;
#pragma unroll
  for (int i = 0; i < Lane::kValues; ++i) found |= FloatBits(x[i]) == wanted;
  return found;
}

// Codes of a lane's K or V, `words` being the values as the input's type holds them. The scale goes
// to scales[scale_index] if `store`. All lanes of the warp take part.
template <typename Lane, typename Feedback = NoFeedback>
__device__ __forceinline__ void QuantizeNibbles(const uint32_t (&words)[Lane::kWords],
                                                const PagedCache& cache, void* scales, int lane,
                                                int64_t scale_index, bool store,
                                                uint32_t (&nibbles)[kNibbleWords<Lane>],
                                                const Feedback& feedback = {}) {
  float x[Lane::kValues];
  const uint32_t amax = LaneAmaxBits<Lane>(words);
  UnpackWords<Lane>(words, x);
  const uint32_t found = __ballot_sync(kFullWarp, HoldsNegative<Lane>(words, x, amax));
  constexpr uint32_t kHead = Lane::kLanes == 32 ? kFullWarp : (1u << (Lane::kLanes % 32)) - 1;
  const bool below = (found >> (threadIdx.x % 32 / Lane::kLanes * Lane::kLanes) & kHead) != 0;
  float scale = Int4Scale(amax, below, kCacheAmaxFloor);
  if (cache.scale_dtype == DType::kBFloat16) {
    const uint16_t rounded = FloatToBFloat16(scale);
    if (store && lane == 0) static_cast<uint16_t*>(scales)[scale_index] = rounded;
    scale = BFloat16ToFloat(rounded);  // the reader's scale, so that the codes fit it
  } else if (store && lane == 0) {
    static_cast<float*>(scales)[scale_index] = scale;
  }
  Scale(x, ReciprocalOfNormal(scale));
  bool bounded = amax < 0x7F800000u;
  if constexpr (Feedback::kAny) {
    if (feedback.matrix != nullptr) {
      ApplyFeedback<DType::kInt4, Lane>(feedback, lane, x);
      bounded = false;
    }
  }
  if (bounded) {
#pragma unroll
    for (int i = 0; i < kNibbleWords<Lane>; ++i) nibbles[i] = NibblesOf<true>(x + 8 * i);
  } else {
#pragma unroll
    for (int i = 0; i < kNibbleWords<Lane>; ++i) nibbles[i] = NibblesOf<false>(x + 8 * i);
  }
}

// Stores a lane's codes of a token whose row begins at `row`.
template <typename Lane>
__device__ __forceinline__ void StoreNibbles(const uint32_t (&nibbles)[kNibbleWords<Lane>],
                                             uint8_t* row, int lane) {
  static_assert(Lane::kHalf == 4 || Lane::kHalf == 8);
  uint8_t* const to = row + lane * (Lane::kHalf / 2);
  if constexpr (Lane::kHalf == 8) {
    StoreHalves<2, Lane::kHeadDim / 4>(to, nibbles);
  } else {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(nibbles[0]);
    *reinterpret_cast<uint16_t*>(to + Lane::kHeadDim / 4) = static_cast<uint16_t>(nibbles[0] >> 16);
  }
}

}  // namespace fastattn::cuda

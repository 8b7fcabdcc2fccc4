// A head of one token as E2M1 codes, two neighbouring channels in a byte, with a byte of scale for
// each group of channels; the lanes are those of head_lanes.cuh. The bits are those of
// common/fp4.h and common/group_scale.h.
#pragma once

#include <cstdint>

#include "common/exact.h"
#include "common/group_scale.h"
#include "cuda/cache/shared/head_lanes.cuh"
#include "cuda/cache/shared/nibbles.cuh"
#include "cuda/common/e2m1.cuh"

namespace fastattn::cuda {

// Which lanes share a group of kGroup channels, a block. A lane has values of kGroups blocks, kEach
// of every one. kPairs: the lane's pairs of channels are Lane::kLanes pairs apart (StridedPairMap),
// else it has halves (HalvesMap).
template <typename Lane, int kGroup, bool kPairs>
struct LaneGroups {
  static constexpr int kBlocks = Lane::kHeadDim / kGroup;
  static constexpr int kLanes = !kPairs                      ? kGroup / Lane::kHalf
                                : Lane::kLanes <= kGroup / 2 ? Lane::kLanes
                                                             : kGroup / 2;
  static constexpr int kEach = kGroup / kLanes;
  static constexpr int kGroups = kPairs ? Lane::kHeadDim / (kEach * Lane::kLanes) : 2;
  // Half a head is no whole number of blocks: the one in the middle has lanes of both halves.
  static constexpr bool kSplitBlock = !kPairs && kBlocks % 2 != 0;
  static_assert(kGroups * kEach <= Lane::kValues && 32 % kLanes == 0);

  static __device__ __forceinline__ int Block(int lane, int group) {
    return kPairs ? group * (Lane::kLanes / kLanes) + lane / kLanes
                  : lane / kLanes + group * (kBlocks / 2);
  }
};

// |x| of the largest of kCount values, as bits; a NaN does not count.
template <int kCount>
__device__ __forceinline__ uint32_t LargestBits(const float* x) {
  float largest = 0.0f;  // fmaxf passes over a NaN
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, fabsf(x[i]));
  return FloatBits(largest);
}

// Scales a lane's halves of a head with a block that lies in both, and stores the blocks' bytes.
// Every lane finds all blocks' largest values. All lanes of the warp take part.
template <typename Lane, typename Side>
__device__ __forceinline__ void ScaleSplitBlocks(float (&x)[Lane::kValues], uint8_t* scales,
                                                 int lane, bool store) {
  using Scale = GroupScale<Side::kScaleType>;
  constexpr int kBlocks = Lane::kHeadDim / Side::kGroup;
  uint32_t amax[kBlocks] = {};
  const auto block_of = [lane](int half) {
    return (lane * Lane::kHalf + half * (Lane::kHeadDim / 2)) / Side::kGroup;
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t own = LargestBits<Lane::kHalf>(x + half * Lane::kHalf);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (block_of(half) == b) amax[b] = max(amax[b], own);
    }
  }
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int lanes = 1; lanes < Lane::kLanes; lanes *= 2) {
      amax[b] = max(amax[b], __shfl_xor_sync(kFullWarp, amax[b], lanes));
    }
    const uint8_t byte = Scale::Byte(amax[b]);
    if (store && lane == b) scales[b] = byte;
    amax[b] = byte;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t byte = amax[kBlocks - 1];
#pragma unroll
    for (int b = 0; b < kBlocks - 1; ++b) {
      if (block_of(half) == b) byte = amax[b];
    }
    const float inverse = Scale::Inverse(static_cast<uint8_t>(byte));
#pragma unroll
    for (int i = half * Lane::kHalf; i < (half + 1) * Lane::kHalf; ++i) x[i] = Mul(x[i], inverse);
  }
}

#if __CUDA_ARCH__ >= 900
// QuantizeGroups of bf16 where 8 neighbouring values of a lane share a block whose scale is a power
// of two: scaled and rounded two at a time.
template <typename Lane, int kGroup, bool kPairs>
__device__ __forceinline__ void QuantizePairs(const uint32_t (&words)[Lane::kWords],
                                              uint8_t* scales, int lane, bool store,
                                              uint32_t (&nibbles)[kNibbleWords<Lane>]) {
  using Groups = LaneGroups<Lane, kGroup, kPairs>;
  constexpr int kWords = Groups::kEach / 2;  // of a block
  const auto larger = [](uint32_t a, uint32_t b) {
    uint32_t out;  // passes over a NaN
    asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
  };
#pragma unroll
  for (int group = 0; group < Groups::kGroups; ++group) {
    uint32_t amax[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) amax[i] = words[group * kWords + i];
    Reduce<kWords / 2>(amax, larger);
#pragma unroll
    for (int lanes = 1; lanes < Groups::kLanes; lanes *= 2) {
      amax[0] = larger(amax[0], __shfl_xor_sync(kFullWarp, amax[0], lanes));
    }
    const float both[2] = {BitsFloat(amax[0] << 16), BitsFloat(amax[0] & 0xFFFF0000u)};
    const uint8_t byte = MxScaleByte(LargestBits<2>(both));
    if (store && lane % Groups::kLanes == 0 && (kPairs || Lane::IsActive(lane))) {
      scales[Groups::Block(lane, group)] = byte;
    }
    const uint32_t inverse = 0x00010001u * ((254u - byte) << 7);
#pragma unroll
    for (int w = group * kWords; w < (group + 1) * kWords; w += 4) {
      nibbles[w / 4] =
          PackE2M1OfBf16x8({words[w], words[w + 1], words[w + 2], words[w + 3]}, inverse);
    }
  }
}
#endif

// Codes of a lane's K or V, `words` being the values as the input's type holds them. The blocks'
// bytes go to scales[first_scale ..] if `store`. All lanes of the warp take part.
template <typename Lane, typename Side, bool kPairs>
__device__ __forceinline__ void QuantizeGroups(const uint32_t (&words)[Lane::kWords], void* scales,
                                               int lane, int64_t first_scale, bool store,
                                               uint32_t (&nibbles)[kNibbleWords<Lane>]) {
  using Groups = LaneGroups<Lane, Side::kGroup, kPairs>;
  using Scale = GroupScale<Side::kScaleType>;
#if __CUDA_ARCH__ >= 900
  if constexpr (Scale::kPowersOfTwo && Lane::kIn == DType::kBFloat16 && !Groups::kSplitBlock &&
                Groups::kEach % 8 == 0) {
    QuantizePairs<Lane, Side::kGroup, kPairs>(words, static_cast<uint8_t*>(scales) + first_scale,
                                              lane, store, nibbles);
    return;
  }
#endif
  float x[Lane::kValues];
  UnpackWords<Lane>(words, x);
  if constexpr (Groups::kSplitBlock) {
    ScaleSplitBlocks<Lane, Side>(x, static_cast<uint8_t*>(scales) + first_scale, lane, store);
  } else {
#pragma unroll
    for (int group = 0; group < Groups::kGroups; ++group) {
      float* const own = x + group * Groups::kEach;
      uint32_t amax = LargestBits<Groups::kEach>(own);
#pragma unroll
      for (int lanes = 1; lanes < Groups::kLanes; lanes *= 2) {
        amax = max(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
      }
      const uint8_t byte = Scale::Byte(amax);
      if (store && lane % Groups::kLanes == 0 && (kPairs || Lane::IsActive(lane))) {
        static_cast<uint8_t*>(scales)[first_scale + Groups::Block(lane, group)] = byte;
      }
      const float inverse = Scale::Inverse(byte);
#pragma unroll
      for (int i = 0; i < Groups::kEach; ++i) own[i] = Mul(own[i], inverse);
    }
  }
#pragma unroll
  for (int w = 0; w < kNibbleWords<Lane>; ++w) {
    float eight[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) eight[i] = x[8 * w + i];
    nibbles[w] = PackE2M1x8 < Scale::kPowersOfTwo && kFitsHalf < Lane::kIn >> (eight);
  }
}

// Codes of 4 bits of a lane's K or V, and their scales. All lanes of the warp take part.
template <typename Traits, typename Lane, bool kPairs = false, typename Feedback = NoFeedback>
__device__ __forceinline__ void QuantizeFourBits(const uint32_t (&words)[Lane::kWords],
                                                 const PagedCache& cache, void* scales, int lane,
                                                 int64_t first_scale, bool store,
                                                 uint32_t (&nibbles)[kNibbleWords<Lane>],
                                                 const Feedback& feedback = {}) {
  if constexpr (Traits::Side::kGrouped) {
    QuantizeGroups<Lane, typename Traits::Side, kPairs>(words, scales, lane, first_scale, store,
                                                        nibbles);
  } else {
    QuantizeNibbles<Lane>(words, cache, scales, lane, first_scale, store, nibbles, feedback);
  }
}

}  // namespace fastattn::cuda

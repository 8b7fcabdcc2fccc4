// A head of one token as MXFP4: E2M1 codes, two neighbouring channels in a byte, and a UE8M0 byte
// for 32 channels; the lanes are those of head_lanes.cuh. The bits are those of common/fp4.h.
#pragma once

#include <cstdint>

#include "common/exact.h"
#include "common/fp4.h"
#include "cuda/cache/shared/head_lanes.cuh"
#include "cuda/cache/shared/nibbles.cuh"
#include "cuda/common/e2m1.cuh"

namespace fastattn::cuda {

// Which lanes share a block. A lane has values of kGroups blocks, kEach of every one. kPairs: the
// lane's pairs of channels are kLanes pairs apart (StridedPairMap), else it has halves (HalvesMap).
template <typename Lane, bool kPairs>
struct MxGroups {
  static constexpr int kBlocks = Lane::kHeadDim / kMxBlock;
  static constexpr int kGroups = kPairs ? kBlocks : 2;
  static constexpr int kEach = Lane::kValues / kGroups;
  static constexpr int kLanes = kPairs ? Lane::kLanes : kMxBlock / Lane::kHalf;
  static_assert(Lane::kActive == Lane::kLanes && kEach * kLanes == kMxBlock,
                "every block is whole lanes' values");

  static __device__ __forceinline__ int Block(int lane, int group) {
    return kPairs ? group : lane / kLanes + group * (kBlocks / 2);
  }
};

// Codes of a lane's K or V, `words` being the values as the input's type holds them. The blocks'
// bytes go to scales[first_scale ..] if `store`. All lanes of the warp take part.
template <typename Lane, bool kPairs>
__device__ __forceinline__ void QuantizeMx(const uint32_t (&words)[Lane::kWords], void* scales,
                                           int lane, int64_t first_scale, bool store,
                                           uint32_t (&nibbles)[kNibbleWords<Lane>]) {
  using Groups = MxGroups<Lane, kPairs>;
  float x[Lane::kValues];
  UnpackWords<Lane>(words, x);
#pragma unroll
  for (int group = 0; group < Groups::kGroups; ++group) {
    float* const own = x + group * Groups::kEach;
    float largest = 0.0f;  // fmaxf passes over a NaN
#pragma unroll
    for (int i = 0; i < Groups::kEach; ++i) largest = fmaxf(largest, fabsf(own[i]));
    uint32_t amax = FloatBits(largest);
#pragma unroll
    for (int lanes = 1; lanes < Groups::kLanes; lanes *= 2) {
      amax = max(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
    }
    const uint8_t byte = MxScaleByte(amax);
    if (store && lane % Groups::kLanes == 0) {
      static_cast<uint8_t*>(scales)[first_scale + Groups::Block(lane, group)] = byte;
    }
    const float inverse = UE8M0Inverse(byte);
#pragma unroll
    for (int i = 0; i < Groups::kEach; ++i) own[i] = Mul(own[i], inverse);
  }
#pragma unroll
  for (int w = 0; w < kNibbleWords<Lane>; ++w) {
    float eight[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) eight[i] = x[8 * w + i];
    nibbles[w] = PackE2M1x8<kFitsHalf<Lane::kIn>>(eight);
  }
}

// Codes of 4 bits of a lane's K or V, and their scales. All lanes of the warp take part.
template <typename Traits, typename Lane, bool kPairs = false>
__device__ __forceinline__ void QuantizeFourBits(const uint32_t (&words)[Lane::kWords],
                                                 const PagedCache& cache, void* scales, int lane,
                                                 int64_t first_scale, bool store,
                                                 uint32_t (&nibbles)[kNibbleWords<Lane>]) {
  if constexpr (HasBlockScales(Traits::kType)) {
    QuantizeMx<Lane, kPairs>(words, scales, lane, first_scale, store, nibbles);
  } else {
    QuantizeNibbles<Lane>(words, cache, scales, lane, first_scale, store, nibbles);
  }
}

}  // namespace fastattn::cuda

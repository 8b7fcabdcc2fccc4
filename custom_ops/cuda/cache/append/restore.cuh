// K of cached tokens that were stored rotated or less a centre, as it was: what the kernel of
// kernel.cuh wrote of K is written once more. Few callers need it, and they pay a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/exact.h"
#include "common/group_scale.h"
#include "common/numeric.h"
#include "common/static_scales.h"
#include "cuda/cache/shared/append_tile.cuh"
#include "cuda/cache/shared/nibble_values.cuh"
#include "cuda/common/convert.cuh"
#include "cuda/common/hadamard.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/vector.cuh"
#include "formats/kv_format.h"
#include "params/cache.h"
#include "params/key_transform.h"

namespace fastattn::cuda {

inline constexpr int kRestoreThreads = 128;

// A lane's 8 codes of a token, from 8 bytes, or 4 of 4-bit codes.
template <DType kCode>
__device__ __forceinline__ void LoadCodes(const uint8_t* from, float (&x)[kChunk]) {
  if constexpr (CodesPerByte(kCode) == 2) {
    NibblesToFloat<kCode>(*reinterpret_cast<const uint32_t*>(from), x);
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    float low[4], high[4];
    CodesToFloat<kCode>(words.x, low);
    CodesToFloat<kCode>(words.y, high);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = low[i], x[4 + i] = high[i];
  }
}

// Scales of the layer and of tokens are told apart at run time: a Side of either is kStatic.
// Neighbouring lanes take a token of one KV head, with 8 channels each.
template <DType kOut, typename Side, int kHeadDim>
__global__ void __launch_bounds__(kRestoreThreads)
    RestoreKeyKernel(const __grid_constant__ AppendCacheParams p,
                     const __grid_constant__ KeyTransform transform) {
  constexpr DType kCode = Side::kCode;
  constexpr int kLanes = kHeadDim <= 64 ? 8 : kHeadDim <= 128 ? 16 : 32;
  static_assert(kLanes * kChunk >= kHeadDim, "every channel has a lane");
  constexpr int kAtOnce = kRestoreThreads / kLanes;
  const PagedCache& cache = p.cache;
  PdlWait();
  PdlLaunchDependents();
  const int head = blockIdx.x % cache.num_kv_heads;
  const AppendTile tile = FindAppendTile(p, blockIdx.x / cache.num_kv_heads);
  if (tile.block < 0) return;
  const int lane = threadIdx.x % kLanes;
  const bool in_head = lane * kChunk < kHeadDim;
  float scales[kChunk], center[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    scales[i] = 1.0f, center[i] = 0.0f;
    if (!in_head) continue;
    const int channel = lane * kChunk + i;
    if (cache.k_granularity != ScaleScheme::kToken) {
      const int64_t index = StaticScaleIndex(cache.k_granularity, head, channel, kHeadDim);
      scales[i] = LoadScale(cache.k_scales, cache.scale_dtype, index);
    }
    if (transform.center != nullptr) center[i] = transform.center[head * kHeadDim + channel];
  }
  const auto* codes = static_cast<const uint8_t*>(cache.key) +
                      cache.key_strides.Plane(tile.block, head) +
                      lane * kChunk / CodesPerByte(kCode);
  auto* out = static_cast<uint16_t*>(p.key) + tile.out_token * p.key_token_stride +
              static_cast<int64_t>(head) * kHeadDim + lane * kChunk;
#pragma unroll 1
  for (int first = 0; first < tile.count; first += kAtOnce) {
    const int r = first + threadIdx.x / kLanes;
    const bool active = r < tile.count && in_head;
    float x[kChunk] = {};
    float token_scale = 1.0f;
    if (active) {
      LoadCodes<kCode>(codes + r * cache.key_strides.row, x);
      if constexpr (Side::kGrouped) {
        const int64_t index = cache.k_scale_strides.Plane(tile.block, head) +
                              r * Side::TokenScales(kHeadDim) + lane * kChunk / Side::kGroup;
        token_scale =
            GroupScale<Side::kScaleType>::Value(static_cast<const uint8_t*>(cache.k_scales)[index]);
      } else if (cache.k_granularity == ScaleScheme::kToken) {
        const int64_t index = cache.k_scale_strides.Plane(tile.block, head) + r;
        token_scale = LoadScale(cache.k_scales, cache.scale_dtype, index);
      }
    }
    const bool own = cache.k_granularity == ScaleScheme::kToken;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = Mul(x[i], own ? token_scale : scales[i]);
    if (transform.rotation == KeyRotation::kHadamard) HadamardOfChunks<kHeadDim>(lane, x);
    if (transform.center != nullptr) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = Add(x[i], center[i]);
    }
    if (active) {
      *reinterpret_cast<uint4*>(out + r * p.key_token_stride) =
          make_uint4(PackPair<kOut>(x[0], x[1]), PackPair<kOut>(x[2], x[3]),
                     PackPair<kOut>(x[4], x[5]), PackPair<kOut>(x[6], x[7]));
    }
  }
}

}  // namespace fastattn::cuda

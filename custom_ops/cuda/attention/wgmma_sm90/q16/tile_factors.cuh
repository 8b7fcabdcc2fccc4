// What consumers would have to wait for at either end of a work tile: helper warps read it ahead.
#pragma once

#include "common/normaliser.h"
#include "common/numeric.h"
#include "cuda/attention/shared/scales.cuh"
#include "cuda/attention/wgmma_sm90/common/query_keys.cuh"
#include "cuda/attention/wgmma_sm90/common/softmax.cuh"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/common/lane.cuh"

namespace fastattn::cuda::wgmma_q16 {

// A scale of K or V that is constant over a sequence's keys and a head's channels.
__device__ inline float ConstantScale(const AttentionParams& p, const volatile WorkTile& tile,
                                      int kv_head, const void* paged, ScaleScheme granularity,
                                      const Descale& ragged) {
  if (!p.paged) return LoadDescale(ragged, 0, kv_head, tile);
  const auto load = [&] { return LoadHeadScale(p.cache, paged, granularity, kv_head); };
  if (granularity == ScaleScheme::kHead) return load();
  return granularity == ScaleScheme::kLayer ? load() : 1.0f;
}

__device__ __forceinline__ bool UsesKeyChannels(const AttentionParams& p) {
  return p.paged && p.cache.k_granularity == ScaleScheme::kChannel;
}

__device__ __forceinline__ bool UsesValueChannels(const AttentionParams& p) {
  return p.paged && p.cache.v_granularity == ScaleScheme::kChannel;
}

// Applies V's per-channel scales to the outputs of a thread. Without a visible key they are 0,
// whatever the scales are.
template <class C>
__device__ __forceinline__ void ScaleOutputs(const Shared<C>& shared, int buffer,
                                             const float (&shift)[2], float (&o)[C::kOut]) {
  const float* scales = shared.value_channels[buffer] + 2 * (threadIdx.x % 32 % 4);
#pragma unroll
  for (int j = 0; j < C::kValueDim / 8; ++j) {
    const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * j);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool empty = shift[h] == kMinusInf;
      float& x = o[4 * j + 2 * h];
      float& y = o[4 * j + 2 * h + 1];
      x = empty ? 0.0f : x * scale.x;
      y = empty ? 0.0f : y * scale.y;
    }
  }
}

// Fills the share of helper warp `warp`.
template <class C>
__device__ void FindFactors(const AttentionParams& p, Shared<C>& shared,
                            const volatile WorkTile& tile, int buffer, int warp) {
  const int lane = Lane<true>();
  // 4-bit codes: that of a key contains the softmax scale.
  float factor = C::kNibbleOperands ? 1.0f : p.softmax_scale * kLog2E;
  float output = p.out_scale == nullptr ? 1.0f : 1.0f / p.out_scale[0];
  if constexpr (C::kPerChannelScales) {
    const int kv_head = tile.kv_head;
    const PagedCache& cache = p.cache;
    factor *=
        ConstantScale(p, tile, kv_head, cache.k_scales, cache.k_granularity, p.ragged.k_descale);
    output *=
        ConstantScale(p, tile, kv_head, cache.v_scales, cache.v_granularity, p.ragged.v_descale);
  }
#pragma unroll 1
  for (int i = 32 * warp + lane; i < C::kQueries; i += 32 * C::kHelperWarps) {
    // Masked scores are -inf, which 0 would turn into NaN.
    shared.factor[buffer][i] = factor == 0.0f ? 1e-30f : factor;
    shared.visible[buffer][i] = QueryKeys(p, tile, i);
  }
  if constexpr (C::kPerChannelScales) {
    const int first = ChannelScaleIndex<int>(tile.kv_head, 0, C::kHeadDim);
    const bool keys = UsesKeyChannels(p), values = UsesValueChannels(p);
#pragma unroll 1
    for (int i = 32 * warp + lane; i < C::kHeadDim; i += 32 * C::kHelperWarps) {
      const DType type = p.cache.scale_dtype;
      if (keys) shared.key_channels[buffer][i] = LoadScale(p.cache.k_scales, type, first + i);
      if (values) shared.value_channels[buffer][i] = LoadScale(p.cache.v_scales, type, first + i);
    }
  }
  if (warp != 2 || lane != 0) return;
  shared.output_scale[buffer] = output;
  shared.sink[buffer] =
      p.sinks == nullptr ? -__builtin_huge_valf() : LoadScale(p.sinks, p.sinks_dtype, tile.head);
}

}  // namespace fastattn::cuda::wgmma_q16

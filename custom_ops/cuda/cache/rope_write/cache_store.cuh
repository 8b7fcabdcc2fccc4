// A lane's 8 channels of K or V on their way into a cache block.
#pragma once

#include "common/layout.h"
#include "cuda/cache/rope_write/head.cuh"

namespace fastattn::cuda {

// kRope: there are Q heads, and everything that may happen before the quantiser
// (rope_write_cache_kv); without it (write_cache_kv) K and V come as they are.
template <DType kIn_, CacheType kType_, DType kCode_, int kHeadDim_, bool kRope_>
struct StepTraits {
  static constexpr DType kIn = kIn_;
  static constexpr CacheType kType = kType_;
  static constexpr DType kCode = kCode_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kRope = kRope_;
  static constexpr int kLanes = kHeadDim / kChunk;  // per head
  static constexpr bool kQuantized = IsQuantized(kType);
};

// Reciprocals of the static scales of a lane's channels (unused by dynamic types).
struct Inverses {
  float values[kChunk];
};

template <typename Traits>
__device__ __forceinline__ void LoadInverses(const PagedCache& cache, const void* scales,
                                             ScaleGranularity granularity, int head, int channel,
                                             Inverses& out) {
  if constexpr (Traits::kQuantized && !IsDynamic(Traits::kType)) {
    if (granularity == ScaleGranularity::kChannel) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const int64_t index = static_cast<int64_t>(head) * Traits::kHeadDim + channel + i;
        out.values[i] = Div(1.0f, LoadScale(scales, cache.scale_dtype, index));
      }
    } else {
      const float scale =
          LoadScale(scales, cache.scale_dtype, granularity == ScaleGranularity::kHead ? head : 0);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) out.values[i] = Div(1.0f, scale);
    }
  }
}

// Codes of a lane's channels. For dynamic types the head's lanes agree on a scale and the first of
// them writes it to scales[scale_index] if `store`. All lanes of the warp take part.
template <typename Traits>
__device__ __forceinline__ uint2 Quantize(const float (&x)[kChunk], Inverses& inverse, void* scales,
                                          DType scale_dtype, int64_t scale_index, int channel,
                                          bool store) {
  if constexpr (IsDynamic(Traits::kType)) {
    float scale =
        DynamicScale(HeadAmaxBits<Traits::kHeadDim>(x), kCacheAmaxFloor, kCodeMax<Traits::kCode>);
    if (scale_dtype == DType::kBFloat16) {
      const uint16_t rounded = FloatToBFloat16(scale);
      if (store && channel == 0) static_cast<uint16_t*>(scales)[scale_index] = rounded;
      scale = BFloat16ToFloat(rounded);  // the reader's scale, so that the codes fit it
    } else if (store && channel == 0) {
      static_cast<float*>(scales)[scale_index] = scale;
    }
    const float one = __frcp_rn(scale);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) inverse.values[i] = one;
  }
  return Encode<Traits::kCode>(x, inverse.values);
}

// Q of one head: bits of T, or e4m3 codes. All lanes of the warp take part.
template <typename Traits>
__device__ __forceinline__ void StoreQ(const RopeWriteCacheParams& p, float (&x)[kChunk],
                                       float static_inverse, int64_t token, int head, int channel,
                                       bool store) {
  if constexpr (Traits::kRope) {
    const uint4 bits = RoundTo<Traits::kIn>(x);
    const int64_t index = token * p.num_heads + head;
    const int64_t element = index * Traits::kHeadDim + channel;
    if (p.q_quant == QQuant::kNone) {
      if (store) *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.q) + element) = bits;
      return;
    }
    float inverse[kChunk];
    float one = static_inverse;
    if (p.q_quant == QQuant::kPerTokenHead) {
      const float scale = FastDynamicScale(HeadAmaxBits<Traits::kHeadDim, Traits::kIn>(bits),
                                           kCacheAmaxFloor, kE4M3Max);
      if (store && channel == 0) p.q_descale[index] = scale;
      one = __frcp_rn(scale);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) inverse[i] = one;
    const uint2 codes = Encode<DType::kE4M3>(x, inverse);
    if (store) *reinterpret_cast<uint2*>(static_cast<uint8_t*>(p.q) + element) = codes;
  }
}

// Bias, rotation and norm of a Q or K head, in the order asked for.
template <typename Traits>
__device__ __forceinline__ void Transform(const RopeWriteCacheParams& p, const void* weight,
                                          DType weight_dtype, const Angles& angles, int channel,
                                          float (&x)[kChunk]) {
  const bool norm = weight != nullptr;
  if (norm && p.norm_before_rope) {
    RmsNorm<Traits::kHeadDim>(weight, weight_dtype, channel, p.rms_norm_eps, x);
  }
  Rotate(p, channel, angles, x);
  if (norm && !p.norm_before_rope) {
    RmsNorm<Traits::kHeadDim>(weight, weight_dtype, channel, p.rms_norm_eps, x);
  }
}

// To the type of the input and back: what is quantised is what an unfused write would read. fp32
// input is not rounded.
template <DType kIn>
__device__ __forceinline__ void RoundToInput(float (&x)[kChunk]) {
  if constexpr (kIn != DType::kFloat32) RoundTo<kIn>(x);
}

// K of token `slot` of a block: codes, or values for type none. Without `store` the block may be
// -1.
template <typename Traits>
__device__ __forceinline__ void StoreKey(const PagedCache& cache, float (&x)[kChunk],
                                         Inverses& inverse, int block, int head, int slot,
                                         int channel, bool store) {
  const int64_t element = cache.key_strides.Row(block, head, slot) + channel;
  if constexpr (Traits::kQuantized) {
    const uint2 codes =
        Quantize<Traits>(x, inverse, cache.k_scales, cache.scale_dtype,
                         cache.k_scale_strides.Plane(block, head) + slot, channel, store);
    if (store) *reinterpret_cast<uint2*>(static_cast<uint8_t*>(cache.key) + element) = codes;
  } else {
    const uint4 bits = RoundTo<Traits::kCode>(x);
    if (store) *reinterpret_cast<uint4*>(static_cast<uint16_t*>(cache.key) + element) = bits;
  }
}

}  // namespace fastattn::cuda

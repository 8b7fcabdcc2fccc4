// Per-token scales (block_wise_fp8, block_wise_int8): the loading warp reads those of one KV tile
// after the other.
#pragma once

#include "common/numeric.h"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/attention/wgmma_sm90/q16/kv_tile_blocks.cuh"
#include "cuda/attention/wgmma_sm90/q16/query_nibbles.cuh"

namespace fastattn::cuda::wgmma_q16 {

template <class C>
class PerTokenScaleLoader {
 public:
  __device__ PerTokenScaleLoader(const AttentionParams& p, Shared<C>& shared)
      : p_(p), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ void StartTile(int buffer) {
    if (lane_ == 0) shared_.v_scale[buffer] = 0.0f;
    __syncwarp();
  }

  // Starts the loads; tokens that do not exist get 1 for K, and 0 for V.
  __device__ void Load(const KvTileBlocks& blocks, int kv_head, int written) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int token = lane_ + 32 * i, block = blocks.id[32 * i / kBlockSize];
      key_[i] = 1.0f;
      value_[i] = 0.0f;
      if (token >= written || block < 0) continue;
      const PagedCache& cache = p_.cache;
      const int at = token % kBlockSize;
      key_[i] = LoadScale(cache.k_scales, cache.scale_dtype,
                          cache.k_scale_strides.Plane(block, kv_head) + at);
      value_[i] = LoadScale(cache.v_scales, cache.scale_dtype,
                            cache.v_scale_strides.Plane(block, kv_head) + at);
    }
  }

  // Writes them. scrub: in a KV tile that some query sees only in part, scales of V that are not
  // finite become 0 and are listed for the consumers: P is 0 where a query does not see them, but 0
  // * NaN is NaN. The others go to RowVScales.
  __device__ void Store(bool scrub, int buffer) {
    const int at = scale_stages_.Index();
    float largest = 0.0f;
    bool found = false;
    unsigned poisoned = 0;  // of token group lane_
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const bool finite = fabsf(value_[i]) <= 3.0e38f;
      const unsigned group = __ballot_sync(~0u, scrub && !finite);
      if (lane_ == i) poisoned = group;
      found |= group != 0;
      if (scrub && !finite) value_[i] = 0.0f;
      if (finite) largest = fmaxf(largest, fabsf(value_[i]));
    }
    const unsigned bits = __reduce_max_sync(~0u, __float_as_uint(largest));
    // What outputs are relative to is a power of two above all scales so far, so that it seldom
    // changes.
    const unsigned exponent = min(max((bits >> 23) + 1, 68u), kLargestExponent);
    const float before = shared_.v_scale[buffer] * kValueTop;
    const float v_scale = scrub ? before : fmaxf(__uint_as_float(exponent << 23), before);
    const float inverse = scrub ? 0.0f : __uint_as_float((254u << 23) - __float_as_uint(v_scale));
    Wait(&shared_.scale_empty[at], scale_stages_.Phase() ^ 1);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int token = lane_ + 32 * i;
      shared_.key_scales[at][token % 8 / 2][token / 8 * 2 + token % 2] = KeyScale(key_[i], scrub);
      shared_.value_scales[at][token] = __float2half_rn(scrub ? Mantissa(value_[i]) * kMantissaUnit
                                                              : value_[i] * inverse * kValueUnit);
      if (scrub)
        shared_.value_exponents[at][token] = min(Exponent(value_[i]) + kMantissaExponent, 255);
    }
    if (lane_ < kPer) shared_.poisoned[at][lane_] = poisoned;
    if (lane_ == 0) {
      const float common = v_scale * (1 / kValueTop);
      shared_.v_scale[buffer] = common;
      shared_.common_v_scale[at] = scrub ? -common : common;
      shared_.v_scale_ratio[at] = before * inverse;
      shared_.poison_found[at] = found;
    }
    ArriveWarp(&shared_.scale_full[at]);
    scale_stages_.Advance();
  }

 private:
  static constexpr int kPer = C::kKeys / 32;
  // Scales of V are below this: times the largest code they are finite in fp16, and small ones keep
  // bits. Those of 4-bit codes are stored 2^20 times as large (ScaleNibbles).
  static constexpr float kValueTop = C::kNibbleOperands ? 0x1p-5f : 0x1p7f;
  static constexpr float kValueUnit = C::kNibbleOperands ? 0x1p15f : kValueTop;
  static constexpr float kMantissaUnit =
      C::kNibbleOperands ? 0x1p13f : 1.0f;  // their exponent makes up
  static constexpr int kMantissaExponent = C::kNibbleOperands ? 20 - 13 : 0;
  static constexpr unsigned kLargestExponent = C::kNibbleOperands ? 245 : 250;

  __device__ float KeyScale(float scale, bool scrub) const {
    if constexpr (C::kNibbleOperands) {
      const float factor = scale * (p_.softmax_scale * kLog2E * NibbleQuery<C>::kUnit);
      if (!C::kColumnFactors || !scrub) return factor;
      // Masked scores are infinite, which neither 0 nor NaN may turn into NaN (MaskColumns).
      if (!(fabsf(factor) <= 3.0e38f)) return __builtin_huge_valf();
      return copysignf(fmaxf(fabsf(factor), 0x1p-126f), factor);
    }
    // Where scores have a bias (CodeQuery), its product with a scale of 22 bits is exact.
    if (!C::kKeyCodeOperands || C::kElement != DType::kInt8 || scale != scale) return scale;
    return __uint_as_float(__float_as_uint(scale) & ~3u);
  }

  __device__ static uint8_t Exponent(float scale) { return __float_as_uint(scale) >> 23 & 0xFF; }

  // The mantissa, from 1 to 2; what is below the normal numbers gives 0.
  __device__ static float Mantissa(float scale) {
    const uint32_t bits = (__float_as_uint(scale) & 0x807FFFFFu) | 0x3F800000u;
    return Exponent(scale) == 0 ? 0.0f : __uint_as_float(bits);
  }

  const AttentionParams& p_;
  Shared<C>& shared_;
  const int lane_;
  PackedPipelineState<C::kScaleStages> scale_stages_;
  float key_[kPer], value_[kPer];
};

}  // namespace fastattn::cuda::wgmma_q16

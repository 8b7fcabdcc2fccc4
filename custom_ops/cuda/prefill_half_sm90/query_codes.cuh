// Queries as two 8-bit codes each, so that K's codes are operands as they lie.
//
// A query times a power of two is high + low. e4m3: both in the same unit, exact for bf16 but for
// channels far below the largest. int8: low counts 1 / 128 of high.
#pragma once

#include "common/numeric.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/common/wgmma_codes.cuh"
#include "cuda/prefill_half_sm90/config.h"
#include "cuda/prefill_sm90/epilogue.cuh"

namespace fastattn::cuda::prefill_half_sm90 {

// A thread holds channels 4 * (lane % 4) .. + 3 of every 16, of rows lane / 4 and + 8: word
// 4 * k + 2 * i + h of the channels from 32 * k + 16 * i of row h.
template <class C>
class CodeQuery {
 public:
  static constexpr bool kIntegers = C::kElement == DType::kInt8;

  __device__ __forceinline__ void Take(const AttentionParams& p, Shared<C>& shared, int buffer,
                                       int group) {
    KeepRegisters(high_);
    KeepRegisters(low_);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const uint8_t* base = shared.query[0] + group * 64 * C::kRowBytes + row * C::kSlice;
    const int kv_head = shared.tile[buffer].head / (p.num_heads / p.num_kv_heads);
    const bool channels = p.paged && p.cache.k_granularity == ScaleGranularity::kChannel;
    const bool half = kIntegers && p.q_dtype == DType::kFloat16;
    uint2 pairs[kWords];
    float largest[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      // Rows h = 0 and 1 are eight apart, and swizzled alike.
      const int sixteen = i / 2, h = i % 2, chunk = (2 * (sixteen % 4) + lane % 4 / 2) ^ (row % 8);
      pairs[i] = *reinterpret_cast<const uint2*>(base + sixteen / 4 * 64 * C::kSlice +
                                                 h * 8 * C::kSlice + 16 * chunk + 8 * (lane % 2));
      float x[4];
      Widen(p, pairs[i], half, channels, kv_head, i, x);
#pragma unroll
      for (int c = 0; c < 4; ++c) largest[h] = MaxNaN(largest[h], fabsf(x[c]));
    }
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      largest[h] = MaxNaN(largest[h], __shfl_xor_sync(~0u, largest[h], 1));
      largest[h] = MaxNaN(largest[h], __shfl_xor_sync(~0u, largest[h], 2));
      const uint32_t bits = __float_as_uint(largest[h]);
      const bool finite = bits < 0x7F800000u;
      // A mantissa that would round up to the next power of two counts as that.
      const uint32_t exponent = finite ? max((bits + kCarry) >> 23, 30u) : 127u;
      scale[h] = finite ? __uint_as_float((254 + kTop - exponent) << 23) : 0.0f;
      if (lane % 4 == 0) {
        float& factor = shared.factor[buffer][prefill_sm90::QueryOf(h)];
        factor *= __uint_as_float((exponent - kTop + kUnit) << 23);
        if (factor == 0.0f) factor = 1e-30f;  // -inf * 0 is NaN
        // No code says that a query is not finite.
        if (!finite) factor = NAN;
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      float x[4];
      Widen(p, pairs[i], half, channels, kv_head, i, x);
      Split(x, scale[i % 2], &high_[i], &low_[i]);
    }
  }

  // s = queries times keys. The product is under way on return.
  template <class T>
  __device__ __forceinline__ void Multiply(T (&s)[C::kScores], uint64_t keys) {
#ifdef V_ONE
    MultiplyTerm<false>(s, high_, keys);
    return;
#endif
    MultiplyTerm<false>(s, low_, keys);
    if constexpr (kIntegers) {
      CommitProducts();
      WaitProducts<0>(s);
#pragma unroll
      for (int i = 0; i < C::kScores; ++i) s[i] = (s[i] >> 7) + kBias;
      FenceProducts();
    }
    MultiplyTerm<true>(s, high_, keys);
  }

  // The bits of an integer product plus kBias are the product plus kBiasValue in fp32.
  static constexpr int kBias = 0x4B400000;
#ifdef V_ONE
  static constexpr float kBiasValue = 0;
#else
  static constexpr float kBiasValue = 12582912.0f;  // 1.5 * 2^23
#endif

 private:
  static constexpr int kWords = C::kDim / 8;
  static constexpr int kTop = kIntegers ? 13 : 7;  // the largest channel is 2^kTop and more
  static constexpr int kUnit = kIntegers ? 7 : 0;  // of `high`, 2^kUnit
  static constexpr uint32_t kCarry = kIntegers ? 1u << 16 | 1u << 10 : 0;

  template <bool kAdd, class T>
  __device__ __forceinline__ static void MultiplyTerm(T (&s)[C::kScores],
                                                      const uint32_t (&words)[kWords],
                                                      uint64_t keys) {
    MultiplyCodes<C::kElement, kAdd>(s, words, keys);
#pragma unroll
    for (int k = 1; k < C::kDim / 32; ++k) {
      MultiplyCodes<C::kElement, true>(s, words + 4 * k, keys + 2 * k);
    }
  }

  __device__ __forceinline__ static float MaxNaN(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
  }

  // Four channels of word i, times K's scales of these channels.
  __device__ __forceinline__ static void Widen(const AttentionParams& p, uint2 pairs, bool half,
                                               bool channels, int kv_head, int i, float (&x)[4]) {
    const uint32_t words[2] = {pairs.x, pairs.y};
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      float2 pair = make_float2(__uint_as_float(words[w] << 16),
                                __uint_as_float(words[w] & 0xFFFF0000u));
      if (half) pair = __half22float2(*reinterpret_cast<const __half2*>(&words[w]));
      x[2 * w] = pair.x;
      x[2 * w + 1] = pair.y;
    }
    if (!channels) return;
    const int first = kv_head * C::kDim + 16 * (i / 2) + 4 * (threadIdx.x % 4);
#pragma unroll
    for (int c = 0; c < 4; ++c) x[c] *= LoadScale(p.cache.k_scales, p.cache.scale_dtype, first + c);
  }

  __device__ __forceinline__ static void Split(const float (&x)[4], float scale, uint32_t* high,
                                               uint32_t* low) {
    if constexpr (kIntegers) {
      // The bits of kBiasValue + 64 + n, whose bits from 7 on are `high`, and those below
      // `low` + 64.
      uint32_t bits[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        bits[c] = __float_as_uint(fmaf(x[c], scale, 12582912.0f + 64.0f));
      }
      const uint32_t rest =
          __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040),
                      0x5410);
      const uint32_t flipped = (rest & 0x7F7F7F7Fu) ^ 0x40404040u;
      *low = flipped | (flipped & 0x40404040u) << 1;
      *high = __byte_perm(__byte_perm(bits[0] << 1, bits[1] << 1, 0x0051),
                          __byte_perm(bits[2] << 1, bits[3] << 1, 0x0051), 0x5410);
    } else {
      *high = *low = 0;
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const uint32_t pair = PackPair<DType::kFloat16>(x[2 * w] * scale, x[2 * w + 1] * scale);
        const uint32_t codes = PackHalves(pair);
        uint32_t whole;
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(whole) : "h"(static_cast<uint16_t>(codes)));
        const __half2 rest = __hsub2(*reinterpret_cast<const __half2*>(&pair),
                                     *reinterpret_cast<const __half2*>(&whole));
        *high |= codes << (16 * w);
        *low |= PackHalves(*reinterpret_cast<const uint32_t*>(&rest)) << (16 * w);
      }
    }
  }

  // Two e4m3 codes.
  __device__ __forceinline__ static uint32_t PackHalves(uint32_t pair) {
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(codes) : "r"(pair));
    return codes;
  }

  uint32_t high_[kWords], low_[kWords];
};

}  // namespace fastattn::cuda::prefill_half_sm90

// Queries as two 8-bit codes each, so that K's codes are operands as they lie.
//
// A query times a power of two is high + low. e4m3: both are codes relative to the same power of
// two; exact for bf16, but for channels far below the largest. int8: `low` counts 1 / 128 of
// `high`.
#pragma once

#include "common/numeric.h"
#include "cuda/attention/wgmma_sm90/common/epilogue.cuh"
#include "cuda/attention/wgmma_sm90/common/softmax.cuh"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/attention/wgmma_sm90/q16/query.cuh"
#include "cuda/attention/wgmma_sm90/q16/tile_factors.cuh"
#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/common/wgmma_int8.cuh"

namespace fastattn::cuda::wgmma_q16 {

// A thread holds channels 4 * (lane % 4) .. + 3 of every 16, of rows lane / 4 and + 8: word
// 4 * k + 2 * i + h are the channels from 32 * k + 16 * i of row h.
template <class C>
class CodeQuery {
 public:
  // The bits of an integer score plus kBias are the score plus kBiasValue in fp32.
  static constexpr int kBias = 0x4B400000;
  static constexpr float kBiasValue = 12582912.0f;  // 1.5 * 2^23

  __device__ __forceinline__ void Take(const AttentionParams& p, Shared<C>& shared, int buffer,
                                       int group) {
    KeepRegisters(high_);
    KeepRegisters(low_);
    // fp16 queries have too many bits for two e4m3 codes.
    if constexpr (kIntegers) {
      const bool channels = C::kPerChannelScales && UsesKeyChannels(p);
      if (p.q_dtype == DType::kFloat16) {
        return channels ? Take<DType::kFloat16, C::kPerChannelScales>(shared, buffer, group)
                        : Take<DType::kFloat16, false>(shared, buffer, group);
      }
      if (channels) return Take<DType::kBFloat16, C::kPerChannelScales>(shared, buffer, group);
    }
    Take<DType::kBFloat16, false>(shared, buffer, group);
  }

  // s = queries times 128 keys of e4m3. The products are under way on return.
  __device__ __forceinline__ void Multiply(float (&s)[C::kScores], uint64_t keys) const {
    // The small sums come first: a sum of FP8 products keeps 14 bits of the largest.
    MultiplyRegisters<false>(s, low_, keys);
#pragma unroll
    for (int k = 1; k < kMmaSteps; ++k) MultiplyRegisters<true>(s, low_ + 4 * k, keys + 2 * k);
#pragma unroll
    for (int k = 0; k < kMmaSteps; ++k) MultiplyRegisters<true>(s, high_ + 4 * k, keys + 2 * k);
  }

  // Does the same with int8, 64 keys in `first` and `second` each, in units of `high` and with
  // kBias. One half's products run while the other's are shifted. `begin` waits at the ping-pong
  // barrier, ahead of most of the products.
  template <class Begin>
  __device__ __forceinline__ void Multiply(int32_t (&first)[32], int32_t (&second)[32],
                                           uint64_t keys, const Begin& begin) const {
    constexpr int kHalf = kBlockSize * C::kDim / 16;
    MultiplyTerm<false>(first, low_, keys);
    CommitProducts();
    MultiplyTerm<false>(second, low_, keys + kHalf);
    CommitProducts();
    WaitProducts<1>(first);
    ShiftLow(first);
    begin();
    FenceProducts();
    MultiplyTerm<true>(first, high_, keys);
    CommitProducts();
    WaitProducts<1>(second);
    ShiftLow(second);
    FenceProducts();
    MultiplyTerm<true>(second, high_, keys + kHalf);
  }

  // Whether a row's integer scores keep kBiasValue. Where its factor is large, the bias in units of
  // log2 would swallow differences of scores.
  __device__ __forceinline__ static bool IsBiased(float factor) {
    constexpr float kLargest = 1 << 19;
    return !C::kPerTokenScales && !C::kSoftcap && factor * kBiasValue < kLargest;
  }

  // Takes the bias off the scores of rows that do not keep it.
  __device__ __forceinline__ static void DropBias(const float (&factor)[2],
                                                  float (&s)[C::kScores]) {
    const float bias[2] = {IsBiased(factor[0]) ? 0.0f : kBiasValue,
                           IsBiased(factor[1]) ? 0.0f : kBiasValue};
#pragma unroll
    for (int i = 0; i < C::kScores; ++i) s[i] -= bias[i / 2 % 2];
  }

  // Takes it off the shifts of those that do. Products were rounded down, by half a unit on
  // average.
  __device__ __forceinline__ static void FinishShift(const float (&factor)[2], float (&shift)[2]) {
    for (int h = 0; h < 2; ++h) {
      if (IsBiased(factor[h])) {
        shift[h] = fmaf(-kBiasValue, factor[h], shift[h]) + 0.5f * factor[h];
      }
    }
  }

 private:
  static constexpr bool kIntegers = C::kElement == DType::kInt8;
  static constexpr int kWords = C::kHeadDim / 8;
  static constexpr int kMmaSteps = C::kHeadDim / 32;
  // The largest channel of a query becomes 2^kTop and more.
  static constexpr int kTop = kIntegers ? 13 : 7;
  // Scores count 2^kUnit.
  static constexpr int kUnit = kIntegers ? 7 : 0;
  // A mantissa that this carries over counts as the next power of two: `high` is at most 127.
  static constexpr uint32_t kCarry = kIntegers ? 1u << 16 | 1u << 10 : 0;

  // kChannels: K has per-channel scales, which multiply the queries.
  template <DType kQuery, bool kChannels>
  __device__ __forceinline__ void Take(Shared<C>& shared, int buffer, int group) {
    const int lane = Lane<true>(), row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const uint8_t* base = shared.query + group * 64 * C::kRowBytes + row * C::kSlice;
    const float* scales = shared.key_channels[buffer] + 4 * (lane % 4);
    // Loads four channels. Rows h = 0 and 1 are eight apart, and swizzled alike.
    const auto load = [&](int i) {
      const int sixteen = i / 2, h = i % 2, chunk = (2 * (sixteen % 4) + lane % 4 / 2) ^ (row % 8);
      return *reinterpret_cast<const uint2*>(base + sixteen / 4 * 64 * C::kSlice +
                                             h * 8 * C::kSlice + 16 * chunk + 8 * (lane % 2));
    };
    const auto widen = [&](int i, float (&x)[4]) {
      const uint2 pairs = load(i);
      WidenPair<kQuery>(pairs.x, &x[0], &x[1]);
      WidenPair<kQuery>(pairs.y, &x[2], &x[3]);
      if constexpr (kChannels) {
        const float4 scale = *reinterpret_cast<const float4*>(scales + 16 * (i / 2));
        x[0] *= scale.x, x[1] *= scale.y, x[2] *= scale.z, x[3] *= scale.w;
      }
    };
    float largest[2] = {0.0f, 0.0f};
    if constexpr (kChannels) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        float x[4];
        widen(i, x);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          largest[i % 2] = MaxNaN(largest[i % 2], fabsf(x[c]));
        }
      }
    } else {
      LargestMagnitude magnitude[2];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint2 pairs = load(i);
        magnitude[i % 2].Add(pairs.x, pairs.y);
      }
      for (int h = 0; h < 2; ++h) largest[h] = magnitude[h].template Get<kQuery>();
    }
    float scale[2];
    FindScales(shared, buffer, largest, scale);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      float x[4];
      widen(i, x);
      if constexpr (kIntegers) {
        SplitIntegers(x, scale[i % 2], &high_[i], &low_[i]);
      } else {
        SplitFloats(x, scale[i % 2], &high_[i], &low_[i]);
      }
    }
  }

  // Finds powers of two for the thread's queries. The work tile's factors make up for them.
  __device__ __forceinline__ static void FindScales(Shared<C>& shared, int buffer,
                                                    float (&largest)[2], float (&scale)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      largest[h] = MaxNaN(largest[h], __shfl_xor_sync(~0u, largest[h], 1));
      largest[h] = MaxNaN(largest[h], __shfl_xor_sync(~0u, largest[h], 2));
      const uint32_t bits = __float_as_uint(largest[h]);
      const bool finite = bits < 0x7F800000u;
      const uint32_t exponent = finite ? max((bits + kCarry) >> 23, 30u) : 127u;
      scale[h] = finite ? __uint_as_float((254 + kTop - exponent) << 23) : 0.0f;
      if (threadIdx.x % 4 == 0) {
        float& factor = shared.factor[buffer][QueryIndex<true>(h)];
        factor *= __uint_as_float((exponent - kTop + kUnit) << 23);
        if (factor == 0.0f) factor = 1e-30f;  // masked scores are -inf, and -inf * 0 is NaN
        if (!finite) factor = NAN;            // codes cannot say it
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ static void SplitIntegers(const float (&x)[4], float scale,
                                                       uint32_t* high, uint32_t* low) {
    // Adding kBiasValue rounds to integers. With 64 more the bits from 7 on are `high`, and those
    // below are `low` + 64.
    uint32_t bits[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      bits[c] = __float_as_uint(fmaf(x[c], scale, kBiasValue + 64.0f));
    }
    const uint32_t rest = __byte_perm(__byte_perm(bits[0], bits[1], 0x0040),
                                      __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
    const uint32_t flipped = (rest & 0x7F7F7F7Fu) ^ 0x40404040u;
    *low = flipped | (flipped & 0x40404040u) << 1;
    *high = __byte_perm(__byte_perm(bits[0] << 1, bits[1] << 1, 0x0051),
                        __byte_perm(bits[2] << 1, bits[3] << 1, 0x0051), 0x5410);
  }

  __device__ __forceinline__ static void SplitFloats(const float (&x)[4], float scale,
                                                     uint32_t* high, uint32_t* low) {
    *high = *low = 0;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      // fp16 holds here the bits of bf16, of codes, and of their difference.
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

  // Two e4m3 codes.
  __device__ __forceinline__ static uint32_t PackHalves(uint32_t pair) {
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(codes) : "r"(pair));
    return codes;
  }

  template <bool kAdd>
  __device__ __forceinline__ static void MultiplyTerm(int32_t (&s)[32],
                                                      const uint32_t (&words)[kWords],
                                                      uint64_t keys) {
    MultiplyInt8<kAdd>(s, words, keys);
#pragma unroll
    for (int k = 1; k < kMmaSteps; ++k) MultiplyInt8<true>(s, words + 4 * k, keys + 2 * k);
  }

  // Brings scores to units of `high`. |score| is less than 2^22: with the bias, neighbouring fp32
  // values differ by 1.
  __device__ __forceinline__ static void ShiftLow(int32_t (&s)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] = (s[i] >> 7) + kBias;
  }

  uint32_t high_[kWords], low_[kWords];
};

}  // namespace fastattn::cuda::wgmma_q16

// Queries over 4-bit codes of K (nibbles.cuh), in registers as fp16.
//
// A row of K's operand has the channels of 32 together: chunk n of its four has channels n and
// n + 4 of each of the four groups of eight (ConvertNibbleRows). A thread's words follow from 16
// bytes of a query then.
#pragma once

#include "common/numeric.h"
#include "cuda/attention/shared/format.cuh"
#include "cuda/attention/wgmma_sm90/common/epilogue.cuh"
#include "cuda/attention/wgmma_sm90/common/softmax.cuh"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/attention/wgmma_sm90/q16/query.cuh"
#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/shared_address.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/common/wgmma_half.cuh"

namespace fastattn::cuda::wgmma_q16 {

template <class C>
class NibbleQuery {
 public:
  // Scores times this are products of queries and codes.
  static constexpr float kUnit = 0x1p21f;
  // What every key has as channels of the product that takes the bias off.
  static constexpr uint16_t kKeyBias = 0x0400;  // 2^-14

  __device__ __forceinline__ void Take(const AttentionParams& p, Shared<C>& shared, int buffer,
                                       int group) {
    KeepRegisters(words_);
    if (p.q_dtype == DType::kFloat16) {
      Take<DType::kFloat16>(shared, buffer, group);
    } else {
      Take<DType::kBFloat16>(shared, buffer, group);
    }
    FindBias(shared, group);
  }

  struct BiasOperands {
    uint64_t query, key;
  };

  // s = queries times the keys' codes, over kUnit.
  __device__ __forceinline__ void Multiply(float (&s)[C::kScores], uint64_t keys,
                                           const BiasOperands& bias) const {
    constexpr int kKeySlice = C::kKeys * C::kSlice / 16;
    MultiplyHalfShared<DType::kFloat16, false>(s, bias.query, bias.key);
#pragma unroll
    for (int k = 0; k < kMmaSteps; ++k) {
      MultiplyHalfRegisters<DType::kFloat16, true, 0>(s, words_ + 4 * k,
                                                      keys + k / 4 * kKeySlice + k % 4 * 2);
    }
  }

  __device__ __forceinline__ static BiasOperands Bias(const Shared<C>& shared, int group) {
    // Eight rows of eight channels are 128 bytes, the next eight channels lie behind them.
    constexpr uint64_t kStrides = uint64_t{256 / 16} << 32 | 128 / 16 << 16;
    const uint32_t query = Uniform(SharedAddress(shared.query_bias[group]));
    const uint32_t key = Uniform(SharedAddress(shared.key_bias));
    return {kStrides | (query & 0x3FFFF) >> 4, kStrides | (key & 0x3FFFF) >> 4};
  }

 private:
  static constexpr int kNamedBarrier = 4;  // after that of the converters
  static constexpr int kMmaSteps = C::kDim / 16;
  static constexpr int kGroups = C::kDim / 32;
  // Queries are multiplied with 2^kTop, and with 2^(kTop - 4) against the nibbles of odd n.
  static constexpr int kTop = 3;
  // What the largest channel of a query that needs no power of two of its own is from and below.
  static constexpr int kLeast = 127 - 4, kMost = 127 + 12;

  template <DType kQuery>
  __device__ __forceinline__ void Take(Shared<C>& shared, int buffer, int group) {
    const int lane = Lane<true>(), row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const uint8_t* base = shared.query + group * 64 * C::kRowBytes + row * C::kSlice;
    float times[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      LargestMagnitude magnitude;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const uint4 v = Load(base, lane, row, g, h);
        magnitude.Add(v.x, v.y);
        magnitude.Add(v.z, v.w);
      }
      float largest = magnitude.template Get<kQuery>();
      largest = MaxNaN(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = MaxNaN(largest, __shfl_xor_sync(~0u, largest, 2));
      times[h] = FindFactor(shared, buffer, h, largest);
    }
    __syncwarp();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4 v = Load(base, lane, row, g, h);
        const uint32_t pairs[4] = {__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632),
                                   __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632)};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float x, y;
          WidenPair<kQuery>(pairs[n], &x, &y);
          const float factor = n % 2 == 0 ? times[h] : times[h] / 16;
          words_[8 * g + 2 * n + h] = PackPair<DType::kFloat16>(x * factor, y * factor);
        }
      }
    }
  }

  // Rows h = 0 and 1 are eight apart, and swizzled alike.
  __device__ __forceinline__ static uint4 Load(const uint8_t* base, int lane, int row, int g,
                                               int h) {
    const int chunk = (4 * (g % 2) + lane % 4) ^ (row % 8);
    return *reinterpret_cast<const uint4*>(base + g / 2 * 64 * C::kSlice + h * 8 * C::kSlice +
                                           16 * chunk);
  }

  // What query h is multiplied with. Most queries have the same power of two, so that their factor
  // stays 1; a query far from 1 has its own, which its factor makes up for.
  __device__ __forceinline__ static float FindFactor(Shared<C>& shared, int buffer, int h,
                                                     float largest) {
    const uint32_t exponent = __float_as_uint(largest) >> 23;
    const bool plain =
        (exponent >= kLeast && exponent < kMost) || exponent == 255 || largest == 0.0f;
    const uint32_t own = plain ? 127u : max(exponent, 27u);
    if (!plain && Lane<true>() % 4 == 0) {
      shared.factor[buffer][QueryIndex<true>(h)] *= __uint_as_float(own << 23);
    }
    return __uint_as_float((254u + kTop - own) << 23);
  }

  // The bias of the scores, -8 times the sum of the query in their units, as two fp16 values: the
  // first channels of its product. Those of the work tile before are done.
  __device__ __forceinline__ void FindBias(Shared<C>& shared, int group) const {
    using Codes = Format<DType::kInt4>;
    float sum[2][4] = {};
#pragma unroll
    for (int k = 0; k < kMmaSteps; ++k) {
      Mma<DType::kFloat16>(sum[k % 2], words_[4 * k], words_[4 * k + 1], words_[4 * k + 2],
                           words_[4 * k + 3], Codes::kLowBias, Codes::kHighBias);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float bias = -0x1p14f * (sum[0][2 * h] + sum[1][2 * h]);
      const __half high = __float2half_rn(bias);
      const __half low = __float2half_rn(bias - __half2float(high));
      const int row = threadIdx.x / 32 % 4 * 16 + Lane<true>() / 4 + 8 * h;
      if (Lane<true>() % 4 == 0) {
        auto* channels = shared.query_bias[group] + row / 8 * 128 + row % 8 * 8;
        *reinterpret_cast<__half2*>(channels) = __halves2half2(high, low);
      }
    }
    FenceAsyncProxy();
    SyncNamed<128>(kNamedBarrier + group);
  }

  uint32_t words_[4 * kMmaSteps];
};

}  // namespace fastattn::cuda::wgmma_q16

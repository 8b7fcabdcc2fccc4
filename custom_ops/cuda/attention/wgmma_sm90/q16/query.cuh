// The left operand of the scores: 64 queries of a work tile.
#pragma once

#include "common/numeric.h"
#include "cuda/attention/wgmma_sm90/common/epilogue.cuh"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/attention/wgmma_sm90/q16/tile_factors.cuh"
#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/shared_address.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/common/wgmma_half.cuh"

namespace fastattn::cuda::wgmma_q16 {

// Tells the compiler that all lanes have the same value: descriptors computed from it take uniform
// registers and instructions, which leaves nothing between two products.
__device__ __forceinline__ uint32_t Uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

// Two 16-bit elements of a query in fp32.
template <DType kQuery>
__device__ __forceinline__ void WidenPair(uint32_t pair, float* low, float* high) {
  if constexpr (kQuery == DType::kFloat16) {
    const float2 x = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    *low = x.x;
    *high = x.y;
  } else {
    *low = __uint_as_float(pair << 16);
    *high = __uint_as_float(pair & 0xFFFF0000u);
  }
}

// The largest magnitude of 16-bit floats, whose bits are in its order; NaN is above all.
class LargestMagnitude {
 public:
  __device__ __forceinline__ void Add(uint32_t a, uint32_t b) {
    largest_ = __vimax3_u16x2(largest_, a & 0x7FFF7FFFu, b & 0x7FFF7FFFu);
  }

  template <DType kQuery>
  __device__ __forceinline__ float Get() const {
    float low, high;
    WidenPair<kQuery>(__vmaxu2(largest_, largest_ >> 16), &low, &high);
    return low;
  }

 private:
  uint32_t largest_ = 0;
};

// Queries as they lie in shared memory.
template <class C>
class SharedQuery {
 public:
  __device__ __forceinline__ void Take(const AttentionParams&, const Shared<C>& shared, int,
                                       int group) {
    address_ = SharedAddress(shared.query + group * 64 * C::kRowBytes);
  }

  __device__ __forceinline__ uint64_t Operand() const {
    return OperandDescriptor<128>(Uniform(address_));
  }

  // s (+)= the query's channels 16 k .. + 15 times those of the keys.
  template <bool kAdd>
  __device__ __forceinline__ void Multiply(float (&s)[C::kScores], int k, uint64_t operand,
                                           uint64_t keys) const {
    constexpr int kSlice = 64 * C::kSlice / 16;
    MultiplyHalfShared<C::kOperand, kAdd>(s, operand + k / 4 * kSlice + k % 4 * 2, keys);
  }

 private:
  uint32_t address_;
};

// What brings the largest channel of a query to 2^9 .. 2^10: fp16 has more mantissa than bf16 and
// less range. The query's factor makes up for it. Called once a query, with `set` by one lane.
__device__ __forceinline__ float ShrinkQuery(float largest, bool set, float* factor) {
  const uint32_t bits = __float_as_uint(largest);
  const uint32_t exponent = bits < 0x7F800000u ? max(bits >> 23, 19u) : 127 + 9;
  if (set) {
    *factor *= __uint_as_float((exponent - 9) << 23);
    if (*factor == 0.0f) *factor = 1e-30f;  // masked scores are -inf, and -inf * 0 is NaN
  }
  return __uint_as_float((254 + 9 - exponent) << 23);
}

// Queries in registers as fp16, each times a power of two (ShrinkQuery).
template <class C>
class RegisterQuery {
 public:
  __device__ __forceinline__ void Take(const AttentionParams& p, Shared<C>& shared, int buffer,
                                       int group) {
    KeepRegisters(words_);
    const bool channels = C::kPerChannelScales && UsesKeyChannels(p);
    if (p.q_dtype == DType::kFloat16) {
      return channels ? Take<DType::kFloat16, C::kPerChannelScales>(shared, buffer, group)
                      : Take<DType::kFloat16, false>(shared, buffer, group);
    }
    return channels ? Take<DType::kBFloat16, C::kPerChannelScales>(shared, buffer, group)
                    : Take<DType::kBFloat16, false>(shared, buffer, group);
  }

  __device__ __forceinline__ uint64_t Operand() const { return 0; }

  template <bool kAdd>
  __device__ __forceinline__ void Multiply(float (&s)[C::kScores], int k, uint64_t,
                                           uint64_t keys) const {
    MultiplyHalfRegisters<C::kOperand, kAdd, 0>(s, words_ + 4 * k, keys);
  }

 private:
  static constexpr int kMmaSteps = C::kHeadDim / 16;

  // kChannels: K has per-channel scales, which multiply the queries.
  template <DType kQuery, bool kChannels>
  __device__ __forceinline__ void Take(Shared<C>& shared, int buffer, int group) {
    const int lane = Lane<true>(), row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const uint32_t base = SharedAddress(shared.query + group * 64 * C::kRowBytes + row * C::kSlice);
    const float* scales = shared.key_channels[buffer] + 2 * (lane % 4);
    // Both passes read the words again: registers are short while the work tile before has products
    // under way.
    const auto load = [&](int k, uint32_t* words) {
      const int chunk = (2 * (k % 4) + lane / 16) ^ (row % 8);
      LoadMatrices(base + k / 4 * 64 * C::kSlice + 16 * chunk, words);
    };
    const auto widen = [&](int k, int i, uint32_t word) {
      float2 x;
      WidenPair<kQuery>(word, &x.x, &x.y);
      if constexpr (kChannels) {
        const auto* scale = reinterpret_cast<const float2*>(scales + 16 * k + 8 * (i / 2));
        x.x *= scale->x;
        x.y *= scale->y;
      }
      return x;
    };
    float largest[2] = {0.0f, 0.0f};
    LargestMagnitude magnitude[2];
#pragma unroll
    for (int k = 0; k < kMmaSteps; ++k) {
      uint32_t words[4];
      load(k, words);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if constexpr (kChannels) {
          const float2 x = widen(k, 0, words[h]), y = widen(k, 2, words[2 + h]);
          largest[h] = fmaxf(largest[h], fmaxf(fabsf(x.x), fabsf(x.y)));
          largest[h] = fmaxf(largest[h], fmaxf(fabsf(y.x), fabsf(y.y)));
        } else {
          magnitude[h].Add(words[h], words[2 + h]);
        }
      }
    }
    if constexpr (!kChannels) {
      for (int h = 0; h < 2; ++h) largest[h] = magnitude[h].template Get<kQuery>();
    }
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 1));
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 2));
      shrink[h] =
          ShrinkQuery(largest[h], lane % 4 == 0, &shared.factor[buffer][QueryIndex<true>(h)]);
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kMmaSteps; ++k) {
      load(k, words_ + 4 * k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t& word = words_[4 * k + i];
        const float2 x = widen(k, i, word);
        word = PackPair<DType::kFloat16>(x.x * shrink[i % 2], x.y * shrink[i % 2]);
      }
    }
  }

  __device__ __forceinline__ static void LoadMatrices(uint32_t address, uint32_t* words) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }

  uint32_t words_[4 * kMmaSteps];
};

// The same where they lie in shared memory.
template <class C>
class ConvertedQuery : public SharedQuery<C> {
 public:
  __device__ __forceinline__ void Take(const AttentionParams& p, Shared<C>& shared, int buffer,
                                       int group) {
    SharedQuery<C>::Take(p, shared, buffer, group);
    const bool channels = C::kPerChannelScales && UsesKeyChannels(p);
    if (p.q_dtype == DType::kFloat16) {
      channels ? Convert<DType::kFloat16, C::kPerChannelScales>(shared, buffer, group)
               : Convert<DType::kFloat16, false>(shared, buffer, group);
    } else {
      channels ? Convert<DType::kBFloat16, C::kPerChannelScales>(shared, buffer, group)
               : Convert<DType::kBFloat16, false>(shared, buffer, group);
    }
    FenceAsyncProxy();
    SyncNamed<128>(kNamedBarrier + group);
  }

 private:
  static constexpr int kNamedBarrier = 4;  // after that of the converters
  static constexpr int kChunks = C::kHeadDim / 8;

  // A lane has every second eight channels of a row. kChannels: K has per-channel scales, which
  // multiply the queries.
  template <DType kQuery, bool kChannels>
  __device__ __forceinline__ static void Convert(Shared<C>& shared, int buffer, int group) {
    const int lane = Lane<true>(), row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    uint8_t* base = shared.query + group * 64 * C::kRowBytes + row * C::kSlice;
    const auto chunk = [&](int i) {
      return reinterpret_cast<uint4*>(base + i / 8 * 64 * C::kSlice + 16 * ((i ^ row) % 8));
    };
    const auto widen = [&](int i, const uint4& pairs, float (&x)[8]) {
      WidenPair<kQuery>(pairs.x, &x[0], &x[1]);
      WidenPair<kQuery>(pairs.y, &x[2], &x[3]);
      WidenPair<kQuery>(pairs.z, &x[4], &x[5]);
      WidenPair<kQuery>(pairs.w, &x[6], &x[7]);
      if constexpr (kChannels) {
        const auto* scales = reinterpret_cast<const float4*>(shared.key_channels[buffer] + 8 * i);
        const float4 a = scales[0], b = scales[1];
        x[0] *= a.x, x[1] *= a.y, x[2] *= a.z, x[3] *= a.w;
        x[4] *= b.x, x[5] *= b.y, x[6] *= b.z, x[7] *= b.w;
      }
    };
    float largest = 0.0f;
    LargestMagnitude magnitude;
#pragma unroll 2
    for (int i = lane / 16; i < kChunks; i += 2) {
      const uint4 pairs = *chunk(i);
      if constexpr (kChannels) {
        float x[8];
        widen(i, pairs, x);
#pragma unroll
        for (int c = 0; c < 8; ++c) largest = fmaxf(largest, fabsf(x[c]));
      } else {
        magnitude.Add(pairs.x, pairs.y);
        magnitude.Add(pairs.z, pairs.w);
      }
    }
    if constexpr (!kChannels) largest = magnitude.template Get<kQuery>();
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 16));
    const float shrink = ShrinkQuery(largest, lane < 16, &shared.factor[buffer][group * 64 + row]);
#pragma unroll 2
    for (int i = lane / 16; i < kChunks; i += 2) {
      float x[8];
      widen(i, *chunk(i), x);
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] *= shrink;
      *chunk(i) =
          make_uint4(PackPair<DType::kFloat16>(x[0], x[1]), PackPair<DType::kFloat16>(x[2], x[3]),
                     PackPair<DType::kFloat16>(x[4], x[5]), PackPair<DType::kFloat16>(x[6], x[7]));
    }
  }
};

}  // namespace fastattn::cuda::wgmma_q16

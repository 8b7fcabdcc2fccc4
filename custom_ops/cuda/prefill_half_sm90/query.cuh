// The left operand of the scores: 64 queries of a tile.
#pragma once

#include "common/numeric.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/shared_address.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/common/wgmma_half.cuh"
#include "cuda/prefill_half_sm90/config.h"
#include "cuda/prefill_sm90/epilogue.cuh"

namespace fastattn::cuda::prefill_half_sm90 {

// Tells the compiler that all lanes have the same value: descriptors computed from it take uniform
// registers and instructions, which leaves nothing between two products.
__device__ __forceinline__ uint32_t Uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

// As they lie in shared memory.
template <class C, bool kInRegisters = C::kCodes>
class Query {
 public:
  __device__ __forceinline__ void Take(const AttentionParams&, const Shared<C>& shared, int,
                                       int group) {
    address_ = SharedAddress(shared.query + group * 64 * C::kRowBytes);
  }

  __device__ __forceinline__ uint64_t Operand() const {
    return OperandDescriptor<128>(Uniform(address_));
  }

  // s (+)= channels 16 k .. + 15 times keys.
  template <bool kAdd>
  __device__ __forceinline__ void Multiply(float (&s)[C::kScores], int k, uint64_t operand,
                                           uint64_t keys) const {
    constexpr int kSlice = 64 * C::kSlice / 16;
    MultiplyHalfShared<C::kOperand, kAdd>(s, operand + k / 4 * kSlice + k % 4 * 2, keys);
  }

 private:
  uint32_t address_;
};

// In registers as fp16, each query times a power of two that brings its largest channel to
// 2^9 .. 2^10: fp16 has more mantissa than bf16 and less range. The tile's factors make up for it.
template <class C>
class Query<C, true> {
 public:
  __device__ __forceinline__ void Take(const AttentionParams& p, Shared<C>& shared, int buffer,
                                       int group) {
    KeepRegisters(words_);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const uint32_t base = SharedAddress(shared.query + group * 64 * C::kRowBytes + row * C::kSlice);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int chunk = (2 * (k % 4) + lane / 16) ^ (row % 8);
      LoadMatrices(base + k / 4 * 64 * C::kSlice + 16 * chunk, words_ + 4 * k);
    }
    const int kv_head = shared.tile[buffer].head / (p.num_heads / p.num_kv_heads);
    const bool channels = p.paged && p.cache.k_granularity == ScaleGranularity::kChannel;
    const bool half = p.q_dtype == DType::kFloat16;
    float largest[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 4 * kSteps; ++i) {
      float2 x = Widen(words_[i], half);
      if (channels) ScaleChannels(p, kv_head, i, &x);
      largest[i % 2] = fmaxf(largest[i % 2], fmaxf(fabsf(x.x), fabsf(x.y)));
    }
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 1));
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], 2));
      const uint32_t bits = __float_as_uint(largest[h]);
      const uint32_t exponent = bits < 0x7F800000u ? max(bits >> 23, 19u) : 127 + 9;
      shrink[h] = __uint_as_float((254 + 9 - exponent) << 23);
      if (lane % 4 == 0) {
        float& factor = shared.factor[buffer][prefill_sm90::QueryOf(h)];
        factor *= __uint_as_float((exponent - 9) << 23);
        if (factor == 0.0f) factor = 1e-30f;  // as above: -inf * 0 is NaN
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4 * kSteps; ++i) {
      float2 x = Widen(words_[i], half);
      if (channels) ScaleChannels(p, kv_head, i, &x);
      words_[i] = PackPair<DType::kFloat16>(x.x * shrink[i % 2], x.y * shrink[i % 2]);
    }
  }

  __device__ __forceinline__ uint64_t Operand() const { return 0; }

  template <bool kAdd>
  __device__ __forceinline__ void Multiply(float (&s)[C::kScores], int k, uint64_t,
                                           uint64_t keys) const {
    MultiplyHalfRegisters<C::kOperand, kAdd, 0>(s, words_ + 4 * k, keys);
  }

 private:
  static constexpr int kSteps = C::kDim / 16;

  __device__ __forceinline__ static void LoadMatrices(uint32_t address, uint32_t* words) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }

  __device__ __forceinline__ static float2 Widen(uint32_t pair, bool half) {
    if (half) return __half22float2(*reinterpret_cast<const __half2*>(&pair));
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
  }

  // K's scales of the channels of word i.
  __device__ __forceinline__ static void ScaleChannels(const AttentionParams& p, int kv_head, int i,
                                                       float2* x) {
    const int channel = kv_head * C::kDim + 16 * (i / 4) + 8 * (i / 2 % 2) + 2 * (threadIdx.x % 4);
    x->x *= LoadScale(p.cache.k_scales, p.cache.scale_dtype, channel);
    x->y *= LoadScale(p.cache.k_scales, p.cache.scale_dtype, channel + 1);
  }

  uint32_t words_[4 * kSteps];
};

}  // namespace fastattn::cuda::prefill_half_sm90

// fp16 operands for 8-bit caches.
//
// e4m3 turns into fp16 in one instruction, and into bf16 in none. fp16 keeps 11 bits where bf16
// keeps 8, enough for products of codes and arbitrary scales, but has a small range. So each key,
// and each query, is divided by a power of two of its own that takes its largest value to [2^14,
// 2^15). Scores are multiplied with both powers; a probability with its key's, in units of the
// largest so far.
#pragma once

#include <cstdint>

#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/work.cuh"

namespace fastattn::cuda::mla_sparse_sm90 {

// Type of the operands: bf16 caches stay as they are.
template <MlaFormat kFormat>
inline constexpr DType kOperand = kFormat == MlaFormat::kBf16 ? DType::kBFloat16 : DType::kFloat16;

inline constexpr float kProbabilityScale = 16384.0f;  // of the largest P in fp16

// The power of two for values below 2^(exponent - 126), `exponent` the field of an fp32 number. Its
// reciprocal times kProbabilityScale is finite; values below 2^-110 lose bits for that.
__device__ __forceinline__ float KeyPower(uint32_t exponent) {
  return __uint_as_float((max(exponent, 31u) - 14) << 23);
}

// 1 / x of a power of two.
__device__ __forceinline__ float Reciprocal(float power) {
  return __uint_as_float(0x7F000000u - __float_as_uint(power));
}

// What takes powers of keys to units of the largest, times kProbabilityScale. None is larger than 0
// where all keys are masked.
__device__ __forceinline__ float ToUnits(float largest) {
  return largest > 0.0f ? Reciprocal(largest) * kProbabilityScale : 0.0f;
}

__device__ __forceinline__ uint32_t ExponentField(float x) {
  return __float_as_uint(x) >> 23 & 0xFF;
}

// The larger magnitude in each half of two bf16 pairs, as bits.
__device__ __forceinline__ uint32_t MaxMagnitudes(uint32_t a, uint32_t b) {
  return __vmaxu2(a & 0x7FFF7FFFu, b & 0x7FFF7FFFu);
}

// Largest magnitude of eight bf16 values, as bits of bf16.
__device__ __forceinline__ uint32_t MaxMagnitude(const uint4& x) {
  const uint32_t m = __vmaxu2(MaxMagnitudes(x.x, x.y), MaxMagnitudes(x.z, x.w));
  return max(m & 0xFFFF, m >> 16);
}

// Two bf16 values times a factor, in fp16.
__device__ __forceinline__ uint32_t ToHalf(uint32_t pair, float factor) {
  return PackPair<DType::kFloat16>(__uint_as_float(pair << 16) * factor,
                                   __uint_as_float(pair & 0xFFFF0000u) * factor);
}

__device__ __forceinline__ uint4 ToHalf(const uint4& x, float factor) {
  return make_uint4(ToHalf(x.x, factor), ToHalf(x.y, factor), ToHalf(x.z, factor),
                    ToHalf(x.w, factor));
}

// Multiplies kCount bf16 values in shared memory.
template <int kCount, int kThreads>
__device__ __forceinline__ void MultiplyQuery(uint8_t* query, float factor, int thread) {
  auto* pairs = reinterpret_cast<uint32_t*>(query);
#pragma unroll 1
  for (int i = thread; i < kCount / 2; i += kThreads) {
    pairs[i] = PackPair<DType::kBFloat16>(__uint_as_float(pairs[i] << 16) * factor,
                                          __uint_as_float(pairs[i] & 0xFFFF0000u) * factor);
  }
}

// Turns a query in shared memory (LoadQuery) into fp16; powers[row] is what its row was divided by.
// Eight lanes have a row, four rows at a time: the exchanges of one would be a chain.
template <int kDim, int kRows, int kWarps>
__device__ __forceinline__ void QueryToHalf(uint8_t* query, float* powers, int warp, int lane) {
  static_assert(kRows % 4 == 0);
#pragma unroll 1
  for (int row = 4 * warp + lane / 8; row < kRows; row += 4 * kWarps) {
    uint4* chunks = reinterpret_cast<uint4*>(query + row * 128 + (((lane & 7) ^ (row & 7)) << 4));
    uint4 x[kDim / 64];
    uint32_t magnitude = 0;
#pragma unroll
    for (int i = 0; i < kDim / 64; ++i) {
      x[i] = chunks[i * (kRows * 128 / 16)];
      magnitude = max(magnitude, MaxMagnitude(x[i]));
    }
#pragma unroll
    for (int i = 1; i < 8; i *= 2) {
      magnitude = max(magnitude, __shfl_xor_sync(kFullWarp, magnitude, i));
    }
    const float power = KeyPower(magnitude >> 7);
    const float factor = Reciprocal(power);
    if (lane % 8 == 0) powers[row] = power;
#pragma unroll
    for (int i = 0; i < kDim / 64; ++i) chunks[i * (kRows * 128 / 16)] = ToHalf(x[i], factor);
  }
}

}  // namespace fastattn::cuda::mla_sparse_sm90

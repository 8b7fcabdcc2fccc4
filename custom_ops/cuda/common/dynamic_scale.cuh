// Dynamic scales in registers: the largest magnitude of a head that neighbouring lanes hold, the
// scale that it gives, and the scale's reciprocal. They have the bits of common/numeric.h.
#pragma once

#include <cstdint>

#include "common/numeric.h"
#include "cuda/common/lane.cuh"
#include "cuda/common/vector.cuh"

namespace fastattn::cuda {

// Maximum of |x| over the head, as bits (a NaN wins), in all of its lanes.
template <int kHeadDim>
__device__ __forceinline__ uint32_t HeadAmaxBits(const float (&x)[kChunk]) {
  static_assert(32 % (kHeadDim / kChunk) == 0, "lanes of a head exchange by XOR inside a warp");
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) amax = max(amax, AbsBits(x[i]));
#pragma unroll
  for (int lanes = 1; lanes < kHeadDim / kChunk; lanes *= 2) {
    amax = max(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
  }
  return amax;
}

// Largest magnitudes of a lane's even and odd 16-bit values, two in a word: magnitudes order as
// unsigned integers, a NaN above all others.
__device__ __forceinline__ uint32_t AmaxPair(uint4 pairs) {
  return __vmaxu2(__vmaxu2(pairs.x & 0x7FFF7FFFu, pairs.y & 0x7FFF7FFFu),
                  __vmaxu2(pairs.z & 0x7FFF7FFFu, pairs.w & 0x7FFF7FFFu));
}

// HeadAmaxBits of packed 16-bit values.
template <int kHeadDim, DType kIn>
__device__ __forceinline__ uint32_t HeadAmaxBits(uint4 pairs) {
  static_assert(32 % (kHeadDim / kChunk) == 0, "lanes of a head exchange by XOR inside a warp");
  uint32_t amax = AmaxPair(pairs);
#pragma unroll
  for (int lanes = 1; lanes < kHeadDim / kChunk; lanes *= 2) {
    amax = __vmaxu2(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
  }
  const uint16_t largest = static_cast<uint16_t>(max(amax & 0xFFFFu, amax >> 16));
  return AbsBits(Element<kIn>::Load(largest));
}

template <DType kCode>
inline constexpr float kCodeMax = kCode == DType::kInt8   ? kInt8Max
                                  : kCode == DType::kE5M2 ? kE5M2Max
                                                          : kE4M3Max;

// DynamicScale with the same bits in fewer instructions. One correction of the quotient by its
// exact remainder rounds it right for every amax from 1e-10 to FLT_MAX and qmax in {127, 448,
// 57344} (checked over all of them). A NaN passes through.
__device__ __forceinline__ float FastDynamicScale(uint32_t amax_bits, float floor, float qmax) {
  if (amax_bits == 0x7F800000u) amax_bits = 0x7F7FFFFFu;
  const float amax = __uint_as_float(amax_bits);
  const float a = amax < floor ? floor : amax;
  const float y = 1.0f / qmax;  // a constant
  const float q = a * y;
  return __fmaf_rn(__fmaf_rn(-qmax, q, a), y, q);
}

// Returns 1 / x correctly rounded where neither x nor the result is subnormal: one Newton step from
// the hardware's approximation is enough (checked over all such x).
__device__ __forceinline__ float ReciprocalOfNormal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return __fmaf_rn(y, __fmaf_rn(-x, y, 1.0f), y);
}

}  // namespace fastattn::cuda

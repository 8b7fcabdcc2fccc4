// fp32 to E2M1 codes in registers, with the bits of FloatToE2M1 in common/fp4.h.
//
// Two paths. cvt.rn.satfinite.e2m1x2.f32 exists on the family targets from SM100 on only. On SM12x
// reports about its results disagree, so a build for those has to ask for it with
// FASTATTN_E2M1_SM12X. Everywhere else packed fp16 arithmetic does it, two values at a time: about
// 6 instructions a value, where the integer form of fp4.h would take longer than the memory does.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/fp4.h"
#include "common/types.h"

#if defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#if __CUDA_ARCH_FAMILY_SPECIFIC__ >= 1200
#if defined(FASTATTN_E2M1_SM12X)
#define FASTATTN_E2M1_INSTRUCTION 1
#endif
#elif __CUDA_ARCH_FAMILY_SPECIFIC__ >= 1000
#define FASTATTN_E2M1_INSTRUCTION 1
#endif
#endif

namespace fastattn::cuda {

// Whether fp16 keeps enough of a kDType value times a power of two: rounding it to fp16 never makes
// or hides a tie of E2M1. A bf16 or an fp16 has at most 11 significant bits.
template <DType kDType>
inline constexpr bool kFitsHalf = kDType == DType::kBFloat16 || kDType == DType::kFloat16;

__device__ __forceinline__ __half2 AsHalf2(uint32_t bits) {
  return *reinterpret_cast<const __half2*>(&bits);
}

__device__ __forceinline__ uint32_t HalfBits(__half2 x) {
  return *reinterpret_cast<const uint32_t*>(&x);
}

// |x| rounded to E2M1's values, as fp32: adding 2^22 times |x|'s power of two (at least 1's) leaves
// one mantissa bit, ties to even. A NaN becomes 6.
__device__ __forceinline__ float RoundToE2M1(float x) {
  const float a = fminf(fabsf(x), kE2M1Max);
  const float power = fmaxf(BitsFloat(FloatBits(a) & 0x7F800000u), 1.0f);
  const float magic = BitsFloat(FloatBits(power) + (22u << 23));
  return __fsub_rn(__fadd_rn(a, magic), magic);
}

// The same in fp16, with 2^9.
__device__ __forceinline__ __half2 RoundToE2M1(__half2 x) {
  const __half2 a = __hmin2(__habs2(x), AsHalf2(0x46004600u));
  const __half2 power = __hmax2(AsHalf2(HalfBits(a) & 0x7C007C00u), AsHalf2(0x3C003C00u));
  const __half2 magic = AsHalf2(HalfBits(power) + 0x24002400u);
  return __hsub2_rn(__hadd2_rn(a, magic), magic);
}

// Codes of two values in bits 9..12 and 25..28, all other bits 0.
template <bool kHalf>
__device__ __forceinline__ uint32_t E2M1Pair(float low, float high) {
  // This conversion gives the signs in either case, and drops that of a NaN.
  const __half2 half = __floats2half2_rn(low, high);
  __half2 rounded;
  if constexpr (kHalf) {
    rounded = RoundToE2M1(half);
  } else {
    rounded = __floats2half2_rn(RoundToE2M1(low), RoundToE2M1(high));
  }
  // Times 2^-14, E2M1's exponent becomes fp16's (subnormals included): the code is in its place.
  const uint32_t code = HalfBits(__hmul2_rn(rounded, AsHalf2(0x04000400u)));
  return code | ((HalfBits(half) >> 3) & 0x10001000u);
}

#if defined(FASTATTN_E2M1_INSTRUCTION)
__device__ __forceinline__ uint32_t E2M1Quad(float a, float b, float c, float d) {
  uint16_t codes;
  asm("{\n"
      ".reg .b8 low, high;\n"
      "cvt.rn.satfinite.e2m1x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e2m1x2.f32 high, %4, %3;\n"
      "mov.b16 %0, {low, high};\n"
      "}\n"
      : "=h"(codes)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return codes;
}
#endif

// Codes of 4 values in 16 bits, the first in the lowest nibble. kHalf: the values are ones of which
// kFitsHalf holds, times a power of two.
template <bool kHalf>
__device__ __forceinline__ uint32_t PackE2M1x4(const float (&x)[4]) {
#if defined(FASTATTN_E2M1_INSTRUCTION)
  return E2M1Quad(x[0], x[1], x[2], x[3]);
#else
  const uint32_t codes = E2M1Pair<kHalf>(x[0], x[2]) >> 9 | E2M1Pair<kHalf>(x[1], x[3]) >> 5;
  return __byte_perm(codes, 0, 0x4420);
#endif
}

// Codes of 8 values, the first in the lowest nibble.
template <bool kHalf>
__device__ __forceinline__ uint32_t PackE2M1x8(const float (&x)[8]) {
#if defined(FASTATTN_E2M1_INSTRUCTION)
  return E2M1Quad(x[0], x[1], x[2], x[3]) | E2M1Quad(x[4], x[5], x[6], x[7]) << 16;
#else
  return E2M1Pair<kHalf>(x[0], x[4]) >> 9 | E2M1Pair<kHalf>(x[1], x[5]) >> 5 |
         E2M1Pair<kHalf>(x[2], x[6]) >> 1 | E2M1Pair<kHalf>(x[3], x[7]) << 3;
#endif
}

// Values of 8 codes, the first in the lowest nibble.
__device__ __forceinline__ void UnpackE2M1x8(uint32_t codes, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t placed = i == 3 ? codes >> 3 : codes << (9 - 4 * i);
    const uint32_t half = (placed & 0x0E000E00u) | ((placed << 3) & 0x80008000u);
    const float2 pair = __half22float2(AsHalf2(half));  // 2^14 times too small
    x[i] = __fmul_rn(pair.x, 0x1p14f);
    x[i + 4] = __fmul_rn(pair.y, 0x1p14f);
  }
}

}  // namespace fastattn::cuda

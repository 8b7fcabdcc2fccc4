// fp32 to E2M1 codes in registers, with the bits of FloatToE2M1 in common/fp4.h.
//
// There are two paths. cvt.rn.satfinite.e2m1x2.f32 exists on the family targets from SM100 on only.
// On SM12x reports about its results disagree, so that a build for those has to ask for it with
// FASTATTN_E2M1_SM12X. Everywhere else two values at a time are rounded by arithmetic on pairs, in
// bf16 where the values come as such and in fp16 otherwise. That takes 6 to 9 instructions a value;
// the integer form of fp4.h would take longer than the memory does.
#pragma once

#include <cuda_bf16.h>
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

// Rounds the same way in fp16, with 2^9.
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

// Codes of 4 values in 16 bits, the first in the lowest nibble. With kHalf the values are a power
// of two times values of a type that kFitsHalf.
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

__device__ __forceinline__ __nv_bfloat162 AsBf162(uint32_t bits) {
  return *reinterpret_cast<const __nv_bfloat162*>(&bits);
}

__device__ __forceinline__ uint32_t Bf162Bits(__nv_bfloat162 x) {
  return *reinterpret_cast<const uint32_t*>(&x);
}

// Products of bf16 pairs, each rounded once; a NaN becomes 0x7FFF. Exact for a power of two, but
// for results too small to be normal.
__device__ __forceinline__ uint32_t ScaleBf16Pair(uint32_t pair, uint32_t factors) {
  return Bf162Bits(__hmul2_rn(AsBf162(pair), AsBf162(factors)));
}

// Codes of two bf16 values times a power of two in bits 0..3 and 16..19; the other bits hold
// anything.
__device__ __forceinline__ uint32_t E2M1Bf16Pair(uint32_t pair, uint32_t inverse) {
  const uint32_t scaled = ScaleBf16Pair(pair, inverse);
  const __nv_bfloat162 a = __hmin2(__habs2(AsBf162(scaled)), AsBf162(0x40C040C0u));  // a NaN: 6
  // As in RoundToE2M1: beside 2^6 times |x|'s power of two (at least 1's), 2^lp, a bf16 keeps one
  // mantissa bit of |x|. Its bits are then (133 + lp) << 7 | n, and the code is n + 2 lp.
  const uint32_t power = Bf162Bits(__hmax2(a, AsBf162(0x3F803F80u))) & 0x7F807F80u;
  const uint32_t sum = Bf162Bits(__hfma2(AsBf162(power), AsBf162(0x42804280u), a));
  const uint32_t code = sum + (sum >> 6) + 0x00060006u;  // 2 * 133 + 6 is 0 in the low 4 bits
  return (code & 0x00070007u) | ((scaled >> 12) & 0xFFF8FFF8u);
}

// Codes of 8 bf16 values times a power of two (both halves of `inverse`), the first in the lowest
// nibble.
__device__ __forceinline__ uint32_t PackE2M1OfBf16x8(const uint4& x, uint32_t inverse) {
#if defined(FASTATTN_E2M1_INSTRUCTION)
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
  float scaled[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    scaled[2 * i] = __fmul_rn(BitsFloat(words[i] << 16), BitsFloat(inverse << 16));
    scaled[2 * i + 1] = __fmul_rn(BitsFloat(words[i] & 0xFFFF0000u), BitsFloat(inverse << 16));
  }
  return PackE2M1x8<true>(scaled);
#else
  const uint32_t a = __byte_perm(E2M1Bf16Pair(x.x, inverse), E2M1Bf16Pair(x.y, inverse), 0x6240);
  const uint32_t b = __byte_perm(E2M1Bf16Pair(x.z, inverse), E2M1Bf16Pair(x.w, inverse), 0x6240);
  const uint32_t even = __byte_perm(a, b, 0x5410), odd = __byte_perm(a, b, 0x7632);
  return (even & 0x0F0F0F0Fu) | ((odd << 4) & 0xF0F0F0F0u);
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

// E2M1 blocks as e4m3 operands.
//
// A row (a key, or a query head) has a scale 2^e for each of its four blocks. An operand is
// E2M1's value times 2^(e - largest e of the row + 6), which e4m3 has for every block that is at
// most 2^14 times smaller than the row's largest; the row's factor 2^(largest e - 6) is left to
// fp32. Blocks that are smaller, and factors that fp32 might not hold, are rare: logits of such
// rows are computed apart (wide_rows.cuh).
#pragma once

#include "common/fp4.h"

namespace fastattn::cuda::mqa_logits {

inline constexpr int kMostShift = 14;
inline constexpr int kTopExponent = 6;  // of the multiplier of a row's largest block
inline constexpr int kMostFactor = 60;  // exponent of a row's factor

// e4m3 code of E2M1 magnitude `code` times 2^(shift - 8), a multiple of the smallest subnormal.
__device__ __forceinline__ uint8_t MagnitudeOfShift(int code, int shift) {
  const int steps = (0xC8643210u >> 4 * code & 0xF) << shift;  // of 2^-9
  const int exponent = max(28 - __clz(steps), 0);
  return static_cast<uint8_t>((exponent << 3) + (steps >> exponent));
}

// The codes for all shifts, by one warp: byte i of word `shift` is that of magnitude i. Bytes of
// the next word are 1.
__device__ __forceinline__ void FillMagnitudes(uint64_t* table, int lane) {
#pragma unroll 1
  for (int i = lane; i < (kMostShift + 2) * 8; i += 32) {
    const int shift = i / 8;
    reinterpret_cast<uint8_t*>(table)[i] = shift > kMostShift ? 1 : MagnitudeOfShift(i % 8, shift);
  }
}

__device__ __forceinline__ uint32_t LargestByte(uint32_t bytes) {
  const uint32_t pairs = __vmaxu4(bytes, bytes >> 16);
  return max(pairs & 0xFF, pairs >> 8 & 0xFF);
}

// Factor of a row whose largest exponent byte is `largest`.
__device__ __forceinline__ float RowFactor(uint32_t largest) {
  if (largest == kUE8M0NaN) return BitsFloat(0x7FC00000u);
  const int e = static_cast<int>(largest) - 127 - kTopExponent;
  return BitsFloat(static_cast<uint32_t>(max(e + 127, 1)) << 23);
}

// The same where it is a normal power of two; other rows are rare.
__device__ __forceinline__ float PlainFactor(int largest) {
  return BitsFloat(static_cast<uint32_t>(largest - kTopExponent) << 23);
}

// Shift of a block; sets `wide` if its codes do not fit.
__device__ __forceinline__ int ShiftOf(uint32_t byte, uint32_t largest, const uint4& codes,
                                       bool* wide) {
  const int shift = static_cast<int>(byte) - static_cast<int>(largest) + kMostShift;
  const bool zero = ((codes.x | codes.y | codes.z | codes.w) & 0x77777777u) == 0;
  const int factor = static_cast<int>(largest) - 127;
  const bool fits = shift >= 0 && factor <= kMostFactor && factor >= -kMostFactor;
  *wide |= !zero && !fits && largest != kUE8M0NaN;
  return max(shift, 0);
}

// Bytes of (b, a) that the selector's nibbles name; with bit 3 set, the byte's sign eight times.
__device__ __forceinline__ uint32_t PermuteBytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

// Four codes in the low half of a word to e4m3, with the opposite sign: that of a key and a query's
// cancel. The conversion is bound by instructions of integers, so that the sign is a product.
// `ones`: bytes of 1. A constant would be copied to a register for each use.
__device__ __forceinline__ uint32_t FourToE4M3(uint32_t codes, uint2 magnitudes, uint32_t ones) {
  const uint32_t magnitude = PermuteBytes(magnitudes.x, magnitudes.y, codes & 0x7777u);
  return magnitude + 0x80 * PermuteBytes(ones, ones, codes);
}

// Eight codes, the first in the lowest nibble, to e4m3: four values a word.
__device__ __forceinline__ void ToE4M3(uint32_t codes, uint2 magnitudes, uint32_t ones,
                                       uint32_t* low, uint32_t* high) {
  *low = FourToE4M3(codes, magnitudes, ones);
  *high = FourToE4M3(codes >> 16, magnitudes, ones);
}

}  // namespace fastattn::cuda::mqa_logits

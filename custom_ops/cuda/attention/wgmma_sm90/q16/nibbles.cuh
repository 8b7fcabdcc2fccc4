// 4-bit codes, two in a byte and each code + 8, as fp16 operands.
//
// A nibble at bits 0 .. 3 or 4 .. 7 of a half is a subnormal number, (code + 8) * 2^-24 or 2^-20:
// an operand of K is one AND. What the 8 adds to a score is a multiple of its query's sum, which
// one product more takes off (query_nibbles.cuh). V's operands are multiplied with the scales of
// their tokens anyway, and the addition that belongs to it takes the 8 off. Large heads have no
// registers for that: their operands are the codes.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace fastattn::cuda::wgmma_q16 {

// Nibbles n of a word's eight as pairs (n, n + 4), times 2^-24 for even n and 2^-20 for odd ones.
__device__ __forceinline__ void NibblesToOperands(uint32_t word, uint32_t (&pairs)[4]) {
  const uint32_t upper = word >> 8;
  pairs[0] = word & 0x000F000Fu;
  pairs[1] = word & 0x00F000F0u;
  pairs[2] = upper & 0x000F000Fu;
  pairs[3] = upper & 0x00F000F0u;
}

__device__ __forceinline__ __half2 HalfPair(uint32_t bits) {
  return *reinterpret_cast<const __half2*>(&bits);
}

__device__ __forceinline__ uint32_t PairBits(__half2 pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// V's scales of two tokens, and what 8 is with them in units of scaled codes.
struct TokenScales {
  uint32_t scales, biases;

  __device__ __forceinline__ explicit TokenScales(uint32_t pair)
      : scales(pair), biases(PairBits(__hmul2(HalfPair(pair), HalfPair(kEight)))) {}

 private:
  static constexpr uint32_t kEight = 0x80808080u;  // -8 * 2^-20, twice
};

// Codes of two channels of two tokens, whose bytes of a word `selector` puts into the low bytes of
// two halves, times 2^-20 and the tokens' scales: of the even channel and of the odd one.
__device__ __forceinline__ void ScaleNibbles(uint32_t word, uint32_t selector,
                                             const TokenScales& tokens, uint32_t* even,
                                             uint32_t* odd) {
  const uint32_t bytes = __byte_perm(word, 0, selector);
  const __half2 scales = HalfPair(tokens.scales), biases = HalfPair(tokens.biases);
  *even = PairBits(__hfma2(HalfPair(bytes << 4 & 0x00F000F0u), scales, biases));
  *odd = PairBits(__hfma2(HalfPair(bytes & 0x00F000F0u), scales, biases));
}

// Codes of two channels of two tokens, in the lower or the upper half of a word, as pairs of fp16
// values: of the even channel and of the odd one.
template <bool kUpper>
__device__ __forceinline__ void NibblesToHalves(uint32_t word, uint32_t* even, uint32_t* odd) {
  const auto half2 = [](uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); };
  const uint32_t bytes = __byte_perm(word, 0x64646464u, kUpper ? 0x4342 : 0x4140);
  // fp16(0x6400 | u) is 1024 + u exactly.
  const __half2 x = __hsub2(half2(bytes & 0xFF0FFF0Fu), half2(0x64086408u));
  const __half2 y = __hfma2(half2(bytes & 0xFFF0FFF0u), half2(0x2C002C00u), half2(0xD480D480u));
  *even = *reinterpret_cast<const uint32_t*>(&x);
  *odd = *reinterpret_cast<const uint32_t*>(&y);
}

// A word's eight codes of neighbouring channels as fp16 values in their order.
__device__ __forceinline__ uint4 NibblesToHalves(uint32_t word) {
  uint32_t even[2], odd[2];
  NibblesToHalves<false>(word, &even[0], &odd[0]);
  NibblesToHalves<true>(word, &even[1], &odd[1]);
  return make_uint4(__byte_perm(even[0], odd[0], 0x5410), __byte_perm(even[0], odd[0], 0x7632),
                    __byte_perm(even[1], odd[1], 0x5410), __byte_perm(even[1], odd[1], 0x7632));
}

}  // namespace fastattn::cuda::wgmma_q16

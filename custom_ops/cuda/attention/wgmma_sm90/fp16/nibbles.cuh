// 4-bit codes, two in a byte and each code + 8, as int8 codes and as fp16 values.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace fastattn::cuda::wgmma_fp16 {

// A word's eight codes of neighbouring channels as int8 codes, four in a word.
__device__ __forceinline__ uint2 NibblesToInt8(uint32_t word) {
  // A byte of 0x80 more takes the 8 off without a borrow.
  const uint32_t even = ((word & 0x0F0F0F0Fu) | 0x80808080u) - 0x08080808u;
  const uint32_t odd = ((word >> 4 & 0x0F0F0F0Fu) | 0x80808080u) - 0x08080808u;
  return make_uint2(__byte_perm(even, odd, 0x5140) ^ 0x80808080u,
                    __byte_perm(even, odd, 0x7362) ^ 0x80808080u);
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

}  // namespace fastattn::cuda::wgmma_fp16

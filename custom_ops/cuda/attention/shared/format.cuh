// How the elements of K and V become 16-bit operands of the tensor cores.
//
// int8, e4m3 and e5m2 codes are subsets of fp16, so that the conversion is exact; bf16 and fp16
// values are operands as they are.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/types.h"

namespace fastattn::cuda {

template <DType kElement>
struct Format;

template <>
struct Format<DType::kE4M3> {
  static constexpr DType kOperand = DType::kFloat16;
  static constexpr int kBytes = 1;

#if __CUDA_ARCH__ < 890
  // Two codes, each in the upper byte of a half: exponent and mantissa moved to their places are
  // the value / 2^8. 0x7F is NaN.
  static __device__ __forceinline__ uint32_t WidenPair(uint32_t codes) {
    const uint32_t magnitude = codes & 0x7F007F00u;
    uint32_t bits = (codes & 0x80008000u) | magnitude >> 1;
    const __half2 factor = __halves2half2(__ushort_as_half(0x5C00), __ushort_as_half(0x5C00));
    const __half2 value = __hmul2(*reinterpret_cast<const __half2*>(&bits), factor);
    bits = *reinterpret_cast<const uint32_t*>(&value);
    return bits | ((magnitude + 0x01000100u) >> 15 & 0x00010001u) * 0x7E00u;
  }
#endif

  // Two codes in the low (high) half of a word.
  static __device__ __forceinline__ void Widen(uint32_t codes, uint32_t* low, uint32_t* high) {
#if __CUDA_ARCH__ >= 890
    // The halves are named inside the assembly: the conversion then reads the upper one where it
    // lies, and a shift with it becomes no instruction of its own.
    asm("{\n"
        ".reg .b16 pair0, pair1;\n"
        "mov.b32 {pair0, pair1}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, pair0;\n"
        "cvt.rn.f16x2.e4m3x2 %1, pair1;\n"
        "}"
        : "=r"(*low), "=r"(*high)
        : "r"(codes));
#else
    *low = WidenPair(__byte_perm(codes, 0, 0x1404));
    *high = WidenPair(__byte_perm(codes, 0, 0x3424));
#endif
  }

  // 0xFF for every byte that is not a finite number: exponent and mantissa all ones.
  static __device__ __forceinline__ uint32_t NonFinite(uint32_t codes) {
    return (((codes & 0x7F7F7F7Fu) + 0x01010101u) >> 7 & 0x01010101u) * 0xFFu;
  }
};

template <>
struct Format<DType::kE5M2> {
  static constexpr DType kOperand = DType::kFloat16;
  static constexpr int kBytes = 1;

  // The code is the upper byte of the fp16 value.
  static __device__ __forceinline__ void Widen(uint32_t codes, uint32_t* low, uint32_t* high) {
    *low = __byte_perm(codes, 0, 0x1404);
    *high = __byte_perm(codes, 0, 0x3424);
  }

  static __device__ __forceinline__ uint32_t NonFinite(uint32_t codes) {
    return (((codes & 0x7C7C7C7Cu) + 0x04040404u) >> 7 & 0x01010101u) * 0xFFu;
  }
};

template <>
struct Format<DType::kInt8> {
  static constexpr DType kOperand = DType::kFloat16;
  static constexpr int kBytes = 1;

  // fp16(0x6400 | u) is 1024 + u exactly, and u = code + 128.
  static __device__ __forceinline__ void Widen(uint32_t codes, uint32_t* low, uint32_t* high) {
    const uint32_t biased = codes ^ 0x80808080u;
    const __half2 bias = __halves2half2(__ushort_as_half(0x6480), __ushort_as_half(0x6480));
    const uint32_t a = __byte_perm(biased, 0x64646464u, 0x4140);
    const uint32_t b = __byte_perm(biased, 0x64646464u, 0x4342);
    const __half2 x = __hsub2(*reinterpret_cast<const __half2*>(&a), bias);
    const __half2 y = __hsub2(*reinterpret_cast<const __half2*>(&b), bias);
    *low = *reinterpret_cast<const uint32_t*>(&x);
    *high = *reinterpret_cast<const uint32_t*>(&y);
  }

  static __device__ __forceinline__ uint32_t NonFinite(uint32_t) { return 0; }
};

// A byte is two codes, each code + 8. The nibbles at bits 0 .. 3 and 4 .. 7 of a half are subnormal
// fp16 numbers, (code + 8) * 2^-24 and (code + 8) * 2^-20: an operand is one AND. What the 8 adds
// to a product is taken off outside of it, where it is one number for all rows.
template <>
struct Format<DType::kInt4> {
  static constexpr DType kOperand = DType::kFloat16;
  static constexpr int kBytes = 1;
  static constexpr uint32_t kLowBias = 0x00080008u;   // what a code of 0 is in Widen's low words
  static constexpr uint32_t kHighBias = 0x00800080u;  // and in its high words, 2^4 as much
  static constexpr float kUnit = 0x1p-24f;            // of the low words' products

  // Nibbles n of a word as four pairs (n, n + 4) of operands.
  static __device__ __forceinline__ void Widen(uint32_t codes, uint32_t (&pairs)[4]) {
    const uint32_t upper = codes >> 8;
    pairs[0] = codes & 0x000F000Fu;
    pairs[1] = codes & 0x00F000F0u;
    pairs[2] = upper & 0x000F000Fu;
    pairs[3] = upper & 0x00F000F0u;
  }

  static __device__ __forceinline__ uint32_t NonFinite(uint32_t) { return 0; }
};

// A byte is two codes: sign, two bits of exponent and one of mantissa. Moved to their places in a
// half they are the fp16 number 2^-14 as large, subnormals included.
template <>
struct Format<DType::kE2M1> {
  static constexpr DType kOperand = DType::kFloat16;
  static constexpr int kBytes = 1;
  static constexpr float kUnit = 0x1p-14f;  // of operands

  // Bits of `a` where the bytes of halves have a sign, else those of `b`: one instruction.
  static __device__ __forceinline__ uint32_t WithSigns(uint32_t a, uint32_t b) {
    uint32_t bits;
    asm("lop3.b32 %0, %1, %2, 0x80808080, 0xE4;" : "=r"(bits) : "r"(a), "r"(b));
    return bits;
  }

  // Nibbles n of a word as four pairs (n, n + 4) of operands. The odd nibbles' signs and the rest
  // of them are brought to their places in bytes, the even ones' too, with other bits beside them:
  // an AND for each pair takes the bytes that are the upper ones of halves, and those bits off.
  static __device__ __forceinline__ void Widen(uint32_t codes, uint32_t (&pairs)[4]) {
    constexpr uint32_t kBits = 0x8E008E00u;
    const uint32_t odd = WithSigns(codes, codes >> 3), even = WithSigns(codes << 4, codes << 1);
    pairs[0] = even << 8 & kBits;
    pairs[1] = odd << 8 & kBits;
    pairs[2] = even & kBits;
    pairs[3] = odd & kBits;
  }

  static __device__ __forceinline__ uint32_t Times(uint32_t pair, uint32_t factors) {
    const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&pair),
                                    *reinterpret_cast<const __half2*>(&factors));
    return *reinterpret_cast<const uint32_t*>(&product);
  }

  // Nibbles n of a word as four pairs (n, n + 4) of operands, times factors of the first two pairs
  // and of the last two.
  static __device__ __forceinline__ void Widen(uint32_t codes, uint32_t first, uint32_t last,
                                               uint32_t (&pairs)[4]) {
    Widen(codes, pairs);
    pairs[0] = Times(pairs[0], first), pairs[1] = Times(pairs[1], first);
    pairs[2] = Times(pairs[2], last), pairs[3] = Times(pairs[3], last);
  }

  static __device__ __forceinline__ uint32_t NonFinite(uint32_t) { return 0; }
};

template <>
struct Format<DType::kFloat16> {
  static constexpr DType kOperand = DType::kFloat16;
  static constexpr int kBytes = 2;

  static __device__ __forceinline__ uint32_t NonFinite(uint32_t pair) {
    return (((pair & 0x7C007C00u) + 0x04000400u) >> 15 & 0x00010001u) * 0xFFFFu;
  }
};

template <>
struct Format<DType::kBFloat16> {
  static constexpr DType kOperand = DType::kBFloat16;
  static constexpr int kBytes = 2;

  static __device__ __forceinline__ uint32_t NonFinite(uint32_t pair) {
    return (((pair & 0x7F807F80u) + 0x00800080u) >> 15 & 0x00010001u) * 0xFFFFu;
  }
};

}  // namespace fastattn::cuda

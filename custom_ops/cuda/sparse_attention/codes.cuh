// Elements of K and V as fp32, a word or two at a time.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/fp4.h"
#include "common/int4.h"
#include "common/numeric.h"
#include "common/types.h"
#include "cuda/common/convert.cuh"

namespace fastattn::cuda::sparse {

// Four bytes as fp32, each below 256: the mantissa of 2^23 takes a byte as it is.
__device__ __forceinline__ void BytesToFloat(uint32_t bytes, float bias, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = __uint_as_float(__byte_perm(bytes, 0x4B000000u, 0x7540 + i)) - (0x1p23f + bias);
  }
}

// Four E2M1 codes in the low nibbles of bytes: exponent and mantissa in their places are the value
// / 2^126, subnormal codes included.
__device__ __forceinline__ void E2M1ToFloat(uint32_t codes, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t code = codes >> (8 * i);
    x[i] = __uint_as_float((code & 8u) << 28 | (code & 7u) << 22) * 0x1p126f;
  }
}

// Four codes, a byte each.
template <DType kCode>
struct Quad {
  static __device__ __forceinline__ void ToFloat(uint32_t codes, float (&x)[4]) {
    CodesToFloat<kCode>(codes, x);
  }
};
template <>
struct Quad<DType::kInt8> {
  static __device__ __forceinline__ void ToFloat(uint32_t codes, float (&x)[4]) {
    BytesToFloat(codes ^ 0x80808080u, 128.0f, x);
  }
};
template <>
struct Quad<DType::kInt4> {
  static __device__ __forceinline__ void ToFloat(uint32_t codes, float (&x)[4]) {
    BytesToFloat(codes, kInt4Bias, x);
  }
};
template <>
struct Quad<DType::kE2M1> {
  static __device__ __forceinline__ void ToFloat(uint32_t codes, float (&x)[4]) {
    E2M1ToFloat(codes, x);
  }
};

// Two 16-bit values.
template <DType kCode>
__device__ __forceinline__ void PairToFloat(uint32_t pair, float* low, float* high) {
  if constexpr (kCode == DType::kBFloat16) {
    *low = __uint_as_float(pair << 16);
    *high = __uint_as_float(pair & 0xFFFF0000u);
  } else {
    const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    *low = values.x;
    *high = values.y;
  }
}

// The value of a group's scale, as GroupScale<kType> has it, without branches.
template <DType kType>
struct GroupScaleOf;
template <>
struct GroupScaleOf<DType::kUE8M0> {
  static __device__ __forceinline__ float Value(uint32_t byte) {  // 0: 2^-127, 255: NaN
    return __uint_as_float(byte << 23 | ((byte + 1 & 0xFEu) == 0 ? 0x00400000u : 0u));
  }
};

// 0xFF for each of four bits that is set.
__device__ __forceinline__ uint32_t ByteMask(uint32_t bits) {
  return ((bits & 0xFu) * 0x00204081u & 0x01010101u) * 0xFFu;
}

}  // namespace fastattn::cuda::sparse

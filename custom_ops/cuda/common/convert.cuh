// Conversions between 8-bit codes, 16-bit values and fp32 in registers, four or two at a time. They
// give the bits of common/numeric.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "common/numeric.h"
#include "common/types.h"

namespace fastattn::cuda {

// Converts four codes, the first in the lowest byte.
template <DType kCode>
__device__ __forceinline__ void CodesToFloat(uint32_t codes, float (&out)[4]) {
  if constexpr (kCode == DType::kInt8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] = static_cast<float>(static_cast<int8_t>(codes >> (8 * i)));
    }
  } else {
    constexpr __nv_fp8_interpretation_t kFormat = kCode == DType::kE4M3 ? __NV_E4M3 : __NV_E5M2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // fp16 holds every e4m3 and e5m2 value exactly.
      const __half2_raw pair =
          __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes >> (16 * i)), kFormat);
      const float2 values = __half22float2(__half2(pair));
      out[2 * i] = values.x;
      out[2 * i + 1] = values.y;
    }
  }
}

// Rounds two fp32 values to bf16 or fp16; the first one goes to the low half.
template <DType kDType>
__device__ __forceinline__ uint32_t PackPair(float low, float high) {
  uint32_t bits;
  if constexpr (kDType == DType::kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    bits = *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    static_assert(kDType == DType::kFloat16);
    const __half2 pair = __floats2half2_rn(low, high);
    bits = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return bits;
}

// Codes of four fp32 values, the first in the lowest byte. They saturate; ties go to even.
template <DType kCode>
__device__ __forceinline__ uint32_t PackCodes(float a, float b, float c, float d) {
  if constexpr (kCode == DType::kInt8) {
    return static_cast<uint8_t>(FloatToInt8(a)) | static_cast<uint8_t>(FloatToInt8(b)) << 8 |
           static_cast<uint8_t>(FloatToInt8(c)) << 16 |
           static_cast<uint32_t>(static_cast<uint8_t>(FloatToInt8(d))) << 24;
  } else {
    constexpr __nv_fp8_interpretation_t kFormat = kCode == DType::kE4M3 ? __NV_E4M3 : __NV_E5M2;
    const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, kFormat);
    const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, kFormat);
    return low | high << 16;
  }
}

}  // namespace fastattn::cuda

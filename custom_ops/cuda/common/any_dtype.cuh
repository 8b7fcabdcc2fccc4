// Single elements of a tensor whose dtype is known at run time: fp32, fp16, bf16 or e4m3.
#pragma once

#include <cstdint>

#include "common/numeric.h"
#include "common/types.h"

namespace fastattn::cuda {

__device__ __forceinline__ float LoadAny(const void* from, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat16:
      return Element<DType::kFloat16>::Load(static_cast<const uint16_t*>(from)[index]);
    case DType::kBFloat16:
      return Element<DType::kBFloat16>::Load(static_cast<const uint16_t*>(from)[index]);
    case DType::kE4M3:
      return Element<DType::kE4M3>::Load(static_cast<const uint8_t*>(from)[index]);
    default:
      return static_cast<const float*>(from)[index];
  }
}

__device__ __forceinline__ void StoreAny(float x, DType dtype, void* to, int64_t index) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<uint16_t*>(to)[index] = Element<DType::kFloat16>::Store(x);
      break;
    case DType::kBFloat16:
      static_cast<uint16_t*>(to)[index] = Element<DType::kBFloat16>::Store(x);
      break;
    case DType::kE4M3:
      static_cast<uint8_t*>(to)[index] = Element<DType::kE4M3>::Store(x);
      break;
    default:
      static_cast<float*>(to)[index] = x;
  }
}

}  // namespace fastattn::cuda

// Values of 4-bit codes, int4 or E2M1, as they are read back from a cache.
#pragma once

#include <cstdint>

#include "common/int4.h"
#include "common/types.h"
#include "cuda/common/e2m1.cuh"

namespace fastattn::cuda {

// Of 8 codes, the first in the lowest nibble.
template <DType kCode>
__device__ __forceinline__ void NibblesToFloat(uint32_t word, float (&x)[8]);

template <>
__device__ __forceinline__ void NibblesToFloat<DType::kE2M1>(uint32_t word, float (&x)[8]) {
  UnpackE2M1x8(word, x);
}

template <>
__device__ __forceinline__ void NibblesToFloat<DType::kInt4>(uint32_t word, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] = static_cast<float>(static_cast<int>(word >> (4 * i) & 0xFu) - kInt4Bias);
  }
}

}  // namespace fastattn::cuda

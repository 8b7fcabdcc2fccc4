// Loads from addresses that need not be aligned for a vector load.
#pragma once

#include <cstdint>

#include "common/numeric.h"
#include "common/types.h"
#include "cuda/common/vector.cuh"

namespace fastattn::cuda {

inline bool IsAligned(const void* address, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// LoadRaw for an address that is aligned to one element only.
template <DType kIn>
__device__ __forceinline__ Raw<kIn> LoadRawUnaligned(const void* base, int64_t element,
                                                     bool active) {
  uint32_t words[8] = {};
  if (active) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if constexpr (kIn == DType::kFloat32) {
        words[i] = __ldg(static_cast<const uint32_t*>(base) + element + i);
      } else {
        const uint32_t half = __ldg(static_cast<const uint16_t*>(base) + element + i);
        words[i / 2] |= half << (16 * (i % 2));
      }
    }
  }
  return {make_uint4(words[0], words[1], words[2], words[3]),
          make_uint4(words[4], words[5], words[6], words[7])};
}

// Loads four neighbouring fp32 or bf16 values. `aligned` says that one vector load can do it.
__device__ __forceinline__ void LoadFour(const void* base, DType dtype, int64_t element,
                                         bool aligned, float (&x)[4]) {
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = LoadScale(base, dtype, element + i);
  } else if (dtype == DType::kFloat32) {
    const float4 v =
        __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(base) + element));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    const uint2 v =
        __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(base) + element));
    x[0] = BitsFloat(v.x << 16), x[1] = BitsFloat(v.x & 0xFFFF0000u);
    x[2] = BitsFloat(v.y << 16), x[3] = BitsFloat(v.y & 0xFFFF0000u);
  }
}

}  // namespace fastattn::cuda

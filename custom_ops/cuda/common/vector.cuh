// Eight neighbouring values of a 16- or 32-bit tensor in one thread.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/types.h"

namespace fastattn::cuda {

inline constexpr int kChunk = 8;  // values of a thread

// kChunk values as they were loaded.
template <DType kIn>
struct Raw {
  uint4 low, high;  // high: fp32 only
};

template <DType kIn>
__device__ __forceinline__ Raw<kIn> LoadRaw(const void* base, int64_t element, bool active) {
  Raw<kIn> raw;
  raw.low = raw.high = make_uint4(0, 0, 0, 0);
  if (!active) return raw;
  const char* address = static_cast<const char*>(base) + element * SizeOf(kIn);
  raw.low = __ldg(reinterpret_cast<const uint4*>(address));
  if constexpr (kIn == DType::kFloat32) {
    raw.high = __ldg(reinterpret_cast<const uint4*>(address) + 1);
  }
  return raw;
}

template <DType kIn>
__device__ __forceinline__ void Unpack(const Raw<kIn>& raw, float (&x)[kChunk]) {
  const uint32_t words[8] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                             raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if constexpr (kIn == DType::kFloat32) {
      x[i] = __uint_as_float(words[i]);
    } else if constexpr (kIn == DType::kBFloat16) {
      x[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    } else {
      const __half2 pair = *reinterpret_cast<const __half2*>(&words[i / 2]);
      x[i] = i % 2 ? __high2float(pair) : __low2float(pair);
    }
  }
}

}  // namespace fastattn::cuda

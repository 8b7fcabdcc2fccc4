// Arithmetic of the consumers that needs its own instructions.
#pragma once

#include <cstdint>

namespace fastattn::cuda::wgmma_fp8 {

// An FMA that the compiler keeps in its place among the exponentials.
__device__ __forceinline__ float Fma(float a, float b, float c) {
  float y;
  asm volatile("fma.rn.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
  return y;
}

// Four values as e4m3 codes, the first in the lowest byte.
__device__ __forceinline__ uint32_t PackE4M3(float a, float b, float c, float d) {
  uint32_t word;
  asm("{\n\t.reg .b16 low, high;\n\t"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n\t"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n\t"
      "mov.b32 %0, {low, high};\n\t}"
      : "=r"(word)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return word;
}

}  // namespace fastattn::cuda::wgmma_fp8

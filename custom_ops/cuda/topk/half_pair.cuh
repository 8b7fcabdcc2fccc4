// Two floats as fp16, in a word.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastattn::cuda {

// Rounded to nearest, so that their order never turns round; overflow gives infinity, any NaN
// 0x7FFF. `first` is in the lower half. Volatile: made anew, it need not be kept in a register.
__device__ __forceinline__ uint32_t HalfPair(float first, float second) {
  uint32_t pair;
  asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

}  // namespace fastattn::cuda

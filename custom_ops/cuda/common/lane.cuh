// The number of a thread, and its lane.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// kAgain: found when it is needed, so that what follows from it is kept in no register until then.
// Volatile, as the compiler would find it once.
template <bool kAgain>
__device__ __forceinline__ uint32_t Thread() {
  if constexpr (!kAgain) return threadIdx.x;
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

template <bool kAgain>
__device__ __forceinline__ uint32_t Lane() {
  if constexpr (!kAgain) return threadIdx.x % 32;
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

}  // namespace fastattn::cuda

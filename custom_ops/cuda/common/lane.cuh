// A thread's index in its CTA, its lane, and the lanes of its warp.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// All lanes, as the mask of warp instructions.
inline constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// In all lanes.
__device__ __forceinline__ float SumOfWarp(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

// With kAgain the index is read where it is needed, so that nothing derived from it stays in a
// register until then. The read is volatile, or the compiler would move it to the front.
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

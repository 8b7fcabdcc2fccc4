// Data exchange and reductions among neighbouring lanes of a warp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/lane.cuh"

namespace fastattn::cuda {

// One step of a transposition: lanes whose `bit` is 0 keep a and give b away, the others keep b.
__device__ __forceinline__ void SwapHalves(uint32_t& a, uint32_t& b, int bit) {
  const bool upper = threadIdx.x & bit;
  const uint32_t other = __shfl_xor_sync(kFullWarp, upper ? a : b, bit);
  if (upper) {
    a = other;
  } else {
    b = other;
  }
}

// Transposes 4x4 words in each four lanes: word i of lane j becomes word j of lane i.
__device__ __forceinline__ void TransposeQuad(uint32_t (&words)[4]) {
  SwapHalves(words[0], words[1], 1);
  SwapHalves(words[2], words[3], 1);
  SwapHalves(words[0], words[2], 2);
  SwapHalves(words[1], words[3], 2);
}

// Maximum over kLanes neighbouring lanes, in all of them.
template <int kLanes>
__device__ __forceinline__ uint32_t LanesMax(uint32_t x) {
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    x = max(x, __shfl_xor_sync(kFullWarp, x, lanes));
  }
  return x;
}

// The same for each of the two 16-bit halves.
template <int kLanes>
__device__ __forceinline__ uint32_t LanesMax2(uint32_t x) {
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    x = __vmaxu2(x, __shfl_xor_sync(kFullWarp, x, lanes));
  }
  return x;
}

}  // namespace fastattn::cuda

// How the latent caches' kernels share out tokens.
#pragma once

#include <cstdint>

#include "cuda/common/divisor.cuh"
#include "params/mla_cache.h"

namespace fastattn::cuda {

inline constexpr int kMlaWarps = 8;  // of a CTA, a token each
inline constexpr int kMlaThreads = 32 * kMlaWarps;
inline constexpr int kMlaRopeChunks = kMlaRopeDim * 2 / 16;  // of 16 bytes, where they are bf16

__device__ __forceinline__ int64_t WarpToken() {
  return static_cast<int64_t>(blockIdx.x) * kMlaWarps + threadIdx.x / 32;
}

}  // namespace fastattn::cuda

// Where a warp of the latent caches' kernels finds its token.
#pragma once

#include <cstdint>

#include "cuda/common/divisor.cuh"
#include "params/mla_cache.h"

namespace fastattn::cuda {

inline constexpr int kMlaWarps = 8;  // of a CTA, a token each
inline constexpr int kMlaThreads = 32 * kMlaWarps;
inline constexpr int kMlaRopeChunks = kMlaRopeDim * 2 / 16;  // of 16 bytes, where they are bf16

struct MlaRow {
  uint8_t* codes;
  uint8_t* scales;  // in the page's other plane, if it has one; else behind the codes
};

template <MlaFormat kFormat>
__device__ __forceinline__ MlaRow RowOf(const MlaCache& cache, uint32_t page, uint32_t row) {
  uint8_t* base = static_cast<uint8_t*>(cache.data) + page * cache.page_stride;
  uint8_t* codes = base + row * cache.row_stride;
  if constexpr (ScalePlaneBytes(kFormat) > 0) {
    return {codes, base + cache.ScalePlane() + int64_t{row} * ScalePlaneBytes(kFormat)};
  }
  return {codes, codes + FactsOf(kFormat).latent};
}

__device__ __forceinline__ int64_t WarpToken() {
  return static_cast<int64_t>(blockIdx.x) * kMlaWarps + threadIdx.x / 32;
}

}  // namespace fastattn::cuda

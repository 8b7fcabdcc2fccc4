// Which dequantisation scale belongs to a head, a sequence or a query token.
#pragma once

#include <cstdint>

#include "common/numeric.h"
#include "params/attention.h"

namespace fastattn::cuda {

// `at` has the `batch_idx` and the query `head`; they are read only where there is a scale.
template <class At>
__device__ __forceinline__ float LoadDescale(const Descale& scale, int token, int kv_head,
                                             const At& at) {
  if (scale.data == nullptr) return 1.0f;
  return LoadScale(scale.data, scale.dtype, scale.Index(token, at.batch_idx, kv_head, at.head));
}

// A static scale of a cache: [KV] if `per_head`, else [1].
__device__ __forceinline__ float LoadHeadScale(const PagedCache& cache, const void* scales,
                                               bool per_head, int kv_head) {
  return LoadScale(scales, cache.scale_dtype, per_head ? kv_head : 0);
}

}  // namespace fastattn::cuda

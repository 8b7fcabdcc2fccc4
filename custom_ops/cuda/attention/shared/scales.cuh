// Which dequantisation scale belongs to a head, a sequence or a query token.
#pragma once

#include <cstdint>

#include "common/numeric.h"
#include "common/static_scales.h"
#include "params/attention.h"

namespace fastattn::cuda {

// A sequence and a query head, where a kernel has no other place that tells them.
struct DescaleAt {
  int batch_idx;
  int head;
};

// `x` times a descale. `at` has the `batch_idx` and the query `head`; they are read only where
// there is a scale.
template <class At>
__device__ __forceinline__ float TimesDescale(float x, const Descale& scale, int token, int kv_head,
                                              const At& at) {
  if (scale.data != nullptr) {
    x *= LoadScale(scale.data, scale.dtype, scale.Index(token, at.batch_idx, kv_head, at.head));
  }
  return x;
}

template <class At>
__device__ __forceinline__ float LoadDescale(const Descale& scale, int token, int kv_head,
                                             const At& at) {
  return TimesDescale(1.0f, scale, token, kv_head, at);
}

// A static scale of a cache that is constant over a head's channels. `granularity` may also be
// whether it is that of heads.
template <typename Granularity>
__device__ __forceinline__ float LoadHeadScale(const PagedCache& cache, const void* scales,
                                               Granularity granularity, int kv_head) {
  return LoadScale(scales, cache.scale_dtype, HeadScaleIndex<int64_t>(granularity, kv_head));
}

}  // namespace fastattn::cuda

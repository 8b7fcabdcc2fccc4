// Where a row's LSE goes, and how it is reckoned.
#pragma once

#include "common/normaliser.h"
#include "cuda/common/exp2.cuh"
#include "params/mla_attention.h"

namespace fastattn::cuda::mla_dense {

__device__ __forceinline__ Normaliser FinishRow(const MlaDenseParams& p, float maximum, float sum,
                                                int head) {
  return NormaliserWithoutSink(maximum, sum, p.sinks, [&] { return __ldg(p.sinks + head); });
}

__device__ __forceinline__ void StoreLse(const MlaDenseParams& p, int64_t token, int head,
                                         float lse) {
  if (p.lse != nullptr) p.lse[int64_t{head} * p.seqs.num_tokens + token] = lse;
}

}  // namespace fastattn::cuda::mla_dense

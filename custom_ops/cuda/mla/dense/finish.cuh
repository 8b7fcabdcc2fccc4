// From a row's sum of weights to its LSE and the factor of its output.
#pragma once

#include "common/normaliser.h"
#include "cuda/common/exp2.cuh"
#include "params/mla_attention.h"

namespace fastattn::cuda::mla_dense {

struct RowEnd {
  float lse;     // natural, without the sink
  float factor;  // what the weighted sum of values is multiplied with
};

// `sum` is that of 2^(score - maximum). A row without a key has a sum of 0.
__device__ __forceinline__ RowEnd FinishRow(const MlaDenseParams& p, float maximum, float sum,
                                            int head) {
  if (sum == 0.0f) return {-INFINITY, 0.0f};
  const float lse = maximum + log2f(sum);
  float factor = 1.0f / sum;
  if (p.sinks != nullptr) factor /= 1.0f + exp2f(__ldg(p.sinks + head) * kLog2E - lse);
  return {lse * kLn2, factor};
}

__device__ __forceinline__ void StoreLse(const MlaDenseParams& p, int64_t token, int head,
                                         float lse) {
  if (p.lse != nullptr) p.lse[int64_t{head} * p.seqs.num_tokens + token] = lse;
}

}  // namespace fastattn::cuda::mla_dense

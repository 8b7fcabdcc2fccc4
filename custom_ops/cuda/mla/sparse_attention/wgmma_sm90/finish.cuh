// What both kernels of sparse latent attention do with a finished row.
#pragma once

#include <cstdint>

#include "common/normaliser.h"
#include "cuda/common/exp2.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/work.cuh"

namespace fastattn::cuda::mla_sparse_sm90 {

// Softmax of one head: probabilities are in units of 2^maximum.
struct RowState {
  float maximum = -INFINITY;
  float sum = 0.0f;
};

// What a head's scores are shifted by; one without a key has no maximum.
__device__ __forceinline__ float ShiftOf(float maximum) {
  return maximum == -INFINITY ? 0.0f : maximum;
}

// Writes a head's LSE and largest logit, and returns what its output is multiplied with. largest:
// of its scores, in base 2.
__device__ __forceinline__ float FinishRow(const Arguments& args, const Work& work, int head,
                                           const RowState& row, float largest, float common_scale) {
  const MlaSparseParams& p = args.p;
  const float shift = ShiftOf(row.maximum);
  const bool lonely = row.sum == 0.0f;
  if (args.splits > 1) {
    const float lse = lonely ? -INFINITY : shift + log2f(row.sum);
    args.partial_lse[(work.split * p.tokens + work.token) * p.heads + head] = lse;
    return lonely ? 0.0f : common_scale / row.sum;
  }
  const int64_t at = p.StatisticAt(work.token, head);
  if (p.lse != nullptr) p.lse[at] = lonely ? p.LonelyLse() : shift * kLn2 + logf(row.sum);
  if (p.max_logits != nullptr) p.max_logits[at] = LargestLogit(largest, row.sum);
  if (lonely) return 0.0f;
  float sum = row.sum;
  if (p.sinks != nullptr) sum += Exp2(p.sinks[head] * kLog2E - shift);
  return common_scale / sum;
}

}  // namespace fastattn::cuda::mla_sparse_sm90

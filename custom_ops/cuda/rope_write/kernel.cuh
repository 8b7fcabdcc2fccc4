// Launch of one variant: which of the two kernels, and its grid.
#pragma once

#include "common/dispatch.h"
#include "cuda/rope_write/policy.h"
#include "cuda/rope_write/prefill_kernel.cuh"
#include "cuda/rope_write/token_kernel.cuh"

namespace fastattn::cuda {

template <typename Traits>
void LaunchStep(const StepParams& p, cudaStream_t stream) {
  const RopeWriteCacheParams& rope = p.rope;
  const int kv_heads = rope.cache.num_kv_heads;
  const int num_tokens = rope.rows.num_tokens;
  if (UseTokenKernel(num_tokens, rope.rows.batch)) {
    constexpr int kGroups = kTokenThreads / Traits::kLanes;
    const int heads = rope.num_heads + 2 * kv_heads;
    const int share = HeadsPerGroup(num_tokens, heads, kGroups, kTokenHeadsMax);
    const dim3 grid((heads + kGroups * share - 1) / (kGroups * share), num_tokens);
    StepTokenKernel<Traits><<<grid, kTokenThreads, 0, stream>>>(p, share);
    return;
  }
  constexpr int kTokens = kPrefillThreads / Traits::kLanes;
  const int token_groups = (num_tokens + kTokens - 1) / kTokens;
  const int heads = rope.num_heads + kv_heads;
  const int wanted =
      (heads + HeadShares(token_groups, heads) - 1) / HeadShares(token_groups, heads);
  PrefillGrid grid;
  grid.heads_per_share = (wanted + kHeadBatch - 1) / kHeadBatch * kHeadBatch;
  grid.head_shares = (heads + grid.heads_per_share - 1) / grid.heads_per_share;
  grid.stream_ctas = token_groups * grid.head_shares;
  const int64_t value_ctas = NumTileSlots(num_tokens, rope.rows.batch, kBlockSize, 2) * kv_heads;
  StepPrefillKernel<Traits>
      <<<static_cast<unsigned>(grid.stream_ctas + value_ctas), kPrefillThreads, 0, stream>>>(p,
                                                                                             grid);
}

template <DType kIn, CacheType kType, DType kCode>
cudaError_t LaunchStepVariant(const StepParams& p, cudaStream_t stream) {
  dispatch<64, 128>(p.rope.cache.head_dim, "head_dim", [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    if constexpr (kIn != DType::kFloat32) {  // qkv is never fp32
      if (p.rope.num_heads > 0) {
        LaunchStep<StepTraits<kIn, kType, kCode, kHeadDim, true>>(p, stream);
        return;
      }
    }
    LaunchStep<StepTraits<kIn, kType, kCode, kHeadDim, false>>(p, stream);
  });
  return cudaGetLastError();
}

}  // namespace fastattn::cuda

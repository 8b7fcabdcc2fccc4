// Launch of one variant: which of the two kernels, and its grid.
#pragma once

#include "common/dispatch.h"
#include "cuda/rope_write/policy.h"
#include "cuda/rope_write/prefill_kernel.cuh"
#include "cuda/rope_write/token_kernel.cuh"

namespace fastattn::cuda {

template <DType kIn, CacheType kType, DType kCode>
cudaError_t LaunchStepVariant(const StepParams& p, cudaStream_t stream) {
  const RopeWriteCacheParams& rope = p.rope;
  const int kv_heads = rope.cache.num_kv_heads;
  cudaError_t status = cudaSuccess;
  dispatch<64, 128>(rope.cache.head_dim, "head_dim", [&](auto head_dim) {
    using Traits = StepTraits<kIn, kType, kCode, decltype(head_dim)::value>;
    if (UseTokenKernel(rope.rows.num_tokens, rope.rows.batch)) {
      constexpr int kHeads = kTokenThreads / Traits::kLanes;
      const int heads = rope.num_heads + 2 * kv_heads;
      const dim3 grid((heads + kHeads - 1) / kHeads, rope.rows.num_tokens);
      StepTokenKernel<Traits><<<grid, kTokenThreads, 0, stream>>>(p);
    } else {
      constexpr int kTokens = kPrefillThreads / Traits::kLanes;
      const int heads = rope.num_heads + kv_heads;
      PrefillGrid grid;
      grid.head_shares = HeadShares(rope.rows.num_tokens / kTokens + 1, heads);
      grid.heads_per_share = heads / grid.head_shares;
      grid.heads_per_share += (grid.heads_per_share * grid.head_shares < heads);
      grid.heads_per_share = (grid.heads_per_share + kHeadBatch - 1) / kHeadBatch * kHeadBatch;
      grid.head_shares = (heads + grid.heads_per_share - 1) / grid.heads_per_share;
      grid.stream_ctas = (rope.rows.num_tokens + kTokens - 1) / kTokens * grid.head_shares;
      const int64_t value_ctas =
          NumTileSlots(rope.rows.num_tokens, rope.rows.batch, kBlockSize, 2) * kv_heads;
      StepPrefillKernel<Traits>
          <<<static_cast<unsigned>(grid.stream_ctas + value_ctas), kPrefillThreads, 0, stream>>>(
              p, grid);
    }
    status = cudaGetLastError();
  });
  return status;
}

}  // namespace fastattn::cuda

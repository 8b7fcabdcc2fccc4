// Launch of one variant: which of the kernels, and its grid.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/dispatch.h"
#include "cuda/cache/rope_write/decode_kernel.cuh"
#include "cuda/cache/rope_write/policy.h"
#include "cuda/cache/rope_write/prefill_kernel.cuh"
#include "cuda/cache/rope_write/stream_kernel.cuh"
#include "cuda/cache/rope_write/token_kernel.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"

namespace fastattn::cuda {

// Whether nothing but a rotation of whole heads is asked for, which has kernels of its own.
inline bool OnlyRotates(const RopeWriteCacheParams& p) {
  if (p.bias != nullptr || p.q_norm_weight != nullptr || p.k_norm_weight != nullptr) return false;
  if (p.style == RotaryStyle::kNone) return true;
  return p.rotary_dim == p.cache.head_dim && p.rotary_step == 1 && p.rotary_stride % 4 == 0 &&
         (reinterpret_cast<uintptr_t>(p.cos) | reinterpret_cast<uintptr_t>(p.sin)) % 16 == 0;
}

template <typename Traits>
cudaError_t LaunchDecode(const StepParams& p, cudaStream_t stream) {
  using Lane = DecodeLane<Traits>;
  const SeqMeta& seqs = p.rope.seqs;
  const int kv_units = CeilDiv(p.rope.cache.num_kv_heads, Lane::kHeads);
  const int units = CeilDiv(p.rope.num_heads, Lane::kHeads) + 2 * kv_units;
  const bool small = static_cast<int64_t>(units) * seqs.num_tokens <= kSmallGrid;
  const int more = small && Traits::kQuantized ? (kValueParts - 1) * kv_units : 0;
  const float rows_per_token = static_cast<float>(seqs.batch) / static_cast<float>(seqs.num_tokens);
  return LaunchPdl(StepDecodeKernel<Traits>, dim3(units + more, seqs.num_tokens),
                   dim3(kDecodeThreads), stream, p, rows_per_token, small);
}

// Prompts: rope_write_cache_kv.
template <typename Traits>
cudaError_t LaunchStream(const StepParams& p, cudaStream_t stream) {
  using Lane = StreamLane<Traits>;
  const SeqMeta& seqs = p.rope.seqs;
  const int kv_heads = p.rope.cache.num_kv_heads;
  const int token_groups = CeilDiv(seqs.num_tokens, kStreamThreads / 32);
  const int steps = CeilDiv(p.rope.num_heads, Lane::kHeads) + CeilDiv(kv_heads, Lane::kHeads);
  const int64_t slots = NumTileSlots(seqs.num_tokens, seqs.batch, kBlockSize, 2);
  StreamGrid grid;
  grid.steps_per_share = CeilDiv(steps, HeadShares(token_groups, steps, kStreamCtasWanted));
  grid.shares = CeilDiv(steps, grid.steps_per_share);
  grid.stream_ctas = token_groups * grid.shares;
  grid.rows_per_token = static_cast<float>(seqs.batch) / static_cast<float>(seqs.num_tokens);
  grid.rows_per_tile = static_cast<float>(seqs.batch) / static_cast<float>(slots);
  const unsigned ctas = GridSize(grid.stream_ctas + slots * kv_heads);
  return LaunchPdl(StepStreamKernel<Traits>, dim3(ctas), dim3(kStreamThreads), stream, p, grid);
}

// Prompts: write_cache_kv.
template <typename Traits>
cudaError_t LaunchTiles(const StepParams& p, cudaStream_t stream) {
  const SeqMeta& seqs = p.rope.seqs;
  const int kv_heads = p.rope.cache.num_kv_heads;
  const auto slots = static_cast<int>(NumTileSlots(seqs.num_tokens, seqs.batch, kBlockSize, 2));
  const bool split = slots <= kSmallGrid / kv_heads;
  const dim3 grid(kv_heads, std::min(slots, kTileRun), CeilDiv(slots, kTileRun) * (split ? 2 : 1));
  const float rows_per_tile = static_cast<float>(seqs.batch) / static_cast<float>(slots);
  return LaunchPdl(StepTileKernel<Traits>, grid, dim3(kStreamThreads), stream, p, rows_per_tile,
                   split);
}

template <typename Traits>
cudaError_t LaunchSimpleStep(const StepParams& p, cudaStream_t stream) {
  if (UseDecodeKernel(p.rope.seqs.num_tokens, p.rope.seqs.batch)) {
    return LaunchDecode<Traits>(p, stream);
  }
  if constexpr (Traits::kRope) {
    return LaunchStream<Traits>(p, stream);
  } else {
    return LaunchTiles<Traits>(p, stream);
  }
}

// Whatever is asked for.
template <typename Traits>
cudaError_t LaunchGeneralStep(const StepParams& p, cudaStream_t stream) {
  const RopeWriteCacheParams& rope = p.rope;
  const int kv_heads = rope.cache.num_kv_heads;
  const int num_tokens = rope.seqs.num_tokens;
  if (UseTokenKernel(num_tokens, rope.seqs.batch)) {
    constexpr int kGroups = kTokenThreads / Traits::kLanes;
    const int heads = rope.num_heads + 2 * kv_heads;
    const int share = HeadsPerGroup(num_tokens, heads, kGroups, kTokenHeadsMax);
    const dim3 grid(CeilDiv(heads, kGroups * share), num_tokens);
    return LaunchKernel(StepTokenKernel<Traits>, grid, kTokenThreads, stream, p, share);
  }
  constexpr int kTokens = kPrefillThreads / Traits::kLanes;
  const int token_groups = CeilDiv(num_tokens, kTokens);
  const int heads = rope.num_heads + kv_heads;
  const int wanted = CeilDiv(heads, HeadShares(token_groups, heads));
  PrefillGrid grid;
  grid.heads_per_share = CeilDiv(wanted, kHeadBatch) * kHeadBatch;
  grid.head_shares = CeilDiv(heads, grid.heads_per_share);
  grid.stream_ctas = token_groups * grid.head_shares;
  const int64_t value_ctas = NumTileSlots(num_tokens, rope.seqs.batch, kBlockSize, 2) * kv_heads;
  return LaunchKernel(StepPrefillKernel<Traits>, GridSize(grid.stream_ctas + value_ctas),
                      kPrefillThreads, stream, p, grid);
}

template <DType kIn, CacheType kType, DType kCode>
cudaError_t LaunchStepVariant(const StepParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  dispatch<64, 128>(p.rope.cache.head_dim, "head_dim", [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    using Write = StepTraits<kIn, kType, kCode, kHeadDim, false>;
    using Rope = StepTraits<kIn, kType, kCode, kHeadDim, true>;
    if constexpr (kIn == DType::kFloat32) {  // qkv is never fp32
      status = LaunchGeneralStep<Write>(p, stream);
    } else if (p.rope.num_heads == 0) {
      status = LaunchSimpleStep<Write>(p, stream);
    } else if (OnlyRotates(p.rope)) {
      status = LaunchSimpleStep<Rope>(p, stream);
    } else {
      status = LaunchGeneralStep<Rope>(p, stream);
    }
  });
  return status;
}

}  // namespace fastattn::cuda

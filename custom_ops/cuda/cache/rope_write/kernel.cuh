// Launch of one variant: which of the kernels, and its grid.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/head_dims.h"
#include "cuda/cache/rope_write/decode_kernel.cuh"
#include "cuda/cache/rope_write/stream_kernel.cuh"
#include "cuda/cache/rope_write/tile_kernel.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "plan/rope_write.h"

namespace fastattn::cuda {

template <typename Traits>
cudaError_t LaunchDecode(const StepParamsOf<Traits>& p, cudaStream_t stream) {
  using Lane = DecodeLane<Traits>;
  const SeqMeta& seqs = p.rope.seqs;
  const int kv_heads = p.rope.cache.num_kv_heads;
  const int v_groups = CeilDiv(kv_heads, DecodeLane<typename Traits::Value>::kHeads);
  const int groups =
      CeilDiv(p.rope.num_heads, Lane::kHeads) + CeilDiv(kv_heads, Lane::kHeads) + v_groups;
  const bool small = static_cast<int64_t>(groups) * seqs.num_tokens <= kSmallGrid;
  const int more = small && Traits::kQuantized ? (kValueShares - 1) * v_groups : 0;
  const float seqs_per_token = static_cast<float>(seqs.batch) / static_cast<float>(seqs.num_tokens);
  if constexpr (kTakesFeedback<Traits>) {
    if (p.transform.feedback != nullptr) {
      return LaunchPdl(StepDecodeKernel<Traits, false, true>, dim3(groups + more, seqs.num_tokens),
                       dim3(kDecodeThreads), stream, p, seqs_per_token, small);
    }
  }
  if constexpr (kTakesTogether<Traits>) {
    const int tokens = TokensTogether(seqs.num_tokens, seqs.batch);
    if (tokens > 1) {
      const dim3 grid(groups + more, CeilDiv(seqs.num_tokens, tokens));
      return LaunchPdl(StepDecodeKernel<Traits, true>, grid, dim3(kDecodeThreads, tokens), stream,
                       p, seqs_per_token, small);
    }
  }
  return LaunchPdl(StepDecodeKernel<Traits, false>, dim3(groups + more, seqs.num_tokens),
                   dim3(kDecodeThreads), stream, p, seqs_per_token, small);
}

// Steps of any size with a block table for each KV head: the kernel of decode steps, a token at a
// time, with the options that fit all.
template <typename Traits>
cudaError_t LaunchHeadTables(const StepParamsOf<Traits>& p, cudaStream_t stream) {
  using Lane = DecodeLane<Traits>;
  const SeqMeta& seqs = p.rope.seqs;
  const int kv_heads = p.rope.cache.num_kv_heads;
  const int groups = CeilDiv(p.rope.num_heads, Lane::kHeads) + CeilDiv(kv_heads, Lane::kHeads) +
                     CeilDiv(kv_heads, DecodeLane<typename Traits::Value>::kHeads);
  const float seqs_per_token = static_cast<float>(seqs.batch) / static_cast<float>(seqs.num_tokens);
  return LaunchPdl(StepDecodeKernel<Traits, false, kTakesFeedback<Traits>, true>,
                   dim3(groups, seqs.num_tokens), dim3(kDecodeThreads), stream, p, seqs_per_token,
                   false);
}

// Prompts: rope_write_cache_kv.
template <typename Traits>
cudaError_t LaunchStream(const StepParamsOf<Traits>& p, cudaStream_t stream) {
  using Lane = StreamLane<Traits>;
  const int kv_heads = p.rope.cache.num_kv_heads;
  const int steps = CeilDiv(p.rope.num_heads, Lane::kHeads) + CeilDiv(kv_heads, Lane::kHeads);
  const StreamGrid grid = MakeStreamGrid(p.rope.seqs, steps, kv_heads);
  return LaunchPdl(StepStreamKernel<Traits>, dim3(GridSize(grid.ctas)), dim3(kStreamThreads),
                   stream, p, grid);
}

// Prompts: write_cache_kv.
template <typename Traits>
cudaError_t LaunchTiles(const StepParamsOf<Traits>& p, cudaStream_t stream) {
  const SeqMeta& seqs = p.rope.seqs;
  const int kv_heads = p.rope.cache.num_kv_heads;
  const auto slots = static_cast<int>(NumTileSlots(seqs.num_tokens, seqs.batch, kBlockSize, 2));
  const bool split = Traits::kOwnValue || slots <= kSmallGrid / kv_heads;
  const dim3 grid(kv_heads, std::min(slots, kTileRun), CeilDiv(slots, kTileRun) * (split ? 2 : 1));
  const float seqs_per_tile = static_cast<float>(seqs.batch) / static_cast<float>(slots);
  return LaunchPdl(StepTileKernel<Traits>, grid, dim3(kStreamThreads), stream, p, seqs_per_tile,
                   split);
}

template <typename Traits>
cudaError_t LaunchStep(const StepParamsOf<Traits>& p, cudaStream_t stream) {
  if (UseDecodeKernel(p.rope.seqs.num_tokens, p.rope.seqs.batch)) {
    return LaunchDecode<Traits>(p, stream);
  }
  if constexpr (Traits::kRope) {
    return LaunchStream<Traits>(p, stream);
  } else {
    return LaunchTiles<Traits>(p, stream);
  }
}

template <DType kIn, Scales kScales, DType kCode, DType kValueCode, bool kTransformsKey>
cudaError_t LaunchStepVariant(const TransformStepParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  AttentionHeadDims::Dispatch(p.rope.cache.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    // qkv is never fp32, and its heads are of one size.
    if constexpr (kIn != DType::kFloat32 && HeadDims::Has(kHeadDim)) {
      if (p.rope.num_heads > 0 && p.rope.seqs.head_tables) {
        using Traits = StepTraits<kIn, kScales, kCode, kHeadDim, RopeOptions<true, true, true>,
                                  kTransformsKey, kValueCode>;
        status = LaunchHeadTables<Traits>(p, stream);
        return;
      }
      if (p.rope.num_heads > 0) {
        const auto launch = [&](auto options) {
          using Traits = StepTraits<kIn, kScales, kCode, kHeadDim, decltype(options),
                                    kTransformsKey, kValueCode>;
          status = LaunchStep<Traits>(p, stream);
        };
        if constexpr (kTransformsKey) {
          DispatchTransformRope<kHeadDim>(p.rope, launch);
        } else {
          DispatchRope<kHeadDim>(p.rope, launch);
        }
        return;
      }
    }
    using Traits = StepTraits<kIn, kScales, kCode, kHeadDim, NoRope, kTransformsKey, kValueCode>;
    status = p.rope.seqs.head_tables ? LaunchHeadTables<Traits>(p, stream)
                                     : LaunchStep<Traits>(p, stream);
  });
  return status;
}

}  // namespace fastattn::cuda

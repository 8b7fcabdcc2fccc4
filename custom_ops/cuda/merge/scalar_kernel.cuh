// Merge for any D, alignment, stride and group of channels, one value at a time.
//
// One CTA takes a span of whole heads of a token: one head, or for dynamic FP8 as many as hold
// whole groups. Groups are read twice, the second time from cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/numeric.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/merge/shared/merge_weights.h"
#include "params/merge.h"
#include "params/quantize.h"

namespace fastattn::cuda {

inline constexpr int kScalarMergeThreads = 128;

__device__ __forceinline__ MergeWeights WeightsAt(const MergeParams& p, int64_t token,
                                                  int64_t head) {
  const float prefix_lse =
      token < p.merged_tokens
          ? p.prefix_lse[head * p.prefix_lse_head_stride + token * p.prefix_lse_token_stride]
          : -INFINITY;
  return WeightsOfSides(
      prefix_lse,
      p.suffix_lse[head * p.suffix_lse_head_stride + token * p.suffix_lse_token_stride]);
}

template <DType kIn>
__device__ __forceinline__ float LoadSide(const void* side, int64_t index, bool use) {
  return use ? Element<kIn>::Load(static_cast<const typename Element<kIn>::Storage*>(side)[index])
             : 0.0f;
}

// Calls f(element of the output, merged value) for the channels [begin, end) of a token's H * D,
// which lie in `first_head` or later. All threads of the CTA share them.
template <DType kIn, typename F>
__device__ __forceinline__ void ForChannels(const MergeParams& p, int64_t token, int64_t first_head,
                                            int64_t begin, int64_t end, F&& f) {
  for (int64_t head = first_head; head * p.head_dim < end; ++head) {
    const int64_t first = head * p.head_dim;
    if (first + p.head_dim <= begin) continue;
    const MergeWeights w = WeightsAt(p, token, head);
    const int64_t from = begin > first ? begin - first : 0;
    const int64_t to = end - first < p.head_dim ? end - first : p.head_dim;
    const int64_t prefix = token * p.prefix_token_stride + head * p.prefix_head_stride;
    const int64_t suffix = token * p.suffix_token_stride + head * p.suffix_head_stride;
    const int64_t output = token * p.output_token_stride + head * p.output_head_stride;
#pragma unroll 1  // a few channels a thread
    for (int64_t d = from + threadIdx.x; d < to; d += kScalarMergeThreads) {
      const float a = LoadSide<kIn>(p.prefix_output, prefix + d, w.use_prefix);
      const float b = LoadSide<kIn>(p.suffix_output, suffix + d, w.use_suffix);
      f(output + d, MergeValues(a, b, w));
    }
  }
}

// Maximum over the CTA, in all threads.
__device__ __forceinline__ uint32_t CtaMax(uint32_t x) {
  constexpr int kWarps = kScalarMergeThreads / 32;
  __shared__ uint32_t warps[kWarps];
  for (int lanes = 1; lanes < 32; lanes *= 2) x = max(x, __shfl_xor_sync(kFullWarp, x, lanes));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) x = max(x, warps[i]);
  __syncthreads();  // before the next call writes
  return x;
}

__device__ __forceinline__ uint8_t CodeOf(float x) {
  return static_cast<uint8_t>(PackCodes<DType::kE4M3>(x, 0.0f, 0.0f, 0.0f));
}

// The heads [first, first + heads) of a token.
template <DType kIn, MergeOutput kOutput>
__device__ __forceinline__ void MergeSpan(const MergeParams& p, int64_t token, int64_t first,
                                          int64_t heads) {
  const int64_t begin = first * p.head_dim, end = begin + heads * p.head_dim;
  if constexpr (IsValues(kOutput)) {
    using E = Element<StoredType(kOutput, kIn)>;
    auto* output = static_cast<typename E::Storage*>(p.output);
    ForChannels<kIn>(p, token, first, begin, end,
                     [&](int64_t at, float x) { output[at] = E::Store(x); });
  } else {
    auto* output = static_cast<uint8_t*>(p.output);
    const int64_t size = kOutput == MergeOutput::kDynamicFp8 ? p.group_size : end - begin;
    for (int64_t group = begin; group < end; group += size) {
      float scale;
      if constexpr (kOutput == MergeOutput::kDynamicFp8) {
        uint32_t amax = 0;
        ForChannels<kIn>(p, token, first, group, group + size,
                         [&](int64_t, float x) { amax = max(amax, AbsBits(x)); });
        scale = DynamicScale(CtaMax(amax), kActivationAmaxFloor, kE4M3Max);
        if (threadIdx.x == 0) {
          p.output_scales[token * p.output_scales_token_stride + group / size] = scale;
        }
      } else {
        scale = __ldg(p.output_scale);
      }
      const float inverse = Div(1.0f, scale);
      ForChannels<kIn>(p, token, first, group, group + size,
                       [&](int64_t at, float x) { output[at] = CodeOf(Mul(x, inverse)); });
    }
  }
}

template <DType kIn, MergeOutput kOutput>
__global__ void __launch_bounds__(kScalarMergeThreads)
    MergeScalarKernel(const __grid_constant__ MergeParams p, int64_t heads_per_span) {
  for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
    for (int64_t first = blockIdx.y * heads_per_span; first < p.num_heads;
         first += gridDim.y * heads_per_span) {
      const int64_t left = p.num_heads - first;
      const int64_t heads = heads_per_span < left ? heads_per_span : left;
      if (p.head_dim > 0) MergeSpan<kIn, kOutput>(p, token, first, heads);
      // All threads have read the span's LSEs before one of them writes, maybe over them.
      __syncthreads();
      for (int64_t head = first + threadIdx.x; head < first + heads; head += kScalarMergeThreads) {
        p.output_lse[head * p.output_lse_head_stride + token * p.output_lse_token_stride] =
            MergedLse(WeightsAt(p, token, head));
      }
    }
  }
}

}  // namespace fastattn::cuda

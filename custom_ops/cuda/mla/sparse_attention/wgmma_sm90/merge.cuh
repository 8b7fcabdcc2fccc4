// Merges the splits of sparse latent attention.
#pragma once

#include <cstdint>

#include "common/normaliser.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/exp2.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/variant.h"
#include "plan/mla_sparse_attention.h"

namespace fastattn::cuda::mla_sparse_sm90 {

inline constexpr int kMergeThreads = kMlaValueDim / 4;
inline constexpr int kMaxSplits = kMlaSparseMaxSplits;
inline constexpr int kBatch = 16;  // splits in flight

// A CTA merges one head of a token; a thread has four channels.
static __global__ void __launch_bounds__(kMergeThreads)
    MergeKernel(const __grid_constant__ Arguments args) {
  __shared__ float lses[kMaxSplits];
  PdlWait();
  PdlLaunchDependents();
  const MlaSparseParams& p = args.p;
  const int64_t at = blockIdx.x, rows = p.tokens * p.heads;
  const int splits = static_cast<int>(args.splits), lane = threadIdx.x % 32;
  const float* partial = args.partial + at * kMlaValueDim + 4 * threadIdx.x;
  float4 x[kBatch];
  const auto load = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (begin + i < splits) {
        x[i] = __ldcs(reinterpret_cast<const float4*>(partial + (begin + i) * rows * kMlaValueDim));
      }
    }
  };
  load(0);
  float maximum = -INFINITY;
  for (int i = lane; i < splits; i += 32) {
    const float lse = args.partial_lse[i * rows + at];
    if (threadIdx.x < 32) lses[i] = lse;
    maximum = fmaxf(maximum, lse);
  }
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, i));
  }
  __syncthreads();
  const float shift = maximum == -INFINITY ? 0.0f : maximum;
  float sum = 0.0f, out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int begin = 0; begin < splits; begin += kBatch) {
    if (begin > 0) load(begin);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (begin + i >= splits) break;
      const float weight = Exp2(lses[begin + i] - shift);
      sum += weight;
      out[0] += weight * x[i].x;
      out[1] += weight * x[i].y;
      out[2] += weight * x[i].z;
      out[3] += weight * x[i].w;
    }
  }
  const bool lonely = sum == 0.0f;
  if (threadIdx.x == 0 && p.lse != nullptr) {
    const unsigned token = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
    p.lse[p.StatisticAt(token, head)] = lonely ? p.LonelyLse() : shift * kLn2 + logf(sum);
  }
  if (p.sinks != nullptr) sum += Exp2(p.sinks[at % p.heads] * kLog2E - shift);
  const float factor = lonely ? 0.0f : 1.0f / sum;
  if (p.out_float != nullptr) {
    *reinterpret_cast<float4*>(p.out_float + at * kMlaValueDim + 4 * threadIdx.x) =
        make_float4(out[0] * factor, out[1] * factor, out[2] * factor, out[3] * factor);
    return;
  }
  uint2 pairs;
  pairs.x = PackPair<DType::kBFloat16>(out[0] * factor, out[1] * factor);
  pairs.y = PackPair<DType::kBFloat16>(out[2] * factor, out[3] * factor);
  *reinterpret_cast<uint2*>(p.out + at * kMlaValueDim + 4 * threadIdx.x) = pairs;
}

}  // namespace fastattn::cuda::mla_sparse_sm90

// Joins the splits of sparse latent attention.
#pragma once

#include <cstdint>

#include "cuda/common/convert.cuh"
#include "cuda/common/exp2.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/mla/attention/wgmma_sm90/work.cuh"

namespace fastattn::cuda::mla_sm90 {

inline constexpr int kCombineThreads = kMlaValueDim / 4;
inline constexpr int kMaxSplits = 64;

// A CTA joins one head of a token; a thread has four channels.
static __global__ void __launch_bounds__(kCombineThreads)
    CombineKernel(const __grid_constant__ Arguments args) {
  static_assert(kMaxSplits <= kCombineThreads);
  __shared__ float lses[kMaxSplits];
  PdlWait();
  PdlLaunchDependents();
  const MlaSparseParams& p = args.p;
  const int64_t at = blockIdx.x, rows = p.tokens * p.heads;
  if (threadIdx.x < args.splits) lses[threadIdx.x] = args.partial_lse[threadIdx.x * rows + at];
  __syncthreads();
  float maximum = -INFINITY;
  for (unsigned i = 0; i < args.splits; ++i) maximum = fmaxf(maximum, lses[i]);
  const float shift = maximum == -INFINITY ? 0.0f : maximum;
  float sum = 0.0f, out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const float* partial = args.partial + at * kMlaValueDim + 4 * threadIdx.x;
#pragma unroll 8
  for (unsigned i = 0; i < args.splits; ++i) {
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    // Without a key, a split wrote no output.
    if (lses[i] != -INFINITY) {
      x = __ldcs(reinterpret_cast<const float4*>(partial + i * rows * kMlaValueDim));
    }
    const float weight = Exp2(lses[i] - shift);
    sum += weight;
    out[0] += weight * x.x;
    out[1] += weight * x.y;
    out[2] += weight * x.z;
    out[3] += weight * x.w;
  }
  const bool lonely = sum == 0.0f;
  if (threadIdx.x == 0 && p.lse != nullptr) {
    p.lse[at] = lonely ? -INFINITY : shift * kLn2 + logf(sum);
  }
  if (p.sinks != nullptr) sum += Exp2(p.sinks[at % p.heads] * kLog2E - shift);
  const float factor = lonely ? 0.0f : 1.0f / sum;
  uint2 pairs;
  pairs.x = PackPair<DType::kBFloat16>(out[0] * factor, out[1] * factor);
  pairs.y = PackPair<DType::kBFloat16>(out[2] * factor, out[3] * factor);
  *reinterpret_cast<uint2*>(p.out + at * kMlaValueDim + 4 * threadIdx.x) = pairs;
}

}  // namespace fastattn::cuda::mla_sm90

// What all kernels do with a finished row.
#pragma once

#include "common/normaliser.h"
#include "cuda/common/convert.cuh"
#include "params/mla_attention.h"

namespace fastattn::cuda::mla_attention {

__device__ __forceinline__ Normaliser FinishRow(const MlaAttentionParams& p, float maximum,
                                                float sum, int head) {
  return NormaliserWithoutSink(maximum, sum, p.sinks, [&] { return __ldg(p.sinks + head); });
}

__device__ __forceinline__ void StoreLse(const MlaAttentionParams& p, int64_t token, int head,
                                         float lse) {
  if (p.lse != nullptr) p.lse[int64_t{head} * p.seqs.num_tokens + token] = lse;
}

// Four channels of the output from `at` on.
__device__ __forceinline__ void StoreFour(const MlaAttentionParams& p, int64_t at, const float4& x,
                                          float factor) {
  const float4 y = make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
  if (p.out_float != nullptr) {
    *reinterpret_cast<float4*>(p.out_float + at) = y;
  } else {
    constexpr DType kOut = DType::kBFloat16;
    *reinterpret_cast<uint2*>(p.out + at) =
        make_uint2(PackPair<kOut>(y.x, y.y), PackPair<kOut>(y.z, y.w));
  }
}

}  // namespace fastattn::cuda::mla_attention

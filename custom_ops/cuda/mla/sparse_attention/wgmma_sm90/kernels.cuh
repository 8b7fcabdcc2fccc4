// Launches of both kernels of sparse latent attention.
#pragma once

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/narrow_kernel.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/wide_kernel.cuh"

namespace fastattn::cuda::mla_sparse_sm90 {

template <auto kKernel, int kThreads, class Shared, int kCluster = 1>
cudaError_t LaunchPersistent(const Arguments& args, cudaStream_t stream) {
  static_assert(sizeof(Shared) <= 227 * 1024);
  DeviceFacts facts;
  const cudaError_t status = AllowShared<kKernel>(sizeof(Shared), &facts);
  if (status != cudaSuccess) return status;
  const unsigned places = facts.processors / kCluster * kCluster;
  const unsigned grid = std::min(args.work_tiles, places);
  return LaunchPdlInClusters(kKernel, dim3(grid), dim3(kThreads), kCluster, sizeof(Shared), stream,
                             args);
}

template <MlaFormat kFormat, int kDim, int kHeads>
cudaError_t LaunchVariant(const Arguments& args, cudaStream_t stream) {
  if constexpr (kHeads < kWideHeads) {
    return LaunchPersistent<NarrowKernel<kDim, kFormat, kHeads>, kNarrowThreads<kFormat>,
                            NarrowShared<kDim, kFormat, kHeads>>(args, stream);
  } else {
    if constexpr (kFormat == MlaFormat::kFp8x656) {
      if (args.pairs) {
        return LaunchPersistent<WidePairKernel<kDim, kFormat>, kWideThreads,
                                WideShared<kDim, kFormat>, 2>(args, stream);
      }
    }
    return LaunchPersistent<WideKernel<kDim, kFormat>, kWideThreads, WideShared<kDim, kFormat>>(
        args, stream);
  }
}

}  // namespace fastattn::cuda::mla_sparse_sm90

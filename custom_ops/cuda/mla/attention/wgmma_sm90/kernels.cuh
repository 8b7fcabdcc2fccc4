// Launches of both kernels of sparse latent attention.
#pragma once

#include <algorithm>

#include "cuda/common/device_facts.h"
#include "cuda/mla/attention/wgmma_sm90/narrow_kernel.cuh"
#include "cuda/mla/attention/wgmma_sm90/wide_kernel.cuh"

namespace fastattn::cuda::mla_sm90 {

template <auto kKernel, int kThreads, class Shared, int kCluster = 1>
cudaError_t LaunchPersistent(const Arguments& args, cudaStream_t stream) {
  static_assert(sizeof(Shared) <= 227 * 1024);
  int device = 0;
  DeviceFacts facts;
  cudaError_t status = GetCurrentDevice(&device, &facts);
  if (status != cudaSuccess) return status;
  static OncePerDevice once;
  status = once.Run(device, [] {
    return cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(sizeof(Shared)));
  });
  if (status != cudaSuccess) return status;
  const unsigned processors = static_cast<unsigned>(facts.processors) / kCluster * kCluster;
  const unsigned grid = std::min(args.work_tiles, processors);
  return LaunchPdlInClusters(kKernel, dim3(grid), dim3(kThreads), kCluster, sizeof(Shared), stream,
                             args);
}

template <MlaFormat kFormat, int kDim, int kHeads>
cudaError_t LaunchVariant(const Arguments& args, cudaStream_t stream) {
  if constexpr (kHeads < kWideHeads) {
    return LaunchPersistent<NarrowKernel<kDim, kFormat, kHeads>, kNarrowThreads,
                            NarrowShared<kDim, kHeads>>(args, stream);
  } else {
    constexpr int kCluster = kHeads / kWideHeads;
    return LaunchPersistent<WideKernel<kDim, kFormat, kCluster>, kWideThreads, WideShared<kDim>,
                            kCluster>(args, stream);
  }
}

}  // namespace fastattn::cuda::mla_sm90

// How both Hopper kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"

namespace fastattn::cuda::wgmma_sm90 {

// Launches a persistent CTA on each multiprocessor, or fewer where there are not as many work
// tiles, with programmatic dependent launch: the kernel waits for those before it. The kernel is a
// template argument because its attributes are set once, for each of them.
template <auto kKernel, class C, class Shared, class Arguments>
cudaError_t LaunchPersistent(const Arguments& arguments, cudaStream_t stream) {
  static_assert(sizeof(Shared) <= 227 * 1024);
  DeviceFacts facts;
  const cudaError_t status = AllowShared<kKernel>(sizeof(Shared), &facts);
  if (status != cudaSuccess) return status;
  const auto& p = arguments.p;
  const int64_t tiles =
      (static_cast<int64_t>(p.seqs.num_tokens) / C::kQueries + p.seqs.batch) * p.num_heads;
  const int grid = static_cast<int>(std::min<int64_t>(tiles, facts.processors));
  if (grid <= 0) return cudaSuccess;
  return LaunchPdlWithShared(kKernel, dim3(grid), dim3(C::kThreads), sizeof(Shared), stream,
                             arguments);
}

}  // namespace fastattn::cuda::wgmma_sm90

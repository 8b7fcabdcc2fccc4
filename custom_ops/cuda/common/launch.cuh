// Launches that return their own status.
//
// After kernel<<<...>>> only cudaGetLastError() has the status, and it reports whatever failed
// before in this thread too, somebody else's call included. cudaLaunchKernelEx returns the status
// of its launch; the error that it leaves behind is cleared, so that no later check reports it
// again.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/common/device_facts.h"

namespace fastattn::cuda {

// First dimension of a grid of `ctas`. The caller turns the exception into the operator's error.
inline unsigned GridSize(int64_t ctas) {
  if (ctas < 0 || ctas > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("too large a problem: " + std::to_string(ctas) +
                                " CTAs, a grid holds 2147483647");
  }
  return static_cast<unsigned>(ctas);
}

// Lets a kernel have up to `bytes` of dynamic shared memory, once on each device, and tells the
// current one's facts. The kernel is a template argument because that is done for each of them.
template <auto kKernel>
cudaError_t AllowShared(size_t bytes, DeviceFacts* facts) {
  int device = 0;
  const cudaError_t status = GetCurrentDevice(&device, facts);
  if (status != cudaSuccess) return status;
  static OncePerDevice once;
  return once.Run(device, [&] {
    return cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
  });
}

template <typename... Params>
cudaError_t LaunchKernel(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                         const Params&... params) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, params...);
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

}  // namespace fastattn::cuda

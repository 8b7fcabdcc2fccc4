// Launch of a kernel while the one before it in the stream still runs.
//
// For a kernel of a microsecond, launching takes as long as working. From SM90 on, a kernel may be
// set up, fetch its parameters and compute its addresses under the end of its predecessor, as long
// as it waits for that one's results before it touches memory.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/device_facts.h"

namespace fastattn::cuda {

// Every thread of a kernel that LaunchEarly launches calls this before its first access to global
// memory. Returns when all earlier kernels of the stream have ended and their writes can be seen.
__device__ __forceinline__ void WaitForEarlierKernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may be set up once every thread got here or ended. It waits in its turn, so order
// in the stream holds. Not before this kernel's own wait: a row of kernels would then pile up on
// the multiprocessors, each where its predecessors left room, and that is badly balanced.
__device__ __forceinline__ void AllowNextKernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Instead of WaitForEarlierKernels, for a kernel that may run beside its predecessor: one that uses
// nothing of it, and writes nothing that it reads or writes. All earlier kernels have ended: the
// predecessor allowed this one after its own wait, or began like this one. The fence drops what a
// multiprocessor still has in its L1 cache of bytes that they wrote.
__device__ __forceinline__ void BeginOverlappingPrevious() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __threadfence();
#endif
}

// Such a kernel ends with this: it then ends after its predecessor, and whoever waits for it waits
// for both. Only the CTA that starts last stays for that.
__device__ __forceinline__ void EndOverlappingPrevious() {
  if (blockIdx.x != gridDim.x - 1 || blockIdx.y != gridDim.y - 1) return;
  AllowNextKernel();
  WaitForEarlierKernels();
}

// kernel<<<grid, block, shared_bytes, stream>>>(params...) that may start early where the GPU can
// do that, and in clusters of CTAs, which need sm_90. (Binaries of this package run on their own
// major architecture only, so that the device's tells whether WaitForEarlierKernels was compiled to
// wait.)
template <typename... Params>
cudaError_t LaunchEarlyInClusters(void (*kernel)(Params...), dim3 grid, dim3 block, int cluster,
                                  size_t shared_bytes, cudaStream_t stream,
                                  const Params&... params) {
  int device = 0;
  DeviceFacts facts;
  const cudaError_t status = GetCurrentDevice(&device, &facts);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = facts.major < 9 ? 0 : cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

template <typename... Params>
cudaError_t LaunchEarlyWithShared(void (*kernel)(Params...), dim3 grid, dim3 block,
                                  size_t shared_bytes, cudaStream_t stream,
                                  const Params&... params) {
  return LaunchEarlyInClusters(kernel, grid, block, 1, shared_bytes, stream, params...);
}

template <typename... Params>
cudaError_t LaunchEarly(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                        const Params&... params) {
  return LaunchEarlyWithShared(kernel, grid, block, 0, stream, params...);
}

}  // namespace fastattn::cuda

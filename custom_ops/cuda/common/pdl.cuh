// Programmatic dependent launch (PDL): launch of a kernel while the one before it in the stream
// still runs.
//
// For a kernel of a microsecond, launching takes as long as working. From SM90 on, a kernel may be
// set up, fetch its parameters and compute its addresses under the end of its predecessor, as long
// as it waits for that one's results before it touches memory.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/device_facts.h"

namespace fastattn::cuda {

// griddepcontrol.wait: returns when all earlier kernels of the stream have ended and their writes
// can be seen. Every thread of a kernel that LaunchPdl launches calls it before its first access
// to global memory.
__device__ __forceinline__ void PdlWait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// griddepcontrol.launch_dependents: the next kernel may be set up once every thread got here or
// ended. That kernel waits in turn, so that order in the stream holds. A kernel calls it behind its
// own wait only: else several kernels would pile up on the multiprocessors, each where its
// predecessors left room, which balances badly.
__device__ __forceinline__ void PdlLaunchDependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// A kernel that is independent of its predecessor (it uses nothing of it, and writes nothing that
// it reads or writes) calls this instead of PdlWait, and runs concurrently with it.
// All kernels before those two have ended: the predecessor launched its dependents after its own
// wait, or began like this one. The fence drops what a multiprocessor still has in its L1 cache of
// bytes that they wrote.
__device__ __forceinline__ void PdlBeginConcurrent() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __threadfence();
#endif
}

// Such a kernel ends with this call, which makes it end after its predecessor, so that whoever
// waits for it waits for both. Only the CTA that starts last stays for that.
__device__ __forceinline__ void PdlEndConcurrent() {
  if (blockIdx.x != gridDim.x - 1 || blockIdx.y != gridDim.y - 1) return;
  PdlLaunchDependents();
  PdlWait();
}

// kernel<<<grid, block, shared_bytes, stream>>>(params...) with PDL where the GPU can do that, and
// in clusters of CTAs, which need sm_90. Binaries of this package run on their own major
// architecture only, so that the device's tells whether PdlWait was compiled to wait.
template <typename... Params>
cudaError_t LaunchPdlInClusters(void (*kernel)(Params...), dim3 grid, dim3 block, int cluster,
                                size_t shared_bytes, cudaStream_t stream, const Params&... params) {
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
cudaError_t LaunchPdlWithShared(void (*kernel)(Params...), dim3 grid, dim3 block,
                                size_t shared_bytes, cudaStream_t stream, const Params&... params) {
  return LaunchPdlInClusters(kernel, grid, block, 1, shared_bytes, stream, params...);
}

template <typename... Params>
cudaError_t LaunchPdl(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream,
                      const Params&... params) {
  return LaunchPdlWithShared(kernel, grid, block, 0, stream, params...);
}

}  // namespace fastattn::cuda

// The set-up that both Hopper kernels have in common: a persistent CTA of three warpgroups, of
// which the first is the producer (warp 0 loads, the others help) and the other two consume.
#pragma once

#include "cuda/common/pdl.cuh"
#include "cuda/common/tma.cuh"

namespace fastattn::cuda::wgmma_sm90 {

// Ends the set-up of shared memory, and waits for the kernels before this one.
__device__ __forceinline__ void BeginRoles() {
  __syncthreads();
  PdlWait();
  PdlLaunchDependents();  // the next kernel takes the multiprocessors that this one leaves
}

template <class Arguments>
__device__ __forceinline__ void PrefetchMaps(const Arguments& arguments) {
  if (threadIdx.x == 0) {
    PrefetchMap(&arguments.query);
    PrefetchMap(&arguments.key);
    PrefetchMap(&arguments.value);
  }
  __syncwarp();
}

}  // namespace fastattn::cuda::wgmma_sm90

// Where a warp is in a pipeline of kStages buffers: the stage, and the phase of its barriers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastattn::cuda::wgmma_sm90 {

template <int kStages>
struct PipelineState {
  int index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void Advance() {
    if (++index == kStages) {
      index = 0;
      phase ^= 1;
    }
  }
};

// The same as one number, where registers are short.
template <int kStages>
struct PackedPipelineState {
  int count = 0;  // modulo two rounds
  __device__ __forceinline__ int Index() const { return count < kStages ? count : count - kStages; }
  __device__ __forceinline__ uint32_t Phase() const { return count < kStages ? 0 : 1; }
  __device__ __forceinline__ void Advance() { count = count + 1 == 2 * kStages ? 0 : count + 1; }
};

}  // namespace fastattn::cuda::wgmma_sm90

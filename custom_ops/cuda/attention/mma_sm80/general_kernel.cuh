// The attention kernel of calls whose queries have holes in what they see (row_holes.cuh), or
// whose KV heads have block tables of their own. It is the kernel of kernel.cuh, compiled apart so
// that other calls pay nothing for it.
#pragma once

#include "cuda/attention/mma_sm80/kernel.cuh"

namespace fastattn::cuda {

template <DType kElement, DType kValue, int kHeadDim, Scales kScales, int kTileRows>
cudaError_t LaunchGeneralVariant(const AttentionParams& p, const AttentionTask& task, int grid,
                                 cudaStream_t stream) {
  using Traits = AttentionTraits<kElement, kHeadDim, true, kScales, kTileRows, false, true, kValue>;
  return LaunchKernel<Traits>(p, task, grid, stream);
}

}  // namespace fastattn::cuda

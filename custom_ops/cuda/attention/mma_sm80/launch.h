// Launches of the kernels of this folder, over some sequences of a call.
#pragma once

#include <cuda_runtime.h>

#include "common/types.h"
#include "cuda/attention/split_kv/shared/task.h"
#include "params/attention.h"

namespace fastattn::cuda {

// kElement: of K, and kValue: of V.
template <DType kElement, DType kValue, int kHeadDim, bool kPaged, Scales kScales, int kTileRows>
cudaError_t LaunchAttentionVariant(const AttentionParams& p, const AttentionTask& task, int grid,
                                   cudaStream_t stream);

// The same over a paged cache where p.IsGeneral(). Its work tiles have 16 packed rows or 64.
template <DType kElement, DType kValue, int kHeadDim, Scales kScales, int kTileRows>
cudaError_t LaunchGeneralVariant(const AttentionParams& p, const AttentionTask& task, int grid,
                                 cudaStream_t stream);

template <DType kElement, DType kValue, int kHeadDim, Scales kScales, int kTileRows>
cudaError_t LaunchInvariantVariant(const AttentionParams& p, const InvariantTask& task, int grid,
                                   cudaStream_t stream);

}  // namespace fastattn::cuda

// Launcher of merge_attn_states.
#pragma once

#include <cuda_runtime.h>

#include "params/merge.h"

namespace fastattn::cuda {

// Output and LSE may be written over either input's memory, as MergeParams says.
cudaError_t LaunchMergeAttnStates(const MergeParams& p, cudaStream_t stream);

// The variants of builder/instances.py, one an input dtype; defined in launch_variant.cuh.
template <DType kIn>
cudaError_t LaunchMergeVariant(const MergeParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

// Launcher of merge_many_attn_states.
#pragma once

#include <cuda_runtime.h>

#include "params/merge_many.h"

namespace fastattn::cuda {

cudaError_t LaunchMergeManyAttnStates(const MergeManyParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

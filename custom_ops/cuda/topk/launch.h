// Launcher of topk_indices. Enqueues one kernel.
#pragma once

#include <cuda_runtime.h>

#include "params/topk.h"

namespace fastattn::cuda {

cudaError_t LaunchTopk(const TopkParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

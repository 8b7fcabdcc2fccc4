// Launcher of the logits on any GPU (mma_kernel.cuh).
#pragma once

#include <cuda_runtime.h>

#include "params/mqa_logits.h"

namespace fastattn::cuda::mqa_logits {

cudaError_t LaunchMma(const LogitsParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda::mqa_logits

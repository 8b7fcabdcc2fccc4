// The logits on Hopper (wgmma_kernel.cuh): which calls it takes, and its launcher.
#pragma once

#include <cuda_runtime.h>

#include "params/mqa_logits.h"

namespace fastattn::cuda::mqa_logits {

bool WgmmaSupports(const LogitsParams& p);

cudaError_t LaunchWgmma(const LogitsParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda::mqa_logits

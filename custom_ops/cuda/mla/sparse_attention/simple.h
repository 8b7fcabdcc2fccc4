// Sparse latent attention on every GPU: any number of heads, any mix of formats.
#pragma once

#include <cuda_runtime.h>

#include "params/mla_attention.h"

namespace fastattn::cuda {

cudaError_t LaunchMlaSparseSimple(const MlaSparseParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

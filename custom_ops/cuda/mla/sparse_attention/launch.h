// Launcher of mla_sparse_attention.
#pragma once

#include <cuda_runtime.h>

#include "params/mla_attention.h"

namespace fastattn::cuda {

// Bytes that the launch needs, at a multiple of 256; 0 for none.
int64_t MlaSparseWorkspaceBytes(const MlaSparseParams& p);

cudaError_t LaunchMlaSparse(const MlaSparseParams& p, void* workspace, cudaStream_t stream);

}  // namespace fastattn::cuda

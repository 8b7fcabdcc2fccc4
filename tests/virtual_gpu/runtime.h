// What the files of the runtime share.
#pragma once

#include <cuda_runtime_api.h>

namespace virtual_gpu {

// Keeps a failure for cudaGetLastError of this thread, and returns it.
cudaError_t Fail(cudaError_t status);

// Multiprocessors of the virtual GPU: few, so that persistent grids stay small.
int Processors();

}  // namespace virtual_gpu

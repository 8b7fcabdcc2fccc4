// Launcher of convert_cache_layout.
#pragma once

#include <cuda_runtime.h>

#include "params/cache.h"

namespace fastattn::cuda {

cudaError_t LaunchConvertLayout(const ConvertLayoutParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

// Launchers of mla_write_cache and mla_gather_cache. Each enqueues one kernel.
#pragma once

#include <cuda_runtime.h>

#include "params/mla_cache.h"

namespace fastattn::cuda {

cudaError_t LaunchMlaWriteCache(const MlaWriteParams& p, cudaStream_t stream);
cudaError_t LaunchMlaGatherCache(const MlaGatherParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

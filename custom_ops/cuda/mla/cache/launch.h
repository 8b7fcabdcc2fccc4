// Launchers of mla_write_cache, mla_gather_cache and mla_qkv_norm_rope_write. Each enqueues one
// kernel.
#pragma once

#include <cuda_runtime.h>

#include "params/mla_cache.h"
#include "params/mla_qkv.h"

namespace fastattn::cuda {

cudaError_t LaunchMlaWriteCache(const MlaWriteParams& p, cudaStream_t stream);
cudaError_t LaunchMlaGatherCache(const MlaGatherParams& p, cudaStream_t stream);
cudaError_t LaunchMlaQkvNormRopeWrite(const MlaQkvParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

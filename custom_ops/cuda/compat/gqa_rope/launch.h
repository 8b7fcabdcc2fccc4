// Launchers of FastDeploy's gqa_rope_write_cache.
#pragma once

#include <cuda_runtime.h>

#include "params/gqa_rope.h"

namespace fastattn::cuda {

// Enqueues everything on `stream`; throws std::invalid_argument for what is not compiled.
cudaError_t LaunchGqaRopeWriteCache(const GqaRopeWriteCacheParams& p, cudaStream_t stream);

// The new tokens, for qkv of type kIn and every cache type.
template <DType kIn>
cudaError_t LaunchGqaTokens(const GqaRopeWriteCacheParams& p, cudaStream_t stream);

// The cached tokens of prefill sequences from a 16-bit cache.
cudaError_t LaunchGqaPrefix16(const AppendCacheParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

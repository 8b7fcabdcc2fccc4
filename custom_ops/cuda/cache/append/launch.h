// Launchers of append_cache_kv_c8: one per (types of codes, scales, layout), those of
// builder/instances.py; LaunchAppendCache picks one.
#pragma once

#include <cuda_runtime.h>

#include "params/cache.h"
#include "params/key_transform.h"

namespace fastattn::cuda {

// Enqueues the dequantisation on `stream`. Throws std::invalid_argument for a combination that is
// not compiled; the API layer has checked everything else.
cudaError_t LaunchAppendCache(const AppendCacheParams& p, cudaStream_t stream);

// Behind that, of K that was transformed when it was written: writes K as it was. Layout kFastattn,
// all codes but e5m2. Nothing is launched where there is no transform.
cudaError_t LaunchRestoreKey(const AppendCacheParams& p, const KeyTransform& transform,
                             cudaStream_t stream);

template <DType kCode, DType kValueCode, Scales kScales, CacheLayout kLayout>
cudaError_t LaunchAppendCacheVariant(const AppendCacheParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

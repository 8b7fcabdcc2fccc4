#include "cuda/cache/append/kernel.cuh"

namespace fastattn::cuda {

template cudaError_t LaunchAppendCacheVariant<DType::kInt8, false, CacheLayout::kFastDeploy>(
    const AppendCacheParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

#include "cuda/cache/append/kernel.cuh"

namespace fastattn::cuda {

template cudaError_t LaunchAppendCacheVariant<DType::kInt8, false, CacheLayout::kFastattn>(
    const AppendCacheParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

#include "cuda/cache/append/kernel.cuh"

namespace fastattn::cuda {

template cudaError_t LaunchAppendCacheVariant<DType::kE4M3, true, CacheLayout::kFastattn>(
    const AppendCacheParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

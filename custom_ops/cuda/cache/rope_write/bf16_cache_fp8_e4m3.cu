#include "cuda/cache/rope_write/kernel.cuh"

namespace fastattn::cuda {

template cudaError_t LaunchStepVariant<DType::kBFloat16, CacheType::kFp8, DType::kE4M3>(
    const StepParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

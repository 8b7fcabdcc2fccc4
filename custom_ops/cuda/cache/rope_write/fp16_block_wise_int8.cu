#include "cuda/cache/rope_write/kernel.cuh"

namespace fastattn::cuda {

template cudaError_t LaunchStepVariant<DType::kFloat16, CacheType::kBlockWiseInt8, DType::kInt8>(
    const StepParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

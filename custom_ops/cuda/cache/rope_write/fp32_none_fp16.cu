#include "cuda/cache/rope_write/kernel.cuh"

namespace fastattn::cuda {

template cudaError_t LaunchStepVariant<DType::kFloat32, CacheType::kNone, DType::kFloat16>(
    const StepParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

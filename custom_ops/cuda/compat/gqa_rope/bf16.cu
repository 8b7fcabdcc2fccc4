#include "cuda/compat/gqa_rope/kernel.cuh"

namespace fastattn::cuda {

template cudaError_t LaunchGqaTokens<DType::kBFloat16>(const GqaRopeWriteCacheParams& p,
                                                       cudaStream_t stream);

}  // namespace fastattn::cuda

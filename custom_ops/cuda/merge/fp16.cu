#include "cuda/merge/launch_variant.cuh"

namespace fastattn::cuda {

template cudaError_t LaunchMergeVariant<DType::kFloat16>(const MergeParams& p, cudaStream_t stream);

}  // namespace fastattn::cuda

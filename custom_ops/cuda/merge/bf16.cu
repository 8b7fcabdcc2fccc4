#include "cuda/merge/launch_variant.cuh"

namespace fastattn::cuda {

template cudaError_t LaunchMergeVariant<DType::kBFloat16>(const MergeParams& p,
                                                          cudaStream_t stream);

}  // namespace fastattn::cuda

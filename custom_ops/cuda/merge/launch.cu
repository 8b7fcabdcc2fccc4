#include "cuda/merge/launch.h"

#include "common/dispatch.h"

namespace fastattn::cuda {

// Defined in launch_variant.cuh, instantiated in one file a dtype.
template <DType kIn>
cudaError_t LaunchMergeVariant(const MergeParams& p, cudaStream_t stream);

cudaError_t LaunchMergeAttnStates(const MergeParams& p, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16>(p.dtype, "dtype", [&](auto dtype) {
    if (p.num_tokens > 0 && p.num_heads > 0) {
      status = LaunchMergeVariant<decltype(dtype)::value>(p, stream);
    }
  });
  return status;
}

}  // namespace fastattn::cuda

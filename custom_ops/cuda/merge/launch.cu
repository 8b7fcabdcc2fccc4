#include "cuda/merge/launch.h"

#include <tuple>

#include "cuda/merge/instances.h"

namespace fastattn::cuda {

cudaError_t LaunchMergeAttnStates(const MergeParams& p, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  dispatch(MergeInstances{}, std::tuple{Wanted{"dtype", p.dtype}}, [&](auto dtype) {
    if (p.num_tokens > 0 && p.num_heads > 0) {
      status = LaunchMergeVariant<decltype(dtype)::value>(p, stream);
    }
  });
  return status;
}

}  // namespace fastattn::cuda
